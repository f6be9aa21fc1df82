"""The registry: what a method is, how it is found, and what its builders are given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil
from typing import Any, Literal

import numpy as np

from growkit.matrices import pad
from growkit.model import Model
from growkit.operator import Expansion, GrowthOperator
from growkit_specs import GrowkitError, InvalidTarget, Layer, LayerGraph
from growkit_specs.layer_graph import SpaceKind


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
        sizes: The new sizes of all spaces.
    """

    graph: LayerGraph
    space: str
    source: int
    target: int
    rng: np.random.Generator
    keep_epsilon: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> SpaceKind:
        """The space's kind."""
        return self.graph.kinds[self.space]

    @cached_property
    def norms(self) -> tuple[Layer, ...]:
        """The norm layers over this space."""
        return self.graph.norms_over(self.space)

    @property
    def is_normed(self) -> bool:
        """Whether norms, or the stream, constrain the maps of this space."""
        return self.kind == "residual" or bool(self.norms)

    @property
    def is_written_on(self) -> bool:
        """Whether a norm's output is itself what later layers add to, so that a reader sees what the norm gave."""
        return self.kind != "residual" or any(norm.is_post_norm for norm in self.norms)

    @property
    def is_read_raw(self) -> bool:
        """Whether something reads this space itself, and not through a norm."""
        return any(
            self.space in parameter.parsed.read_spaces() and layer.through is None
            for _, layer in self.graph.walk()
            for parameter in layer.parameters
        )

    @property
    def writes_stream(self) -> bool:
        """Whether a norm's output goes into the stream, as the stream itself or added to it."""
        return any(norm.writes_stream for norm in self.norms)

    @property
    def is_activated(self) -> bool:
        """Whether something is written into this space through an activation."""
        return self.graph.is_activated(self.space)

    @property
    def is_layer_norm(self) -> bool:
        """Whether a LayerNorm, which also takes out the mean, stands over this space."""
        return any(norm.attributes.get("norm") == "layer" for norm in self.norms)

    @property
    def ratio(self) -> float:
        """``D / d``."""
        return self.target / self.source

    @property
    def is_whole(self) -> bool:
        """Whether ``D`` is a multiple of ``d``."""
        return self.target % self.source == 0

    @property
    def score_gain(self) -> float:
        """What wider heads must multiply a score by: the model multiplies it by a power of head_dim, or by nothing.

        Where layers differ, those that divide most are made up for, and the verdict tells that others change.
        """
        powers = [layer.score_power for _, layer in self.graph.walk() if layer.kind == "attention"]
        return float(self.ratio ** -min(powers, default=0.0))


def unused(growth: SpaceGrowth) -> Expansion:
    """New tokens and positions, which nothing uses yet, whatever the method."""
    matrix = pad(growth.target, growth.source)
    return Expansion(matrix, matrix, matrix, fresh="both")


@dataclass(frozen=True)
class Depth:
    """How one stack deepens.

    Attributes:
        sources: For each target layer the source layer its weights come from.
        writes: For each target layer a factor on what it writes into the stream: 1 where it is empty, and 0 makes a
            pre-norm block the identity.
        scores: For each target layer a factor on its attention scores; 1 where it is empty.
        new: The target layers into which nothing of the source goes; ``refine`` says what they hold.
    """

    sources: tuple[int, ...]
    writes: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    new: frozenset[int] = frozenset()

    @property
    def repeats(self) -> tuple[int, ...]:
        """The target layers whose source has been used below already: what deepening adds."""
        return tuple(t for t, j in enumerate(self.sources) if j in self.sources[:t])

    def attenuated(self, writes: float | None, scores: float | None) -> Depth:
        """The same with factors on the repeated layers; None leaves them as they are."""

        def on_repeats(factor: float | None, now: tuple[float, ...]) -> tuple[float, ...]:
            if factor is None:
                return now
            return tuple(factor if t in self.repeats else 1.0 for t in range(len(self.sources)))

        return replace(self, writes=on_repeats(writes, self.writes), scores=on_repeats(scores, self.scores))

    def blend(self, depth: int) -> np.ndarray:
        """``w``, ``(L2, L1)``, of the slots that do not write into the stream."""
        kept = ~np.isin(np.arange(len(self.sources)), list(self.new))
        w: np.ndarray = np.eye(depth)[list(self.sources)] * kept[:, None]
        return w

    def writers_blend(self, depth: int) -> np.ndarray:
        """``w``, ``(L2, L1)``, of the slots that write into the stream."""
        writes = np.asarray(self.writes or np.ones(len(self.sources)))
        w: np.ndarray = self.blend(depth) * writes[:, None]
        return w


