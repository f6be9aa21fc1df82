"""The standard ONNX operators as torch functions: one table, for runs with numbers and for abstract runs alike.

A handler gets an `Operation` and the node's inputs. The inputs that its entry lists in ``reads`` (shapes, axes, sizes)
come as plain Python lists of numbers, taken before anything else; every other input comes as a tensor. That division
is what makes an abstract run possible: tensors may be on torch's ``meta`` device, what is read must be real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from growkit_onnx.operation import Handler, Numbers, Operation, Table, named, torch_dtype

TABLE = Table()
operator = TABLE.add


def _plain(function: Handler) -> Handler:
    return lambda op, *inputs: function(*inputs)


def _fold(function: Handler) -> Handler:
    """Operators of any number of inputs, out of a function of two."""
    return lambda op, *inputs: list(accumulate(inputs, function))[-1]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact for large x too (torch's own is linear from 20 on)."""
    return torch.logaddexp(x, x.new_zeros(()))


# Operators that torch has under the same name, in small letters.
NAMESAKES = (
    *("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Sigmoid", "Relu"),
    *("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Acosh", "Atanh", "Det"),
)
PLAIN: dict[str, Handler] = {
    **{name: getattr(torch, name.lower()) for name in NAMESAKES},
    "Softplus": softplus,
    "Softsign": F.softsign,
    "HardSwish": F.hardswish,
    "Mish": lambda x: x * torch.tanh(softplus(x)),
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": _divide,
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Where": torch.where,
    "MatMul": torch.matmul,
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True),
}
FOLDED: dict[str, Handler] = {"Sum": torch.add, "Max": torch.maximum, "Min": torch.minimum}

for _name, _function in PLAIN.items():
    operator(_name)(_plain(_function))
for _name, _function in FOLDED.items():
    operator(_name)(_fold(_function))


@operator("Mean")
def _mean(op: Operation, *inputs: Tensor) -> Tensor:
    return sum(inputs[1:], start=inputs[0]) / len(inputs)


