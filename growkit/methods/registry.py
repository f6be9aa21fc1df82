"""The registry: what a method is, how it is found, and what its builders are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Literal

import numpy as np

from growkit.operator import Expansion
from growkit_specs import GrowkitError, InvalidTarget, Layer, LayerGraph
from growkit_specs.layer_graph import SpaceKind, Stack


@dataclass(frozen=True)
class SpaceGrowth:
    """What a width builder is given: one space that grows, and what the model does with it.

    Attributes:
        graph: The source model.
        space: The space's name.
        source: Its size ``d``.
        target: Its new size ``D``.
        rng: The random numbers of this space.
        keep_epsilon: Whether epsilon must stay as it is, because norms that do not grow alike share its config key.
    """

    graph: LayerGraph
    space: str
    source: int
    target: int
    rng: np.random.Generator
    keep_epsilon: bool = False

    @property
    def kind(self) -> SpaceKind:
        """The space's kind."""
        return self.graph.kinds[self.space]

    @cached_property
    def norms(self) -> tuple[Layer, ...]:
        """The norm layers over this space."""
        return norms_over(self.graph, self.space)

    @property
    def is_post_norm(self) -> bool:
        """Whether a norm's output is itself the stream."""
        return any(norm.is_post_norm for norm in self.norms)

    @property
    def writes_stream(self) -> bool:
        """Whether a norm's output goes into the stream, as the stream itself or added to it."""
        return any(norm.writes_stream for norm in self.norms)

    @property
    def is_layer_norm(self) -> bool:
        """Whether a LayerNorm, which also takes out the mean, stands over this space."""
        return any(norm.attributes.get("norm") == "layer" for norm in self.norms)

    @property
    def ratio(self) -> float:
        """``D / d``."""
        return self.target / self.source

    @property
    def score_gain(self) -> float:
        """What wider heads must multiply a score by: the model divides it by the root of head_dim, or by nothing."""
        kinds = [layer for _, layer in self.graph.walk() if layer.kind == "attention"]
        return sqrt(self.ratio) if any(layer.attributes.get("scale") != "none" for layer in kinds) else 1.0


def norms_over(graph: LayerGraph, space: str) -> tuple[Layer, ...]:
    """The norm layers whose scale or shift lives in ``space``."""
    return tuple(
        layer
        for _, layer in graph.walk()
        if layer.kind == "norm" and any(space in p.parsed.spaces for p in layer.parameters)
    )


@dataclass(frozen=True)
class Depth:
    """How one stack deepens.

    Attributes:
        sources: For each target layer the source layer its weights come from.
        silent: For each target layer whether what it writes into the stream is zero, which makes a pre-norm block the
            identity.
    """

    sources: tuple[int, ...]
    silent: tuple[bool, ...] = field(default=())

    def blend(self, depth: int) -> np.ndarray:
        """``w``, ``(L2, L1)``, of the slots that do not write into the stream."""
        return np.eye(depth)[list(self.sources)]

    def writers_blend(self, depth: int) -> np.ndarray:
        """``w``, ``(L2, L1)``, of the slots that write into the stream: the rows of silent layers are zero."""
        silent = np.asarray(self.silent or (False,) * len(self.sources))
        awake: np.ndarray = self.blend(depth) * ~silent[:, None]
        return awake


WidthBuilder = Callable[[SpaceGrowth], Mapping[str, Expansion]]
DepthBuilder = Callable[[Stack, int], Depth]


@dataclass(frozen=True)
class Method:
    """A growth method.

    Attributes:
        name: Its name on the command line.
        summary: One line.
        exact_when: When the grown model computes the same function.
        paper: Where it was published, with a link; None where it was not.
        width: Builds the expansions of a space that grows; None where the method does not widen.
        depth: Builds the layer map of a stack; None where the method does not deepen.
        fresh: The default scale of fresh entries.
        reference: What that scale is relative to; ``init`` draws every entry anew.
    """

    name: str
    summary: str
    exact_when: str
    paper: str | None
    width: WidthBuilder | None = None
    depth: DepthBuilder | None = None
    fresh: float = 1.0
    reference: Literal["trained", "init"] = "trained"

    @property
    def grows(self) -> tuple[str, ...]:
        """``width``, ``depth`` or both."""
        return tuple(name for name, built in (("width", self.width), ("depth", self.depth)) if built is not None)


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry.

    Raises:
        GrowkitError: Where the name is taken.
    """
    if method.name in _METHODS:
        raise GrowkitError(f"a method called '{method.name}' is already registered")
    _METHODS[method.name] = method
    return method


def methods() -> tuple[Method, ...]:
    """Every registered method, by name."""
    return tuple(_METHODS[name] for name in sorted(_METHODS))


def method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        InvalidTarget: Naming the methods there are.
    """
    if name not in _METHODS:
        raise InvalidTarget(f"unknown method '{name}'; methods are {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


def chosen(text: str, *, widens: bool, deepens: bool) -> tuple[Method, Method]:
    """The width and the depth method of a request: ``lossless``, or ``width=net2net,depth=stack``.

    Args:
        text: The request.
        widens: Whether the target is wider than the source.
        deepens: Whether it is deeper.

    Raises:
        InvalidTarget: For an unknown method, or one that does not grow what is asked; alternatives are named.
    """
    named = dict.fromkeys(("width", "depth"), text)
    if "=" in text:
        parts = [part.strip().partition("=") for part in text.split(",")]
        named = dict.fromkeys(("width", "depth"), "lossless") | {way: name for way, _, name in parts}
        if set(named) != {"width", "depth"} or any(not name for name in named.values()):
            raise InvalidTarget(f"the method '{text}' does not parse; expected NAME or width=NAME,depth=NAME")
    for way, needed in (("width", widens), ("depth", deepens)):
        if needed and way not in method(named[way]).grows:
            others = sorted((m.name for m in methods() if way in m.grows), key="lossless".__ne__)
            other = "depth" if way == "width" else "width"
            raise InvalidTarget(
                f"the method '{named[way]}' does not grow {way}; for {way}: {', '.join(others)}; combine them: "
                f"--method {way}={others[0]},{other}={named[other]}"
            )
    wide, deep = method(named["width"]), method(named["depth"])
    if wide.reference != deep.reference:
        raise InvalidTarget(f"'random' draws the whole model anew and combines with no other method; got '{text}'")
    return wide, deep
