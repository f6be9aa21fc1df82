"""Depth methods whose new layers are made of the weights of the two layers around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import sqrt
from zlib import crc32

import numpy as np

from growkit.matrices import Array, Dense, composed
from growkit.methods.registry import Depth, Method, Refinement, refusal, register
from growkit.operator import GrowthOperator, Source
from growkit.weights import Grower
from growkit_specs import Axis, Concatenation, Leaf, Product, Stack, Tensor
from growkit_specs.layout import axis_size, spaces_of


def between_top_layers(name: str, stack: Stack, depth: int) -> Depth:
    """A new layer between two neighbours, for as many of the top pairs as there are layers to add."""
    L1, added = stack.depth, depth - stack.depth
    if added > L1 - 1:
        raise refusal(
            name, f"puts one layer between two neighbours, at most {2 * L1 - 1} from {L1}; got {depth} layers"
        )
    below_a_new_one = range(L1 - 1 - added, L1 - 1)
    return Depth(tuple(j for layer in range(L1) for j in [layer] * (1 + (layer in below_a_new_one))))


# --- OpT-DeUS --------------------------------------------------------------------------------------------------------


def _aligned_below(stack: Stack, depth: int) -> Depth:
    return between_top_layers("opt_deus", stack, depth).attenuated(0.0, None)


def _averaged(refinement: Refinement) -> GrowthOperator:
    """The mean of a layer and the next one, whose units are first moved onto its own by optimal transport.

    The two terms of a new layer ``t`` between ``l`` and ``l + 1`` are ``1/2 B W[l] A^T`` and ``1/2 (B P) W[l+1] A^T``;
    ``P``, ``(n, n)`` with rows that sum to 1, says how much of each unit of the next layer a unit takes. What writes
    into the stream is zero, so what reads the units does not matter.
    """
    operator, graph = refinement.operator, refinement.model.graph
    expansions, blend = dict(operator.expansions), dict(operator.blend)
    for stack in graph.stacks:
        depth = refinement.depths.get(stack.name)
        if depth is None:
            continue
        spaces = _unit_spaces(stack, graph.kinds)
        mean = depth.blend(stack.depth)
        terms_apart = np.stack([mean, mean])
        for t in depth.repeats:
            layer = depth.sources[t]
            terms_apart[:, t] = 0.5 * np.eye(stack.depth)[[layer, layer + 1]]
            mean[t] = terms_apart[:, t].sum(axis=0)
            for space in spaces:
                own, next_own = (_units(refinement, stack, space, j) for j in (layer, layer + 1))
                e, P = expansions[space], Dense(transported(own, next_own))
                terms = ((e.write, e.read), (composed(e.write, P), e.read))
                expansions[f"{space}@{stack.name}/{t}"] = replace(e, terms=terms)
        for key, parameter in stack.slots():
            if key not in blend:
                has_units = bool(parameter.parsed.written_spaces() & set(spaces))
                blend[key] = terms_apart if has_units else mean
    return replace(operator, expansions=expansions, blend=blend)


def _unit_spaces(stack: Stack, kinds: Mapping[str, str]) -> list[str]:
    """The spaces of a block's own units: MLP units, and whole heads or groups of them."""
    leading: dict[str, None] = {}
    for _, parameter in stack.slots():
        for axis in parameter.parsed.writes:
            leading |= dict.fromkeys(next(spaces_of(segment), "") for segment in _segments(axis))
    return [space for space in leading if kinds.get(space) in ("pointwise", "scores") and space != "head_dim"]


def _segments(axis: Axis) -> tuple[Axis, ...]:
    return axis.segments if isinstance(axis, Concatenation) else (axis,)


