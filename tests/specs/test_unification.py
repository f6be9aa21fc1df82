"""Laws of unification: what is one becomes one, what only measures the same never does, and sizes stay."""

from itertools import accumulate, pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit_specs.layout import Axis, Concatenation, Fixed, Leaf, Product, concatenation, product
from growkit_specs.unification import ONE, Conflict, Sizes, Unifier

RUNS = 2
SMALL = st.sampled_from([2, 4])  # sizes coincide nearly always


def fresh(unifier: Unifier, size: int) -> Axis:
    return unifier.fresh((size,) * unifier.runs)


def leaf_sizes(unifier: Unifier, axis: Axis) -> list[Sizes]:
    """The sizes of an axis's spaces, in order: what is known of it, whatever its spaces are called."""
    return [unifier.spaces()[leaf] for leaf in unifier.leaves(axis)]


# --- any axes --------------------------------------------------------------------------------------------------------

Shape = int | tuple[str, list["Shape"]]  # a space's size, or a kind and its parts


def shapes() -> st.SearchStrategy[Shape]:
    def nested(parts: st.SearchStrategy[Shape]) -> st.SearchStrategy[Shape]:
        return st.tuples(st.sampled_from(["product", "concatenation"]), st.lists(parts, min_size=2, max_size=3))

    return st.recursive(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), nested, max_leaves=6)


def built(unifier: Unifier, shape: Shape) -> Axis:
    if isinstance(shape, int):
        return unifier.fresh((shape, 5 * shape))  # dynamic, but for size 1 in the first run
    kind, parts = shape
    return {"product": product, "concatenation": concatenation}[kind](*(built(unifier, part) for part in parts))


