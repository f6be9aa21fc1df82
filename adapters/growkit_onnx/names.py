"""The names of inferred spaces, and axes in terms of them."""

from __future__ import annotations

from collections.abc import Iterator

from growkit_onnx.infer import Scene
from growkit_specs.layer_graph import SpaceKind
from growkit_specs.layout import Axis, Concatenation, Fixed, Leaf, concatenation, product
from growkit_specs.unification import ONE

Factors = tuple[Axis, ...]


class Names:
    """The named spaces of a graph, and every axis in terms of them."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.kinds: dict[str, SpaceKind] = {}
        self.sizes: dict[str, int] = {}
        self._named: dict[Factors, str] = {}
        self._longest = 1

    def name(self, axis: Axis, name: str, kind: SpaceKind, otherwise: str | None = None) -> str | None:
        """Call an axis ``name``; a space of another size has that name already, or is called ``otherwise``.

        Returns:
            What it is called; None where it is no space (size 1, or dynamic).
        """
        factors = self.scene.unifier.factors(axis)
        sizes = self.scene.sizes(axis)
        if axis == ONE or factors == (ONE,) or len(set(sizes)) > 1:
            return None
        if factors in self._named:
            return self._named[factors]
        candidates = [name, *([otherwise] if otherwise else []), *(f"{otherwise or name}_{i}" for i in range(2, 1000))]
        chosen = next(each for each in candidates if self.sizes.get(each, sizes[0]) == sizes[0])
        self._named[factors] = chosen
        self._longest = max(self._longest, len(factors))
        self.kinds.setdefault(chosen, kind)
        self.sizes[chosen] = sizes[0]
        return chosen

    def axis(self, axis: Axis) -> Axis:
        """An axis in named spaces; what has no name is a fixed size, what is dynamic stays an unknown leaf."""
        factors = self.scene.unifier.factors(axis)
        found: list[Axis] = []
        at = 0
        while at < len(factors):
            for length in range(min(self._longest, len(factors) - at), 0, -1):
                name = self._named.get(factors[at : at + length])
                if name is not None:
                    found.append(Leaf(name))
                    at += length
                    break
            else:
                found.append(self._unnamed(factors[at]))
                at += 1
        return product(*found)

    def _unnamed(self, factor: Axis) -> Axis:
        if isinstance(factor, Concatenation):
            segments = [self.axis(segment) for segment in factor.segments]
            segments = [Fixed(1) if segment == ONE else segment for segment in segments]
            if all(isinstance(segment, Fixed) for segment in segments):
                return Fixed(sum(segment.size for segment in segments if isinstance(segment, Fixed)))
            if all(segment == segments[0] for segment in segments):
                return product(Fixed(len(segments)), segments[0])
            return concatenation(*segments)
        if isinstance(factor, Leaf) and not self.scene.is_dynamic(factor):
            return Fixed(self.scene.sizes(factor)[0])
        return factor

    def is_named(self, axis: Axis) -> bool:
        """Whether the whole axis has a name."""
        return self.scene.unifier.factors(axis) in self._named

    def is_scores(self, axis: Axis) -> bool:
        """Whether queries and keys are contracted over an axis."""
        return self._named.get(self.scene.unifier.factors(axis)) == "head_dim"

    def leaves(self, name: str) -> Iterator[Factors]:
        """The factors that are called ``name``."""
        return (factors for factors, each in self._named.items() if each == name)

    def is_divided(self, name: str) -> bool:
        """Whether the entries of a space are taken apart somewhere, like those that rotary positions turn in pairs."""
        return any(len(factors) > 1 or not isinstance(factors[0], Leaf) for factors in self.leaves(name))

    def frozen(self, name: str) -> str | None:
        """Why the space cannot grow; None where it can."""
        reasons = (self.scene.unifier.frozen(product(*factors)) for factors in self.leaves(name))
        return next((reason for reason in reasons if reason), None)