def _units(refinement: Refinement, stack: Stack, space: str, layer: int) -> np.ndarray:
    """``(n, features)``: what each unit of ``space`` is computed with, in one source layer."""
    graph, weights = refinement.model.graph, Grower(refinement.model, refinement.operator)
    rows: list[np.ndarray] = []
    for tensor in graph.tensors(tied=True):
        if (tensor.stack, tensor.layer) != (stack.name, layer) or space not in tensor.parameter.parsed.written_spaces():
            continue
        layout = tensor.parameter.parsed
        written = layout.roles.index("write")
        W = np.moveaxis(np.asarray(weights.source(tensor, tensor.key, layer), dtype=np.float64), written, 0)
        start = 0
        for segment in _segments(layout.axes[written]):
            size = axis_size(segment, graph.sizes)
            rows.extend(_by_unit(W[start : start + size], segment, space, graph.sizes))
            start += size
    return np.concatenate(rows, axis=1)


def _by_unit(W: np.ndarray, segment: Axis, space: str, sizes: Mapping[str, int]) -> Iterator[np.ndarray]:
    """The rows of a segment as ``(n, features)``, if it holds the space."""
    factors = segment.factors if isinstance(segment, Product) else (segment,)
    if Leaf(space) in factors:
        W = W.reshape(*(axis_size(factor, sizes) for factor in factors), -1)
        yield np.moveaxis(W, factors.index(Leaf(space)), 0).reshape(sizes[space], -1)


def transported(own: np.ndarray, other: np.ndarray, sharpness: float = 50.0, rounds: int = 100) -> np.ndarray:
    """``P``, ``(n, n)``: the entropic optimal transport of ``other``'s rows onto ``own``'s, by Sinkhorn's iteration.

    Args:
        own: ``(n, features)``.
        other: ``(n, features)``.
        sharpness: How strongly it prefers the nearest row; distances are cosine distances.
        rounds: How often rows and columns are normalised in turn.

    Returns:
        The plan times ``n``, so that each row sums to 1: an average of rows of ``other``.
    """
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (own, other))
    K = np.exp(sharpness * (a @ b.T - 1))
    v = np.ones(len(K))
    for _ in range(rounds):
        u = 1 / (K @ v)
        v = 1 / (K.T @ u)
    plan = u[:, None] * K * v
    rows: np.ndarray = plan / plan.sum(axis=1, keepdims=True)
    return rows


OPT_DEUS = register(
    Method(
        name="opt_deus",
        summary="between neighbours at the top the mean of both, units aligned by optimal transport, silent at first",
        exact_when="the norm comes first",
        paper="Cao et al., OpT-DeUS, 2025, https://arxiv.org/abs/2508.08011",
        use="keep",
        depth=_aligned_below,
        refine=_averaged,
    )
)


# --- LESA ------------------------------------------------------------------------------------------------------------


def _predicted_between(stack: Stack, depth: int) -> Depth:
    if depth > stack.depth and stack.depth < 3:
        raise refusal("lesa", f"learns from layers with a neighbour on each side; got {stack.depth} layers")
    return between_top_layers("lesa", stack, depth)


def _predicted(refinement: Refinement) -> GrowthOperator:
    """New matrices, predicted from those of the layers around them; norms and biases are the lower layer's.

    This is no linear map of the weights, so what is predicted stands in ``Z``, and its depth blend is zero.
    """
    operator, model = refinement.operator, refinement.model
    source = Grower(model, operator).source
    blend, residual = dict(operator.blend), dict(operator.residual)
    new: dict[str, list[Tensor]] = {}
    for tensor in refinement.target.tensors():
        depth = refinement.depths.get(str(tensor.stack))
        if depth is not None and tensor.layer in depth.repeats and tensor.parameter.parsed.reads:
            new.setdefault(tensor.key, []).append(tensor)
    for key, tensors in new.items():
        depth = refinement.depths[str(tensors[0].stack)]
        L1 = model.graph.depths[str(tensors[0].stack)]
        trained = np.stack([np.asarray(source(tensors[0], key, j), dtype=np.float64) for j in range(L1)])
        pairs = [(depth.sources[int(t.layer or 0)], depth.sources[int(t.layer or 0)] + 1) for t in tensors]
        made = predicted_between(trained, pairs, seed=[operator.fresh.seed, crc32(key.encode())])
        rows = np.array(operator.blend_of(tensors[0]))
        rows[..., [int(t.layer or 0) for t in tensors], :] = 0
        blend[key] = rows
        for tensor, W in zip(tensors, made, strict=True):
            widened = [operator.widened(tensor, W, _in_layer(source, tensor), r) for r in operator.terms(tensor)]
            residual[tensor.name] = sum(widened[1:], widened[0])
    return replace(operator, blend=blend, residual=residual)