def unified(unifier: Unifier, a: Axis, b: Axis) -> bool:
    """Whether two axes could be made one."""
    try:
        unifier.unify(a, b)
    except Conflict as conflict:
        assert str(conflict).isprintable()  # noqa: PT017 - some cannot
        return False
    return True


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Shape], list[tuple[int, int]]]:
    """Axes, and which of them are one; made so that sizes agree often: any axis beside one space of its size."""
    made = draw(st.lists(shapes(), min_size=1, max_size=3))
    found = Unifier(RUNS)
    whole = [found.sizes(built(found, shape))[0] for shape in made]
    every: list[Shape] = [*made, *whole, *(("product", [2, size // 2]) for size in whole if size % 2 == 0)]
    index = st.integers(0, len(every) - 1)
    return every, draw(st.lists(st.tuples(index, index), min_size=1, max_size=6))


@given(problems())
def test_unifying_keeps_sizes_and_settles(problem: tuple[list[Shape], list[tuple[int, int]]]) -> None:
    shapes, pairs = problem
    unifier = Unifier(RUNS)
    axes = [built(unifier, shape) for shape in shapes]
    before = [unifier.sizes(axis) for axis in axes]
    for i, j in pairs:
        done = unified(unifier, axes[i], axes[j])
        assert not done or unifier.resolve(axes[i]) == unifier.resolve(axes[j])
        for axis, sizes in zip(axes, before, strict=True):  # also where there was a conflict
            resolved = unifier.resolve(axis)
            assert unifier.sizes(axis) == unifier.sizes(resolved) == sizes
            assert unifier.resolve(resolved) == resolved
        if done:  # once more changes nothing
            known = [unifier.resolve(axis) for axis in axes], unifier.spaces()
            unifier.unify(axes[i], axes[j])
            unifier.unify(axes[j], axes[i])
            assert ([unifier.resolve(axis) for axis in axes], unifier.spaces()) == known


@given(problems())
def test_unifying_knows_no_sides(problem: tuple[list[Shape], list[tuple[int, int]]]) -> None:
    shapes, pairs = problem
    known = []
    for turned in (False, True):
        unifier = Unifier(RUNS)
        axes = [built(unifier, shape) for shape in shapes]
        done = all(unified(unifier, axes[j if turned else i], axes[i if turned else j]) for i, j in pairs)
        resolved = [unifier.resolve(axis) for axis in axes]
        same = [[a == b for a in resolved] for b in resolved]
        known.append((done, same, [leaf_sizes(unifier, axis) for axis in axes]) if done else (done, [], []))
    assert known[0] == known[1]


# --- cutting ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=4), st.data())
def test_a_product_is_its_factor_times_what_stays(sizes: list[int], data: st.DataObject) -> None:
    unifier = Unifier(1)
    axis = product(*(fresh(unifier, size) for size in sizes))
    size = data.draw(st.sampled_from([d for d in range(1, prod(sizes) + 1) if prod(sizes) % d == 0]))
    try:
        head, tail = unifier.split_product(axis, (size,))
    except Conflict:
        assert size not in accumulate([1, *sizes], lambda a, b: a * b)  # a cut between factors always can be
        return
    assert (unifier.sizes(head), unifier.sizes(tail)) == ((size,), (prod(sizes) // size,))
    assert unifier.resolve(product(head, tail)) == unifier.resolve(axis)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.sampled_from([1, 2, 3]), st.data())
def test_an_axis_is_its_part_and_what_stays(sizes: list[int], behind: int, data: st.DataObject) -> None:
    unifier = Unifier(1)
    parts = [unifier.fresh((size,)) for size in sizes]
    axis = product(concatenation(*parts), fresh(unifier, behind))
    whole = sum(sizes) * behind
    size = data.draw(st.integers(1, whole))
    if size % behind:
        with pytest.raises(Conflict):
            unifier.split_sum(axis, (size,))
        return
    part, rest = unifier.split_sum(axis, (size,))
    assert (rest is None) == (size == whole)
    assert unifier.sizes(part) == (size,)
    if rest is not None:
        assert unifier.sizes(rest) == (whole - size,)
        unifier.unify(axis, concatenation(part, rest))
        assert behind > 1 or unifier.resolve(concatenation(part, rest)) == unifier.resolve(axis)  # (a + b) c: a c + b c


# --- recovering what is hidden ---------------------------------------------------------------------------------------

Cuts = list[int]  # after how many of the hidden spaces an axis ends


@st.composite
def presentations(draw: st.DrawFn) -> tuple[list[int], list[Cuts]]:
    """Sizes of hidden spaces, and groupings of them."""
    sizes = draw(st.lists(SMALL, min_size=2, max_size=7))
    inner = st.sets(st.integers(1, len(sizes) - 1))
    groupings = draw(st.lists(inner, min_size=1, max_size=4))
    return sizes, [[0, *sorted(cuts), len(sizes)] for cuts in groupings]


@pytest.mark.parametrize(("join", "measure"), [(product, prod), (concatenation, sum)])
@given(hidden=presentations(), other=presentations())
def test_regroupings_recover_what_is_hidden(
    join: type, measure: type, hidden: tuple[list[int], list[Cuts]], other: tuple[list[int], list[Cuts]]
) -> None:
    """Of two tensors, each reshaped (or cut) again and again: an axis is another one iff it covers the same spaces."""
    unifier = Unifier(1)
    places: list[tuple[tuple[int, int, int], Axis]] = []
    for tensor, (sizes, groupings) in enumerate((hidden, other)):
        wholes = []
        for cuts in groupings:
            axes = [fresh(unifier, measure(sizes[a:b])) for a, b in pairwise(cuts)]
            places += [((tensor, a, b), axis) for (a, b), axis in zip(pairwise(cuts), axes, strict=True)]
            wholes.append(join(*axes))
        for whole in wholes[1:]:
            unifier.unify(wholes[0], whole)
        ends = sorted(set().union(*groupings))  # no finer than anybody saw
        assert leaf_sizes(unifier, wholes[0]) == [(measure(sizes[a:b]),) for a, b in pairwise(ends)]
    for place, axis in places:
        for elsewhere, twin in places:
            assert (unifier.resolve(axis) == unifier.resolve(twin)) == (place == elsewhere)


@given(st.integers(1, 3), st.sampled_from([2, 4]), st.sampled_from([2, 4]))
def test_a_fused_projection_is_told_apart_by_heads(groups: int, heads: int, head_dim: int) -> None:
    """``(q + k + v)``: cut, then each by heads; values meet what they are mixed into, queries meet keys in one head."""
    unifier = Unifier(1)
    wide = [groups * heads * head_dim, heads * head_dim, heads * head_dim]
    fused = fresh(unifier, sum(wide))
    query, rest = unifier.split_sum(fused, (wide[0],))
    assert rest is not None
    key, value = unifier.split_sum(rest, (wide[1],))
    assert value is not None
    repeats, kv, dim = (unifier.fresh((size,)) for size in (groups, heads, head_dim))
    unifier.unify(query, product(kv, repeats, dim))
    unifier.unify(key, product(kv, dim))
    own = fresh(unifier, head_dim)
    unifier.unify(value, product(kv, own))
    expected = concatenation(product(kv, repeats, dim), product(kv, dim), product(kv, own))
    assert unifier.resolve(fused) == unifier.resolve(expected)
    assert unifier.resolve(own) != unifier.resolve(dim)


# --- what must not grow, and conflicts -------------------------------------------------------------------------------


@given(presentations())
def test_reasons_follow_refinement(hidden: tuple[list[int], list[Cuts]]) -> None:
    sizes, groupings = hidden
    unifier = Unifier(1)
    frozen, free = fresh(unifier, prod(sizes)), fresh(unifier, prod(sizes))
    unifier.freeze(frozen, "first")
    for cuts in groupings:
        axes = [fresh(unifier, prod(sizes[a:b])) for a, b in pairwise(cuts)]
        unifier.unify(frozen, product(*axes))
        assert {unifier.frozen(axis) for axis in axes} == {"first"}
    unifier.freeze(frozen, "second")
    assert unifier.frozen(frozen) == "first"
    assert unifier.frozen(free) is None


def test_frozen_on_either_side_is_frozen_on_both() -> None:
    for turned in (False, True):
        unifier = Unifier(1)
        a, b = fresh(unifier, 6), fresh(unifier, 6)
        unifier.freeze(a, "kept")
        unifier.unify(*((b, a) if turned else (a, b)))
        assert unifier.frozen(a) == unifier.frozen(b) == "kept"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (6, 8, "an axis of 6 cannot be one of 8"),
        (("product", [2, 3]), ("product", [3, 2]), "2 is no multiple of 3"),
        (("concatenation", [2, 3]), ("product", [5, 1]), None),
        (("concatenation", [2, 4]), ("product", [2, 3]), "the parts of 6 are no multiples of 3"),
        (
            ("concatenation", [("product", [2, 2]), 2]),
            ("concatenation", [3, 3]),
            "lie across|goes through",
        ),
    ],
)
def test_conflicts_are_told(a: Shape, b: Shape, expected: str | None) -> None:
    def of(unifier: Unifier, shape: Shape) -> Axis:
        if isinstance(shape, int):
            return fresh(unifier, shape)
        return {"product": product, "concatenation": concatenation}[shape[0]](*(of(unifier, p) for p in shape[1]))

    unifier = Unifier(1)
    left, right = of(unifier, a), of(unifier, b)
    if expected is None:
        unifier.unify(left, right)
        return
    with pytest.raises(Conflict, match=expected):
        unifier.unify(left, right)


def test_factors_that_change_places_are_all_one() -> None:
    """``2 x 4 = 4 x 2`` holds where it is ``a (a a) = (a a) a``."""
    unifier = Unifier(1)
    two, four = fresh(unifier, 2), fresh(unifier, 4)
    unifier.unify(product(two, four), product(four, two))
    assert unifier.resolve(four) == unifier.resolve(product(two, two))


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_what_differs_between_runs_is_dynamic() -> None:
    unifier = Unifier(2)
    batch, hidden = unifier.fresh((2, 3)), unifier.fresh((24, 24))
    flat = unifier.fresh((48, 72))
    unifier.unify(flat, product(batch, hidden))
    assert unifier.is_dynamic(flat)
    assert [unifier.is_dynamic(factor) for factor in unifier.factors(flat)] == [True, False]
    assert unifier.fresh((1, 1)) == ONE == Product(())
    assert unifier.sizes(Fixed(3)) == (3, 3)


def test_long_chains_stay_small() -> None:
    """A chain of 200 reshapes there and back, and one of 200 cuts, make as many spaces as there are."""
    unifier = Unifier(1)
    shape = [fresh(unifier, size) for size in (2, 3, 4, 5)]
    first = product(*shape)
    for step in range(200):
        sizes = [(24, 5), (6, 20), (2, 60), (2, 12, 5)][step % 4]
        shape = [fresh(unifier, size) for size in sizes]
        unifier.unify(product(*shape), first)
    assert [unifier.sizes(factor) for factor in unifier.factors(first)] == [(2,), (3,), (4,), (5,)]
    rest: Axis | None = fresh(unifier, 200)
    whole = rest
    for _ in range(199):
        assert rest is not None
        _, rest = unifier.split_sum(rest, (1,))
    assert isinstance(whole, Leaf)
    resolved = unifier.resolve(whole)
    assert isinstance(resolved, Concatenation)
    assert len(resolved.segments) == 200
    assert len(unifier.spaces()) < 2000
