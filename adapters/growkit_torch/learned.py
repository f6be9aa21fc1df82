"""What is learned of a growth operator, as torch parameters, and the operator that they make.

An operator that is learned begins as a closed form. Each space's matrices keep the rows that the source's entries
have there, ``[I; C]``, and learn the others (LiGO's published form), or learn every entry; each slot learns its own
blend of layers. (Wang et al., LiGO, ICLR 2023, section 3; structures and ties: the authors' code.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from growkit.matrices import (
    Composition,
    Dense,
    Identity,
    Matrix,
    MeanFill,
    RowBlocks,
    Scaled,
    Selection,
)
from growkit.operator import Expansion, GrowthOperator
from growkit_specs import FitSettings, GrowkitError, LayerGraph, Tensor, parse_layout
from growkit_specs.layout import Axis, Concatenation, Fixed, Product, product, spaces_of

Entries = Sequence[Any]
Made = Callable[[Entries], Matrix]
"""Makes a matrix out of the entries that are learned."""


class LearnedOperator(torch.nn.Module):
    """The parameters of an operator that is learned.

    Args:
        start: The operator to begin with.
        source: The source's graph.
        target: The larger model's graph.
        settings: What is learned.
        weights: The source's tensors by name, where they are learned along.

    Raises:
        GrowkitError: Where a structure is asked for a space that does not grow or is not there, or nothing is learned.
    """

    def __init__(
        self,
        start: GrowthOperator,
        source: LayerGraph,
        target: LayerGraph,
        settings: FitSettings,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.start, self.source, self.target, self.settings = start, source, target, settings
        self.entries = torch.nn.ParameterList()
        self.names: list[str] = []
        self._blends: dict[str, int] = {}
        self._residual: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._made: dict[str, tuple[Expansion, Made, Made]] = {}
        _refuse_structures(settings, start, target)
        if "depth" in settings.learn:
            self._learn_blends()
        if "width" in settings.learn:
            self._learn_matrices()
        self._learn_residuals()
        if "source" in settings.learn:
            self._weights = {name: self._keep(name, tensor) for name, tensor in (weights or {}).items()}
        if not self.names:
            raise GrowkitError(
                f"nothing is learned: learn={','.join(settings.learn)} has no part in a growth of these sizes; add "
                "norms, residual or source, or ask for other sizes"
            )

    def _keep(self, name: str, values: Any) -> int:
        tensor = values.detach().clone() if isinstance(values, torch.Tensor) else torch.tensor(np.asarray(values))
        self.entries.append(torch.nn.Parameter(tensor.to(getattr(torch, self.settings.dtype))))
        self.names.append(name)
        return len(self.names) - 1

    def _learn_blends(self) -> None:
        for stack in self.source.stacks:
            if self.start.depth(stack.name)[0] == self.start.depth(stack.name)[1] or stack.shared:
                continue
            for key, _ in stack.slots():
                w = self.start.blend.get(key, self.start.blend[stack.name])
                self._blends[key] = self._keep(f"w of {key}", w)

    def _learn_matrices(self) -> None:
        for key, axis, places in self._learnable():
            base = self._base(key, axis)
            structure = self.settings.structure.get(str(axis)) or self._usual(axis)
            if structure == "fixed" or not base.grows:
                continue
            for place in places if self.settings.per_layer else [None]:
                at = key if place is None else f"{key}@{place}"
                write = self._matrix(f"B of {at}", base.write, structure)
                read = write if self.settings.tied else self._matrix(f"A of {at}", base.read, structure)
                self._made[at] = (base, write, read)

    def _usual(self, axis: Axis) -> str:
        """What of an axis is learned where nobody says: where reads are writes everything that is not the source's.

        Else not the entries of heads, which rotations may pair, and not the units behind an activation: mixing these
        takes more than a training step, and keeps nothing of what they do. (E2)
        """
        kinds = {self.target.kinds[space] for space in spaces_of(axis)}
        stays = str(axis) == "head_dim" or ("pointwise" in kinds and not self.settings.tied)
        return "fixed" if stays else "source"

    def _base(self, key: str, axis: Axis) -> Expansion:
        """The starting expansion of a space, or of a whole head axis."""
        name, _, basis = key.partition("[")
        bases = [basis.rstrip("]")] if basis else []
        try:
            return self.start.expansion(name, bases)
        except KeyError:
            sides = {side: self.start.matrix(side, axis, bases) for side in ("write", "read", "seen")}
            return Expansion(**{side: Dense(matrix.as_matrix()) for side, matrix in sides.items()})

    def _learnable(self) -> Iterator[tuple[str, Axis, list[str]]]:
        """The spaces that may be learned, by the key of their expansions, and the layers of stacks they stand in."""
        found: dict[str, tuple[Axis, dict[str, None]]] = {}
        whole = [parse_layout(f"-> {name}").axes[0] for name in self.settings.structure if " " in name]
        for tensor in self.target.tensors(tied=True):
            inner = tensor.stack is not None
            for axis in tensor.parameter.parsed.axes:
                is_stream = any(self.target.kinds[space] == "residual" for space in spaces_of(axis))
                for part, bases in _parts(axis, () if is_stream else tensor.parameter.bases):
                    parts = [part] if part in whole else [parse_layout(f"-> {s}").axes[0] for s in spaces_of(part)]
                    for each in parts:
                        if self._is_fixed(each):
                            continue
                        key = f"{each}[{bases[0]}]" if len(bases) == 1 else str(each)
                        _, places = found.setdefault(key, (each, {}))
                        if inner and not is_stream:
                            places[f"{tensor.stack}/{tensor.layer}"] = None
        for key, (axis, places) in found.items():
            yield key, axis, list(places) or [None]  # type: ignore[list-item]

    def _is_fixed(self, axis: Axis) -> bool:
        """Whether an axis is of tokens or positions, or has expansions of several terms, which stay as they are."""
        return any(
            self.target.kinds[space] == "fixed" or self.start.expansions[space].terms for space in spaces_of(axis)
        )

    def _matrix(self, name: str, matrix: Matrix, structure: str) -> Made:
        rows = source_rows(matrix) if structure == "source" else None
        D, d = matrix.shape
        if rows is None:
            i = self._keep(name, matrix.as_matrix())
            return lambda entries: Dense(entries[i])
        index, weight = rows
        new = np.setdiff1d(np.arange(D), index)
        if len(new) == 0:
            return lambda entries: matrix
        i = self._keep(name, matrix.as_matrix()[new])
        kept: Matrix = Identity(d) if (weight == 1).all() else Selection(np.arange(d), d, weight)
        order = np.empty(D, dtype=np.int64)
        order[np.concatenate([index, new])] = np.arange(D)
        if (order == np.arange(D)).all():
            return lambda entries: RowBlocks((kept, Dense(entries[i])))
        return lambda entries: Composition(Selection(order, D), RowBlocks((kept, Dense(entries[i]))))

    def _learn_residuals(self) -> None:
        norms, others = ("norms" in self.settings.learn, "residual" in self.settings.learn)
        for tensor in self.target.tensors():
            is_norm = tensor.owner.kind == "norm"
            if (norms and is_norm) or (others and not is_norm):
                self._residual[tensor.name] = self._keep(f"Z of {tensor.name}", np.zeros(tensor.shape))

    def set_residual(self, name: str, Z: torch.Tensor) -> None:
        """Begin a tensor's learned ``Z`` with the fresh entries it has."""
        if name in self._residual:
            with torch.no_grad():
                self.entries[self._residual[name]].copy_(Z)

    @property
    def learned_residuals(self) -> frozenset[str]:
        """The names of the target tensors whose ``Z`` is learned."""
        return frozenset(self._residual)

    def operator(self, fixed: Mapping[str, Any] | None = None, *, entries: Entries | None = None) -> GrowthOperator:
        """The operator of the entries as they are now; gradients flow into them.

        Args:
            fixed: Entries of ``Z`` that are not learned, by the target tensor's name.
            entries: Values in place of the parameters.
        """
        values = list(self.entries) if entries is None else entries
        expansions = dict(self.start.expansions)
        for key, (base, write, read) in self._made.items():
            B, A = write(values), read(values)
            expansions[key] = replace(base, write=B, read=A, seen=B if self.settings.tied else base.seen)
        return replace(
            self.start,
            expansions=expansions,
            blend={**self.start.blend, **{key: values[i] for key, i in self._blends.items()}},
            residual={**(fixed or {}), **self.start.residual, **{n: values[i] for n, i in self._residual.items()}},
            weights={name: values[i] for name, i in self._weights.items()},
            start=self.start,
        )

    def learned_blends(self) -> frozenset[str]:
        """The slots whose blend is learned."""
        return frozenset(self._blends)

    def source_weight(self, name: str) -> torch.Tensor | None:
        """A source tensor that is learned along."""
        return self.entries[self._weights[name]] if name in self._weights else None

    def values(self) -> list[np.ndarray]:
        """The entries as they are now, in numpy: with them :meth:`operator` gives one that can be saved and applied."""
        return [whole(entry) for entry in self.entries]


