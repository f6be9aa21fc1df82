"""Structured matrices: each knows how to apply itself along an axis, its transpose and its dense form.

Shape legend: ``D`` rows (target entries), ``d`` columns (source entries). Everything is written in terms that numpy
and torch share, so the code that grows a checkpoint in numpy is the code that gradients flow through. Nothing builds a
dense matrix outside :meth:`Matrix.as_matrix`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar, final

import numpy as np

Array = Any
"""A numpy array or a torch tensor."""


FEW_RUNS = 16
"""Up to how many stretches of consecutive entries an index is copied stretch by stretch, not entry by entry."""


def namespace(x: Array) -> Any:
    """The array namespace of ``x``: numpy, or torch."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def overlaid(x: Array, entries: Array, mask: np.ndarray) -> Array:
    """``x`` with the ``entries`` where the mask holds; an ``x`` of numpy's, which bears no gradient, is overwritten."""
    if isinstance(x, np.ndarray):
        np.copyto(x, entries, where=mask)
        return x
    xp = namespace(x)
    return xp.where(xp.asarray(mask, device=x.device), entries, x)


def _reshape_axis(x: Array, axis: int, sizes: Sequence[int]) -> Array:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


class Matrix(ABC):
    """A linear map from ``d`` to ``D`` entries.

    Every kind is final. :meth:`apply` is the only way a matrix acts.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(D, d)``."""

    @abstractmethod
    def apply(self, x: Array, axis: int = 0) -> Array:
        """This matrix times ``x`` along ``axis``: an axis of ``d`` entries becomes one of ``D``."""

    @property
    @abstractmethod
    def mT(self) -> Matrix:
        """The transpose, ``d x D``."""

    @property
    @abstractmethod
    def support(self) -> np.ndarray:
        """``(D,)`` booleans: the rows that are not zero throughout."""

    @property
    def multiplications(self) -> int:
        """Multiplications to apply it to one vector, those by weights of single entries not counted."""
        return 0

    @property
    def is_identity(self) -> bool:
        """Whether applying it changes nothing."""
        return False

    @property
    def is_gather(self) -> bool:
        """Whether every entry it gives is one entry it got, or zero: no arithmetic, so exact in every dtype."""
        return False

    @property
    def pattern(self) -> Matrix | None:
        """The unweighted selection this matrix is a weighting of, where it has at most one entry in each row."""
        return None

    def as_matrix(self) -> np.ndarray:
        """The dense form, ``(D, d)`` float64: the oracle of the tests."""
        dense: np.ndarray = np.asarray(self.apply(np.eye(self.shape[1]), axis=0))
        return dense

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"


@final
@dataclass(frozen=True, repr=False)
class Identity(Matrix):
    """The identity of ``size`` entries."""

    kind: ClassVar[str] = "identity"
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def apply(self, x: Array, axis: int = 0) -> Array:
        return x

    @property
    def mT(self) -> Matrix:
        return self

    @property
    def support(self) -> np.ndarray:
        return np.ones(self.size, dtype=bool)

    @property
    def is_identity(self) -> bool:
        return True

    @property
    def is_gather(self) -> bool:
        return True

    @property
    def pattern(self) -> Matrix | None:
        return self


@final
@dataclass(frozen=True, repr=False, eq=False)
class Selection(Matrix):
    """Row ``i`` is ``weight[i]`` times the unit row ``index[i]``; an index of -1 is a zero row.

    A gather, never a matmul: duplication, zero-padding and their scaled forms.

    Attributes:
        index: ``(D,)`` integers below ``columns``.
        columns: ``d``.
        weight: ``(D,)``, or None where every weight is 1.
    """

    kind: ClassVar[str] = "selection"
    index: np.ndarray
    columns: int
    weight: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.index), self.columns

    @cached_property
    def counts(self) -> np.ndarray:
        """``(d,)``: how many rows select each column."""
        return np.bincount(self.index[self.index >= 0], minlength=self.columns)

    def apply(self, x: Array, axis: int = 0) -> Array:
        return _weighted(_gather(x, self.index, axis), self.weight, axis)

    @property
    def mT(self) -> Matrix:
        return _Gathering(self)

    @property
    def support(self) -> np.ndarray:
        chosen: np.ndarray = self.index >= 0
        return chosen if self.weight is None else chosen & (self.weight != 0)

    @property
    def is_gather(self) -> bool:
        return self.weight is None

    @property
    def pattern(self) -> Matrix | None:
        return Selection(self.index, self.columns)


