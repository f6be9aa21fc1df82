"""What can be learned of an operator: which entries, what they begin as, and where they act."""

from typing import Any

import numpy as np
import pytest

import growkit
from growkit.learnable import Learnable, source_rows
from growkit.matrices import Composition, Dense, Identity, Matrix, MeanFill, RowBlocks, Scaled, Selection, pad
from growkit.testing import memory_model, transformer
from growkit_specs import FitSettings, GrowkitError

SIZES = {"hidden": 12, "heads": 6, "ffn": 10, "layers": 3}
FEATURES = {"hidden": 8, "heads": 4, "head_dim": 2, "ffn": 6, "vocab": 9, "positions": 5, "depths": (2,), "norm": "rms"}


def learnable(method: str = "lossless", sizes: dict[str, Any] | None = None, **settings: Any) -> Learnable:
    source = memory_model(transformer(**FEATURES))
    return growkit.plan(source, method=method, **(sizes or SIZES)).learnable(FitSettings.of(**settings))


def initial(what: Learnable) -> list[np.ndarray]:
    return [make() for make in what.initial]


def matrices(what: Learnable) -> dict[str, tuple[int, ...]]:
    return {
        name: shape for name, shape in zip(what.names, what.shapes, strict=True) if name.startswith(("A of", "B of"))
    }


QKV = ("B of heads[q]", "B of heads[k]", "B of heads[v]", "A of heads[v]")
HEADS = ("B of (heads head_dim)[q]", "B of (heads head_dim)[k]", "B of (heads head_dim)[v]")
STREAM = ("B of hidden", "A of hidden")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, [*STREAM, *QKV]),
        ({"tied": True}, ["B of hidden", *QKV[:3], "B of ffn"]),
        ({"method": "ligo-paper"}, ["B of hidden", *HEADS, "B of ffn"]),
        ({"structure": {"ffn": "source"}}, [*STREAM, *QKV, "B of ffn", "A of ffn"]),
        ({"structure": {"hidden": "fixed"}}, list(QKV)),
        ({"structure": {"(heads head_dim)": "source"}}, [*STREAM, *HEADS, "A of (heads head_dim)[v]"]),
        ({"sizes": {"ffn": 10}, "structure": {"ffn": "dense"}}, ["B of ffn", "A of ffn"]),
        ({"method": "aki"}, []),  # expansions of several terms stay as they are
        ({"learn": ("depth", "norms", "residual", "source")}, []),
    ],
)
def test_matrices_that_are_learned(told: dict[str, Any], expected: list[str]) -> None:
    assert list(matrices(learnable(**told))) == expected


def test_structures_settle_which_entries_are_learned() -> None:
    shapes = matrices(learnable(structure={"hidden": "dense", "ffn": "source"}))
    assert shapes["B of hidden"] == shapes["A of hidden"] == (12, 8)
    assert shapes["B of ffn"] == (4, 6)  # what is beside the source's own entries
    assert shapes["B of heads[q]"] == (2, 4)


def test_each_layer_has_its_own_inside_blocks_and_the_stream_is_one() -> None:
    names = matrices(learnable(per_layer=True))
    layers = {name.partition("@")[2] for name in names}
    assert layers == {"", *(f"stack0/{i}" for i in range(3))}
    assert [name for name in names if "@" not in name] == list(STREAM)
    assert all(f"{name}@stack0/{i}" in names for name in QKV for i in range(3))


def test_blends_are_learned_where_the_depth_grows() -> None:
    what = learnable(learn=("depth",))
    assert set(what.shapes) == {(3, 2)}
    assert set(what.blends) == {t.key for t in what.target.tensors() if t.stack is not None}
    assert learnable(sizes={"hidden": 12, "heads": 6}, learn=("depth",)).names == []


def test_norms_and_all_else_are_learned_apart() -> None:
    norms, others = (learnable(learn=(what,)) for what in ("norms", "residual"))
    targets = {t.name: t for t in norms.target.tensors()}
    assert set(norms.residuals) | set(others.residuals) == set(targets)
    assert {targets[name].owner.kind for name in norms.residuals} == {"norm"}
    assert "norm" not in {targets[name].owner.kind for name in others.residuals}
    for what in (norms, others):
        assert all(what.shapes[i] == targets[name].shape for name, i in what.residuals.items())


def test_the_sources_own_tensors_are_learned_once() -> None:
    what = learnable(learn=("source",))
    assert list(what.weights) == [t.name for t in what.source.tensors()]
    assert what.parameters == what.source.parameter_count


