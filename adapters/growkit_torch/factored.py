"""Grown weights that act without being made: ``y = B (sum_j w_j W_j) (A^T x) + Z x``.

Shape legend: ``M`` is the blend ``sum_j w_j W_j``, ``(o, i)``; the grown weight ``B M A^T + Z`` is ``(O, I)``; ``x`` is
``(T, I)``, ``T`` its rows. A grown weight stands in a module, or in a graph, in the place of a tensor. The products
that models are made of know its factors; whatever else is done with it is done with the matrix that they make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from growkit.matrices import Dense, Matrix
from growkit_specs.recipe import Strategy
from growkit_torch.placed import Term, blocks_of, placed


@dataclass(frozen=True)
class Fresh:
    """The entries ``Z`` of a weight, ``(O, I)``, in the parts that hold any.

    What is beside the source's entries, ``(o, I - i)``, what is below them, ``(O - o, I)``, and, where a mean is filled
    in, one number for each row in their place; or all of them.

    Attributes:
        shape: ``(O, I)``.
        parts: Entries, and the rows and columns they stand in; one column of them stands for all, and so does one row.
    """

    shape: tuple[int, int]
    parts: tuple[tuple[torch.Tensor, slice, slice], ...]

    @classmethod
    def of(cls, entries: torch.Tensor, source: tuple[int, int]) -> Fresh:
        """Fresh entries beside a source tensor of a shape; those that are zero are let go."""
        (o, i), (O, I) = source, entries.shape  # noqa: E741 - the equation's letter
        level = entries[:o, :i].mean(dim=1, keepdim=True)
        rounding = 32 * torch.finfo(entries.dtype).eps * entries.abs().max()
        if (entries[:o, :i] - level).abs().max() > rounding:
            return cls.whole(entries)
        places = ((slice(0, o), slice(i, I)), (slice(o, O), slice(0, I)))
        parts = [(entries[rows, columns].clone(), rows, columns) for rows, columns in places]
        parts.append((level if (level.abs() > rounding).any() else level[:0], slice(0, o), slice(0, i)))
        return cls((O, I), tuple(part for part in parts if part[0].numel() and part[0].any()))

    @classmethod
    def whole(cls, entries: torch.Tensor) -> Fresh:
        """Fresh entries anywhere."""
        O, I = entries.shape  # noqa: E741 - the equation's letter
        return cls((O, I), ((entries, slice(0, O), slice(0, I)),))

    @cached_property
    def mT(self) -> Fresh:
        """The transpose."""
        return Fresh(self.shape[::-1], tuple((part.mT, columns, rows) for part, rows, columns in self.parts))

    @property
    def multiplications(self) -> int:
        """Multiplications to apply it to one vector."""
        return sum(part.numel() for part, _, _ in self.parts)

    @property
    def is_learned(self) -> bool:
        """Whether its entries are learned."""
        return any(part.requires_grad for part, _, _ in self.parts)

    @property
    def entries(self) -> torch.Tensor:
        """All entries, ``(O, I)``."""
        if len(self.parts) == 1 and self.parts[0][0].shape == self.shape:
            return self.parts[0][0]
        whole = self.parts[0][0].new_zeros(self.shape)
        for part, rows, columns in self.parts:
            whole[rows, columns] = part
        return whole

    def terms(self, x: torch.Tensor) -> list[Term]:
        """``Z x`` as terms of a sum, ``x`` being ``(T, I)``."""
        found = []
        for part, rows, columns in self.parts:
            read, among = x, columns
            if part.shape[1] == 1 < columns.stop - columns.start:
                read, among = x[:, columns].sum(dim=1, keepdim=True), slice(0, 1)
            W = part.expand(rows.stop - rows.start, -1) if part.shape[0] == 1 else part
            found.append(Term(read, among, rows, W))
        return found

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of it, as an embedding looks them up; there is no other part than what is beside the source's."""
        found = (F.embedding(index, part).expand(*index.shape, c.stop - c.start) for part, _, c in self.parts)
        places = ((c.start, self.shape[1] - c.stop) for _, _, c in self.parts)
        each = [F.pad(part, place) for part, place in zip(found, places, strict=True)]
        return sum(each[1:], each[0])


class Reads:
    """What is read, ``A^T x``, kept for the weights that read the same after it: queries, keys and values."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.rows: torch.Tensor
        self.read: dict[Matrix, torch.Tensor] = {}

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor as its rows, ``(T, I)``."""
        if self.x is not x:
            self.x, self.rows, self.read = x, x.reshape(-1, x.shape[-1]), {}
        return self.rows

    def __call__(self, A: Matrix, x: torch.Tensor) -> torch.Tensor:
        """``A^T x`` of every row, ``(T, i)``."""
        rows = self.rows_of(x)
        if A.is_identity:
            return rows
        if A not in self.read:
            blocks = blocks_of(A)
            if blocks is None:
                self.read[A] = A.mT.apply(rows, 1)
            elif len(blocks) == 1 and blocks[0][1:] == (None, 1.0):
                self.read[A] = rows[:, blocks[0][0]]
            else:
                whole = slice(0, A.shape[1])
                terms = [Term(rows, at, whole, W if W is None else W.mT, f) for at, W, f in blocks]
                self.read[A] = placed(A.shape[1], terms)
        return self.read[A]


