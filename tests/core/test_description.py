"""What is said of an operator, against its dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import growkit
from growkit import description
from growkit.description import MatrixFacts, describe, matrix_facts, ranges, row_blocks, same, single_entries, structure
from growkit.heatmaps import heat_maps, png, reduced, scale_of
from growkit.matrices import Composition, Concatenation, Dense, Identity, Kronecker, Matrix, MeanFill, Selection, pad
from growkit.operator import Expansion, GrowthOperator, unchanged
from growkit.testing import layer_graphs, matrices, memory_model, targets, transformer
from growkit_specs import LayerGraph, layer_maps


def dense(rows: int, columns: int, seed: int = 0) -> Dense:
    return Dense(np.random.default_rng(seed).standard_normal((rows, columns)))


# --- matrices ----------------------------------------------------------------------------------------------------


@given(matrices())
def test_the_facts_of_a_matrix_are_those_of_its_dense_form(matrix: Matrix) -> None:
    whole = matrix.as_matrix()
    facts = matrix_facts(matrix)
    assert facts.rank == np.linalg.matrix_rank(whole)
    nearest = np.zeros_like(whole)
    for row in range(len(whole)):
        if whole[row].max() > 0.5:
            nearest[row, whole[row].argmax()] = 1
    assert facts.differing == np.count_nonzero(whole != nearest)
    assert facts.distance == pytest.approx(np.abs(whole - nearest).max(initial=0))


@given(matrices())
def test_single_entries_are_all_there_is(matrix: Matrix) -> None:
    single = single_entries(matrix)
    if single is None:
        return
    columns, values = single
    rebuilt = np.zeros(matrix.shape)
    rows = np.flatnonzero(columns >= 0)
    rebuilt[rows, columns[rows]] = values[rows]
    np.testing.assert_array_equal(rebuilt, matrix.as_matrix())


@pytest.mark.parametrize("at_once", [1, 20, 1 << 22])
def test_rows_come_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(description, "ENTRIES_AT_ONCE", at_once)
    for matrix in (MeanFill(11, 4, 2), dense(7, 3), pad(9, 5).mT):
        blocks = list(row_blocks(matrix, multiple=2))
        assert all(len(block) % 2 == 0 for block in blocks[:-1])
        np.testing.assert_allclose(np.concatenate(blocks), matrix.as_matrix())


@given(matrices())
def test_the_same_entries_are_the_same_matrix(matrix: Matrix) -> None:
    whole = matrix.as_matrix()
    assert same(matrix, matrix)
    assert same(Dense(whole), Dense(whole.copy()))
    if whole.size:
        whole[-1, -1] += 1
        assert not same(matrix, Dense(whole))
    assert not same(matrix, Identity(99))


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (Identity(3), "identity"),
        (pad(5, 3), "pad: 3 entries, then 2 zero"),
        (Selection(np.arange(6) % 3, 3), "selection: the source in order, 2 times"),
        (Selection(np.array([2, -1, 2]), 4), "selection of 1 of 4 entries, up to 2 times, 1 zero rows"),
        (
            Selection(np.array([0, 1, 1]), 2, np.array([1, 0.5, 0.5])),
            "selection of 2 of 2 entries, up to 2 times, weight 0.5 to 1",
        ),
        (Selection(np.full(4, -1), 2), "zero"),
        (MeanFill(8, 3, 2), "mean-fill: 2 copies of the source, then its mean in 2"),
        (Dense(np.zeros((4, 3), np.float32)), "dense 4 x 3, float32"),
        (Dense(torch.zeros(4, 3)), "dense 4 x 3, float32"),
        (Kronecker((pad(2, 1), Identity(3))), "product of (pad: 1 entries, then 1 zero) and (identity)"),
        (Concatenation((Identity(1), Identity(2))), "block diagonal of (identity), (identity)"),
        (Composition(pad(4, 3), dense(3, 2)), "(pad: 3 entries, then 1 zero) after (dense 3 x 2, float64)"),
        (MeanFill(5, 3).mT, "transpose of (mean-fill: the source, then its mean in 2)"),
    ],
)
def test_structure_in_words(matrix: Matrix, words: str) -> None:
    assert structure(matrix) == words


def test_what_is_not_finite_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.eye(3)
    broken[1, 2] = np.nan
    facts = matrix_facts(Dense(broken))
    assert facts == MatrixFacts("dense 3 x 3, float64, NOT FINITE", None, 2, None, 9)  # the NaN, and the 1 beside it
    operator = GrowthOperator({"ffn": Expansion(Dense(broken), pad(3, 3), pad(3, 3))}, {"layers": np.eye(2)})
    (drawn,) = heat_maps(operator)
    assert "Green cells are not finite" in drawn.caption
    assert np.isnan(drawn.cells).sum() == 1
    assert scale_of([drawn]) == 1
    assert png(drawn, 1).startswith(b"\x89PNG")
    monkeypatch.setattr(description, "RANK_LIMIT", 2)
    assert matrix_facts(dense(4, 3)).rank is None
    assert matrix_facts(dense(4, 2)).rank == 2


# --- operators ---------------------------------------------------------------------------------------------------


def test_a_plans_operator_is_described() -> None:
    source = memory_model(transformer(hidden=12, depths=(3,)))
    plan = growkit.plan(source, hidden=18, layers=5)
    facts = describe(plan.operator)
    hidden = facts.spaces["hidden"]
    assert (hidden.source, hidden.target, hidden.grows, hidden.fresh) == (12, 18, True, "read")
    assert (hidden.read, hidden.seen) == (None, None)
    assert hidden.gain == plan.operator.expansions["hidden"].gain
    assert not facts.spaces["vocab"].grows
    assert facts.stacks["stack0"].layers_from == tuple(plan.operator.layer_map("stack0"))
    assert (facts.stacks["stack0"].source, facts.stacks["stack0"].target) == (3, 5)
    assert set(facts.blends) == set(plan.operator.blend) - {"stack0"}
    silent = facts.blends["stack0/mlp/down_proj.weight"]
    assert silent.layers_from.count(None) == 2
    assert silent.structure == "one source layer each, 2 zero"
    assert facts.dense_parameters == 0


@given(layer_graphs(), st.sampled_from(("lossless", "net2net", "lemon", "aki", "random")), st.data())
def test_every_operator_that_a_method_makes_is_described(graph: LayerGraph, method: str, data: st.DataObject) -> None:
    source = memory_model(graph)
    try:
        operator = growkit.plan(source, data.draw(targets(graph)), method=method).operator
    except growkit.GrowkitError:
        return  # a method that cannot: not what is tested here
    facts = describe(operator)
    for key, e in operator.expansions.items():
        told = facts.spaces[key]
        assert (told.target, told.source) == e.write.shape
        for side in ("read", "seen"):
            equal = np.array_equal(e.write.as_matrix(), getattr(e, side).as_matrix())
            assert (getattr(told, side) is None) == equal
        assert len(told.terms) == len(e.terms)
    cells = {row[0] for row in facts.table()[1:]} - {""}
    assert cells == set(operator.expansions)


def test_what_is_learned_is_counted_once() -> None:
    B, A = dense(4, 3), dense(4, 3, seed=1)
    operator = GrowthOperator(
        {
            "hidden": Expansion(B, A, B),
            "ffn[q]": Expansion(B, B, B),
            "ffn@layers/3": Expansion(B, A, dense(4, 3, seed=2)),
            "heads": Expansion(Kronecker((B, pad(2, 1))), Kronecker((B, pad(2, 1))), Kronecker((B, pad(2, 1)))),
            "vocab": unchanged(9),
        },
        {"layers": np.full((4, 2), 0.5), "layers/mlp/down_proj.weight": np.array([[1, 0], [0, 0], [0, 0.5], [0, 1]])},
        norm_factors={"/norm": 0.5},
        untied=("lm_head.weight",),
        residual={"w": np.zeros((2, 3)), "v": pad(4, 2)},
    )
    facts = describe(operator)
    assert facts.dense_parameters == 12 * (2 + 1 + 3 + 1)
    assert facts.stacks["layers"].structure == "mixes up to 2 source layers"
    assert facts.blends["layers/mlp/down_proj.weight"].layers_from == (0, None, 1, 1)
    lines = facts.lines()
    assert ("norm factor", "/norm: 0.5") in lines
    assert ("untied", "lm_head.weight") in lines
    assert ("residual", "w: 6 entries") in lines
    assert ("residual", "v: 8 entries") in lines


def test_an_operator_in_training_is_described_as_it_is_saved() -> None:
    def learned(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.float32, requires_grad=True)

    rng = np.random.default_rng(0)
    B, w = rng.standard_normal((4, 3)), rng.standard_normal((2, 5, 2))

    def made(kind: object) -> GrowthOperator:
        b = Dense(kind(B))  # type: ignore[operator]
        return GrowthOperator({"hidden": Expansion(b, b, b)}, {"layers": kind(w)})  # type: ignore[operator]

    told = describe(made(learned))
    assert told == describe(made(lambda array: array.astype(np.float32)))
    assert told.stacks["layers"].terms == 2


@given(st.lists(st.integers(0, 6), min_size=7, max_size=20))
def test_layer_ranges_are_read_back(layers: list[int]) -> None:
    assert list(layer_maps(ranges(layers), {"layers": 7})["layers"]) == layers


# --- heat maps ---------------------------------------------------------------------------------------------------


@given(matrices(), st.integers(1, 5))
def test_a_cell_is_the_largest_entry_of_its_block(matrix: Matrix, cells: int) -> None:
    whole = matrix.as_matrix()
    picked, (rows, columns) = reduced(matrix, cells)
    assert max(picked.shape) <= cells
    for (i, j), cell in np.ndenumerate(picked):
        block = whole[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert abs(cell) == pytest.approx(np.abs(block).max())
        assert np.isclose(block, cell).any(), "not an entry of the block: the sign is lost"


def test_a_large_vocabulary_stays_a_line() -> None:
    picked, block = reduced(pad(200_000, 150_000))
    assert block == (782, 782)
    assert (picked != 0).any(axis=0).all(), "the line has gaps"
    assert set(np.unique(picked)) == {0, 1}


def test_what_is_drawn() -> None:
    B, A, C = dense(4, 3), dense(4, 3, seed=1), dense(4, 3, seed=2)
    deep = np.array([[1.0, 0], [1, 0], [0, 1]])
    operator = GrowthOperator(
        {
            "hidden": Expansion(B, A, C),
            "ffn": Expansion(B, B, B),
            "heads": Expansion(B, A, B, terms=((B, A), (C, A))),
            "vocab": unchanged(9),
        },
        {"a": np.eye(2), "b": deep, "b/x/1": 2 * deep, "b/x/2": 2 * deep, "c": np.stack([deep, -3 * deep])},
    )
    drawn = {each.title: each for each in heat_maps(operator)}
    assert list(drawn) == [
        *("hidden: B", "hidden: A", "hidden: C", "ffn: B = A"),
        *("heads: B", "heads: A", "heads: B_0", "heads: A_0", "heads: B_1", "heads: A_1"),
        *("b: w", "b: w of 2 slots", "c: w_0", "c: w_1"),
    ]
    assert "b/x/1, b/x/2" in drawn["b: w of 2 slots"].caption
    assert "Rows: target layers; columns: source layers" in drawn["b: w"].caption
    assert "Rows: target entries; columns: source entries" in drawn["hidden: C"].caption
    assert "block" not in drawn["hidden: C"].caption
    assert scale_of(list(drawn.values())) == 3


def test_a_picture_shows_its_entries() -> None:
    """The colours of the cells, read back: blue below zero, red above, and a lone entry among many is seen."""
    from io import BytesIO

    from matplotlib.image import imread

    lone = np.zeros((2000, 1000))
    lone[1234, 567] = -1
    operator = GrowthOperator({"ffn": Expansion(Dense(lone), pad(2000, 1000), pad(2000, 1000))}, {"l": np.eye(1)})
    pictures = {each.title: imread(BytesIO(png(each, 1.0))) for each in heat_maps(operator)}
    inside = {title: picture[80:-110, 120:-180, :3] for title, picture in pictures.items()}  # the axes alone
    blue = [(cells[..., 2] - cells[..., 0] > 0.2).sum() for cells in inside.values()]
    red = [(cells[..., 0] - cells[..., 2] > 0.2).sum() for cells in inside.values()]
    assert list(inside) == ["ffn: B", "ffn: A", "ffn: C"]
    assert blue[0] >= 4
    assert blue[1:] == [0, 0]
    assert red[0] == 0
    assert min(red[1:]) > 500