@final
@dataclass(frozen=True, repr=False, eq=False)
class _Gathering(Matrix):
    """The transpose of a selection: each source entry gathers the sum of its copies."""

    kind: ClassVar[str] = "gathering"
    selection: Selection

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.selection.shape
        return columns, rows

    @cached_property
    def _copies(self) -> np.ndarray:
        """``(most copies, d)``: the rows that select each column, filled up with -1."""
        index, counts = self.selection.index, self.selection.counts
        table = np.full((max(int(counts.max(initial=0)), 1), self.selection.columns), -1)
        order = np.argsort(index, kind="stable")
        order = order[index[order] >= 0]
        starts = np.cumsum(counts) - counts
        table[np.arange(len(order)) - starts[index[order]], index[order]] = order
        return table

    def apply(self, x: Array, axis: int = 0) -> Array:
        weighted = _weighted(x, self.selection.weight, axis)
        total = _gather(weighted, self._copies[0], axis)
        for copy in self._copies[1:]:
            total = total + _gather(weighted, copy, axis)
        return total

    @property
    def mT(self) -> Matrix:
        return self.selection

    @property
    def support(self) -> np.ndarray:
        chosen = np.zeros(self.selection.columns, dtype=bool)
        chosen[self.selection.index[self.selection.support]] = True
        return chosen


def _gather(x: Array, index: np.ndarray, axis: int) -> Array:
    """Entries ``index`` of ``x`` along ``axis``; -1 gives zero."""
    xp, lead = namespace(x), (slice(None),) * axis

    def zeros(count: int) -> Array:
        zero = xp.zeros((), dtype=x.dtype, device=x.device)
        return xp.broadcast_to(zero, (*x.shape[:axis], count, *x.shape[axis + 1 :]))

    runs = _runs(index)
    if len(runs) == 1 and runs[0][0] >= 0:
        return x[(*lead, slice(runs[0][0], runs[0][-1] + 1))]
    if 0 < len(runs) <= FEW_RUNS:
        parts = [zeros(len(run)) if run[0] < 0 else x[(*lead, slice(run[0], run[-1] + 1))] for run in runs]
        return xp.concatenate(parts, axis=axis)
    if (index < 0).any():  # one zero entry after the last, which is what -1 names
        x = xp.concatenate([x, zeros(1)], axis=axis)
    # numpy's own fancy indexing is several times slower than its take, which torch names otherwise
    if xp is np:
        return np.take(x, index, axis)
    return x.index_select(axis, xp.asarray(np.where(index < 0, x.shape[axis] - 1, index), device=x.device))


def _runs(index: np.ndarray) -> list[np.ndarray]:
    """An index cut where it neither goes on to the next entry nor stays at -1."""
    follows = index[1:] == np.where(index[:-1] < 0, -1, index[:-1] + 1)
    return np.split(index, np.flatnonzero(~follows) + 1) if len(index) else []


def _weighted(x: Array, weight: np.ndarray | None, axis: int) -> Array:
    if weight is None:
        return x
    factors = namespace(x).asarray(weight, dtype=x.dtype, device=x.device)
    return x * factors.reshape(-1, *(1,) * (x.ndim - axis - 1))


def _cast(x: Array, dtype: Any) -> Array:
    """``x`` in another element type; gradients flow through, which torch's ``asarray`` does not promise."""
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


def _on_host(x: Array) -> Array:
    """``x`` as numpy can read it: in the host's memory, and without a gradient."""
    return x.detach().cpu() if hasattr(x, "detach") else x


def pad(rows: int, columns: int) -> Matrix:
    """``[I; 0]``, ``(rows, columns)``: the source's entries first, then zeros."""
    return (
        Identity(rows)
        if rows == columns
        else Selection(np.r_[np.arange(columns), np.full(rows - columns, -1)], columns)
    )