@dataclass(frozen=True)
class Factors:
    """A grown weight as its factors.

    Attributes:
        B: Its rows' matrix, ``(O, o)``.
        M: The blend, ``(o, i)``.
        A: Its columns' matrix, ``(I, i)``.
        Z: Its fresh entries, where there are any.
        reads: Where what is read is kept.
        strategy: How it acts.
        readers: How many weights, this one among them, read what it reads.
    """

    B: Matrix
    M: torch.Tensor
    A: Matrix
    Z: Fresh | None = None
    reads: Reads = field(default_factory=Reads)
    strategy: Strategy = "auto"
    readers: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.B.shape[0], self.A.shape[0]

    @cached_property
    def matrix(self) -> torch.Tensor:
        """``B M A^T + Z``, made once; of what it is made nothing is kept but the factors."""
        return self.made()

    def made(self) -> torch.Tensor:
        """``B M A^T + Z``, made anew."""
        B, A, Z = self.B, self.A, self.Z  # what the gradient holds on to must not hold the matrix in turn

        def make(M: torch.Tensor) -> torch.Tensor:
            grown = A.apply(B.apply(M, 0), 1)
            return grown if Z is None else grown + Z.entries

        made: torch.Tensor = checkpoint(make, self.M, use_reentrant=False, preserve_rng_state=False)
        return made

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None, *, turned: bool = False) -> torch.Tensor:
        """``W x + bias`` for each row of ``x``; where it is ``turned``, ``W^T x``."""
        if self.is_made(x.numel() // x.shape[-1] if x.shape[-1] else 0):
            return F.linear(x, self.matrix.mT if turned else self.matrix, bias)
        B, M, A, Z = (self.A, self.M.mT, self.B, self.Z and self.Z.mT) if turned else (self.B, self.M, self.A, self.Z)
        if B.is_identity and Z is None:
            return F.linear(self.reads(A, x), M, bias).reshape(*x.shape[:-1], B.shape[0])
        y = F.linear(self.reads(A, x), M)
        size, blocks = B.shape[0], blocks_of(B)
        if blocks is None:
            y, blocks = B.apply(y, 1), [(slice(0, size), None, 1.0)]
        terms = [Term(y, slice(0, y.shape[1]), rows, W, factor) for rows, W, factor in blocks]
        terms += Z.terms(self.reads.rows_of(x)) if Z is not None else []
        whole = placed(size, terms, bias if bias is None or bias.ndim == 1 else None).reshape(*x.shape[:-1], size)
        return whole if bias is None or bias.ndim == 1 else whole + bias

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows of an index, as an embedding looks them up."""
        if not self.B.is_identity:
            return F.embedding(index, self.whole)
        y = self.A.apply(F.embedding(index, self.M), index.ndim)
        return y if self.Z is None or not self.Z.parts else y + self.Z.rows(index)

    @property
    def whole(self) -> torch.Tensor:
        """The matrix, for what knows no factors; not kept where factors are asked for."""
        return self.made() if self.strategy == "factored" else self.matrix

    def is_made(self, rows: int) -> bool:
        """Whether the matrix is made, and not its factors applied to ``rows`` rows of ``x``."""
        if self.strategy != "auto":
            return self.strategy == "materialised"
        return "matrix" in self.__dict__ or self.cost_made(rows) < self.cost_factored(rows)

    def cost_factored(self, rows: int) -> int:
        """Multiplications to apply the factors to ``rows`` rows of ``x``, and for the gradients."""
        o, i = self.M.shape
        fresh = self.Z.multiplications if self.Z is not None else 0
        moved = self.B.multiplications + o * i + self.A.multiplications / self.readers + fresh
        learned = _learned(self.B) + _learned(self.A) / self.readers + (o * i if self.M.requires_grad else 0)
        learned += fresh if self.Z is not None and self.Z.is_learned else 0
        return round(rows * (2 * moved + learned))

    def cost_made(self, rows: int) -> int:
        """Multiplications to make the matrix, again for its gradient, and to apply it to ``rows`` rows of ``x``."""
        O, I = self.shape  # noqa: E741 - the equation's letter
        i = self.M.shape[1]
        once = self.B.multiplications * i + self.A.multiplications * O
        learned = _learned(self.B) * i + _learned(self.A) * O
        return rows * 3 * O * I + 3 * once + learned


def _learned(matrix: Matrix) -> int:
    """Multiplications for the gradient of what is learned of a matrix, for one vector."""
    return matrix.multiplications if _learns(matrix) else 0


def _learns(matrix: Matrix) -> bool:
    if isinstance(matrix, Dense):
        return isinstance(matrix.array, torch.Tensor) and matrix.array.requires_grad
    inner = (getattr(matrix, name, ()) for name in ("matrix", "left", "right", "factors", "blocks"))
    parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
    return any(_learns(part) for part in parts if isinstance(part, Matrix))


class GrownWeight(torch.Tensor):
    """A tensor that stands for a grown weight; ``turned`` for its transpose."""

    factors: Factors
    turned: bool

    @staticmethod
    def __new__(cls, factors: Factors, turned: bool = False) -> GrownWeight:
        """A tensor of the grown weight's shape, which holds no numbers."""
        shape = factors.shape[::-1] if turned else factors.shape
        made: GrownWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=factors.M.dtype, device=factors.M.device
        )
        made.factors, made.turned = factors, turned
        return made

    @property
    def matrix(self) -> torch.Tensor:
        """The matrix itself."""
        return self.factors.whole.mT if self.turned else self.factors.whole

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What the products make of the factors, and everything else of the matrix."""
        kwargs = dict(kwargs or {})
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs)
        known = _PRODUCTS.get(func) if not _OPERANDS & kwargs.keys() else None
        result = known(*args, **kwargs) if known is not None else NotImplemented
        if result is not NotImplemented:
            return result
        return func(*map(_made, args), **{name: _made(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below torch's functions nothing knows the factors."""
        return func(*map(_made, args), **{name: _made(value) for name, value in (kwargs or {}).items()})


