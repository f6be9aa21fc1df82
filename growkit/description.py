"""Descriptions: what a growth operator is, as plain data and in words, without the weights it acts on.

Nothing here builds a dense matrix of a structured one: an operator of a large vocabulary is described as quickly as
one of a small. Shape legend: ``D`` rows (target entries), ``d`` columns (source entries); ``L2`` and ``L1`` layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

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
)
from growkit.operator import Expansion, GrowthOperator

ENTRIES_AT_ONCE = 1 << 22
"""How many entries of a matrix that is no selection are in memory at a time."""

RANK_LIMIT = 1024
"""Up to which size, of the smaller side, the rank of a dense matrix is computed: above, it takes minutes."""


@dataclass(frozen=True)
class MatrixFacts:
    """What one matrix is.

    Attributes:
        structure: In words.
        rank: Its rank; None where that would take minutes, or entries are not finite.
        differing: How many entries are not those of the nearest selection, which has at most a single 1 in each row.
        distance: The largest absolute difference to that selection; None where entries are not finite.
        dense_parameters: How many entries its dense parts hold: what can be learned.
    """

    structure: str
    rank: int | None
    differing: int
    distance: float | None
    dense_parameters: int


@dataclass(frozen=True)
class SpaceFacts:
    """How one space grows.

    Attributes:
        source: Its size before, ``d``.
        target: Its size after, ``D``.
        grows: Whether anything changes: a space that keeps its size may be mixed all the same.
        write: ``B``.
        read: ``A``; None where it is ``B``.
        seen: ``C``; None where it is ``B``.
        gain: The factor that norms over it take back.
        variance: What epsilon is multiplied by.
        fresh: Which entries are fresh: ``read``, ``write``, ``both`` or none.
        terms: ``(B_r, A_r)`` where the sum has several terms.
    """

    source: int
    target: int
    grows: bool
    write: MatrixFacts
    read: MatrixFacts | None
    seen: MatrixFacts | None
    gain: float
    variance: float
    fresh: str | None
    terms: tuple[tuple[MatrixFacts, MatrixFacts], ...]


@dataclass(frozen=True)
class BlendFacts:
    """How the layers of a stack, or of one of its slots, come from the source's.

    Attributes:
        source: Layers before, ``L1``.
        target: Layers after, ``L2``.
        layers_from: For each target layer the source layer of the largest weight; None where all weights are zero.
        structure: ``w`` in words.
        terms: How many terms of the sum have a blend of their own.
    """

    source: int
    target: int
    layers_from: tuple[int | None, ...]
    structure: str
    terms: int


@dataclass(frozen=True)
class OperatorFacts:
    """What a growth operator is.

    Attributes:
        spaces: By the expansion's key: a space, with its basis, or of one target layer.
        stacks: By stack.
        blends: Slots with a blend of their own, by the slot's key.
        norm_factors: Factors on the output of norms.
        untied: The parameters that the source ties and the target does not.
        fresh: The seed and scale of fresh entries.
        residual: Explicit entries of ``Z``: how many, by the tensor's name.
        dense_parameters: The entries of all dense matrices; ``A`` and ``C`` count where they are not ``B``.
        learned: Whether the operator was learned.
        weights: Source tensors that were learned along: how many entries, by name.
    """

    spaces: Mapping[str, SpaceFacts]
    stacks: Mapping[str, BlendFacts]
    blends: Mapping[str, BlendFacts]
    norm_factors: Mapping[str, float]
    untied: tuple[str, ...]
    fresh: Mapping[str, Any]
    residual: Mapping[str, int]
    dense_parameters: int
    learned: bool
    weights: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The facts as the command line prints them under ``--json``."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """``(what, value)`` of everything but the spaces."""
        told = [("learned", "yes" if self.learned else "no"), ("dense entries", f"{self.dense_parameters:,}")]
        told += [(stack, _blend_line(facts)) for stack, facts in self.stacks.items()]
        slots: dict[str, list[str]] = {}
        for key, facts in self.blends.items():
            slots.setdefault(_blend_line(facts), []).append(key)
        told += [("own blend", f"{', '.join(keys)}: {line}") for line, keys in slots.items()]
        told += [("norm factor", f"{norm}: {factor:.6g}") for norm, factor in self.norm_factors.items()]
        told += [("untied", ", ".join(self.untied))] if self.untied else []
        fresh = self.fresh
        scale = f"scale {fresh['scale']:g} of the {_REFERENCES[fresh['reference']]}"
        if fresh["reference"] == "init":
            scale += f" ({fresh['init_std']:g})"
        told.append(("fresh", f"seed {fresh['seed']}, {scale}{', every entry' if fresh['anew'] else ''}"))
        told += [("residual", f"{name}: {count:,} entries") for name, count in self.residual.items()]
        told += [("weights", f"{name}: {count:,} entries") for name, count in self.weights.items()]
        return told

    def table(self) -> list[tuple[str, ...]]:
        """The spaces as rows, the first of which names the columns."""
        rows: list[tuple[str, ...]] = [("space", "size", "matrix", "structure", "rank", "off a selection", "also")]
        for key, space in self.spaces.items():
            size = str(space.source) if space.source == space.target else f"{space.source} -> {space.target}"
            for i, (matrix, facts) in enumerate(_matrices_of(space)):
                distance = "" if facts.distance is None else f", by up to {facts.distance:.3g}"
                differing = f"{facts.differing:,} entries{distance}" if facts.differing else ""
                rank = "not computed" if facts.rank is None else str(facts.rank)
                first, last = ((key, size), _extras(space)) if i == 0 else (("", ""), "")
                rows.append((*first, matrix, facts.structure, rank, differing, last))
        return rows


_REFERENCES = {"trained": "trained entries' deviation", "init": "initialisation's deviation"}


def describe(operator: GrowthOperator) -> OperatorFacts:
    """What an operator is: its spaces, matrices and blends, and what else it holds.

    >>> from growkit.matrices import pad
    >>> from growkit.operator import Expansion
    >>> facts = describe(GrowthOperator({"ffn": Expansion(pad(6, 4), pad(6, 4), pad(6, 4))}, {"layers": np.eye(2)}))
    >>> facts.spaces["ffn"].write.structure, facts.stacks["layers"].structure
    ('pad: 4 entries, then 2 zero', 'identity')
    """
    spaces = {key: _space(expansion) for key, expansion in operator.expansions.items()}
    blends = {key: _blend(w) for key, w in operator.blend.items()}
    slots = {key for key in blends if "/" in key and key.partition("/")[0] in blends}
    return OperatorFacts(
        spaces=spaces,
        stacks={key: blend for key, blend in blends.items() if key not in slots},
        blends={key: blend for key, blend in blends.items() if key in slots},
        norm_factors=dict(operator.norm_factors),
        untied=tuple(operator.untied),
        fresh=asdict(operator.fresh),
        residual={name: prod(Z.shape) for name, Z in operator.residual.items()},
        dense_parameters=sum(f.dense_parameters for space in spaces.values() for _, f in _matrices_of(space)),
        learned=operator.start is not None,
        weights={name: prod(array.shape) for name, array in operator.weights.items()},
    )


# --- matrices --------------------------------------------------------------------------------------------------------


def single_entries(matrix: Matrix) -> tuple[np.ndarray, np.ndarray] | None:
    """Column and value of the only entry of each row, both ``(D,)``; -1 and 0 for zero rows.

    None where the structure does not promise that rows have no second entry.
    """
    pattern = matrix.pattern
    if pattern is None:
        return None
    d = matrix.shape[1]
    values = np.asarray(matrix.apply(np.ones(d)))
    columns = np.asarray(pattern.apply(np.arange(1, d + 1))) - 1
    return np.where(values == 0, -1, columns), values


def row_blocks(matrix: Matrix, multiple: int = 1) -> Iterator[np.ndarray]:
    """The dense rows of a matrix, a few at a time, ``(k, d)``.

    Args:
        matrix: The matrix.
        multiple: What ``k`` is a multiple of, but for the last one.
    """
    D, d = matrix.shape
    k = max(ENTRIES_AT_ONCE // max(D, d) // multiple, 1) * multiple
    for start in range(0, D, k):
        if isinstance(matrix, Dense):
            yield Dense(matrix.array[start : start + k]).as_matrix()
            continue
        rows = np.arange(start, min(start + k, D))
        unit = np.zeros((D, len(rows)))
        unit[rows, np.arange(len(rows))] = 1
        yield np.asarray(matrix.mT.apply(unit)).T


def same(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices have the same entries."""
    if one.shape != other.shape:
        return False
    a, b = single_entries(one), single_entries(other)
    if a is not None and b is not None:
        return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    return all(np.array_equal(*rows, equal_nan=True) for rows in zip(row_blocks(one), row_blocks(other), strict=True))


