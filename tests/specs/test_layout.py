"""The axis notation: parsed and printed without loss, sizes computed, mistakes pointed at."""

import re
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.testing import SPACES, layouts
from growkit_specs import Axis, Concatenation, Fixed, Layout, LayoutError, Leaf, Product, parse_layout
from growkit_specs.layout import axis_size, concatenation, product, spaces_of

SIZES = st.fixed_dictionaries({space: st.integers(1, 5) for space in SPACES})


@given(layouts())
def test_parsing_what_was_printed_gives_the_same(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout


@given(layouts(), st.randoms(use_true_random=False))
def test_printing_is_canonical_whatever_the_spacing(layout: Layout, random: object) -> None:
    tokens = re.findall(r"<-|->|\w+|[*+()]", str(layout))
    spaced = "".join(token + " " * random.randint(1, 3) for token in tokens)  # type: ignore[attr-defined]
    assert str(parse_layout(spaced)) == str(layout)


@given(layouts(), SIZES)
def test_the_shape_is_that_of_the_axes_written_out(layout: Layout, sizes: dict[str, int]) -> None:
    assert layout.shape(sizes) == tuple(len(entries(axis, sizes)) for axis in layout.axes)


def entries(axis: Axis, sizes: dict[str, int]) -> np.ndarray:
    """Every entry of an axis, as a row of an array."""
    match axis:
        case Leaf(space):
            return np.arange(sizes[space])
        case Fixed(size):
            return np.arange(size)
        case Product(factors):
            return np.arange(prod(len(entries(factor, sizes)) for factor in factors))
        case Concatenation(segments):
            return np.concatenate([entries(segment, sizes) for segment in segments])


@given(layouts())
def test_every_axis_has_one_role_and_every_space_one_direction(layout: Layout) -> None:
    assert len(layout.roles) == len(layout.axes)
    named = {space for axis in layout.axes for space in spaces_of(axis)}
    assert set(layout.spaces) == named
    if layout.sign in ("*", "+"):
        assert not layout.written_spaces() | layout.read_spaces()
    else:
        assert layout.written_spaces() | layout.read_spaces() == named
        assert layout.reads + layout.writes == (layout.axes if layout.sign == "->" else layout.right + layout.left)


@pytest.mark.parametrize(
    ("text", "shape", "roles"),
    [
        ("(heads head_dim) <- hidden", (8, 6), ("write", "read")),
        ("hidden -> (3 heads head_dim)", (6, 24), ("read", "write")),
        ("(heads 3 head_dim) <- hidden", (24, 6), ("write", "read")),
        ("((heads head_dim) + head_dim + head_dim) <- hidden", (16, 6), ("write", "read")),
        ("(heads (group + 1 + 1) head_dim) <- hidden", (40, 6), ("write", "read")),
        ("hidden <- 3 2 2", (6, 3, 2, 2), ("write", "read", "read", "read")),
        ("1 (1 + 2 2) -> hidden", (1, 5, 6), ("read", "read", "write")),
        ("-> (heads head_dim)", (8,), ("write",)),
        ("* hidden", (6,), ("scale",)),
        ("+ hidden", (6,), ("shift",)),
    ],
)
def test_what_layouts_mean(text: str, shape: tuple[int, ...], roles: tuple[str, ...]) -> None:
    layout = parse_layout(text)
    assert layout.shape({"heads": 2, "head_dim": 4, "hidden": 6, "group": 3}) == shape
    assert layout.roles == roles


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a<-b", "a <- b"),
        ("  (a)(b)  <-c ", "a b <- c"),
        ("((a b) c) <- (d)", "(a b c) <- d"),
        ("(a + (b + c)) <- d", "(a + b + c) <- d"),
        ("(a b + c) <- d", "((a b) + c) <- d"),
        ("a->3(b)", "a -> 3 b"),
    ],
)
def test_one_printed_form_for_many_ways_of_writing(text: str, printed: str) -> None:
    assert str(parse_layout(text)) == printed


@pytest.mark.parametrize(
    ("text", "character", "problem"),
    [
        ("", 1, "expected a space, a size or '(', got the end"),
        ("hidden", 7, "expected '<-' or '->', got the end"),
        ("<- a", 1, "expected a space, a size or '(', got '<-'"),
        ("a <-", 5, "got the end"),
        ("a <- b <- c", 8, "expected the end, got '<-'"),
        ("a <- -> b", 6, "got '->'"),
        ("* a b", 5, "expected the end, got 'b'"),
        ("*", 2, "got the end"),
        ("* a <- b", 5, "expected the end, got '<-'"),
        ("(a b <- c", 6, "expected '+' or ')', got '<-'"),
        ("a <- ((b", 9, "expected '+' or ')', got the end"),
        ("a) <- c", 2, "got ')'"),
        ("() <- c", 2, "got ')'"),
        ("(a + ) <- c", 6, "got ')'"),
        ("a + b <- c", 3, "expected '<-' or '->', got '+'"),
        ("a <- (b 0)", 9, "a fixed size is at least 1"),
        ("3heads <- a", 2, "a space is missing before 'heads'"),
        ("a <- b $", 8, "unexpected character"),
        ("a < b", 3, "unexpected character"),
        ("a → b", 3, "unexpected character"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, character: int, problem: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parse_layout(text)
    message = str(caught.value)
    assert problem in message
    assert f"at character {character} of the layout '{text}'" in message
    assert message.endswith(f"{text[: character - 1]} >>> {text[character - 1 :]}")


def test_an_unknown_space_is_named_with_the_known_ones() -> None:
    with pytest.raises(LayoutError, match="unknown space 'b'; known: a, c"):
        parse_layout("a <- b").shape({"a": 1, "c": 2})


def test_products_and_concatenations_of_one_are_that_one() -> None:
    assert product(Leaf("a")) == concatenation(Leaf("a")) == Leaf("a")
    assert axis_size(product(Fixed(2), concatenation(Fixed(3), Fixed(4))), {}) == 14


@pytest.mark.parametrize("text", ["-> " + "(" * 5000, "9" * 5000 + " -> hidden"])
def test_hostile_lines_are_refused_like_others(text: str) -> None:
    with pytest.raises(LayoutError, match="at character"):
        parse_layout(text)
