"""The growth operator: one linear map from a small model's parameters to a large one's.

For a slot ``k`` with out-space ``o`` and in-space ``i``, target layer ``t`` and source layers ``j``:

    W'[k,t] = sum_r sum_j w[k][r,t,j] * B[o,r] W[k,j] A[i,r]^T  +  Z[k,t]

Shape legend: lower case for source sizes, upper case for target sizes. ``B_Oo`` writes, ``A_Ii`` reads, ``w_Ll``
blends layers, ``Z`` holds fresh entries. Width and depth commute, so the blend comes first: it is cheaper.
(Wang et al., LiGO, ICLR 2023, section 3; write and read matrices apart, which the paper ties.) Nearly every method has
one term. More of them, ``r``, say what no single pair of matrices can: blocks on a diagonal (staged training), or new
rows that come from another layer than the old ones (AKI).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import product as product_of
from math import prod
from operator import add
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np

from growkit import norms
from growkit.matrices import (
    Array,
    Identity,
    Matrix,
    block_diagonal,
    from_state,
    interleaved,
    kronecker,
    namespace,
    overlaid,
    scaled,
    to_state,
)
from growkit_specs import Axis, Concatenation, Fixed, GrowkitError, InvalidTarget, Layer, Leaf, Product, Tensor
from growkit_specs.layer_graph import norm_key, slot_key
from growkit_specs.layout import product, spaces_of

Side = Literal["write", "read", "seen"]
Source = Callable[[str, int | None], Array]
"""Gives a source tensor by its key (stack, layer and slot) and its layer's number."""

OPERATOR_FORMAT = 1

BLOCK = 1 << 17
"""About how many entries of a tensor are worked on at once: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class Expansion:
    """How one space grows: the pair of matrices that serves every parameter that touches it.

    Attributes:
        write: ``B``, ``(D, d)``: what writers write. Rows of weights, biases, embeddings.
        read: ``A``, ``(D, d)``: what readers read with. Columns of weights.
        seen: ``C``, ``(D, d)``: what readers see. Through a norm that is not always what was written:
            ``norm(B x) = gain * C norm(x)``. Elsewhere ``C = B``.
        gain: The factor the norm's scale takes back.
        variance: The ratio of the mean square (RMSNorm) or variance (LayerNorm) after to before, which epsilon follows.
        fresh: Where new capacity comes from. ``read``: writers are determined, readers take fresh entries in the null
            space of ``C``. ``write``: writers take fresh entries in the rows that ``B`` leaves zero, readers are silent
            there. ``both``: nobody reads or writes the new entries yet. None: nothing is fresh.
        terms: ``(B_r, A_r)`` for each term of the sum, where there is more than one; ``B = sum_r B_r``.
    """

    write: Matrix
    read: Matrix
    seen: Matrix
    gain: float = 1.0
    variance: float = 1.0
    fresh: Literal["read", "write", "both"] | None = None
    terms: tuple[tuple[Matrix, Matrix], ...] = ()

    def term(self, r: int | None) -> Expansion:
        """The expansion with the matrices of one term; itself where it has no terms, or none is asked for."""
        if r is None or not self.terms:
            return self
        write, read = self.terms[r]
        return replace(self, write=write, read=read, terms=())

    @property
    def grows(self) -> bool:
        """Whether this is anything but the identity."""
        maps = (self.write, self.read, self.seen)
        return not (all(matrix.is_identity for matrix in maps) and self.gain == 1 and self.variance == 1)

    @property
    def rewrite(self) -> float:
        """``s`` where ``B = s C``: the factor on a norm's output that goes back into the stream."""
        written, seen = (matrix.apply(np.ones(matrix.shape[1])) for matrix in (self.write, self.seen))
        return float(written @ seen / (seen @ seen)) if seen.any() else 1.0


def unchanged(size: int) -> Expansion:
    """The expansion of a space that does not grow."""
    return Expansion(Identity(size), Identity(size), Identity(size))