def matrix_facts(matrix: Matrix) -> MatrixFacts:
    """What a matrix is."""
    differing, distance = _off_selection(matrix)
    finite = bool(np.isfinite(distance))
    return MatrixFacts(
        structure=structure(matrix) + ("" if finite else ", NOT FINITE"),
        rank=_rank(matrix) if finite else None,
        differing=differing,
        distance=distance if finite else None,
        dense_parameters=sum(prod(part.shape) for part in _parts(matrix) if isinstance(part, Dense)),
    )


def structure(matrix: Matrix) -> str:
    """A matrix's structure in words."""
    match matrix:
        case Identity():
            return "identity"
        case Selection():
            return _selection(matrix)
        case MeanFill():
            copies = "the source" if matrix.copies == 1 else f"{matrix.copies} copies of the source"
            return f"mean-fill: {copies}, then its mean in {matrix.residue}"
        case Dense():
            return f"dense {matrix.shape[0]} x {matrix.shape[1]}, {str(matrix.array.dtype).removeprefix('torch.')}"
        case Scaled(inner, factor):
            return f"{factor:.6g} times ({structure(inner)})"
        case Kronecker(factors):
            return "product of " + " and ".join(f"({structure(factor)})" for factor in factors)
        case Concatenation(blocks):
            return "block diagonal of " + ", ".join(f"({structure(block)})" for block in blocks)
        case Interleaved(blocks, runs):
            by_turns = ", ".join(f"({structure(block)})" for block in blocks)
            return f"by turns, {runs[1]} -> {runs[0]} times: {by_turns}"
        case RowBlocks(blocks):
            return "; then ".join(f"{block.shape[0]} rows ({structure(block)})" for block in blocks)
        case ColumnBlocks(blocks):
            return "; beside ".join(f"{block.shape[1]} columns ({structure(block)})" for block in blocks)
        case Composition(left, right):
            return f"({structure(left)}) after ({structure(right)})"
        case _:
            return f"transpose of ({structure(matrix.mT)})"


