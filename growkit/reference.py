"""What a layer graph computes, in float64 numpy: the definition that exactness is tested against.

No framework and no device, and slow: for small models. Shape legend: ``b`` batch, ``l`` and ``m`` length, ``k``
key-value heads, ``g`` group, ``d`` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import erf
from typing import Any

import numpy as np

from growkit.matrices import Array
from growkit_specs import Axis, Concatenation, Fixed, GrowkitError, Layer, LayerGraph, Parameter, Product
from growkit_specs.layout import axis_size

Values = np.ndarray[Any, Any]


def reference_forward(
    graph: LayerGraph, weights: Mapping[str, Array], inputs: Mapping[str, Array]
) -> dict[str, Values]:
    """Run a transformer.

    A layer is understood by its kind and the names of its slots. Attention and MLPs are added to the stream, through a
    norm where they name one; a norm in ``post`` position replaces it; everything else gives a value of the space it
    writes. Norms over ``head_dim`` called ``q_norm`` and ``k_norm`` act inside the attention of their block.

    Args:
        graph: The model.
        weights: Its tensors by name.
        inputs: Its inputs by name: ids, ``(b, l)``, and a mask of ones where there is a token.

    Returns:
        The outputs by name, ``(b, l, size)``; outputs that this model lacks are left out.

    Raises:
        GrowkitError: Where the graph holds something that is not understood.
    """
    try:
        return _Run(graph, weights, inputs).outputs()
    except KeyError as missing:
        raise GrowkitError(f"the reference does not understand this graph: nothing gives {missing}") from missing


class _Run:
    """One pass: ``values`` holds every space's current value, ``normed`` what the norms of the block gave."""

    def __init__(self, graph: LayerGraph, weights: Mapping[str, Array], inputs: Mapping[str, Array]) -> None:
        self.graph = graph
        self.sizes = graph.sizes
        self.weights = weights
        images = [port.name for port in graph.inputs if port.kind == "image"]
        if images:
            raise GrowkitError(f"the reference does not understand the input '{images[0]}': it is an image")
        self.ids = {p.space: inputs[p.name] for p in graph.inputs if p.kind in ("tokens", "types")}
        self.masks = [np.asarray(inputs[p.name]) for p in graph.inputs if p.kind == "mask"]
        self.values: dict[str, Values] = {}
        self.normed: dict[str, Values] = {}

    def outputs(self) -> dict[str, Values]:
        self.block(self.graph.stem, None)
        for stack in self.graph.stacks:
            for index in range(stack.depth):
                self.block(stack.layers, index)
        self.block(self.graph.head, None)
        found = {port.name: self.output(port.through, port.space) for port in self.graph.outputs}
        return {name: value for name, value in found.items() if value is not None}

    def block(self, layers: Sequence[Layer], index: int | None) -> None:
        self.index = index
        self.normed = {}
        self.norms = {layer.name: layer for layer in layers if layer.kind == "norm"}
        for layer in layers:
            if layer.kind == "embedding":
                self.embedding(layer)
            elif layer.kind == "norm":
                self.norm(layer)
            elif layer.parameter("o_proj.weight"):
                self.add(layer, "o_proj", self.heads(layer, self.read(layer)))
            elif layer.parameter("down_proj.weight"):
                self.add(layer, "down_proj", self.units(layer, self.read(layer)))
            else:
                self.map(layer, self.read(layer))

    def output(self, through: str | None, space: str | None) -> Values | None:
        return self.normed[through] if through is not None else self.values.get(str(space))

    # --- parameters ------------------------------------------------------------------------------------------

    def array(self, parameter: Parameter) -> Values:
        name = (parameter.tied_to or parameter.name).replace("{layer}", str(self.index))
        return np.asarray(self.weights[name], dtype=np.float64)

    def mapping(self, parameter: Parameter) -> Values:
        """``(in, out)``, whichever way it is stored."""
        array = self.array(parameter)
        return array if parameter.parsed.sign == "->" else array.T

    def linear(self, layer: Layer, module: str, x: Values) -> Values:
        """``W x + b``."""
        bias = layer.parameter(f"{module}.bias")
        y: Values = x @ self.mapping(_filling(layer, f"{module}.weight"))
        return y if bias is None else y + self.array(bias)

    def read(self, layer: Layer) -> Values:
        """What a layer reads: the output of a norm, or the value of its first parameter's space."""
        space = str(layer.parameters[0].parsed.reads[0])
        value = self.values[space] if layer.through is None else self.normed[layer.through]
        return value * self.power(layer, space)

    def power(self, layer: Layer, space: str) -> float:
        """What multiplies what a layer reads of ``space`` or writes into it: ``hidden ** hidden_power``, or 1."""
        power = float(layer.attributes.get("hidden_power") or 0) if space == "hidden" else 0.0
        return float(self.sizes[space] ** power)

    # --- layers ----------------------------------------------------------------------------------------------

    def embedding(self, layer: Layer) -> None:
        length = next(iter(self.ids.values())).shape[1]
        for parameter in layer.parameters:
            (space,), (into,) = map(str, parameter.parsed.reads), map(str, parameter.parsed.writes)
            if space not in self.ids and space != "positions":
                raise GrowkitError(f"the reference does not understand '{layer.name}': no input says which {space}")
            vectors = self.mapping(parameter)[self.ids.get(space, np.arange(length))] * self.power(layer, into)
            self.values[into] = vectors + self.values[into] if into in self.values else vectors

    def norm(self, layer: Layer) -> None:
        (space,) = layer.parameters[0].parsed.spaces
        if space == "head_dim" or layer.is_branch_norm:  # inside the attention, or where a branch is added
            return
        self.normed[layer.name] = self.normalised(layer, self.values[space])
        if layer.is_post_norm:
            self.values[space] = self.normed[layer.name]

    def normalised(self, layer: Layer, x: Values) -> Values:
        x = x if layer.attributes["norm"] == "rms" else x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + float(layer.attributes["epsilon"] or 0))
        offset = float(layer.attributes.get("offset") or 0)
        for parameter in layer.parameters:
            x = x * (self.array(parameter) + offset) if parameter.parsed.sign == "*" else x + self.array(parameter)
        return x

    def map(self, layer: Layer, x: Values) -> None:
        """A linear map, a head, or a pooler, which maps the first token only; then an activation, if any."""
        first = layer.parameters[0]
        x = x[:, 0] if layer.kind == "pool" else x
        (space,) = map(str, first.parsed.writes)
        self.values[space] = _activation(layer)(self.linear(layer, first.module, x))

    def add(self, layer: Layer, module: str, x: Values) -> None:
        """Map what a branch computed back into the stream, and add it there."""
        y, scale = self.linear(layer, module, x), layer.parameter("layer_scale")
        (space,) = map(str, _filling(layer, f"{module}.weight").parsed.writes)
        y = y if scale is None else y * self.array(scale)
        y = y if layer.added_through is None else self.normalised(self.norms[layer.added_through], y)
        self.values[space] = self.values[space] + y

    def units(self, layer: Layer, x: Values) -> Values:
        if layer.parameter("gate_up_proj.weight"):
            gate, up = np.split(self.linear(layer, "gate_up_proj", x), 2, axis=-1)
        elif layer.parameter("gate_proj.weight"):
            gate, up = self.linear(layer, "gate_proj", x), self.linear(layer, "up_proj", x)
        else:
            return _activation(layer)(self.linear(layer, "up_proj", x))
        units: Values = _activation(layer)(gate) * up
        return units

    def heads(self, layer: Layer, x: Values) -> Values:
        d = self.sizes["head_dim"]
        k = self.sizes.get("kv_heads") or self.sizes["heads"]
        q_blkgd, k_blkgd, v_blkgd = (p.reshape(*x.shape[:2], k, -1, d) for p in self.projections(layer, x))
        q_blkgd, k_blkgd = self.head_norm("q_norm", q_blkgd), self.head_norm("k_norm", k_blkgd)
        if layer.attributes.get("rope"):
            q_blkgd, k_blkgd = _rotated(q_blkgd), _rotated(k_blkgd)
        scores = np.einsum("blkgd,bmkd->bkglm", q_blkgd, k_blkgd[:, :, :, 0])
        scores = scores * d**layer.score_power
        scores = np.where(self.visible(layer, x.shape[1]), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        heads: Values = np.einsum("bkglm,bmkd->blkgd", weights, v_blkgd[:, :, :, 0])
        return heads.reshape(*x.shape[:2], -1)

    def projections(self, layer: Layer, x: Values) -> Iterator[Values]:
        """Queries, keys and values, ``(b, l, k g d)``, from separate maps or from a fused one."""
        fused = layer.parameter("qkv_proj.weight")
        if fused is None:
            yield from (self.linear(layer, name, x) for name in ("q_proj", "k_proj", "v_proj"))
            return
        joined = self.linear(layer, "qkv_proj", x)
        (axis,) = fused.parsed.writes
        yield from (joined[..., _segment(axis, self.sizes, part)] for part in range(3))

    def head_norm(self, name: str, heads: Values) -> Values:
        return self.normalised(self.norms[name], heads) if name in self.norms else heads

    def visible(self, layer: Layer, length: int) -> Values:
        """``(b, 1, 1, l, m)``: whether a token sees another."""
        seen = np.ones((1, 1, 1, length, length), dtype=bool)
        seen = np.tril(seen) if layer.attributes.get("causal") else seen
        for mask in self.masks:
            seen = seen & (mask[:, None, None, None, :] != 0)
        return seen


def _filling(layer: Layer, slot: str) -> Parameter:
    parameter = layer.parameter(slot)
    if parameter is None:
        raise GrowkitError(f"the reference does not understand layer '{layer.name}': nothing fills the slot {slot}")
    return parameter


def _segment(axis: Axis, sizes: Mapping[str, int], part: int) -> Values:
    """The entries of a fused axis that belong to q (0), k (1) or v (2)."""
    match axis:
        case Fixed(3):
            return np.array([part])
        case Concatenation(segments):
            start = sum(axis_size(segment, sizes) for segment in segments[:part])
            return start + np.arange(axis_size(segments[part], sizes))
        case Product(factors):
            index = np.zeros(1, dtype=int)
            for factor in factors:
                within = _segment(factor, sizes, part)
                index = (index[:, None] * axis_size(factor, sizes) + within).reshape(-1)
            return index
        case _:
            return np.arange(axis_size(axis, sizes))


def _rotated(heads: Values, base: float = 10000.0) -> Values:
    """Rotary positions: entries ``i`` and ``i + d/2`` of a head are turned by ``position * base^(-2i/d)``."""
    length, d = heads.shape[1], heads.shape[-1]
    angle = np.arange(length)[:, None] * base ** (-2 * np.arange(d // 2) / d)
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    x, y = heads[..., : d // 2], heads[..., d // 2 :]
    return np.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)


def _activation(layer: Layer) -> Callable[[Values], Values]:
    name = layer.attributes.get("activation")
    if name not in _ACTIVATIONS:
        known = ", ".join(map(str, _ACTIVATIONS))
        raise GrowkitError(
            f"the reference does not know the activation '{name}' of layer '{layer.name}'; known: {known}"
        )
    return _ACTIVATIONS[name]


def _tanh_gelu(x: Values) -> Values:
    y: Values = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y


_erf = np.vectorize(erf, otypes=[np.float64])
_ACTIVATIONS: dict[Any, Callable[[Values], Values]] = {
    None: lambda x: x,
    "gelu": lambda x: x * (1 + _erf(x / np.sqrt(2))) / 2,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