@dataclass(frozen=True)
class Fresh:
    """The fresh entries ``Z``: reproducible normal noise.

    Attributes:
        seed: The seed; every tensor draws from a stream of its own, so the order of growing does not matter.
        scale: The standard deviation, as a multiple of ``reference``.
        reference: ``trained``: of the entries the tensor already has; ``init``: of the model's initialisation.
        init_std: The standard deviation of the model's initialisation.
        anew: Whether every entry is fresh, and nothing of the source stays.
    """

    seed: int = 0
    scale: float = 1.0
    reference: Literal["trained", "init"] = "trained"
    init_std: float = 0.02
    anew: bool = False

    def std(self, trained: Array) -> Any:
        """The standard deviation of a tensor's fresh entries, given its trained ones."""
        if self.reference == "init":
            return self.init_std * self.scale
        if isinstance(trained, np.ndarray):
            return _std(trained) * self.scale
        return namespace(trained).std(trained, correction=0) * self.scale

    def draw(self, name: str, like: Array, shape: Sequence[int], where: np.ndarray | None = None) -> Array:
        """Normal entries for the tensor ``name``, in the namespace, dtype and scale of ``like``, its trained ones.

        Args:
            name: The tensor's name; with the seed it settles what is drawn.
            like: Its trained entries.
            shape: Its shape.
            where: A mask that broadcasts to that shape, of the entries to draw; the others are zero. None draws all.
        """
        if isinstance(like, np.ndarray):
            return self.add(np.zeros(shape, like.dtype), name, like, where)
        entries = self._add(np.zeros(shape, np.float32), name, where, 1.0)
        drawn = namespace(like).asarray(entries, dtype=like.dtype, device=like.device)
        drawn *= self.std(like)
        return drawn

    def add(self, onto: np.ndarray, name: str, like: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """``onto``, to which what :meth:`draw` gives has been added: nothing else of a large tensor's size is held."""
        return self._add(onto, name, where, self.std(like))

    def _add(self, onto: np.ndarray, name: str, where: np.ndarray | None, std: Any) -> np.ndarray:
        """The entries are drawn in storage order; how many at once changes nothing about them."""
        random = np.random.Generator(np.random.SFC64([self.seed, crc32(name.encode())]))  # the quickest of numpy's
        where = np.broadcast_to(True if where is None else where, onto.shape)
        for rows in _blocks(onto):
            mask = np.ascontiguousarray(where[rows])
            drawn = random.standard_normal(np.count_nonzero(mask), dtype=np.float32).astype(onto.dtype, copy=False)
            drawn *= std
            onto[rows][mask] += drawn
        return onto


@dataclass(frozen=True)
class Term:
    """One term of the sum.

    Attributes:
        writes: For each space with terms that the tensor writes, which of its terms.
        r: The term of the spaces it reads, and of the blend; None where the sum has one term.
    """

    writes: Mapping[str, int] = field(default_factory=dict)
    r: int | None = None


def place(target: Tensor) -> str | None:
    """Where a tensor stands, ``stack/number``, as the keys of one layer's own expansions name it."""
    return None if target.stack is None else f"{target.stack}/{target.layer}"


@dataclass(frozen=True)
class GrowthOperator:
    """The growth operator, without the weights it acts on.

    Attributes:
        expansions: By space (``hidden``), or by space and basis where they differ (``head_dim[q]``); also by a whole
            axis, ``(heads head_dim)[q]``, for matrices that mix its spaces. One target layer's own expansion has its
            stack and number behind an at sign: ``ffn@layers/3``.
        blend: ``w``, ``(L2, L1)``, by stack; and by a slot's key (``stack/layer/slot``) where it differs. ``(R, L2,
            L1)`` where the terms of the sum blend differently.
        norm_factors: Factors on the output of norms, by :func:`norm_key`, that a tied head needs where ``B^T C`` is
            not 1.
        untied: Names of parameters that the source ties and the target cannot.
        fresh: How fresh entries are drawn.
        residual: Explicit entries of ``Z``, by the target tensor's name, as arrays or as matrices; they replace the
            fresh ones.
        start: What this operator was learned from; fresh entries are drawn as it draws them. None where nothing was
            learned.
        weights: Source tensors by name that were learned along; they replace the source's own.
    """

    expansions: Mapping[str, Expansion]
    blend: Mapping[str, np.ndarray]
    norm_factors: Mapping[str, float] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    fresh: Fresh = Fresh()
    residual: Mapping[str, Array | Matrix] = field(default_factory=dict)
    start: GrowthOperator | None = None
    weights: Mapping[str, Array] = field(default_factory=dict)

    # --- the equation ----------------------------------------------------------------------------------------------

    def grow(self, target: Tensor, source: Source, *, begun: Source | None = None) -> Array:
        """One tensor of the larger model.

        Args:
            target: The tensor to make; its parameter's layout says which matrices act on it.
            source: Gives the source's tensors.
            begun: Gives them as they were before they were learned along, if they were; fresh entries refer to these.

        Returns:
            An array of ``target.shape``, in the source's namespace and dtype.
        """
        terms = self.terms(target)
        blended = [self.blended(target, source, term) for term in terms]
        grown = reduce(add, (self.widened(target, W, source, term) for W, term in zip(blended, terms, strict=True)))
        by, W = self._drawn_by(target, begun or source, blended[0])
        noise = by._noise(target, W)
        if noise is not None and noise.where is not None and _is_own(grown, blended):
            return by.fresh.add(grown, target.name, W, noise.where)
        Z = by.residual_of(target, W)
        return grown if Z is None else grown + Z

    def terms(self, target: Tensor) -> list[Term]:
        """The terms ``r`` of a tensor's sum: for each space that it writes and that has terms, which one is meant.

        A tensor that nothing tells apart by term has one term with every space whole.
        """
        layout, at = target.parameter.parsed, place(target)
        counts = {space: len(self.expansion(space, at=at).terms) for space in sorted(layout.written_spaces())}
        counts = {space: count for space, count in counts.items() if count}
        read_apart = any(self.expansion(space, at=at).terms for space in layout.read_spaces())
        blended_apart = target.stack is not None and np.ndim(self.blend_of(target)) == 3
        if not counts or not (read_apart or blended_apart):
            return [Term()]
        picks = product_of(*map(range, counts.values()))
        return [Term(dict(zip(counts, pick, strict=True)), max(pick)) for pick in picks]

    def blended(self, target: Tensor, source: Source, term: Term = Term()) -> Array:
        """``sum_j w[r,t,j] W_j``: the depth blend of the target's slot."""
        if target.stack is None:
            return self._folded(target, source, None)
        w = self.blend_of(target)
        row = (w[term.r or 0] if np.ndim(w) == 3 else w)[target.layer]
        layers = np.flatnonzero(row) if isinstance(row, np.ndarray) else range(len(row))
        row = row.tolist() if isinstance(row, np.ndarray) else row  # Python's numbers leave the element type alone
        offset = _offset(target)  # stored = computed with - offset, and it is what is computed with that is blended
        if len(layers) == 0:
            return 0 * source(target.key, 0) - offset
        terms = [self._folded(target, source, int(j)) for j in layers]
        W = sum((row[j] * W for j, W in zip(layers[1:], terms[1:], strict=True)), _times(row[layers[0]], terms[0]))
        return W + offset * (sum(row) - 1) if offset else W

    def widened(self, target: Tensor, W: Array, source: Source, term: Term = Term()) -> Array:
        """``B_r W A_r^T``: each axis of ``W`` mapped by the matrix of its space."""
        layout = target.parameter.parsed
        for axis, role in enumerate(layout.roles):
            W = self._scaled(target, W) if role == "scale" else self.axis_matrix(target, axis, term=term).apply(W, axis)
        if self.is_folded(target):  # the writer's rows were folded with the layer scale; divide the grown one out
            scale = self._layer_scale(target, source)
            # Where the scale is zero so is the folded row, and any row would do.
            W = W / _along(scale + (scale == 0), self._write_axis(target), W.ndim)
        return W

    def residual_for(self, target: Tensor, source: Source) -> Array | None:
        """``Z`` of a tensor, as :meth:`residual_of` says; of what this operator was learned from, where it was."""
        by, W = self._drawn_by(target, source, None)
        return by.residual_of(target, W)

    def _drawn_by(self, target: Tensor, source: Source, W: Array | None) -> tuple[GrowthOperator, Array]:
        """The operator that a tensor's ``Z`` is drawn by, and that operator's blend; ``W`` is this one's, if known."""
        if self.start is not None and target.name not in self.residual:
            return self.start._drawn_by(target, source, None)
        return self, self.blended(target, source, self.terms(target)[0]) if W is None else W

    def residual_of(self, target: Tensor, W: Array) -> Array | None:
        """``Z``: fresh entries where the function does not see them, in the scale of ``W``; None where there are none.

        New rows that nobody reads are drawn freely; the entries of readers are drawn in the null space of what they
        see: ``Z = N - N C A^T``, so that ``Z C = 0``.
        """
        if target.name in self.residual:
            Z = self.residual[target.name]
            return namespace(W).asarray(Z.as_matrix(), dtype=W.dtype) if isinstance(Z, Matrix) else Z
        noise = self._noise(target, W)
        if noise is None:
            return None
        N = unseen = self.fresh.draw(target.name, W, target.shape, noise.where)
        if noise.where is not None:
            return N
        for axis, space in noise.null.items():
            unseen = space.part(unseen, axis)
        return overlaid(unseen, N, noise.free) if noise.free.any() else unseen

    def _noise(self, target: Tensor, W: Array) -> _Noise | None:
        """Where the entries of a tensor are fresh; None where none are, or they are explicit."""
        layout = target.parameter.parsed
        if target.name in self.residual or not layout.reads:
            return None
        null = {
            a: _NullSpace(self.axis_matrix(target, a), self.axis_matrix(target, a, "seen"))
            for a, role in enumerate(layout.roles)
            if role == "read" and self._reads_fresh(layout.axes[a])
        }
        free = np.asarray(self.fresh.anew)  # as few axes as tell entries apart: large tensors, of which some are new
        for a, role in enumerate(layout.roles):
            unused = self._unused(target, a, ("write", "both") if role == "write" else ("both",))
            free = free | _along(unused, a, W.ndim) if unused.any() else free
        return _Noise(null, free, W.ndim) if null or free.any() else None

    # --- the matrices of a tensor ----------------------------------------------------------------------------------

    def axis_matrix(self, target: Tensor, axis: int, side: Side | None = None, *, term: Term = Term()) -> Matrix:
        """The matrix of one axis of a tensor: a Kronecker product of its spaces' matrices, or a concatenation.

        Args:
            target: The tensor.
            axis: Which of its axes, in storage order.
            side: Which matrix; None takes what the axis's role asks for.
            term: Which term of the sum.
        """
        layout = target.parameter.parsed
        role = layout.roles[axis]
        back: Side = "write" if target.owner.writes_stream else "seen"
        own: dict[str, Side] = {"write": "write", "read": "read", "shift": back}
        chosen = side or own.get(role, "seen")
        if role in ("write", "read") and target.owner.through is None and chosen == "seen":
            chosen = "write"  # read without a norm: what is seen is what was written

        def leaf(space: str, expansion: Expansion) -> Matrix:
            r = term.writes.get(space) if role == "write" else term.r if role == "read" else None
            matrix: Matrix = getattr(expansion.term(r), chosen)
            return matrix

        matrix = self._composed(layout.axes[axis], target.parameter.bases, leaf, place(target))
        if role in ("scale", "shift"):
            return scaled(matrix, self.norm_factors.get(norm_key(target.stack, target.owner.name), 1.0))
        factor = 1 / self.power(target.owner) if "hidden" in spaces_of(layout.axes[axis]) else 1.0
        if role == "read" and target.owner.through is not None and not self._is_tied(target):
            factor *= self.norm_factors.get(str(target.through), 1.0)
        return scaled(matrix, factor if side == "seen" else 1 / factor)

    def power(self, layer: Layer) -> float:
        """``(d/D)^p``: what takes back that the model multiplies a layer by ``hidden^p``, its ``hidden_power``."""
        D, d = self.expansions["hidden"].write.shape if "hidden" in self.expansions else (1, 1)
        return float((d / D) ** float(layer.attributes.get("hidden_power") or 0))

    def matrix(self, side: Side, axis: Axis, bases: Sequence[str] = (), at: str | None = None) -> Matrix:
        """The matrix of an axis on one side, composed from its spaces; of a target layer's own, ``stack/number``."""
        return self._composed(axis, bases, lambda space, expansion: getattr(expansion, side), at)

    def expansion(self, name: str, bases: Sequence[str] = (), at: str | None = None) -> Expansion:
        """The expansion of a space, or of a whole axis: the most specific there is.

        Args:
            name: The space, or the axis as it is written.
            bases: The bases of the head axis it stands in; where they are several, none is meant.
            at: The target layer, ``stack/number``.

        Raises:
            KeyError: Where there is none.
        """
        based = [f"{name}[{bases[0]}]"] if len(bases) == 1 else []
        keys = [f"{key}@{at}" for key in (*based, name)] + [*based, name]
        return next((self.expansions[key] for key in keys if key in self.expansions), None) or self.expansions[name]

    def _composed(
        self, axis: Axis, bases: Sequence[str], leaf: Callable[[str, Expansion], Matrix], at: str | None = None
    ) -> Matrix:
        """The matrix of an axis, given what each space's expansion contributes."""
        if not isinstance(axis, Leaf):
            with suppress(KeyError):
                return leaf(str(axis), self.expansion(str(axis), bases, at))
        match axis:
            case Leaf(space):
                return leaf(space, self.expansion(space, bases, at))
            case Fixed(size):
                return Identity(size)
            case Concatenation():
                return block_diagonal(*(self._composed(s, b, leaf, at) for s, b in parts_by_basis(axis, bases)))
            case Product(factors) if any(_has_segments(factor, bases) for factor in factors):
                before, _, _ = _fused(factors, bases)
                blocks = [self._composed(segment, basis, leaf, at) for segment, basis in parts_by_basis(axis, bases)]
                runs = kronecker(*(self._composed(factor, bases, leaf, at) for factor in before)).shape
                return interleaved(*blocks, runs=runs)
            case Product(factors):
                return kronecker(*(self._composed(factor, bases, leaf, at) for factor in factors))

    def blend_of(self, target: Tensor) -> Any:
        """``w`` of the target's slot, ``(L2, L1)``."""
        return self.blend.get(target.key, self.blend[str(target.stack)])

    def multiplications(self, target: Tensor) -> int:
        """Multiplications to make a tensor: its blend's, and those of the matrices of its axes, one after the other."""
        matrices = [self.axis_matrix(target, axis) for axis in range(len(target.shape))]
        shape = [matrix.shape[1] for matrix in matrices]
        mixed = (
            0
            if target.stack is None
            else int(np.count_nonzero(np.asarray(self.blend_of(target))[..., target.layer, :]))
        )
        total = prod(shape) * mixed if mixed > 1 else 0
        for axis, matrix in enumerate(matrices):
            total += matrix.multiplications * prod(shape[:axis] + shape[axis + 1 :])
            shape[axis] = matrix.shape[0]
        return total

    def layer_map(self, stack: str) -> list[int]:
        """For each target layer of ``stack`` the source layer with the largest weight."""
        w = np.asarray(self.blend[stack])
        return [int(j) for j in (w if w.ndim == 2 else w[0]).argmax(axis=1)]

    def depth(self, stack: str) -> tuple[int, int]:
        """``(L2, L1)`` of a stack."""
        deep, shallow = self.blend[stack].shape[-2:]
        return deep, shallow

    def read_matrix(self, space: str, through: str | None = None) -> Matrix:
        """The matrix an output that lives in ``space`` is brought back with: ``A^T``, ``(d, D)``."""
        return scaled(self.expansions[space].read, 1 / self.norm_factors.get(norm_key(None, through), 1.0)).mT

    # --- norms, layer scale, ties ----------------------------------------------------------------------------------

    def _is_tied(self, target: Tensor) -> bool:
        return target.parameter.tied_to is not None

    def _reads_fresh(self, axis: Axis) -> bool:
        """Whether readers of an axis take fresh entries; where any of its spaces has fresh writers they are silent."""
        sides = {self.expansions[space].fresh for space in spaces_of(axis) if self.expansions[space].grows}
        return "read" in sides and "write" not in sides

    def _unused(self, target: Tensor, axis: int, sides: Sequence[str]) -> np.ndarray:
        """``(D,)`` booleans: the entries of an axis that are new in some space whose new entries are free."""

        def leaf(space: str, expansion: Expansion) -> Matrix:
            return expansion.write if expansion.fresh in sides else Identity(expansion.write.shape[0])

        parameter = target.parameter
        axes = parameter.parsed.axes
        unused: np.ndarray = ~self._composed(axes[axis], parameter.bases, leaf, place(target)).support
        return unused

    def _scaled(self, target: Tensor, W: Array) -> Array:
        (axis,) = target.parameter.parsed.axes
        spaces = tuple(spaces_of(axis))
        if len(spaces) != 1:
            if any(self.expansions[space].grows for space in spaces):
                raise InvalidTarget(f"{target.name}: a scale over {axis} cannot grow; expected one over a single space")
            return W
        (space,) = spaces
        expansion = self.expansion(space, target.parameter.bases, place(target))
        fill = 1.0 if self.fresh.anew else None
        if target.parameter.module == "layer_scale":
            return norms.grown_layer_scale(expansion, W, fill)
        factor = self.norm_factors.get(norm_key(target.stack, target.owner.name), 1.0)
        if target.owner.writes_stream:
            factor *= expansion.rewrite
        return norms.grown_scale(expansion, W, fill, factor, offset=_offset(target))

    def is_folded(self, target: Tensor) -> bool:
        """Whether a layer scale multiplies what this tensor writes, by a matrix that mixes channels."""
        scale = target.owner.parameter("layer_scale")
        if scale is None or scale is target.parameter:
            return False
        (space,) = scale.parsed.spaces
        return space in target.parameter.parsed.written_spaces() and self.expansions[space].write.pattern is None

    def _folded(self, target: Tensor, source: Source, layer: int | None) -> Array:
        W = source(target.key, layer)
        if not self.is_folded(target):
            return W
        scale = source(slot_key(target.stack, target.owner.name, "layer_scale"), layer)
        return W * _along(scale, self._write_axis(target), W.ndim)

    def _write_axis(self, target: Tensor) -> int:
        return target.parameter.parsed.roles.index("write")

    def _layer_scale(self, target: Tensor, source: Source) -> Array:
        scale = target.owner.parameter("layer_scale")
        assert scale is not None
        shape = (target.shape[self._write_axis(target)],)
        return self.grow(replace(target, parameter=scale, name=scale.name, shape=shape), source)

    # --- saving ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Save as one safetensors file: the arrays, and the structure as JSON in its metadata.

        Args:
            path: The file to write; it is replaced.
        """
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        structure = {"format": OPERATOR_FORMAT, **self._structure(arrays)}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        Path(path).write_bytes(save(contiguous, metadata={"growkit_operator": json.dumps(structure)}))

    def _structure(self, arrays: dict[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
        """The operator as plain data; its arrays go into ``arrays`` under names that start with ``prefix``."""
        expansions = {
            key: {
                "write": to_state(e.write, arrays, f"{prefix}{key}.write"),
                "read": to_state(e.read, arrays, f"{prefix}{key}.read"),
                "seen": to_state(e.seen, arrays, f"{prefix}{key}.seen"),
                "gain": e.gain,
                "variance": e.variance,
                "fresh": e.fresh,
                "terms": [
                    [to_state(B, arrays, f"{prefix}{key}.{r}.write"), to_state(A, arrays, f"{prefix}{key}.{r}.read")]
                    for r, (B, A) in enumerate(e.terms)
                ],
            }
            for key, e in self.expansions.items()
        }
        arrays |= {f"{prefix}blend.{key}": np.asarray(w) for key, w in self.blend.items()}
        arrays |= {f"{prefix}weights.{name}": np.asarray(array) for name, array in self.weights.items()}
        residual: dict[str, dict[str, Any] | None] = {}
        for name, Z in self.residual.items():
            if isinstance(Z, Matrix):
                residual[name] = to_state(Z, arrays, f"{prefix}residual.{name}")
            else:
                residual[name] = None
                arrays[f"{prefix}residual.{name}"] = np.asarray(Z)
        return {
            "expansions": expansions,
            "blend": sorted(self.blend),
            "residual": residual,
            "norm_factors": dict(self.norm_factors),
            "untied": list(self.untied),
            "fresh": vars(self.fresh),
            "weights": sorted(self.weights),
            "start": None if self.start is None else self.start._structure(arrays, f"{prefix}start."),
        }

    @classmethod
    def load(cls, path: str | Path) -> GrowthOperator:
        """Load what :meth:`save` wrote.

        Raises:
            GrowkitError: Where the file is not an operator, is of another format, or does not fit together.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                structure = json.loads((file.metadata() or {}).get("growkit_operator", "null"))
            if structure is None:
                raise ValueError("its metadata has no growkit_operator")
            if structure["format"] != OPERATOR_FORMAT:
                raise ValueError(f"format {structure['format']}, expected {OPERATOR_FORMAT}; another growkit made it")
            return cls._from_structure(structure, arrays)
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise GrowkitError(f"{path}: not a growth operator that growkit saved ({error})") from None

    @classmethod
    def _from_structure(
        cls, structure: Mapping[str, Any], arrays: dict[str, np.ndarray], prefix: str = ""
    ) -> GrowthOperator:
        start = structure.get("start")
        loaded = cls(
            expansions={
                key: Expansion(
                    write=from_state(state["write"], arrays),
                    read=from_state(state["read"], arrays),
                    seen=from_state(state["seen"], arrays),
                    gain=float(state["gain"]),
                    variance=float(state["variance"]),
                    fresh=state["fresh"],
                    terms=tuple((from_state(B, arrays), from_state(A, arrays)) for B, A in state.get("terms", ())),
                )
                for key, state in structure["expansions"].items()
            },
            blend={key: arrays[f"{prefix}blend.{key}"] for key in structure["blend"]},
            norm_factors={norm: float(factor) for norm, factor in structure["norm_factors"].items()},
            untied=tuple(structure["untied"]),
            fresh=Fresh(**structure["fresh"]),
            residual={
                name: arrays[f"{prefix}residual.{name}"] if state is None else from_state(state, arrays)
                for name, state in structure["residual"].items()
            },
            start=None if start is None else cls._from_structure(start, arrays, f"{prefix}start."),
            weights={name: arrays[f"{prefix}weights.{name}"] for name in structure.get("weights", ())},
        )
        _refuse_unfit(loaded)
        return loaded


def _refuse_unfit(operator: GrowthOperator) -> None:
    """Refuse matrices of one space that are not of one shape, blends that are none, and fresh entries of no scale.

    Raises:
        ValueError: Naming the first.
    """
    for key, e in operator.expansions.items():
        shapes = {matrix.shape for matrix in (e.write, e.read, e.seen, *(each for pair in e.terms for each in pair))}
        if min(e.write.shape) < 1:
            raise ValueError(f"{key} is empty: {e.write.shape}")
        if len(shapes) > 1:
            raise ValueError(f"the matrices of {key} differ in shape: {', '.join(map(str, sorted(shapes)))}")
    for key, w in operator.blend.items():
        if w.ndim not in (2, 3) or not w.size:
            raise ValueError(f"the blend {key} is of shape {w.shape}; expected (target layers, source layers)")
    if operator.fresh.reference not in ("trained", "init"):
        raise ValueError(f"fresh entries refer to {operator.fresh.reference!r}; expected 'trained' or 'init'")


def _offset(target: Tensor) -> float:
    """What a norm adds to its stored scale; 0 for every other tensor."""
    return float(target.owner.attributes.get("offset") or 0) if target.parameter.parsed.sign == "*" else 0.0


def parts_by_basis(axis: Axis, bases: Sequence[str]) -> list[tuple[Axis, tuple[str, ...]]]:
    """The parts of an axis, each with the bases it stands in: of a fused one the segment of each basis."""
    match axis:
        case Concatenation(segments):
            own = [(basis,) for basis in bases] if len(bases) == len(segments) else [tuple(bases)] * len(segments)
            return list(zip(segments, own, strict=True))
        case Product(factors) if any(_has_segments(factor, bases) for factor in factors):
            before, fused, after = _fused(factors, bases)
            whole = (product(*before, *segment, *after) for segment in fused)
            return [(segment, (basis,)) for segment, basis in zip(whole, bases, strict=True)]
        case _:
            return [(axis, tuple(bases))]


def _has_segments(factor: Axis, bases: Sequence[str]) -> bool:
    """Whether a factor of an axis lays the bases' entries side by side."""
    return len(bases) > 1 and (
        factor == Fixed(len(bases)) or (isinstance(factor, Concatenation) and len(factor.segments) == len(bases))
    )


def _fused(
    factors: Sequence[Axis], bases: Sequence[str]
) -> tuple[Sequence[Axis], Sequence[Sequence[Axis]], Sequence[Axis]]:
    """The factors before the fused one, what each basis has in its place, and the factors behind it."""
    first = next(i for i, factor in enumerate(factors) if _has_segments(factor, bases))
    fused = factors[first]
    segments = [(s,) for s in fused.segments] if isinstance(fused, Concatenation) else [()] * len(bases)
    return factors[:first], segments, factors[first + 1 :]


def _along(vector: Array, axis: int, rank: int) -> Array:
    """``vector`` shaped to be broadcast along ``axis`` of an array with ``rank`` axes."""
    return vector.reshape(-1, *(1,) * (rank - axis - 1))


def _times(factor: Any, W: Array) -> Array:
    return W if isinstance(factor, float) and factor == 1 else factor * W


@dataclass(frozen=True)
class _NullSpace:
    """What readers of ``C x`` do not see, along one axis that they read with ``A``: the range of ``I - C A^T``.

    A reader whose columns are shared out has smaller entries. Where copies share, only differences between them are
    unseen, of which there are ``D - d``; the entries that can hold noise have together the variance that they were
    drawn with.
    """

    A: Matrix
    C: Matrix

    @cached_property
    def _probed(self) -> tuple[np.ndarray, np.ndarray]:
        """Random entries, ``(D,)``, and what of them is seen."""
        probe = np.random.default_rng(0).standard_normal(self.C.shape[0])
        return probe, self.A.apply(self.C.mT.apply(probe))

    @cached_property
    def rows(self) -> np.ndarray | None:
        """``(D,)`` booleans: the entries that hold noise, where each is seen as it is or not at all, else None."""
        probe, seen = self._probed
        alone: np.ndarray = seen == 0
        return alone if (alone | np.isclose(seen, probe)).all() else None

    @cached_property
    def scale(self) -> float:
        """The factor that brings noise to the scale of the readers' own entries."""
        D, d = self.C.shape
        if d == D:
            return 0.0
        share = float(np.abs(self.A.mT.apply(np.ones(D))).mean() / max(self.A.support.sum() / d, 1))
        free = int((~np.isclose(*self._probed)).sum())
        return min(share, 1.0) * float((free / (D - d)) ** 0.5)

    def part(self, N: Array, axis: int) -> Array:
        """``N - N C A^T`` in the scale of the readers' own entries."""
        seen = self.A.apply(self.C.mT.apply(N, axis), axis)
        if isinstance(seen, np.ndarray) and not np.may_share_memory(seen, N):
            return np.multiply(np.subtract(N, seen, out=seen), self.scale, out=seen)
        return (N - seen) * self.scale


@dataclass(frozen=True)
class _Noise:
    """Which entries of a tensor are fresh.

    Attributes:
        null: By axis, what readers do not see.
        free: A mask that broadcasts to the tensor: the entries that are drawn freely.
        rank: How many axes the tensor has.
    """

    null: Mapping[int, _NullSpace]
    free: np.ndarray
    rank: int

    @cached_property
    def where(self) -> np.ndarray | None:
        """A mask of the fresh entries, where each is drawn by itself; None where noise has to be projected.

        Drawing takes the longest of all by far, so that nothing is drawn that a projection would take out again.
        """
        alone = [_along(space.rows, a, self.rank) for a, space in self.null.items() if space.rows is not None]
        if len(alone) < len(self.null) or any(space.scale != 1 for space in self.null.values()):
            return None
        return reduce(np.logical_and, alone) | self.free if alone else self.free


def _blocks(x: np.ndarray) -> Iterator[slice]:
    """An array's rows, along its first axis, in blocks of about :data:`BLOCK` entries."""
    rows = max(1, BLOCK * len(x) // max(x.size, 1))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _std(x: np.ndarray) -> float:
    """The standard deviation of all entries; numpy's own holds a second array of the size of ``x``."""
    mean = x.mean(dtype=np.float64).astype(x.dtype)
    squares = sum(float(np.square(x[rows] - mean).sum()) for rows in _blocks(x))
    return float((squares / x.size) ** 0.5)


def _is_own(grown: Array, sources: Sequence[Array]) -> bool:
    """Whether an array is one of numpy's that may be overwritten: it shares nothing with what it was made of."""
    return isinstance(grown, np.ndarray) and not any(np.may_share_memory(grown, W) for W in sources)