@final
@dataclass(frozen=True, repr=False)
class MeanFill(Matrix):
    """``[1_n (x) I; (1/d) 1 1^T]``: copies, then the source's mean in what is left (LEMON's residue)."""

    kind: ClassVar[str] = "mean_fill"
    rows: int
    columns: int
    copies: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def residue(self) -> int:
        """``D - n d``: how many rows hold the mean."""
        return self.rows - self.copies * self.columns

    def apply(self, x: Array, axis: int = 0) -> Array:
        xp = namespace(x)
        mean = xp.mean(x, axis=axis)
        shape = (*x.shape[:axis], self.residue, *x.shape[axis + 1 :])
        fill = xp.broadcast_to(mean.reshape(*x.shape[:axis], 1, *x.shape[axis + 1 :]), shape)
        return xp.concatenate([*[x] * self.copies, fill], axis=axis)

    @property
    def mT(self) -> Matrix:
        return _MeanSpread(self)

    @property
    def support(self) -> np.ndarray:
        return np.ones(self.rows, dtype=bool)


@final
@dataclass(frozen=True, repr=False)
class _MeanSpread(Matrix):
    """The transpose of a mean-fill: copies are summed, the sum of the residue is spread evenly over the source's."""

    kind: ClassVar[str] = "mean_spread"
    fill: MeanFill

    @property
    def shape(self) -> tuple[int, int]:
        return self.fill.columns, self.fill.rows

    def apply(self, x: Array, axis: int = 0) -> Array:
        xp, lead, copied = namespace(x), (slice(None),) * axis, self.fill.copies * self.fill.columns
        copies = _reshape_axis(x[(*lead, slice(None, copied))], axis, [self.fill.copies, self.fill.columns])
        total = xp.sum(x[(*lead, slice(copied, None))], axis=axis) / self.fill.columns
        return xp.sum(copies, axis=axis) + total.reshape(*x.shape[:axis], 1, *x.shape[axis + 1 :])

    @property
    def mT(self) -> Matrix:
        return self.fill

    @property
    def support(self) -> np.ndarray:
        return np.ones(self.fill.columns, dtype=bool)


@final
@dataclass(frozen=True, repr=False, eq=False)
class Dense(Matrix):
    """An unstructured matrix; ``array`` is ``(D, d)``, numpy or torch (then gradients flow into it)."""

    kind: ClassVar[str] = "dense"
    array: Array

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.array.shape
        return rows, columns

    def apply(self, x: Array, axis: int = 0) -> Array:
        xp = namespace(x)
        matrix = self.array if namespace(self.array) is xp else xp.asarray(_on_host(self.array), device=x.device)
        matrix = matrix if matrix.dtype == x.dtype else _cast(matrix, x.dtype)
        if axis == x.ndim - 1:
            return x @ matrix.mT
        rest = xp.moveaxis(x, axis, 0)
        product = matrix @ rest.reshape(self.shape[1], -1)
        return xp.moveaxis(product.reshape(self.shape[0], *rest.shape[1:]), 0, axis)

    @property
    def mT(self) -> Matrix:
        return Dense(self.array.mT)

    def as_matrix(self) -> np.ndarray:
        # Not by apply, where an entry that is not finite would spread.
        dense: np.ndarray = np.asarray(_cast(_on_host(self.array), namespace(self.array).float64))
        return dense

    @property
    def multiplications(self) -> int:
        return prod(self.shape)

    @property
    def support(self) -> np.ndarray:
        rows: np.ndarray = np.asarray(_on_host(namespace(self.array).any(self.array != 0, axis=1)))
        return rows


@final
@dataclass(frozen=True, repr=False)
class Scaled(Matrix):
    """``factor`` times ``matrix``."""

    kind: ClassVar[str] = "scaled"
    matrix: Matrix
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def apply(self, x: Array, axis: int = 0) -> Array:
        return self.matrix.apply(x, axis) * self.factor

    @property
    def mT(self) -> Matrix:
        return Scaled(self.matrix.mT, self.factor)

    @property
    def multiplications(self) -> int:
        return self.matrix.multiplications

    @property
    def support(self) -> np.ndarray:
        return self.matrix.support if self.factor != 0 else np.zeros(self.shape[0], dtype=bool)

    @property
    def pattern(self) -> Matrix | None:
        return self.matrix.pattern