def whole(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers, copied; of one that is shared out among processes all of them."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    array: np.ndarray = gathered.detach().cpu().numpy().copy()
    return array


def _parts(axis: Axis, bases: Sequence[str]) -> Iterator[tuple[Axis, tuple[str, ...]]]:
    """The parts of an axis that have a basis of their own, each with it; fused axes have one for each basis."""
    if len(bases) > 1 and isinstance(axis, Concatenation) and len(axis.segments) == len(bases):
        yield from ((segment, (basis,)) for segment, basis in zip(axis.segments, bases, strict=True))
    elif len(bases) > 1 and isinstance(axis, Product):
        inner = product(*(factor for factor in axis.factors if factor != Fixed(len(bases))))
        yield from ((inner, (basis,)) for basis in bases)
    else:
        yield axis, tuple(bases)


def source_rows(matrix: Matrix) -> tuple[np.ndarray, np.ndarray] | None:
    """Where a matrix holds the source's entries by themselves: for each its first row, ``(d,)``, and its weight there.

    None where some entry has no such row, so that no row is known to be the source's.
    """
    match matrix:
        case Identity(size):
            return np.arange(size), np.ones(size)
        case MeanFill(_, columns, _):
            return np.arange(columns), np.ones(columns)
        case Scaled(inner, factor):
            rows = source_rows(inner)
            return None if rows is None else (rows[0], rows[1] * factor)
        case Selection(index, columns, weight):
            used = np.flatnonzero(index >= 0)
            chosen, first = np.unique(index[used], return_index=True)
            if len(chosen) < columns:
                return None
            rows = used[first]
            return rows, np.ones(columns) if weight is None else np.asarray(weight)[rows]
        case RowBlocks(blocks):
            return source_rows(blocks[0]) if blocks[0].shape[0] == matrix.shape[1] else None
        case _:
            return None


def _refuse_structures(settings: FitSettings, start: GrowthOperator, target: LayerGraph) -> None:
    known = {str(axis) for tensor in target.tensors(tied=True) for axis in tensor.parameter.parsed.axes}
    for name in settings.structure:
        if name not in target.sizes and name not in known:
            raise GrowkitError(
                f"structure: no space is called '{name}'; spaces are {', '.join(target.sizes)}, and head axes are "
                f"{', '.join(sorted(axis for axis in known if axis.startswith('('))) or 'not there'}"
            )


def is_factored(operator: GrowthOperator, target: Tensor) -> bool:
    """Whether a tensor can act as its factors: a matrix that reads, of one term, not folded with a layer scale."""
    layout = target.parameter.parsed
    return (
        len(layout.axes) == 2
        and set(layout.roles) <= {"read", "write"}
        and len(operator.terms(target)) == 1
        and not operator.is_folded(target)
    )
