"""Sums of products that are placed side by side: ``y[:, rows] += x[:, columns] W^T``, in one pass each way.

What a grown weight does is such a sum: the source's rows, rows that are mixed of them, fresh entries. Written with
torch's own slices, pads and concatenations every part would be copied several times, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from growkit.matrices import Dense, Identity, Matrix, RowBlocks, Scaled, Selection


@dataclass(frozen=True)
class Term:
    """One product: ``y[:, rows] += x[:, columns] W^T``, or ``factor * x[:, columns]`` where there is no ``W``.

    Attributes:
        x: What is read, ``(T, ...)``.
        columns: Which of its entries.
        rows: Where it is placed.
        W: ``(rows, columns)``.
        factor: What takes the place of ``W``.
    """

    x: torch.Tensor
    columns: slice
    rows: slice
    W: torch.Tensor | None = None
    factor: float = 1.0


def placed(size: int, terms: list[Term], bias: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of terms, ``(T, size)``.

    Args:
        size: Entries of a row.
        terms: The terms; their ``x`` have as many rows as another.
        bias: ``(size,)``.
    """
    kind = terms[0].x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        terms = [
            Term(t.x.to(dtype), t.columns, t.rows, None if t.W is None else t.W.to(dtype), t.factor) for t in terms
        ]
        bias = None if bias is None else bias.to(dtype)
    tensors: list[torch.Tensor | None] = [bias]
    places: dict[int, int] = {}
    layout: list[tuple[int, slice, slice, int, float]] = []
    for term in terms:
        if id(term.x) not in places:
            places[id(term.x)] = len(tensors)
            tensors.append(term.x)
        weight = 0
        if term.W is not None:
            weight = len(tensors)
            tensors.append(term.W)
        layout.append((places[id(term.x)], term.columns, term.rows, weight, term.factor))
    with torch.autocast(kind, enabled=False):
        made: torch.Tensor = _Placed.apply(size, tuple(layout), *tensors)
    return made


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, size: int, layout: tuple[tuple[int, slice, slice, int, float], ...], *tensors: torch.Tensor
    ) -> torch.Tensor:
        bias, first = tensors[0], tensors[1]
        y = first.new_empty(first.shape[0], size)
        if bias is None:
            y.zero_()
        else:
            y.copy_(bias.expand_as(y))
        for x, columns, rows, weight, factor in layout:
            read = tensors[x][:, columns]
            if weight:
                y[:, rows].addmm_(read, tensors[weight].mT)
            else:
                y[:, rows].add_(read, alpha=factor)
        ctx.layout = layout
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = grads
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        found: list[torch.Tensor | None] = [None] * len(tensors)
        if needed[0]:
            found[0] = g.sum(dim=0)
        for x, columns, rows, weight, factor in ctx.layout:
            part = g[:, rows]
            if weight and needed[weight]:
                found[weight] = part.mT @ tensors[x][:, columns]
            if not needed[x]:
                continue
            if found[x] is None:
                found[x] = torch.zeros_like(tensors[x])
            into = found[x][:, columns]
            if weight:
                into.addmm_(part, tensors[weight])
            else:
                into.add_(part, alpha=factor)
        return None, None, *found


Blocks = list[tuple[slice, Any, float]]
"""Rows of a matrix and what they are: an array, or None for a factor times the identity. Other rows are zero."""


def blocks_of(matrix: Matrix) -> Blocks | None:
    """A matrix as blocks of rows; None where it is of another kind."""
    match matrix:
        case Identity(size):
            return [(slice(0, size), None, 1.0)]
        case Dense(array):
            return [(slice(0, matrix.shape[0]), array, 1.0)]
        case Selection(_, columns, weight) if _is_pad(matrix):
            factor = 1.0 if weight is None else float(weight[0])
            return [(slice(0, columns), None, factor)]
        case Scaled(inner, factor):
            inside = blocks_of(inner)
            if inside is None:
                return None
            return [(rows, None if array is None else array * factor, f * factor) for rows, array, f in inside]
        case RowBlocks(parts):
            found: Blocks = []
            start = 0
            for part in parts:
                inside = blocks_of(part)
                if inside is None:
                    return None
                found += [(slice(start + r.start, start + r.stop), a, f) for r, a, f in inside]
                start += part.shape[0]
            return found
        case _:
            return None


def _is_pad(matrix: Selection) -> bool:
    """Whether a selection is a factor times the identity, and zeros below."""
    d = matrix.columns
    padded = len(matrix.index) >= d and (matrix.index[:d] == np.arange(d)).all() and (matrix.index[d:] < 0).all()
    return bool(padded) and (matrix.weight is None or bool((matrix.weight[:d] == matrix.weight[0]).all()))
