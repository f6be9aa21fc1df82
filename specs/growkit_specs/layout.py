"""The axis notation: one line says how a parameter is stored and which way it maps.

    (heads head_dim) <- hidden          an nn.Linear, stored out x in
    hidden -> (3 heads head_dim)        a GPT-2 Conv1D, stored in x out, fused q, k and v
    vocab -> hidden                     a token table
    -> ffn                              a bias: it writes and reads nothing
    * hidden                            a norm's scale;  ``+ hidden`` its shift

Textual order is storage order and the arrow is the direction of the map. Parentheses are a product of spaces,
row-major; ``+`` inside parentheses is a concatenation; a number is a fixed size.

Grammar::

    layout  = axes "<-" axes | axes "->" axes | "->" axes | "*" axis | "+" axis
    axes    = axis { axis }
    axis    = NAME | NUMBER | "(" product { "+" product } ")"
    product = axis { axis }
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Literal

from growkit_specs.errors import LayoutError

Role = Literal["write", "read", "scale", "shift"]


@dataclass(frozen=True)
class Leaf:
    """A named space."""

    space: str

    def __str__(self) -> str:
        return self.space


@dataclass(frozen=True)
class Fixed:
    """A size that never grows: a kernel dimension, the 3 of fused q, k and v."""

    size: int

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Product:
    """A row-major product of axes."""

    factors: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"({_product_text(self)})"


@dataclass(frozen=True)
class Concatenation:
    """Axes laid one after the other."""

    segments: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"({' + '.join(str(segment) for segment in self.segments)})"


Axis = Leaf | Fixed | Product | Concatenation


def _product_text(axis: Axis) -> str:
    return " ".join(map(str, axis.factors)) if isinstance(axis, Product) else str(axis)


def product(*factors: Axis) -> Axis:
    """The product of ``factors``, flattened; a product of one is that one."""
    flat = tuple(f for factor in factors for f in (factor.factors if isinstance(factor, Product) else (factor,)))
    return flat[0] if len(flat) == 1 else Product(flat)


def concatenation(*segments: Axis) -> Axis:
    """The concatenation of ``segments``, flattened; a concatenation of one is that one."""
    flat = tuple(
        s for segment in segments for s in (segment.segments if isinstance(segment, Concatenation) else (segment,))
    )
    return flat[0] if len(flat) == 1 else Concatenation(flat)


def spaces_of(axis: Axis) -> Iterator[str]:
    """The names of the spaces in ``axis``, in textual order, repeated where they repeat."""
    match axis:
        case Leaf(space):
            yield space
        case Fixed():
            return
        case Product(parts) | Concatenation(parts):
            for part in parts:
                yield from spaces_of(part)


def axis_size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The number of entries along ``axis`` where every space has the size that ``sizes`` gives it."""
    match axis:
        case Leaf(space):
            if space not in sizes:
                raise LayoutError(f"unknown space '{space}'; known: {', '.join(sorted(sizes))}")
            return sizes[space]
        case Fixed(size):
            return size
        case Product(factors):
            return prod(axis_size(factor, sizes) for factor in factors)
        case Concatenation(segments):
            return sum(axis_size(segment, sizes) for segment in segments)


