"""Axes with unknown spaces, made equal step by step: how the axis notation is inferred instead of written down.

The algebra is that of :mod:`growkit_specs.layout`: an axis is a product or a concatenation of spaces. An unknown space
is a :class:`Leaf` with a made-up name. Where two axes turn out to be one, their spaces become one, and where a product
meets a coarser one the coarser space is refined: 24 against 4 x 6 makes the 24 a product. It is position in storage
that decides, never a coincidence of sizes, so a reshape that says nothing about its meaning still says which factor is
which.

An axis may be seen at several sizes at once, those of several trial runs; what differs between them is dynamic (batch,
sequence) and what is refined must divide in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from growkit_specs.errors import LayoutError
from growkit_specs.layout import Axis, Concatenation, Fixed, Leaf, Product, concatenation, product, spaces_of

Sizes = tuple[int, ...]
"""The sizes of one axis in each trial run."""

ONE = Product(())
"""The axis of size 1: a product of nothing."""


class Conflict(LayoutError):
    """Two axes that would have to be one cannot be."""


class Unifier:
    """Unknown spaces, and what is known about them so far.

    Args:
        runs: The number of trial runs; every size is given once for each.

    Example:
        >>> unifier = Unifier(runs=1)
        >>> hidden, heads, head_dim = unifier.fresh((24,)), unifier.fresh((4,)), unifier.fresh((6,))
        >>> unifier.unify(hidden, product(heads, head_dim))
        >>> unifier.resolve(hidden) == unifier.resolve(product(heads, head_dim))
        True
    """

    def __init__(self, runs: int = 1) -> None:
        self.runs = runs
        self._bound: dict[str, Axis] = {}
        self._sizes: dict[str, Sizes] = {}
        self._frozen: dict[str, str] = {}

    # --- making and looking up ---------------------------------------------------------------------------------------

    def fresh(self, sizes: Sizes) -> Axis:
        """An axis of which nothing is known but its sizes."""
        if all(size == 1 for size in sizes):
            return ONE
        name = f"_{len(self._sizes)}"
        self._sizes[name] = tuple(sizes)
        return Leaf(name)

    def sizes(self, axis: Axis) -> Sizes:
        """The sizes of ``axis`` in each trial run."""
        match axis:
            case Leaf(space):
                return self._sizes[space]
            case Fixed(size):
                return (size,) * self.runs
            case Product(parts):
                return tuple(prod(each) for each in zip(*map(self.sizes, parts), strict=True)) or (1,) * self.runs
            case Concatenation(parts):
                return tuple(sum(each) for each in zip(*map(self.sizes, parts), strict=True))

    def spaces(self) -> dict[str, Sizes]:
        """The sizes of every unknown space, refined ones included."""
        return dict(self._sizes)

    def resolve(self, axis: Axis) -> Axis:
        """``axis`` in terms of the spaces that are not refined any further."""
        match axis:
            case Leaf(space) if space in self._bound:
                resolved = self.resolve(self._bound[space])
                self._bound[space] = resolved
                return resolved
            case Product(parts):
                return product(*map(self.resolve, parts))
            case Concatenation(parts):
                return concatenation(*map(self.resolve, parts))
            case _:
                return axis

    def factors(self, axis: Axis) -> tuple[Axis, ...]:
        """The factors of ``axis``, resolved: leaves and concatenations."""
        resolved = self.resolve(axis)
        return resolved.factors if isinstance(resolved, Product) else (resolved,)

    def leaves(self, axis: Axis) -> Iterator[str]:
        """The spaces in ``axis``, resolved, repeated where they repeat."""
        return spaces_of(self.resolve(axis))

    def is_dynamic(self, axis: Axis) -> bool:
        """Whether the axis has another size in another trial run."""
        return len(set(self.sizes(axis))) > 1

    # --- what must not grow ------------------------------------------------------------------------------------------

    def freeze(self, axis: Axis, reason: str) -> None:
        """Say that the spaces of ``axis`` must keep their sizes; the first reason counts."""
        for space in self.leaves(axis):
            self._frozen.setdefault(space, reason)

    def frozen(self, axis: Axis) -> str | None:
        """Why the axis must keep its size; None where nothing says so."""
        return next((self._frozen[space] for space in self.leaves(axis) if space in self._frozen), None)

    def reasons(self) -> tuple[str, ...]:
        """Every reason for which a space is frozen, each once."""
        return tuple(dict.fromkeys(self._frozen.values()))

    # --- making equal ------------------------------------------------------------------------------------------------

    def unify(self, a: Axis, b: Axis) -> None:
        """Make two axes one.

        Raises:
            Conflict: Where they have different sizes, or cannot be refined to the same factors.
        """
        if self.sizes(a) != self.sizes(b):
            raise Conflict(f"an axis of {self._text(a)} cannot be one of {self._text(b)}")
        left, right = list(self.factors(a)), list(self.factors(b))
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x == y:
                continue
            larger = self._larger(x, y)
            if larger is None:
                self._unify_atoms(x, y)
            else:  # what was bound meanwhile may have more factors now
                pending, atom, size = (left, x, self.sizes(y)) if larger == x else (right, y, self.sizes(x))
                head, tail = self.split_product(atom, size)
                self.unify(head, y if larger == x else x)
                pending[:0] = self.factors(tail)
            left, right = ([f for axis in side for f in self.factors(axis)] for side in (left, right))
        for rest in left + right:
            if rest != ONE:
                raise Conflict(f"an axis of {self._text(a)} cannot be one of {self._text(b)}")

    def _larger(self, x: Axis, y: Axis) -> Axis | None:
        """Which of two atoms is the larger; None where their sizes are equal."""
        sx, sy = self.sizes(x), self.sizes(y)
        if sx == sy:
            return None
        for one, size, other in ((x, sx, sy), (y, sy, sx)):
            if all(a % b == 0 for a, b in zip(size, other, strict=True)):
                return one
        raise Conflict(f"{self._text(x)} is no multiple of {self._text(y)}")

    def split_product(self, axis: Axis, sizes: Sizes) -> tuple[Axis, Axis]:
        """``axis`` as a product of a factor of ``sizes`` and what stays.

        Raises:
            Conflict: Where it is no such product.
        """
        head: list[Axis] = []
        rest = list(self.factors(axis))
        while (done := self.sizes(product(*head))) != sizes:
            if not rest:
                raise Conflict(f"an axis of {self._text(axis)} has no leading factor of {sizes[0]}")
            wanted = tuple(s // d for s, d in zip(sizes, done, strict=True))
            atom = rest.pop(0)
            size = self.sizes(atom)
            if all(w % s == 0 for w, s in zip(wanted, size, strict=True)):
                head.append(atom)
            elif all(s % w == 0 for w, s in zip(wanted, size, strict=True)):
                rest[:0] = self._refine(atom, wanted)
            else:
                raise Conflict(f"an axis of {self._text(axis)} has no leading factor of {sizes[0]}")
        return product(*head), product(*rest)

    def _refine(self, atom: Axis, sizes: Sizes) -> tuple[Axis, Axis]:
        """An atom as a product of two: the first of ``sizes``."""
        rest = tuple(s // w for s, w in zip(self.sizes(atom), sizes, strict=True))
        if isinstance(atom, Leaf):
            head, tail = self.fresh(sizes), self.fresh(rest)
            self._bind(atom, product(head, tail))
            return head, tail
        if isinstance(atom, Concatenation):
            return self._refine_concatenation(atom, sizes, rest)
        return Fixed(sizes[0]), Fixed(rest[0])

    def _refine_concatenation(self, atom: Concatenation, sizes: Sizes, rest: Sizes) -> tuple[Axis, Axis]:
        """A concatenation whose every segment has the factor ``rest`` behind: ``(a c + b c)`` is ``(a + b) c``."""
        heads: list[Axis] = []
        tail: Axis | None = None
        for segment in atom.segments:
            if any(s % r for s, r in zip(self.sizes(segment), rest, strict=True)):
                raise Conflict(f"the parts of {self._text(atom)} are no multiples of {rest[0]}")
            lead = tuple(s // r for s, r in zip(self.sizes(segment), rest, strict=True))
            head, own = self.split_product(segment, lead)
            if tail is not None:
                self.unify(tail, own)
            tail = own
            heads.append(head)
        assert tail is not None
        return concatenation(*heads), self.resolve(tail)

    def _unify_atoms(self, x: Axis, y: Axis) -> None:
        """Make two atoms of equal sizes one."""
        if isinstance(x, Leaf):
            self._bind(x, y)
        elif isinstance(y, Leaf):
            self._bind(y, x)
        elif isinstance(x, Concatenation) and isinstance(y, Concatenation):
            self._unify_segments(x, y)
        else:
            fixed, other = (x, y) if isinstance(x, Fixed) else (y, x)
            self.freeze(other, f"a fixed size of {fixed}")

    def _unify_segments(self, x: Concatenation, y: Concatenation) -> None:
        left, right = list(x.segments), list(y.segments)
        while left and right:
            a, b = left.pop(0), right.pop(0)
            size = tuple(map(min, self.sizes(a), self.sizes(b)))
            if size not in (self.sizes(a), self.sizes(b)):
                raise Conflict(f"the parts of {self._text(x)} and of {self._text(y)} lie across each other")
            (a, rest_a), (b, rest_b) = self.split_sum(a, size), self.split_sum(b, size)
            self.unify(a, b)
            left[:0] = [rest_a] if rest_a else []
            right[:0] = [rest_b] if rest_b else []

    def split_sum(self, axis: Axis, sizes: Sizes) -> tuple[Axis, Axis | None]:
        """``axis`` as a concatenation of a part of ``sizes`` and what stays; None where nothing does.

        Raises:
            Conflict: Where the cut goes through a product.
        """
        total = self.sizes(axis)
        if sizes == total:
            return axis, None
        if not all(0 < s < t for s, t in zip(sizes, total, strict=True)):
            raise Conflict(f"{sizes[0]} entries cannot be cut from an axis of {self._text(axis)}")
        factors = self.factors(axis)
        if len(factors) > 1:
            return self._split_leading(axis, sizes, factors)
        (atom,) = factors
        if isinstance(atom, Leaf):
            left = self.fresh(sizes)
            right = self.fresh(tuple(t - s for t, s in zip(total, sizes, strict=True)))
            self._bind(atom, concatenation(left, right))
            return left, right
        if isinstance(atom, Fixed):
            return Fixed(sizes[0]), Fixed(total[0] - sizes[0])
        assert isinstance(atom, Concatenation)
        return self._split_segments(atom, sizes)

    def _split_leading(self, axis: Axis, sizes: Sizes, factors: Sequence[Axis]) -> tuple[Axis, Axis | None]:
        """A cut of a product is a cut of its leading factors, as long as it falls between whole runs of the others."""
        for lead in range(1, len(factors)):
            behind = self.sizes(product(*factors[lead:]))
            if all(s % b == 0 for s, b in zip(sizes, behind, strict=True)):
                part = tuple(s // b for s, b in zip(sizes, behind, strict=True))
                left, right = self.split_sum(product(*factors[:lead]), part)
                tail = factors[lead:]
                return product(left, *tail), product(right, *tail) if right is not None else None
        raise Conflict(f"a cut at {sizes[0]} goes through the product of an axis of {self._text(axis)}")

    def _split_segments(self, atom: Concatenation, sizes: Sizes) -> tuple[Axis, Axis | None]:
        before: list[Axis] = []
        segments = list(atom.segments)
        left = sizes
        while segments:
            size = self.sizes(segments[0])
            if any(s > n for s, n in zip(size, left, strict=True)):
                break
            before.append(segments.pop(0))
            left = tuple(n - s for s, n in zip(size, left, strict=True))
        if any(left):
            part, rest = self.split_sum(segments.pop(0), left)
            before.append(part)
            segments[:0] = [rest] if rest is not None else []
        return concatenation(*before), concatenation(*segments)

    def _bind(self, leaf: Leaf, axis: Axis) -> None:
        if leaf.space in spaces_of(axis):
            raise Conflict(f"an axis of {self._text(leaf)} would contain itself")
        self._bound[leaf.space] = axis
        if leaf.space in self._frozen:
            self.freeze(axis, self._frozen[leaf.space])

    def _text(self, axis: Axis) -> str:
        sizes = self.sizes(axis)
        return str(sizes[0]) if len(set(sizes)) == 1 else " or ".join(map(str, sizes))
