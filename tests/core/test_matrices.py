"""Structured matrices: every law against the dense matrix, in numpy and in torch."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.matrices import (
    ColumnBlocks,
    Composition,
    Concatenation,
    Dense,
    Identity,
    Interleaved,
    Kronecker,
    Matrix,
    MeanFill,
    RowBlocks,
    Scaled,
    Selection,
    block_diagonal,
    from_state,
    kronecker,
    pad,
    scaled,
    to_state,
)
from growkit.testing import matrices


def dense(matrix: Matrix) -> np.ndarray:
    """The matrix written out from its definition, without its own `apply`."""
    match matrix:
        case Identity(size):
            return np.eye(size)
        case Selection(index, columns, weight):
            rows = np.zeros((len(index), columns))
            for row, column in enumerate(index):
                if column >= 0:
                    rows[row, column] = 1 if weight is None else weight[row]
            return rows
        case MeanFill(rows, columns, copies):
            return np.vstack([np.eye(columns)] * copies + [np.full((rows - copies * columns, columns), 1 / columns)])
        case Dense(array):
            return np.asarray(array)
        case Scaled(inner, factor):
            return factor * dense(inner)
        case Kronecker(factors):
            product = np.ones((1, 1))
            for factor in factors:
                product = np.kron(product, dense(factor))
            return product
        case Concatenation(blocks):
            whole, row, column = np.zeros(matrix.shape), 0, 0
            for block in map(dense, blocks):
                whole[row : row + block.shape[0], column : column + block.shape[1]] = block
                row, column = row + block.shape[0], column + block.shape[1]
            return whole
        case Interleaved(blocks, (wide_runs, runs)):
            sides = [(b.shape[0] // wide_runs, b.shape[1] // runs) for b in blocks]
            whole = np.zeros((wide_runs, sum(D for D, _ in sides), runs, sum(d for _, d in sides)))
            row = column = 0
            for block, (D, d) in zip(blocks, sides, strict=True):
                whole[:, row : row + D, :, column : column + d] = dense(block).reshape(wide_runs, D, runs, d)
                row, column = row + D, column + d
            return whole.reshape(matrix.shape)
        case RowBlocks(blocks):
            return np.concatenate([dense(block) for block in blocks], axis=0)
        case ColumnBlocks(blocks):
            return np.concatenate([dense(block) for block in blocks], axis=1)
        case Composition(left, right):
            return dense(left) @ dense(right)
        case _:  # a transpose
            return dense(matrix.mT).T


def along(matrix: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """A dense matrix times `x` along `axis`."""
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)


@st.composite
def applications(draw: st.DrawFn) -> tuple[Matrix, np.ndarray, int]:
    """A matrix, an array it fits, and the axis along which."""
    matrix = draw(matrices())
    rest = draw(st.lists(st.integers(1, 3), max_size=2))
    axis = draw(st.integers(0, len(rest)))
    shape = (*rest[:axis], matrix.shape[1], *rest[axis:])
    return matrix, np.random.default_rng(draw(st.integers(0, 9))).standard_normal(shape), axis


@given(matrices())
def test_the_dense_form(matrix: Matrix) -> None:
    np.testing.assert_allclose(matrix.as_matrix(), dense(matrix), atol=1e-12)
    assert matrix.as_matrix().shape == matrix.shape


@given(applications())
def test_applying_it_is_the_dense_product_along_every_axis(application: tuple[Matrix, np.ndarray, int]) -> None:
    matrix, x, axis = application
    before = x.copy()
    np.testing.assert_allclose(matrix.apply(x, axis), along(dense(matrix), x, axis), atol=1e-12)
    assert np.array_equal(x, before), "the source is changed"


@given(matrices())
def test_the_transpose(matrix: Matrix) -> None:
    assert matrix.mT.shape == matrix.shape[::-1]
    np.testing.assert_allclose(matrix.mT.as_matrix(), dense(matrix).T, atol=1e-12)
    np.testing.assert_allclose(matrix.mT.mT.as_matrix(), dense(matrix), atol=1e-12)


@given(matrices())
def test_the_support_is_the_rows_that_are_not_zero(matrix: Matrix) -> None:
    assert np.array_equal(matrix.support, (dense(matrix) != 0).any(axis=1))


@given(matrices())
def test_the_pattern_says_where_the_one_entry_of_each_row_is(matrix: Matrix) -> None:
    if matrix.pattern is not None:
        pattern = dense(matrix.pattern)
        assert set(pattern.ravel()) <= {0.0, 1.0}
        assert (pattern.sum(axis=1) <= 1).all()
        assert not ((pattern == 0) & (dense(matrix) != 0)).any()


@given(matrices())
def test_a_gather_moves_entries_and_computes_nothing(matrix: Matrix) -> None:
    if matrix.is_gather:
        assert set(dense(matrix).ravel()) <= {0.0, 1.0}
        assert (dense(matrix).sum(axis=1) <= 1).all()
        x = np.random.default_rng(0).standard_normal(matrix.shape[1]).astype(np.float16)
        assert set(matrix.apply(x)) <= {*x, 0}
    if matrix.is_identity:
        assert np.array_equal(dense(matrix), np.eye(matrix.shape[0]))


@pytest.mark.parametrize("matrix", [Identity(3), pad(5, 3), Selection(np.array([2, 0, -1]), 3)])
def test_selections_are_gathers(matrix: Matrix) -> None:
    assert matrix.is_gather
    assert Kronecker((matrix, matrix)).is_gather
    assert Concatenation((matrix, matrix)).is_gather
    assert not Scaled(matrix, 2.0).is_gather
    for weighted in (matrix, Scaled(matrix, 2.0)):
        assert np.array_equal(dense(weighted.pattern), dense(matrix))
        assert np.array_equal(dense(Kronecker((weighted, weighted)).pattern), np.kron(dense(matrix), dense(matrix)))
        assert np.array_equal(dense(Concatenation((weighted,)).pattern), dense(matrix))


@given(matrices())
def test_what_was_saved_is_loaded(matrix: Matrix) -> None:
    arrays: dict[str, np.ndarray] = {}
    state = json.loads(json.dumps(to_state(matrix, arrays, "hidden.write")))
    loaded = from_state(state, arrays)
    assert type(loaded) is type(matrix)
    assert np.array_equal(loaded.as_matrix(), matrix.as_matrix())
    assert all(name.startswith("hidden.write.") for name in arrays)


def test_a_state_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown matrix kind 'circulant'"):
        from_state({"kind": "circulant"}, {})


@given(st.lists(matrices(), min_size=1, max_size=3))
def test_the_builders_are_the_products_they_are_called(parts: list[Matrix]) -> None:
    assert np.array_equal(kronecker(*parts).as_matrix(), Kronecker(tuple(parts)).as_matrix())
    assert np.array_equal(block_diagonal(*parts).as_matrix(), Concatenation(tuple(parts)).as_matrix())
    assert scaled(parts[0], 1.0) is parts[0]
    np.testing.assert_allclose(scaled(parts[0], 3.0).as_matrix(), 3 * dense(parts[0]), atol=1e-12)
    if all(part.is_identity for part in parts):
        assert kronecker(*parts).is_identity
        assert block_diagonal(*parts).is_identity


def test_what_applying_costs() -> None:
    dense = Dense(np.ones((3, 2)))
    assert (dense.multiplications, pad(5, 3).multiplications, RowBlocks((Identity(2), dense)).multiplications) == (
        6,
        0,
        6,
    )
    # (3 x 2) (x) I_4 mixes whole heads: four times the small product; (3 x 2) (x) (3 x 2) goes from 4 by 6 to 9 entries
    assert Kronecker((dense, Identity(4))).multiplications == 24
    assert Kronecker((dense, dense)).multiplications == 3 * 2 * 2 + 3 * 3 * 2
    assert Scaled(Composition(dense.mT, dense), 2.0).mT.multiplications == 12


def test_a_pad_of_nothing_is_the_identity() -> None:
    assert pad(3, 3).is_identity
    assert np.array_equal(pad(5, 3).as_matrix(), np.eye(5, 3))


# --- torch ---------------------------------------------------------------------------------------------------


@given(applications())
def test_numpy_and_torch_give_the_same(application: tuple[Matrix, np.ndarray, int]) -> None:
    matrix, x, axis = application
    grown = matrix.apply(torch.from_numpy(x), axis)
    assert grown.dtype == torch.float64
    np.testing.assert_allclose(grown.numpy(), matrix.apply(x, axis), atol=1e-12)


@given(applications(), st.sampled_from(("float16", "float32", "float64")))
def test_the_element_type_is_kept(application: tuple[Matrix, np.ndarray, int], dtype: str) -> None:
    matrix, x, axis = application
    assert matrix.apply(x.astype(dtype), axis).dtype == np.dtype(dtype)
    assert matrix.apply(torch.from_numpy(x).to(getattr(torch, dtype)), axis).dtype == getattr(torch, dtype)


def learned(rows: int, columns: int, dtype: Any = torch.float64) -> Dense:
    entries = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return Dense(entries.requires_grad_())


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.mT, lambda m: Scaled(m, 0.5), lambda m: Kronecker((m, m))])
def test_gradients_flow_into_a_dense_matrix(of: Any) -> None:
    matrix = learned(3, 3)
    x = torch.arange(18.0, dtype=torch.float64).reshape(2, 9)

    def total(entries: torch.Tensor) -> torch.Tensor:
        built = of(Dense(entries))
        return built.apply(x[:, : built.shape[1]], 1).square().sum()

    assert torch.autograd.gradcheck(total, (matrix.array,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_flow_where_the_weights_are_of_another_element_type(dtype: torch.dtype) -> None:
    matrix = learned(4, 3, torch.float32)
    matrix.apply(torch.ones(3, 2, dtype=dtype)).sum().backward()
    assert matrix.array.grad is not None
    torch.testing.assert_close(matrix.array.grad, torch.full((4, 3), 2.0))


@given(applications())
def test_gradients_flow_into_what_a_matrix_is_applied_to(application: tuple[Matrix, np.ndarray, int]) -> None:
    matrix, x, axis = application
    source = torch.from_numpy(x).requires_grad_()
    total = matrix.apply(source, axis).sum()
    (gradient,) = torch.autograd.grad(total, source) if total.requires_grad else (torch.zeros_like(source),)
    ones = np.ones((*x.shape[:axis], matrix.shape[0], *x.shape[axis + 1 :]))
    np.testing.assert_allclose(gradient.numpy(), along(dense(matrix).T, ones, axis), atol=1e-12)


def test_a_learned_matrix_acts_on_numpy_and_is_saved_without_its_gradient() -> None:
    matrix, arrays = learned(4, 3), {}
    entries = matrix.array.detach().numpy()
    assert np.array_equal(matrix.as_matrix(), entries)
    assert np.array_equal(matrix.support, np.ones(4, dtype=bool))
    assert np.array_equal(from_state(to_state(matrix, arrays, "s"), arrays).as_matrix(), entries)