@final
@dataclass(frozen=True, repr=False)
class Kronecker(Matrix):
    """The Kronecker product of ``factors``: one matrix per space of a product axis, row-major.

    ``(A (x) B) vec(X)`` is computed as ``A X B^T``: each factor is applied along its own axis.
    """

    kind: ClassVar[str] = "kronecker"
    factors: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return prod(f.shape[0] for f in self.factors), prod(f.shape[1] for f in self.factors)

    def apply(self, x: Array, axis: int = 0) -> Array:
        x = _reshape_axis(x, axis, [factor.shape[1] for factor in self.factors])
        for offset, factor in enumerate(self.factors):
            x = factor.apply(x, axis + offset)
        return x.reshape(*x.shape[:axis], self.shape[0], *x.shape[axis + len(self.factors) :])

    @property
    def mT(self) -> Matrix:
        return Kronecker(tuple(factor.mT for factor in self.factors))

    @property
    def multiplications(self) -> int:
        total = 0
        for i, factor in enumerate(self.factors):  # the factors before it are applied already, those behind it are not
            done, waiting = self.factors[:i], self.factors[i + 1 :]
            total += factor.multiplications * prod(f.shape[0] for f in done) * prod(f.shape[1] for f in waiting)
        return total

    @property
    def support(self) -> np.ndarray:
        rows = np.ones(1, dtype=bool)
        for factor in self.factors:
            rows = np.logical_and.outer(rows, factor.support).reshape(-1)
        return rows

    @property
    def is_identity(self) -> bool:
        return all(factor.is_identity for factor in self.factors)

    @property
    def is_gather(self) -> bool:
        return all(factor.is_gather for factor in self.factors)

    @property
    def pattern(self) -> Matrix | None:
        patterns = [factor.pattern for factor in self.factors]
        return None if None in patterns else Kronecker(tuple(p for p in patterns if p is not None))


@dataclass(frozen=True, repr=False)
class _Segmented(Matrix):
    """One matrix for each segment of an axis, however the segments lie."""

    blocks: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(b.shape[0] for b in self.blocks), sum(b.shape[1] for b in self.blocks)

    @property
    def multiplications(self) -> int:
        return sum(block.multiplications for block in self.blocks)

    @property
    def is_identity(self) -> bool:
        return all(block.is_identity for block in self.blocks)

    @property
    def is_gather(self) -> bool:
        return all(block.is_gather for block in self.blocks)


@final
@dataclass(frozen=True, repr=False)
class Concatenation(_Segmented):
    """The block diagonal of ``blocks``: one matrix per segment of a concatenated axis."""

    kind: ClassVar[str] = "concatenation"

    def apply(self, x: Array, axis: int = 0) -> Array:
        lead, parts, start = (slice(None),) * axis, [], 0
        for block in self.blocks:
            stop = start + block.shape[1]
            parts.append(block.apply(x[(*lead, slice(start, stop))], axis))
            start = stop
        return namespace(x).concatenate(parts, axis=axis)

    @property
    def mT(self) -> Matrix:
        return Concatenation(tuple(block.mT for block in self.blocks))

    @property
    def support(self) -> np.ndarray:
        return np.concatenate([block.support for block in self.blocks])

    @property
    def pattern(self) -> Matrix | None:
        patterns = [block.pattern for block in self.blocks]
        return None if None in patterns else Concatenation(tuple(p for p in patterns if p is not None))