@pytest.mark.parametrize("method", ["lossless", "lemon", "width=net2net,depth=stack", "fpi", "aki", "ligo-paper"])
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"per_layer": True},
        {"structure": {"hidden": "dense", "ffn": "dense"}},
        {"structure": {"(heads head_dim)": "dense"}},
    ],
)
def test_it_begins_as_the_operator_it_starts_from(method: str, told: dict[str, Any]) -> None:
    what = learnable(method, {"hidden": 16, "heads": 8, "ffn": 12, "layers": 3}, learn=("depth", "width"), **told)
    values = initial(what)
    assert [value.shape for value in values] == what.shapes
    operator = what.operator(values)
    assert operator.start is what.start
    for target in what.target.tensors():
        np.testing.assert_array_equal(
            *(np.asarray(o.blend_of(target)) for o in (operator, what.start))
        ) if target.stack else None
        for axis in range(len(target.shape)):
            for side in (None, "write", "seen"):
                ours, theirs = (o.axis_matrix(target, axis, side).as_matrix() for o in (operator, what.start))  # type: ignore[arg-type]
                np.testing.assert_allclose(ours, theirs, atol=1e-15, err_msg=f"{target.name} {axis} {side}")


def test_other_values_make_other_matrices_and_keep_the_sources_rows() -> None:
    what = learnable("lemon", per_layer=True)
    values = [value + 1.0 for value in initial(what)]
    operator = what.operator(values)
    made = dict(zip(what.names, values, strict=True))
    B = operator.expansions["hidden"].write.as_matrix()
    assert np.array_equal(B[:8], np.eye(8))
    assert np.array_equal(B[8:], made["B of hidden"])
    assert np.array_equal(operator.expansions["hidden"].read.as_matrix()[8:], made["A of hidden"])
    for i in range(3):
        heads = operator.expansions[f"heads[v]@stack0/{i}"]
        assert np.array_equal(heads.write.as_matrix()[4:], made[f"B of heads[v]@stack0/{i}"])
    key = next(iter(what.blends))
    assert np.array_equal(operator.blend[key], made[f"w of {key}"])


def test_tied_matrices_read_what_they_write_and_see() -> None:
    what = learnable("lemon", tied=True)
    expansion = what.operator([value + 1.0 for value in initial(what)]).expansions["hidden"]
    assert expansion.read is expansion.write is expansion.seen


ROWS: list[tuple[Matrix, list[int] | None, list[float]]] = [
    (Identity(2), [0, 1], [1, 1]),
    (pad(4, 2), [0, 1], [1, 1]),
    (Selection(np.array([1, 0, 1]), 2), [1, 0], [1, 1]),
    (Selection(np.array([1, 1, 0]), 2, np.array([0.5, 0.25, 2.0])), [2, 0], [2, 0.5]),
    (Selection(np.array([1, 1, -1]), 2), None, []),
    (MeanFill(4, 2, 1), [0, 1], [1, 1]),
    (Scaled(Identity(2), 3.0), [0, 1], [3, 3]),
    (RowBlocks((Identity(2), Dense(np.ones((2, 2))))), [0, 1], [1, 1]),
    (RowBlocks((Dense(np.ones((1, 2))), Identity(2))), None, []),
    (Dense(np.eye(3, 2)), None, []),
    (Composition(Identity(2), Identity(2)), None, []),
]


@pytest.mark.parametrize(("matrix", "rows", "weights"), ROWS)
def test_rows_that_hold_the_sources_entries(matrix: Matrix, rows: list[int] | None, weights: list[float]) -> None:
    found = source_rows(matrix)
    if rows is None:
        assert found is None
        return
    assert found is not None
    assert (found[0].tolist(), found[1].tolist()) == (rows, weights)
    np.testing.assert_array_equal(matrix.as_matrix()[rows], np.diag(weights))


def test_what_it_takes_is_told() -> None:
    told = growkit.plan(memory_model(transformer(**FEATURES)), **SIZES).to_learn()
    what = learnable()
    assert told["parameters"] == what.parameters == sum(value.size for value in initial(what))
    assert told["bytes"] == 4 * told["parameters"]
    assert told["flops"] > 0


@pytest.mark.parametrize(
    ("structure", "problem"),
    [
        ({"hiden": "dense"}, "structure: no space is called 'hiden'; spaces are hidden, ffn, heads"),
        ({"(heads hidden)": "dense"}, r"no space is called '\(heads hidden\)'.* head axes are \(heads head_dim\)"),
    ],
)
def test_structures_of_spaces_that_are_not_there(structure: dict[str, Any], problem: str) -> None:
    with pytest.raises(GrowkitError, match=problem):
        learnable(structure=structure)