@dataclass(frozen=True)
class Refinement:
    """What ``refine`` is given, once sizes, widths and layer maps are settled.

    Attributes:
        model: The source.
        operator: The operator so far.
        target: The graph of what it makes.
        depths: How each stack that deepens does.
    """

    model: Model
    operator: GrowthOperator
    target: LayerGraph
    depths: Mapping[str, Depth]


WidthBuilder = Callable[..., Mapping[str, Expansion]]
DepthBuilder = Callable[..., Depth]


@dataclass(frozen=True)
class Method:
    """A growth method.

    Attributes:
        name: Its name on the command line.
        summary: One line.
        exact_when: When the grown model computes the same function.
        paper: Where it was published, with a link; None where it was not.
        use: What it is for: ``keep`` the function, or ``train`` on from a good start.
        width: Builds the expansions of a space that grows, ``(growth, **options)``; None where it does not widen.
        depth: Builds the layer map of a stack, ``(stack, depth, **options)``; None where it does not deepen.
        refine: Adds to the finished operator what depends on the whole of it, or on the weights.
        ratios: The width ratios it can do: ``any``, ``whole`` multiples, or ``double``.
        copies: What becomes of copied units in training: ``none`` are made, they ``part``, or they ``stay`` equal for
            as long as nothing outside the weights tells them apart (E12).
        next_layer: Whether new units come from the layer above the one the old units come from.
        fresh: The default scale of fresh entries.
        reference: What that scale is relative to.
        anew: Whether every entry is fresh.
        options: What can be set behind the name, ``stack:part=back``, and the defaults.
        training: What the paper says of training on: rules, one each line.
        trains_new: Whether only the layers that were added are trained at first.
        tied: Whether what reads is what writes where the operator is learned, ``A = B``, norms included.
    """

    name: str
    summary: str
    exact_when: str
    paper: str | None
    use: Literal["keep", "train"]
    width: WidthBuilder | None = None
    depth: DepthBuilder | None = None
    refine: Callable[[Refinement], GrowthOperator] | None = None
    ratios: Literal["any", "whole", "double"] = "any"
    copies: Literal["none", "part", "stay"] = "none"
    next_layer: bool = False
    fresh: float = 1.0
    reference: Literal["trained", "init"] = "trained"
    anew: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    training: tuple[str, ...] = ()
    trains_new: bool = False
    tied: bool = False

    @property
    def grows(self) -> tuple[str, ...]:
        """``width``, ``depth`` or both."""
        return tuple(name for name, built in (("width", self.width), ("depth", self.depth)) if built is not None)

    def widened(self, growth: SpaceGrowth) -> Mapping[str, Expansion]:
        """The expansions of a space.

        Raises:
            InvalidTarget: Where the method cannot do the ratio; the nearest sizes and other methods are named.
        """
        assert self.width is not None
        if growth.kind == "fixed" and not self.anew:
            return {growth.space: unused(growth)}
        wanted = {"any": growth.ratio, "whole": max(ceil(growth.ratio), 1), "double": 2}[self.ratios]
        if growth.ratio not in (1, wanted):
            d, near = growth.source, int(growth.ratio)
            sizes = (2 * d,) if self.ratios == "double" else (near * d, (near + 1) * d)
            others = ", ".join(m.name for m in methods() if m.width is not None and m.ratios == "any" and not m.anew)
            raise InvalidTarget(
                f"the method '{self.name}' makes {'twice' if self.ratios == 'double' else 'whole multiples of'} a "
                f"size; got {growth.space} {d} to {growth.target}; nearest: {' or '.join(map(str, sizes))}; methods "
                f"for any ratio: {others}"
            )
        return self.width(growth)

    def with_options(self, text: str) -> Method:
        """The method with the options of ``part=back:...`` in place of its defaults.

        Raises:
            InvalidTarget: For an option it does not have, or a value of another type.
        """
        told: dict[str, Any] = {}
        for item in filter(None, text.split(":")):
            name, _, value = item.partition("=")
            if name not in self.options:
                known = ", ".join(f"{k}={v}" for k, v in self.options.items()) or "none"
                raise InvalidTarget(f"the method '{self.name}' has no option '{name}'; its options: {known}")
            kind = type(self.options[name])
            try:
                told[name] = kind(value)
            except ValueError:
                raise InvalidTarget(
                    f"the option {name} of '{self.name}' is {value!r}; expected {kind.__name__}, as "
                    f"{self.options[name]}"
                ) from None
        options = {**self.options, **told}
        if not options:
            return self
        return replace(
            self,
            options=options,
            width=self.width and partial(self.width, **options),
            depth=self.depth and partial(self.depth, **options),
        )


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