def _selection(matrix: Selection) -> str:
    index, (D, d), weight = matrix.index, matrix.shape, matrix.weight
    zero, most = int((index < 0).sum()), int(matrix.counts.max(initial=0))
    if zero == D:
        words = "zero"
    elif d <= D and np.array_equal(index, np.r_[np.arange(d), np.full(D - d, -1)]):
        words = f"pad: {d} entries, then {zero} zero" if zero else "diagonal"
    elif np.array_equal(index, np.arange(D) % max(d, 1)):
        words = f"selection: the source in order, {D / d:.3g} times"
    else:
        chosen = int((matrix.counts > 0).sum())
        words = f"selection of {chosen} of {d} entries" + (f", up to {most} times" if most > 1 else "")
        words += f", {zero} zero rows" if zero else ""
    if weight is None or zero == D:
        return words
    low, high = float(np.min(weight, initial=np.inf)), float(np.max(weight, initial=-np.inf))
    return f"{words}, weight {low:.6g}" + ("" if low == high else f" to {high:.6g}")


def _parts(matrix: Matrix) -> Iterator[Matrix]:
    """The matrices that a matrix is made of."""
    match matrix:
        case Scaled(inner):
            inside: Iterable[Matrix] = (inner,)
        case Kronecker(parts) | Concatenation(parts) | Interleaved(parts) | RowBlocks(parts) | ColumnBlocks(parts):
            inside = parts
        case Composition(left, right):
            inside = (left, right)
        case _:
            inside = ()
            yield matrix
    for part in inside:
        yield from _parts(part)


def _rank(matrix: Matrix) -> int | None:
    single = single_entries(matrix)
    if single is not None:
        return len(np.unique(single[0][single[0] >= 0]))
    match matrix:
        case MeanFill(columns=columns, copies=copies):
            return columns if copies else min(columns, matrix.residue, 1)
        case Scaled(inner, factor):
            return _rank(inner) if factor else 0
        case Kronecker(parts):
            ranks = [_rank(part) for part in parts]
            return None if None in ranks else prod(rank for rank in ranks if rank is not None)
        case Concatenation(parts) | Interleaved(parts):
            ranks = [_rank(part) for part in parts]
            return None if None in ranks else sum(rank for rank in ranks if rank is not None)
        case Dense() | Composition() | RowBlocks() | ColumnBlocks():
            small = min(matrix.shape) <= RANK_LIMIT
            return int(np.linalg.matrix_rank(matrix.as_matrix())) if small else None
        case _:
            return _rank(matrix.mT)