@dataclass(frozen=True)
class Layout:
    """A parsed line of the axis notation.

    Attributes:
        left: The axes before the arrow, in storage order (empty for a bias, a scale and a shift).
        sign: ``<-``, ``->``, ``*`` or ``+``.
        right: The axes after the sign.
    """

    left: tuple[Axis, ...]
    sign: Literal["<-", "->", "*", "+"]
    right: tuple[Axis, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes in storage order."""
        return self.left + self.right

    @property
    def writes(self) -> tuple[Axis, ...]:
        """The axes of the space that is written."""
        return {"<-": self.left, "->": self.right}.get(self.sign, ())

    @property
    def reads(self) -> tuple[Axis, ...]:
        """The axes of the space that is read."""
        return {"<-": self.right, "->": self.left}.get(self.sign, ())

    @property
    def roles(self) -> tuple[Role, ...]:
        """What each axis does, in storage order."""
        left, right = _ROLES[self.sign]
        return (left,) * len(self.left) + (right,) * len(self.right)

    @property
    def spaces(self) -> tuple[str, ...]:
        """The names of all spaces, in textual order, each once."""
        return tuple(dict.fromkeys(space for axis in self.axes for space in spaces_of(axis)))

    def written_spaces(self) -> frozenset[str]:
        """The names of the spaces this parameter writes into."""
        return frozenset(space for axis in self.writes for space in spaces_of(axis))

    def read_spaces(self) -> frozenset[str]:
        """The names of the spaces this parameter reads from."""
        return frozenset(space for axis in self.reads for space in spaces_of(axis))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape where every space has the size that ``sizes`` gives it."""
        return tuple(axis_size(axis, sizes) for axis in self.axes)

    def __str__(self) -> str:
        return " ".join([*map(str, self.left), self.sign, *map(str, self.right)])


_ROLES: dict[str, tuple[Role, Role]] = {
    "<-": ("write", "read"),
    "->": ("read", "write"),
    "*": ("scale", "scale"),
    "+": ("shift", "shift"),
}
_DEEPEST = 50
_LONGEST_NUMBER = 18
_TOKEN = re.compile(
    r"\s*(?:(?P<sign><-|->|\*|\+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>[0-9]+)|(?P<bracket>[()]))"
)


@lru_cache(maxsize=4096)
def parse_layout(text: str) -> Layout:
    """Parse a line of the axis notation.

    Args:
        text: The line.

    Returns:
        The layout; ``str(parse_layout(text))`` is the line in canonical spacing.

    Raises:
        LayoutError: Where the line does not parse; the message points at the character.

    Example:
        >>> layout = parse_layout("hidden -> (3 heads head_dim)")
        >>> layout.shape({"hidden": 8, "heads": 2, "head_dim": 4})
        (8, 24)
        >>> print(layout)
        hidden -> (3 heads head_dim)
    """
    return _Parser(text).layout()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, position
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error(
                    "unexpected character", position + len(text[position:]) - len(text[position:].lstrip())
                )
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self.tokens.append(("end", "", len(text)))
        for (kind, _, _), (next_kind, next_text, next_position) in pairwise(self.tokens):
            if kind == "number" and next_kind in ("name", "number"):
                gap = text[next_position - 1]
                if not gap.isspace():
                    raise self.error(f"a space is missing before '{next_text}'", next_position)
        self.index = 0
        self.nested = 0

    def error(self, what: str, position: int) -> LayoutError:
        return LayoutError(
            f"{what} at character {position + 1} of the layout '{self.text}': "
            f"{self.text[:position]} >>> {self.text[position:]}"
        )

    @property
    def kind(self) -> str:
        return self.tokens[self.index][0]

    @property
    def token(self) -> str:
        return self.tokens[self.index][1]

    def fail(self, expected: str) -> LayoutError:
        got = f"'{self.token}'" if self.token else "the end"
        return self.error(f"expected {expected}, got {got}", self.tokens[self.index][2])

    def take(self) -> str:
        self.index += 1
        return self.tokens[self.index - 1][1]

    def layout(self) -> Layout:
        if self.token in ("*", "+"):
            sign = self.take()
            layout = Layout((), "*" if sign == "*" else "+", (self.axis(),))
        else:
            left = () if self.token == "->" else self.axes()
            if self.token not in ("<-", "->"):
                raise self.fail("'<-' or '->'")
            layout = Layout(left, "<-" if self.take() == "<-" else "->", self.axes())
        if self.kind != "end":
            raise self.fail("the end")
        return layout

    def axes(self) -> tuple[Axis, ...]:
        found = [self.axis()]
        while self.kind in ("name", "number") or self.token == "(":
            found.append(self.axis())
        return tuple(found)

    def axis(self) -> Axis:
        if self.kind == "name":
            return Leaf(self.take())
        if self.kind == "number":
            position = self.tokens[self.index][2]
            if len(self.token) > _LONGEST_NUMBER:
                raise self.error(f"a size has at most {_LONGEST_NUMBER} digits", position)
            size = int(self.take())
            if size < 1:
                raise self.error("a fixed size is at least 1", position)
            return Fixed(size)
        if self.token != "(":
            raise self.fail("a space, a size or '('")
        self.nested += 1
        if self.nested > _DEEPEST:
            raise self.fail(f"at most {_DEEPEST} brackets inside each other")
        self.take()
        segments = [product(*self.axes())]
        while self.token == "+":
            self.take()
            segments.append(product(*self.axes()))
        if self.token != ")":
            raise self.fail("'+' or ')'")
        self.take()
        self.nested -= 1
        return concatenation(*segments)