def method(text: str) -> Method:
    """The method of ``NAME``, or of ``NAME:option=value``.

    Raises:
        InvalidTarget: Naming the methods, or the options, there are.
    """
    name, _, options = text.partition(":")
    if name not in _METHODS:
        raise InvalidTarget(f"unknown method '{name}'; methods are {', '.join(sorted(_METHODS))}")
    return _METHODS[name].with_options(options)


def is_tied(text: str) -> bool:
    """Whether a request's method is learned with reads that are writes, ``A = B``."""
    return chosen(text, widens=False, deepens=False)[0].tied


def refusal(name: str, why: str) -> InvalidTarget:
    """The error of a depth method that cannot do what is asked: why, and the methods that can do any depth."""
    return InvalidTarget(f"the method '{name}' {why}; depth methods for any depth: interpolate, lossless, stack")


def chosen(text: str, *, widens: bool, deepens: bool) -> tuple[Method, Method]:
    """The width and the depth method of a request: ``lossless``, or ``width=net2net,depth=stack:part=back``.

    Args:
        text: The request.
        widens: Whether the target is wider than the source.
        deepens: Whether it is deeper, by a map that the method makes.

    Raises:
        InvalidTarget: For an unknown method, or one that does not grow what is asked; alternatives are named.
    """
    named = dict.fromkeys(("width", "depth"), text)
    if re.match(r"\s*(width|depth)\s*=", text) or "," in text:
        parts = [part.strip().partition("=") for part in text.split(",")]
        named = dict.fromkeys(("width", "depth"), "lossless") | {way: name for way, _, name in parts}
        if set(named) != {"width", "depth"} or any(not name for name in named.values()):
            raise InvalidTarget(f"the method '{text}' does not parse; expected NAME or width=NAME,depth=NAME")
    wide, deep = method(named["width"]), method(named["depth"])
    for way, needed, asked in (("width", widens, wide), ("depth", deepens, deep)):
        if needed and way not in asked.grows:
            others = sorted((m.name for m in methods() if way in m.grows), key="lossless".__ne__)
            other = "depth" if way == "width" else "width"
            raise InvalidTarget(
                f"the method '{asked.name}' does not grow {way}; for {way}: {', '.join(others)}; combine them: "
                f"--method {way}={others[0]},{other}={named[other]}"
            )
    if wide.anew != deep.anew:
        raise InvalidTarget(f"'random' draws the whole model anew and combines with no other method; got '{text}'")
    return wide, deep