def _in_layer(source: Callable[[Tensor, str, int | None], Array], tensor: Tensor) -> Source:
    return lambda key, layer: source(tensor, key, layer)


def predicted_between(
    W: np.ndarray, pairs: list[tuple[int, int]], *, seed: list[int], width: int = 256, steps: int = 200
) -> list[np.ndarray]:
    """Matrices that would stand between two layers, as a small network predicts them.

    All layers' matrices side by side are ``U S V^T``, so ``W_i = U S V_i`` with a basis that the layers share; a
    network of one hidden layer learns ``V_i`` from ``V_(i-1)`` and ``V_(i+1)``, column by column.

    Args:
        W: ``(L, out, in)``, the trained matrices, at least three.
        pairs: The layers on either side of each new one.
        seed: The seed of the network.
        width: Its hidden units.
        steps: How many steps of Adam it is trained for.

    Returns:
        One matrix, ``(out, in)``, for each pair.
    """
    side_by_side = np.moveaxis(W, 0, 1).reshape(W.shape[1], -1)
    squares, U = np.linalg.eigh(side_by_side @ side_by_side.T)
    kept = squares > squares.max(initial=0) * 1e-12
    U, S = U[:, kept], np.sqrt(squares[kept])
    V = W.mT @ (U / S * np.sqrt(side_by_side.shape[1]))  # (L, in, r), of unit mean square
    inputs = np.concatenate([V[:-2], V[2:]], axis=-1).reshape(-1, 2 * V.shape[-1])
    network = _Network(inputs, V[1:-1].reshape(-1, V.shape[-1]), width, steps, np.random.default_rng(seed))
    scale = U * S / np.sqrt(side_by_side.shape[1])
    return [scale @ network(np.concatenate([V[a], V[b]], axis=-1)).T for a, b in pairs]


class _Network:
    """``x -> mean + W2 relu(W1 x + b1) + b2``, fitted by Adam on the mean square error.

    ``mean`` is that of the two halves of ``x``, and ``W2`` starts at zero: what is not learned stays their mean.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, width: int, steps: int, rng: np.random.Generator) -> None:
        x, y = x.astype(np.float32), y.astype(np.float32)
        W1 = rng.standard_normal((x.shape[1], width), np.float32) * sqrt(2 / x.shape[1])
        zeros = ((1, width), (width, y.shape[1]), (1, y.shape[1]))
        self.parameters = [W1, *(np.zeros(shape, np.float32) for shape in zeros)]
        moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.parameters]
        for step in range(1, steps + 1):
            batch = rng.integers(0, len(x), min(len(x), 256))
            for p, (m, v), g in zip(self.parameters, moments, self.gradients(x[batch], y[batch]), strict=True):
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                p -= 1e-3 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        W1, b1, W2, b2 = self.parameters
        below, above = np.split(x, 2, axis=-1)
        y: np.ndarray = (below + above) / 2 + np.maximum(x @ W1 + b1, 0) @ W2 + b2
        return y

    def gradients(self, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        W1, b1, W2, _ = self.parameters
        h = np.maximum(x @ W1 + b1, 0)
        d_y = 2 * (self(x) - y) / y.size
        d_h = (d_y @ W2.T) * (h > 0)
        return [x.T @ d_h, d_h.sum(0, keepdims=True), h.T @ d_y, d_y.sum(0, keepdims=True)]


LESA = register(
    Method(
        name="lesa",
        summary="between neighbours at the top a layer that a small network, trained on the weights alone, predicts",
        exact_when="never",
        paper="Yang et al., LESA, ACL 2025, https://arxiv.org/abs/2502.13794",
        use="train",
        depth=_predicted_between,
        refine=_predicted,
    )
)