@final
@dataclass(frozen=True, repr=False)
class Interleaved(_Segmented):
    """One matrix for each segment of an axis whose segments alternate: GPT-NeoX's ``(heads 3 head_dim)``.

    Attributes:
        blocks: The matrix of each segment, over all of its own entries, ``(heads head_dim)``.
        runs: How often the segments take turns in the target and in the source: ``(H', H)``.
    """

    kind: ClassVar[str] = "interleaved"
    runs: tuple[int, int]

    def apply(self, x: Array, axis: int = 0) -> Array:
        wide_runs, runs = self.runs
        x = _reshape_axis(x, axis, [runs, x.shape[axis] // runs])
        lead, segments, start = (slice(None),) * (axis + 1), [], 0
        for block in self.blocks:
            stop = start + block.shape[1] // runs
            segment = x[(*lead, slice(start, stop))]
            segment = block.apply(segment.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), axis)
            segments.append(_reshape_axis(segment, axis, [wide_runs, block.shape[0] // wide_runs]))
            start = stop
        joined = namespace(x).concatenate(segments, axis=axis + 1)
        return joined.reshape(*joined.shape[:axis], self.shape[0], *joined.shape[axis + 2 :])

    @property
    def mT(self) -> Matrix:
        return Interleaved(tuple(block.mT for block in self.blocks), self.runs[::-1])

    @property
    def support(self) -> np.ndarray:
        rows = [block.support.reshape(self.runs[0], -1) for block in self.blocks]
        return np.concatenate(rows, axis=1).reshape(-1)

    @property
    def pattern(self) -> Matrix | None:
        patterns = [block.pattern for block in self.blocks]
        return None if None in patterns else Interleaved(tuple(p for p in patterns if p is not None), self.runs)


@final
@dataclass(frozen=True, repr=False)
class RowBlocks(Matrix):
    """``[A; B; ...]``: blocks of as many columns, one below the other (LiGO's ``[I; C]``)."""

    kind: ClassVar[str] = "row_blocks"
    blocks: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(block.shape[0] for block in self.blocks), self.blocks[0].shape[1]

    def apply(self, x: Array, axis: int = 0) -> Array:
        return namespace(x).concatenate([block.apply(x, axis) for block in self.blocks], axis=axis)

    @property
    def mT(self) -> Matrix:
        return ColumnBlocks(tuple(block.mT for block in self.blocks))

    @property
    def multiplications(self) -> int:
        return sum(block.multiplications for block in self.blocks)

    @property
    def support(self) -> np.ndarray:
        return np.concatenate([block.support for block in self.blocks])

    @property
    def is_gather(self) -> bool:
        return all(block.is_gather for block in self.blocks)


@final
@dataclass(frozen=True, repr=False)
class ColumnBlocks(Matrix):
    """``[A B ...]``: blocks of as many rows, side by side."""

    kind: ClassVar[str] = "column_blocks"
    blocks: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks[0].shape[0], sum(block.shape[1] for block in self.blocks)

    def apply(self, x: Array, axis: int = 0) -> Array:
        lead, total, start = (slice(None),) * axis, None, 0
        for block in self.blocks:
            stop = start + block.shape[1]
            part = block.apply(x[(*lead, slice(start, stop))], axis)
            total, start = part if total is None else total + part, stop
        return total

    @property
    def mT(self) -> Matrix:
        return RowBlocks(tuple(block.mT for block in self.blocks))

    @property
    def multiplications(self) -> int:
        return sum(block.multiplications for block in self.blocks)

    @property
    def support(self) -> np.ndarray:
        rows: np.ndarray = np.logical_or.reduce([block.support for block in self.blocks])
        return rows


@final
@dataclass(frozen=True, repr=False)
class Composition(Matrix):
    """``left right``: the right matrix is applied first."""

    kind: ClassVar[str] = "composition"
    left: Matrix
    right: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def apply(self, x: Array, axis: int = 0) -> Array:
        return self.left.apply(self.right.apply(x, axis), axis)

    @property
    def mT(self) -> Matrix:
        return Composition(self.right.mT, self.left.mT)

    @property
    def multiplications(self) -> int:
        return self.left.multiplications + self.right.multiplications

    @property
    def support(self) -> np.ndarray:
        probe = np.random.default_rng(0).standard_normal(self.shape[1])
        rows: np.ndarray = self.apply(probe) != 0
        return rows

    @property
    def is_identity(self) -> bool:
        return self.left.is_identity and self.right.is_identity

    @property
    def is_gather(self) -> bool:
        return self.left.is_gather and self.right.is_gather


def scaled(matrix: Matrix, factor: float) -> Matrix:
    """``factor`` times ``matrix``; the matrix itself where the factor is 1."""
    return matrix if factor == 1 else Scaled(matrix, factor)


def kronecker(*factors: Matrix) -> Matrix:
    """The Kronecker product; of one factor, that factor; of identities, an identity."""
    if all(factor.is_identity for factor in factors):
        return Identity(prod(factor.shape[0] for factor in factors))
    return factors[0] if len(factors) == 1 else Kronecker(factors)


def composed(left: Matrix, right: Matrix) -> Matrix:
    """``left right``; the other one where one is the identity."""
    return right if left.is_identity else left if right.is_identity else Composition(left, right)


def block_diagonal(*blocks: Matrix) -> Matrix:
    """The block diagonal; of one block, that block; of identities, an identity."""
    if all(block.is_identity for block in blocks):
        return Identity(sum(block.shape[0] for block in blocks))
    return blocks[0] if len(blocks) == 1 else Concatenation(blocks)


def interleaved(*blocks: Matrix, runs: tuple[int, int]) -> Matrix:
    """Alternating segments; of one run, the block diagonal; of identities, an identity.

    Args:
        blocks: One matrix for each segment.
        runs: How often the segments alternate in the target and in the source.
    """
    in_one_run = runs == (1, 1) or all(block.is_identity for block in blocks)
    return block_diagonal(*blocks) if in_one_run else Interleaved(blocks, runs)


# --- saving --------------------------------------------------------------------------------------------------------

State = dict[str, Any]


def to_state(matrix: Matrix, arrays: dict[str, np.ndarray], prefix: str) -> State:
    """The matrix as plain data; its arrays go into ``arrays`` under names that start with ``prefix``."""

    def keep(name: str, array: Array) -> str:
        arrays[f"{prefix}.{name}"] = np.asarray(array)
        return f"{prefix}.{name}"

    state: State = {"kind": matrix.kind}
    match matrix:
        case Identity(size):
            state |= {"size": size}
        case Selection():
            state |= {"columns": matrix.columns, "index": keep("index", matrix.index)}
            if matrix.weight is not None:
                state |= {"weight": keep("weight", matrix.weight)}
        case MeanFill(rows, columns, copies):
            state |= {"rows": rows, "columns": columns, "copies": copies}
        case Dense(array):
            state |= {"array": keep("array", _on_host(array))}
        case Scaled(inner, factor):
            state |= {"matrix": to_state(inner, arrays, f"{prefix}.matrix"), "factor": factor}
        case Kronecker(parts) | Concatenation(parts) | RowBlocks(parts) | ColumnBlocks(parts):
            state |= {"parts": [to_state(part, arrays, f"{prefix}.{i}") for i, part in enumerate(parts)]}
        case Interleaved(parts, runs):
            parts_state = [to_state(part, arrays, f"{prefix}.{i}") for i, part in enumerate(parts)]
            state |= {"parts": parts_state, "runs": list(runs)}
        case Composition(left, right):
            state |= {"left": to_state(left, arrays, f"{prefix}.left")}
            state |= {"right": to_state(right, arrays, f"{prefix}.right")}
        case _:  # a transpose: saved as what it is the transpose of
            state |= {"kind": "transpose", "matrix": to_state(matrix.mT, arrays, f"{prefix}.matrix")}
    return state


def from_state(state: State, arrays: dict[str, np.ndarray]) -> Matrix:
    """The inverse of :func:`to_state`."""
    match state["kind"]:
        case "identity":
            return Identity(state["size"])
        case "selection":
            weight = arrays[state["weight"]] if "weight" in state else None
            index, columns = arrays[state["index"]], state["columns"]
            if index.min(initial=-1) < -1 or index.max(initial=-1) >= columns:
                raise ValueError(f"a selection names entries outside 0 to {columns - 1}")
            return Selection(index, columns, weight)
        case "mean_fill":
            return MeanFill(int(state["rows"]), int(state["columns"]), int(state.get("copies", 1)))
        case "dense":
            return Dense(arrays[state["array"]])
        case "scaled":
            return Scaled(from_state(state["matrix"], arrays), state["factor"])
        case "kronecker":
            return Kronecker(tuple(from_state(part, arrays) for part in state["parts"]))
        case "concatenation":
            return Concatenation(tuple(from_state(part, arrays) for part in state["parts"]))
        case "interleaved":
            rows, columns = state["runs"]
            return Interleaved(tuple(from_state(part, arrays) for part in state["parts"]), (rows, columns))
        case "row_blocks":
            return RowBlocks(tuple(from_state(part, arrays) for part in state["parts"]))
        case "column_blocks":
            return ColumnBlocks(tuple(from_state(part, arrays) for part in state["parts"]))
        case "composition":
            return Composition(from_state(state["left"], arrays), from_state(state["right"], arrays))
        case "transpose":
            return from_state(state["matrix"], arrays).mT
        case kind:
            raise ValueError(f"unknown matrix kind {kind!r}")
