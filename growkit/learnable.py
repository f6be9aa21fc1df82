"""What can be learned of a growth operator: arrays of entries, and the operator that any values of them make.

Whoever learns holds the entries, in whichever framework. An operator that is learned begins as a closed form. Each
space's matrices keep the rows that the source's entries have there, ``[I; C]``, and learn the others (LiGO's published
form), or learn every entry; each slot learns its own blend of layers. (Wang et al., LiGO, ICLR 2023, section 3;
structures and ties: the authors' code.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

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
from growkit.operator import Expansion, GrowthOperator, Side, parts_by_basis
from growkit_specs import FitSettings, GrowkitError, LayerGraph, parse_layout
from growkit_specs.layout import Axis, spaces_of

_SIDES: tuple[Side, ...] = ("write", "read", "seen")
Entries = Sequence[Any]
Made = Callable[[Entries], Matrix]
"""Makes a matrix out of the entries that are learned."""


class Learnable:
    """The entries of an operator that can be learned.

    Args:
        start: The operator to begin with.
        source: The source's graph.
        target: The larger model's graph.
        settings: What is learned; ``tied`` is settled.

    Attributes:
        names: What each entry is.
        shapes: Its shape.
        initial: Makes what it begins with, in float64.

    Raises:
        GrowkitError: Where a structure is asked for a space that is not there.
    """

    def __init__(self, start: GrowthOperator, source: LayerGraph, target: LayerGraph, settings: FitSettings) -> None:
        self.start, self.source, self.target, self.settings = start, source, target, settings
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.initial: list[Callable[[], np.ndarray]] = []
        self.blends: dict[str, int] = {}
        self.residuals: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self._made: dict[str, tuple[Expansion, Made, Made | None]] = {}
        _refuse_structures(settings, start, target)
        if "depth" in settings.learn:
            self._learn_blends()
        if "width" in settings.learn:
            self._learn_matrices()
        self._learn_residuals()
        if "source" in settings.learn:
            for tensor in source.tensors():
                self.weights[tensor.name] = self._keep(tensor.name, tensor.shape)

    def _keep(self, name: str, shape: tuple[int, ...], initial: Callable[[], np.ndarray] | None = None) -> int:
        """Note an entry, which begins as zeros where nothing else is said; its number."""
        self.initial.append((lambda: np.zeros(shape)) if initial is None else initial)
        self.shapes.append(shape)
        self.names.append(name)
        return len(self.names) - 1

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return sum(map(prod, self.shapes))

    def _learn_blends(self) -> None:
        for stack in self.source.stacks:
            if self.start.depth(stack.name)[0] == self.start.depth(stack.name)[1] or stack.shared:
                continue
            for key, _ in stack.slots():
                w = self.start.blend.get(key, self.start.blend[stack.name])
                self.blends[key] = self._keep(f"w of {key}", np.shape(w), partial(np.array, w))

    def _learn_matrices(self) -> None:
        for key, axis, places, is_read in self._learnable():
            base = self._base(key, axis)
            structure = self.settings.structure.get(str(axis)) or self._usual(axis)
            if structure == "fixed" or not base.grows:
                continue
            own = [f"{key}@{place}" for place in places] if self.settings.per_layer else []
            for at in own or [key]:
                write = self._matrix(f"B of {at}", base.write, structure)
                self._made[at] = (base, write, self._read_by(at, base, structure, write) if is_read else None)

    def _read_by(self, at: str, base: Expansion, structure: str, write: Made) -> Made:
        """The matrix that readers read with; a space that nobody reads, like that of queries, has none to learn."""
        return write if self.settings.tied else self._matrix(f"A of {at}", base.read, structure)

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
            B, A, C = (Dense(self.start.matrix(s, axis, bases).as_matrix()) for s in _SIDES)
            return Expansion(write=B, read=A, seen=C)

    def _learnable(self) -> Iterator[tuple[str, Axis, list[str], bool]]:
        """What may be learned: the key of its expansions, its axis, the layers it stands in, and whether it is read."""
        found: dict[str, tuple[Axis, dict[str, None]]] = {}
        read: set[str] = set()
        named = (key.partition("[")[0].partition("@")[0] for key in (*self.settings.structure, *self.start.expansions))
        whole = [parse_layout(f"-> {name}").axes[0] for name in named if " " in name]
        for tensor in self.target.tensors(tied=True):
            inner = tensor.stack is not None
            for axis, role in zip(tensor.parameter.parsed.axes, tensor.parameter.parsed.roles, strict=True):
                is_stream = any(self.target.kinds[space] == "residual" for space in spaces_of(axis))
                for part, bases in parts_by_basis(axis, () if is_stream else tensor.parameter.bases):
                    parts = [part] if part in whole else [parse_layout(f"-> {s}").axes[0] for s in spaces_of(part)]
                    for each in parts:
                        if self._is_fixed(each):
                            continue
                        key = f"{each}[{bases[0]}]" if len(bases) == 1 else str(each)
                        _, places = found.setdefault(key, (each, {}))
                        if role == "read":
                            read.add(key)
                        if inner and not is_stream:
                            places[f"{tensor.stack}/{tensor.layer}"] = None
        for key, (axis, places) in found.items():
            yield key, axis, list(places), key in read

    def _is_fixed(self, axis: Axis) -> bool:
        """Whether an axis is of tokens or positions, or has expansions of several terms, which stay as they are."""
        return any(
            self.target.kinds[space] == "fixed" or self.start.expansions[space].terms for space in spaces_of(axis)
        )

    def _matrix(self, name: str, matrix: Matrix, structure: str) -> Made:
        rows = source_rows(matrix) if structure == "source" else None
        D, d = matrix.shape
        if rows is None:
            i = self._keep(name, (D, d), matrix.as_matrix)
            return lambda entries: Dense(entries[i])
        index, weight = rows
        new = np.setdiff1d(np.arange(D), index)
        if len(new) == 0:
            return lambda entries: matrix
        i = self._keep(name, (len(new), d), lambda: matrix.as_matrix()[new])
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
                self.residuals[tensor.name] = self._keep(f"Z of {tensor.name}", tensor.shape)

    def operator(self, entries: Entries, fixed: Mapping[str, Any] | None = None) -> GrowthOperator:
        """The operator that values of the entries make; gradients flow into them.

        Args:
            entries: A value for each of the names.
            fixed: Entries of ``Z`` that are not learned, by the target tensor's name.
        """
        expansions = dict(self.start.expansions)
        for key, (base, write, read) in self._made.items():
            B, tied = write(entries), self.settings.tied
            A = B if tied else base.read if read is None else read(entries)
            expansions[key] = replace(base, write=B, read=A, seen=B if tied else base.seen)
        return replace(
            self.start,
            expansions=expansions,
            blend={**self.start.blend, **{key: entries[i] for key, i in self.blends.items()}},
            residual={**(fixed or {}), **self.start.residual, **{n: entries[i] for n, i in self.residuals.items()}},
            weights={name: entries[i] for name, i in self.weights.items()},
            start=self.start,
        )


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
            inside = source_rows(inner)
            return None if inside is None else (inside[0], inside[1] * factor)
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