@operator("Mod")
def _mod(op: Operation, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if op.get("fmod", 0) else torch.remainder(a, b)


@operator("BitShift")
def _bit_shift(op: Operation, a: Tensor, b: Tensor) -> Tensor:
    return torch.bitwise_left_shift(a, b) if op.get("direction") == "LEFT" else torch.bitwise_right_shift(a, b)


@operator("IsInf")
def _is_inf(op: Operation, x: Tensor) -> Tensor:
    positive, negative = bool(op.get("detect_positive", 1)), bool(op.get("detect_negative", 1))
    return (torch.isposinf(x) & positive) | (torch.isneginf(x) & negative)


# Activations


@operator("LeakyRelu")
def _leaky_relu(op: Operation, x: Tensor) -> Tensor:
    return F.leaky_relu(x, op.get("alpha", 0.01))


@operator("Elu")
def _elu(op: Operation, x: Tensor) -> Tensor:
    return F.elu(x, op.get("alpha", 1.0))


@operator("Celu")
def _celu(op: Operation, x: Tensor) -> Tensor:
    return F.celu(x, op.get("alpha", 1.0))


@operator("Selu")
def _selu(op: Operation, x: Tensor) -> Tensor:
    alpha, gamma = op.get("alpha", 1.67326319217681884765625), op.get("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def _hard_sigmoid(op: Operation, x: Tensor) -> Tensor:
    return torch.clamp(op.get("alpha", 0.2) * x + op.get("beta", 0.5), 0, 1)


@operator("ThresholdedRelu")
def _thresholded_relu(op: Operation, x: Tensor) -> Tensor:
    return F.threshold(x, op.get("alpha", 1.0), 0.0)


@operator("Swish")
def _swish(op: Operation, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.get("alpha", 1.0) * x)


@operator("Gelu")
def _gelu(op: Operation, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=op.get("approximate", "none"))


@operator("Clip")
def _clip(op: Operation, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    for bound, limit in ((low, torch.maximum), (high, torch.minimum)):
        x = x if bound is None else limit(x, bound)
    low_attribute, high_attribute = op.get("min"), op.get("max")  # before opset 11
    return x if low_attribute is None and high_attribute is None else torch.clamp(x, low_attribute, high_attribute)


@operator("Softmax", "LogSoftmax")
def _softmax(op: Operation, x: Tensor) -> Tensor:
    function = torch.softmax if op.node.op_type == "Softmax" else torch.log_softmax
    if op.opset >= 13:
        return function(x, op.get("axis", -1))
    axis = op.get("axis", 1) % max(x.ndim, 1)
    return function(x.flatten(axis), -1).reshape(x.shape)  # before opset 13 the softmax is over all axes from `axis` on


@operator("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss")
def _entropy(op: Operation, x: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shares = torch.log_softmax(x, 1) if op.node.op_type == "SoftmaxCrossEntropyLoss" else x
    ignored = op.get("ignore_index", -1)  # no label is negative where none is ignored
    reduction = op.get("reduction", "mean")
    return F.nll_loss(shares, labels.long(), weights, ignore_index=ignored, reduction=reduction), shares


# Types and constants


@operator("Cast")
def _cast(op: Operation, x: Tensor) -> Tensor:
    return x.to(op.floating(torch_dtype(op.get("to"), named(op.node))))


@operator("CastLike")
def _cast_like(op: Operation, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


CONSTANTS: dict[str, type] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def constant(node: ir.Node) -> ir.TensorProtocol:
    """What a Constant node holds, whichever attribute holds it.

    Raises:
        UnsupportedModel: Where it is a string or sparse.
    """
    op = Operation(node, 0)
    if "value" in node.attributes:
        value: ir.TensorProtocol = op.get("value")
        return value
    for name, dtype in CONSTANTS.items():
        if name in node.attributes:
            return ir.Tensor(np.array(op.get(name), dtype))
    raise op.refuse(f"a constant in {', '.join(node.attributes) or 'no attribute'}")


@operator("Constant")
def _constant(op: Operation) -> Tensor:
    return op.tensor(constant(op.node))


@operator("ConstantOfShape", reads=[0])
def _constant_of_shape(op: Operation, shape: Numbers) -> Tensor:
    value = op.get("value")
    fill = torch.zeros((), dtype=op.floating(torch.float32)) if value is None else op.tensor(value).reshape(())
    return fill.expand(shape).clone()


@operator("EyeLike")
def _eye_like(op: Operation, x: Tensor) -> Tensor:
    dtype = op.get("dtype")
    ones = torch.ones(x.shape, dtype=x.dtype if dtype is None else op.floating(torch_dtype(dtype, named(op.node))))
    return ones.tril(op.get("k", 0)).triu(op.get("k", 0))


@operator("Range")
def _range(op: Operation, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    (first,), (last,), (step,) = op.read(start), op.read(limit), op.read(delta)
    count = max(math.ceil((last - first) / step), 0)
    return start.reshape(()) + torch.arange(count, dtype=start.dtype, device=start.device) * delta.reshape(())


@operator("Shape")
def _shape(op: Operation, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[op.get("start", 0) : op.get("end")], dtype=torch.int64)


@operator("Size")
def _size(op: Operation, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@operator("NonZero")
def _non_zero(op: Operation, x: Tensor) -> Tensor:
    if x.is_meta:
        op.read(x)  # raises: how many there are is not known
    return torch.nonzero(x).T


@operator("Dropout", reads=[1, 2], floats=[1])
def _dropout(op: Operation, x: Tensor, ratio: Any = None, training: Numbers | None = None) -> tuple[Tensor, Tensor]:
    if training and training[0]:
        raise op.refuse("training mode")
    return x, torch.ones_like(x, dtype=torch.bool)


# Shapes


@operator("Reshape", reads=[1])
def _reshape(op: Operation, x: Tensor, shape: Numbers) -> Tensor:
    if op.get("allowzero", 0):
        return x.reshape(shape)
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


@operator("Flatten")
def _flatten(op: Operation, x: Tensor) -> Tensor:
    axis = op.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def _transpose(op: Operation, x: Tensor) -> Tensor:
    return x.permute(op.get("perm", tuple(reversed(range(x.ndim)))))


@operator("Unsqueeze", reads=[1])
def _unsqueeze(op: Operation, x: Tensor, axes: Numbers | None = None) -> Tensor:
    axes = op.get("axes") if axes is None else axes
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze", reads=[1])
def _squeeze(op: Operation, x: Tensor, axes: Numbers | None = None) -> Tensor:
    axes = op.get("axes") if axes is None else axes
    for axis in axes or ():
        if x.shape[axis] != 1:
            raise ValueError(f"cannot squeeze axis {axis} of shape {tuple(x.shape)}")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("Expand", reads=[1])
def _expand(op: Operation, x: Tensor, shape: Numbers) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


@operator("Tile", reads=[1])
def _tile(op: Operation, x: Tensor, repeats: Numbers) -> Tensor:
    return x.repeat(repeats)


@operator("Concat")
def _concat(op: Operation, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, op.get("axis"))


@operator("Split", reads=[1])
def _split(op: Operation, x: Tensor, sizes: Numbers | None = None) -> tuple[Tensor, ...]:
    axis = op.get("axis", 0)
    sizes = op.get("split") if sizes is None else sizes
    if sizes is None:
        return x.split(max(math.ceil(x.shape[axis] / op.get("num_outputs", len(op.node.outputs))), 1), axis)
    return x.split(list(sizes), axis)


@operator("Slice", reads=[1, 2, 3, 4])
def _slice(
    op: Operation,
    x: Tensor,
    starts: Numbers | None = None,
    ends: Numbers | None = None,
    axes: Numbers | None = None,
    steps: Numbers | None = None,
) -> Tensor:
    starts, ends = op.get("starts", starts), op.get("ends", ends)  # attributes before opset 10
    axes = op.get("axes", axes)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = i if axes is None else axes[i], 1 if steps is None else steps[i]
        taken = range(*slice(start, end, step).indices(x.shape[axis]))
        x = x.narrow(axis, min(taken, default=0), max(taken, default=-1) - min(taken, default=0) + 1)
        x = x.flip(axis) if step < 0 else x
        if abs(step) > 1:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(None, None, abs(step)),)]
    return x


def take(x: Tensor, axis: int, positions: Sequence[int]) -> Tensor:
    """The entries of an axis at these positions, in this order."""
    return x.index_select(axis, torch.tensor(positions, dtype=torch.int64, device=x.device))


# How a position beyond the edges of an axis of n entries is found within it.
PADDING: dict[str, Callable[[int, int], int]] = {
    "reflect": lambda i, n: (n - 1) - abs((n - 1) - i % (2 * n - 2)) if n > 1 else 0,
    "edge": lambda i, n: min(max(i, 0), n - 1),
    "wrap": lambda i, n: i % n,
}


@operator("Pad", reads=[1, 2, 3], floats=[2])
def _pad(
    op: Operation, x: Tensor, pads: Numbers | None = None, value: Numbers | None = None, axes: Numbers | None = None
) -> Tensor:
    pads = list(op.get("pads") if pads is None else pads)
    axes = [axis % x.ndim for axis in (range(x.ndim) if axes is None else axes)]
    ends = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    if op.get("mode", "constant") == "constant":
        widths = [width for axis in reversed(range(x.ndim)) for width in ends.get(axis, (0, 0))]
        return F.pad(x, widths, value=value[0] if value else op.get("value", 0))
    within = op.choice("mode", PADDING)
    for axis, (before, after) in ends.items():
        size = x.shape[axis]
        x = take(x, axis, [within(i, size) for i in range(-before, size + after)])
    return x


@operator("DepthToSpace")
def _depth_to_space(op: Operation, x: Tensor) -> Tensor:
    block, (batch, depth, height, width) = op.get("blocksize"), x.shape
    if op.get("mode", "DCR") == "DCR":
        x = x.reshape(batch, block, block, depth // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(batch, depth // block**2, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, depth // block**2, height * block, width * block)


@operator("SpaceToDepth")
def _space_to_depth(op: Operation, x: Tensor) -> Tensor:
    block, (batch, depth, height, width) = op.get("blocksize"), x.shape
    x = x.reshape(batch, depth, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, depth * block**2, height // block, width // block)


@operator("Trilu", reads=[1])
def _trilu(op: Operation, x: Tensor, k: Numbers | None = None) -> Tensor:
    return (torch.triu if op.get("upper", 1) else torch.tril)(x, k[0] if k else 0)


# Gathering and scattering


def _counted(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front, where negative ones count from the end."""
    return torch.where(indices < 0, indices + size, indices).to(torch.int64)


@operator("Gather")
def _gather(op: Operation, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0) % x.ndim
    found = x.index_select(axis, _counted(indices, x.shape[axis]).reshape(-1))
    return found.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@operator("GatherElements")
def _gather_elements(op: Operation, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0)
    return x.gather(axis, _counted(indices, x.shape[axis]))


def _points(x: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """An index of ``x`` out of indices whose last axis holds one coordinate for each leading axis of ``x``."""
    return tuple(_counted(column, size) for column, size in zip(indices.unbind(-1), x.shape, strict=False))


@operator("GatherND")
def _gather_nd(op: Operation, x: Tensor, indices: Tensor) -> Tensor:
    shared = op.get("batch_dims", 0)
    shape = indices.shape[:-1] + x.shape[shared + indices.shape[-1] :]
    rows = x.reshape(-1, *x.shape[shared:])
    points = indices.reshape(rows.shape[0], -1, indices.shape[-1])
    batch = torch.arange(rows.shape[0], device=points.device)[:, None].expand(points.shape[:-1])
    return rows[_points(rows, torch.cat([batch[..., None], points], -1))].reshape(shape)


# What torch calls the ways to combine an entry with its update.
SCATTERS = {"none": None, "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterND")
def _scatter_nd(op: Operation, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    points, reduction = _points(x, indices), op.choice("reduction", SCATTERS, "none")
    if reduction in (None, "sum"):
        return x.index_put(points, updates, accumulate=reduction == "sum")
    lines = torch.arange(x.numel(), device=x.device).reshape(x.shape)[points].reshape(-1)
    return x.reshape(-1).scatter_reduce(0, lines, updates.reshape(-1), reduction).reshape(x.shape)


@operator("ScatterElements", "Scatter")
def _scatter_elements(op: Operation, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = op.get("axis", 0), op.choice("reduction", SCATTERS, "none")
    indices = _counted(indices, x.shape[axis])
    if reduction is None:
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, reduction)


@operator("OneHot", reads=[1])
def _one_hot(op: Operation, indices: Tensor, depth: Numbers, values: Tensor) -> Tensor:
    axis, size = op.get("axis", -1) % (indices.ndim + 1), int(depth[0])
    shape = [size if i == axis else 1 for i in range(indices.ndim + 1)]
    classes = torch.arange(size, device=indices.device).reshape(shape)
    off, on = values.unbind(0)
    return torch.where(_counted(indices, size).unsqueeze(axis) == classes, on, off)


# Reductions


def _reduce_mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(x.sum(axes, keep, dtype=x.dtype), count, rounding_mode="trunc")


def _reduce_prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


REDUCTIONS: dict[str, Handler] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceMean": _reduce_mean,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceProd": _reduce_prod,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": torch.logsumexp,
}


@operator(*REDUCTIONS, reads=[1])
def _reduce(op: Operation, x: Tensor, axes: Numbers | None = None) -> Tensor:
    axes = axes or op.get("axes")
    if not axes and op.get("noop_with_empty_axes", 0):
        return x
    every = tuple(axes) if axes else tuple(range(x.ndim))
    return REDUCTIONS[op.node.op_type](x, every, bool(op.get("keepdims", 1))) if x.ndim else x


@operator("ArgMax", "ArgMin")
def _arg_extreme(op: Operation, x: Tensor) -> Tensor:
    axis, keep = op.get("axis", 0), bool(op.get("keepdims", 1))
    function = torch.argmax if op.node.op_type == "ArgMax" else torch.argmin
    if op.get("select_last_index", 0):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)
    return function(x, axis, keep)


@operator("TopK", reads=[1])
def _top_k(op: Operation, x: Tensor, k: Numbers | None = None) -> tuple[Tensor, Tensor]:
    axis, count = op.get("axis", -1), k[0] if k else op.get("k")
    values, indices = x.sort(dim=axis, descending=bool(op.get("largest", 1)), stable=True)  # of equals, the first
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@operator("CumSum", reads=[1])
def _cum_sum(op: Operation, x: Tensor, axis: Numbers) -> Tensor:
    dim, backwards = int(axis[0]), bool(op.get("reverse", 0))
    x = x.flip(dim) if backwards else x
    total = x.cumsum(dim, dtype=x.dtype)
    total = total - x if op.get("exclusive", 0) else total
    return total.flip(dim) if backwards else total


# Products


@operator("Gemm")
def gemm(op: Operation, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """The general matrix product: alpha a b + beta c."""
    a, b = a.T if op.get("transA", 0) else a, b.T if op.get("transB", 0) else b
    product = a @ b if op.get("alpha", 1.0) == 1 else op.get("alpha") * (a @ b)
    return product if c is None else product + (c if op.get("beta", 1.0) == 1 else op.get("beta") * c)


@operator("Einsum")
def _einsum(op: Operation, *inputs: Tensor) -> Tensor:
    return torch.einsum(op.get("equation").replace(" ", ""), *inputs)


# Norms


def standardised(
    x: Tensor, axes: Sequence[int], epsilon: float, *, centred: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries less their mean over ``axes`` (if ``centred``) over their root mean square; the mean; 1 / the root."""
    axes = tuple(axes)
    mean = x.mean(axes, keepdim=True)
    x = x - mean if centred else x
    inverse = torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)
    return x * inverse, mean, inverse


def widened(x: Tensor) -> Tensor:
    """Half types in float32, as ONNX Runtime computes norms and softmaxes; other types as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@operator("LayerNormalization")
def _layer_norm(op: Operation, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    axes = range(op.get("axis", -1) % x.ndim, x.ndim)
    y, mean, inverse = standardised(widened(x), axes, op.get("epsilon", 1e-5))
    y = y.to(x.dtype) * scale
    return y if bias is None else y + bias, mean, inverse


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(op: Operation, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The entries over their root mean square, times the scale; 1 / the root."""
    axes = range(op.get("axis", -1) % x.ndim, x.ndim)
    y, _, inverse = standardised(widened(x), axes, op.get("epsilon", 1e-5), centred=False)
    return y.to(x.dtype) * scale, inverse


def _by_channel(weight: Tensor, x: Tensor) -> Tensor:
    """A vector over the channels, shaped to broadcast with [batch, channels, ...]."""
    return weight.reshape(-1, *(1,) * (x.ndim - 2))


@operator("InstanceNormalization")
def _instance_norm(op: Operation, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    y, _, _ = standardised(x, range(2, x.ndim), op.get("epsilon", 1e-5))
    return y * _by_channel(scale, x) + _by_channel(bias, x)


@operator("GroupNormalization")
def _group_norm(op: Operation, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = op.get("num_groups")
    y, _, _ = standardised(widened(x).reshape(x.shape[0], groups, -1), [2], op.get("epsilon", 1e-5))
    if op.opset < 21:  # one scale and one bias a group, later one a channel
        scale, bias = (w.repeat_interleave(x.shape[1] // groups) for w in (scale, bias))
    return y.reshape(x.shape).to(x.dtype) * _by_channel(scale, x) + _by_channel(bias, x)


@operator("BatchNormalization")
def _batch_norm(op: Operation, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    op.allow(training_mode=0)
    factor = scale * torch.rsqrt(variance + op.get("epsilon", 1e-5))
    return (x - _by_channel(mean, x)) * _by_channel(factor, x) + _by_channel(bias, x)


@operator("LpNormalization")
def _lp_norm(op: Operation, x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, op.get("p", 2), op.get("axis", -1), keepdim=True)


@operator("MeanVarianceNormalization")
def _mean_variance_norm(op: Operation, x: Tensor) -> Tensor:
    return standardised(x, op.get("axes", (0, 2, 3)), 0.0)[0]


# Quantisation: what is stored as integers, back in floats, and there again


def _along(weight: Tensor, x: Tensor, axis: int) -> Tensor:
    """A number, or a vector along one axis of ``x``, shaped to broadcast with ``x``."""
    return weight.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]) if weight.ndim == 1 else weight


@operator("DequantizeLinear")
def _dequantize(op: Operation, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    op.allow(block_size=0)
    axis = op.get("axis", 1)
    shifted = x.to(scale.dtype) if zero is None else x.to(scale.dtype) - _along(zero, x, axis).to(scale.dtype)
    return shifted * _along(scale, x, axis)


@operator("QuantizeLinear")
def _quantize(op: Operation, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    op.allow(block_size=0, output_dtype=0)
    axis, dtype = op.get("axis", 1), torch.uint8 if zero is None else zero.dtype
    steps = torch.round(x / _along(scale, x, axis)) + (0 if zero is None else _along(zero, x, axis))
    limits = torch.iinfo(dtype)
    return steps.clamp(limits.min, limits.max).to(dtype)