def _made(value: Any) -> Any:
    """A value with every grown weight in it as its matrix."""
    if isinstance(value, GrownWeight):
        return value.matrix
    if isinstance(value, (tuple, list)) and any(isinstance(each, GrownWeight) for each in value):
        return type(value)(map(_made, value))
    return value


def _linear(x: Any, weight: Any, bias: torch.Tensor | None = None) -> Any:
    if not isinstance(weight, GrownWeight) or isinstance(x, GrownWeight):
        return NotImplemented
    return weight.factors.linear(x, bias, turned=weight.turned)


def _matmul(x: Any, weight: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(weight, GrownWeight) or isinstance(x, GrownWeight) or x.ndim < 2:
        return NotImplemented
    return weight.factors.linear(x, turned=not weight.turned)


def _addmm(bias: Any, x: Any, weight: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(weight, GrownWeight) or isinstance(x, GrownWeight):
        return NotImplemented
    return weight.factors.linear(x, bias, turned=not weight.turned)


def _embedding(
    index: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Padding has no gradient of its own here, and none flows into the source's rows anyway."""
    if not isinstance(weight, GrownWeight) or weight.turned or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    return weight.factors.rows(index)


def _index_select(weight: Any, dim: int, index: Any) -> Any:
    if not isinstance(weight, GrownWeight) or weight.turned or dim % 2 != 0:
        return NotImplemented
    return weight.factors.rows(index)


def _same(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """A weight moved to where it is, in the element type it has."""
    wanted = {*args, *kwargs.values()}
    return weight if wanted <= {weight.device, weight.dtype, str(weight.device), False, None} else NotImplemented


def _turned(weight: Any, *axes: Any) -> Any:
    if not isinstance(weight, GrownWeight) or (axes and {axis % 2 for axis in axes} != {0, 1}):
        return NotImplemented
    return GrownWeight(weight.factors, not weight.turned)


def _getter(name: str) -> Any:
    """What torch calls to get an attribute of a tensor."""
    return getattr(torch.Tensor, name).__get__


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: lambda weight, x: _matmul(x, weight),
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.embedding: lambda weight, index, padding_idx=-1, *how: _embedding(index, weight, None, None, 2.0, *how),
    torch.index_select: _index_select,
    torch.Tensor.index_select: _index_select,
    torch.Tensor.to: _same,
    torch.t: _turned,
    torch.Tensor.t: _turned,
    torch.transpose: _turned,
    torch.Tensor.transpose: _turned,
    **{_getter(name): _turned for name in ("T", "mT")},
}
"""What knows the factors; each gives NotImplemented where it does not know them after all."""

_OPERANDS = {"input", "self", "other", "mat1", "mat2", "mat", "dim0", "dim1"}
"""Operands that torch's own code never gives by name; where they are, the matrix is taken."""

_FACTS = {
    *map(
        _getter,
        (
            "shape",
            "dtype",
            "device",
            "layout",
            "ndim",
            "requires_grad",
            "is_meta",
            "is_cuda",
            "is_cpu",
            "is_sparse",
            "is_nested",
            "is_quantized",
            "is_leaf",
            "grad_fn",
        ),
    ),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
    torch.Tensor.element_size,
    torch.Tensor.__len__,
    torch.Tensor.get_device,
    torch.Tensor.type,
}
"""What asks for nothing but the shape, the element type or the place."""