def _off_selection(matrix: Matrix) -> tuple[int, float]:
    """How many entries differ from the nearest selection's, and by how much at most.

    That has a 1 in a row where the row's largest entry is nearer to 1 than to 0, and nothing else.
    """
    single = single_entries(matrix)
    if single is not None:
        off = np.abs(single[1] - (single[1] > 0.5))
        return int((off != 0).sum()), float(off.max(initial=0))
    differing, distance = 0, 0.0
    for rows in row_blocks(matrix):
        if not rows.size:
            continue
        numbers, largest = np.arange(len(rows)), rows.argmax(axis=1)
        off = rows.copy()
        off[numbers, largest] -= rows[numbers, largest] > 0.5
        differing += int((off != 0).sum())
        distance = float(np.maximum(distance, np.abs(off).max()))  # NaN stays
    return differing, distance


# --- spaces and blends -----------------------------------------------------------------------------------------------


def _space(expansion: Expansion) -> SpaceFacts:
    D, d = expansion.write.shape
    return SpaceFacts(
        source=d,
        target=D,
        grows=expansion.grows,
        write=matrix_facts(expansion.write),
        read=None if same(expansion.write, expansion.read) else matrix_facts(expansion.read),
        seen=None if same(expansion.write, expansion.seen) else matrix_facts(expansion.seen),
        gain=expansion.gain,
        variance=expansion.variance,
        fresh=expansion.fresh,
        terms=tuple((matrix_facts(B), matrix_facts(A)) for B, A in expansion.terms),
    )


def _matrices_of(space: SpaceFacts) -> Iterator[tuple[str, MatrixFacts]]:
    """The matrices of a space by the letters they are shown under."""
    yield ("B = A" if space.read is None else "B"), space.write
    if space.read is not None:
        yield "A", space.read
    if space.seen is not None:
        yield "C", space.seen
    for r, (B, A) in enumerate(space.terms):
        yield f"B_{r}", B
        yield f"A_{r}", A


def _extras(space: SpaceFacts) -> str:
    said = [f"gain {space.gain:.6g}"] if space.gain != 1 else []
    said += [f"variance {space.variance:.6g}"] if space.variance != 1 else []
    said += [f"fresh: {space.fresh}"] if space.fresh else []
    return ", ".join(said)


def blend_matrices(w: Any) -> list[np.ndarray]:
    """``w`` of each term, ``(L2, L1)``, in float64 on the host."""
    return [Dense(each).as_matrix() for each in (w if w.ndim == 3 else [w])]


def _blend(w: Any) -> BlendFacts:
    terms = blend_matrices(w)
    L2, L1 = terms[0].shape
    first = terms[0]
    used = (first != 0).any(axis=1)
    return BlendFacts(
        source=L1,
        target=L2,
        layers_from=tuple(int(j) if any_ else None for j, any_ in zip(first.argmax(axis=1), used, strict=True)),
        structure="; ".join(dict.fromkeys(map(_blend_structure, terms))),
        terms=len(terms),
    )


def _blend_structure(w: np.ndarray) -> str:
    if w.shape[0] == w.shape[1] and np.array_equal(w, np.eye(len(w))):
        return "identity"
    counts = (w != 0).sum(axis=1)
    zero, most = int((counts == 0).sum()), int(counts.max(initial=0))
    words = f"mixes up to {most} source layers" if most > 1 else "one source layer each"
    if most <= 1 and not np.isin(w, (0, 1)).all():
        words += f", weights {w[w != 0].min():.6g} to {w[w != 0].max():.6g}"
    return words + (f", {zero} zero" if zero else "") + ("" if np.isfinite(w).all() else ", NOT FINITE")


def _blend_line(facts: BlendFacts) -> str:
    depth = f"{facts.source} -> {facts.target} layers" if facts.source != facts.target else f"{facts.source} layers"
    terms = f" (the first of {facts.terms} terms)" if facts.terms > 1 else ""
    return f"{depth} from {ranges(facts.layers_from)}{terms}, {facts.structure}"


def ranges(layers: Sequence[int | None]) -> str:
    """Layer numbers as ``--layers-from`` takes them, runs as half-open ranges; a dash for no layer.

    >>> ranges([0, 1, 2, 2, 3, None])
    '0:3,2,3,-'
    """
    runs: list[list[int | None]] = []
    for layer in layers:
        last = runs[-1][-1] if runs else None
        if last is not None and layer == last + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spelled = (f"{run[0]}:{run[0] + len(run)}" if run[0] is not None and len(run) > 2 else _listed(run) for run in runs)
    return ",".join(spelled)


def _listed(layers: Iterable[int | None]) -> str:
    return ",".join("-" if layer is None else str(layer) for layer in layers)
