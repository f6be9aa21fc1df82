"""Operators on images and signals: convolutions, pooling, resizing. Tensors are [batch, channels, *space]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from growkit_onnx.operation import Numbers, Operation, Table

TABLE = Table()
operator = TABLE.add


def _paddings(
    op: Operation, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """What is added before and after each axis of space; ``kernel`` counts the gaps of dilation."""
    mode, pads = op.get("auto_pad", "NOTSET"), op.get("pads", (0,) * 2 * len(sizes))
    if mode == "NOTSET":
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    if mode == "VALID":
        return [(0, 0)] * len(sizes)
    totals = [
        max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
        for size, extent, stride in zip(sizes, kernel, strides, strict=True)
    ]
    return [(t // 2, t - t // 2) if mode == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    widths = [width for pair in reversed(pads) for width in pair]
    return F.pad(x, widths, value=value) if any(widths) else x


def _extents(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


@operator("Conv")
def _conv(op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    space = x.ndim - 2
    strides, dilations = op.get("strides", (1,) * space), op.get("dilations", (1,) * space)
    pads = _paddings(op, x.shape[2:], _extents(weight.shape[2:], dilations), strides)
    still = [0] * space
    padded = _padded(x, pads)
    return torch.convolution(padded, weight, bias, strides, still, dilations, False, still, op.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    space = x.ndim - 2
    strides, dilations = op.get("strides", (1,) * space), op.get("dilations", (1,) * space)
    extra, shape, mode = op.get("output_padding", (0,) * space), op.get("output_shape"), op.get("auto_pad", "NOTSET")
    full = torch.convolution(x, weight, bias, strides, [0] * space, dilations, True, list(extra), op.get("group", 1))
    if shape is None and mode.startswith("SAME"):
        shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if shape is None:
        pads = _paddings(op, x.shape[2:], [], strides)
        shape = [size - before - after for size, (before, after) in zip(full.shape[2:], pads, strict=True)]
        starts = [before for before, _ in pads]
    else:
        surplus = [size - wanted for size, wanted in zip(full.shape[2:], shape[-space:], strict=True)]
        starts = [total // 2 if mode == "SAME_UPPER" else total - total // 2 for total in surplus]
    for i, (start, size) in enumerate(zip(starts, shape[-space:], strict=True)):
        full = full.narrow(i + 2, start, size)
    return full


Reduction = Callable[[Tensor, tuple[int, ...]], Tensor]


def _pool(op: Operation, x: Tensor, reduce: Reduction, around: float, *, beyond: float) -> Tensor:
    """Reduce every window of the kernel; ``around`` is what pads, ``beyond`` what `ceil_mode` adds at the end."""
    kernel = op.get("kernel_shape")
    strides, dilations = op.get("strides", (1,) * len(kernel)), op.get("dilations", (1,) * len(kernel))
    extents = _extents(kernel, dilations)
    x = _padded(x, _paddings(op, x.shape[2:], extents, strides), around)
    if op.get("ceil_mode", 0):
        x = _padded(x, [(0, (e - n) % s) for n, e, s in zip(x.shape[2:], extents, strides, strict=True)], beyond)
    for i, (extent, stride, dilation) in enumerate(zip(extents, strides, dilations, strict=True)):
        x = x.unfold(i + 2, extent, stride)[..., ::dilation]
    return reduce(x, tuple(range(-len(kernel), 0)))


@operator("MaxPool")
def _max_pool(op: Operation, x: Tensor) -> Tensor:
    least = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    return _pool(op, x, torch.amax, least, beyond=least)


@operator("AveragePool")
def _average_pool(op: Operation, x: Tensor) -> Tensor:
    counted = _pool(op, torch.ones_like(x[:1, :1]), torch.sum, op.get("count_include_pad", 0), beyond=0.0)
    return _pool(op, x, torch.sum, 0.0, beyond=0.0) / counted


# Resizing: one matrix for every axis whose size changes


def _round_half_down(position: float) -> int:
    return math.ceil(position - 0.5)


NEAREST: dict[str, Callable[[float], int]] = {
    "round_prefer_floor": _round_half_down,
    "round_prefer_ceil": lambda position: math.floor(position + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}

# The position in the old axis of entry i of the new one; n and m are their sizes, s the scale.
COORDINATES: dict[str, Callable[[int, int, int, float], float]] = {
    "half_pixel": lambda i, n, m, s: (i + 0.5) / s - 0.5,
    "pytorch_half_pixel": lambda i, n, m, s: (i + 0.5) / s - 0.5 if m > 1 else 0.0,
    "half_pixel_symmetric": lambda i, n, m, s: n / 2 * (1 - m / (n * s)) + (i + 0.5) / s - 0.5,
    "align_corners": lambda i, n, m, s: i * (n - 1) / (m - 1) if m > 1 else 0.0,
    "asymmetric": lambda i, n, m, s: i / s,
}


def _taps(op: Operation, position: float, scale: float) -> list[tuple[int, float]]:
    """The entries of the old axis that make up one at this position, and how much of each."""
    mode, base = op.get("mode", "nearest"), math.floor(position)
    t = position - base
    if mode == "nearest":
        default = "round_prefer_floor" if op.opset > 10 else "floor" if scale >= 1 else "ceil"
        return [(op.choice("nearest_mode", NEAREST, default)(position), 1.0)]
    if mode == "linear":
        return [(base, 1 - t), (base + 1, t)]
    if mode != "cubic":
        raise op.refuse(f"mode={mode!r}")
    a = op.get("cubic_coeff_a", -0.75)

    def near(d: float) -> float:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: float) -> float:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [(base - 1, far(1 + t)), (base, near(t)), (base + 1, near(1 - t)), (base + 2, far(2 - t))]


def _resized(op: Operation, x: Tensor, axis: int, size: int, scale: float) -> Tensor:
    old = x.shape[axis]
    default = "half_pixel" if op.opset > 10 else "asymmetric"
    place = op.choice("coordinate_transformation_mode", COORDINATES, default)
    rows = [[0.0] * old for _ in range(size)]
    for i, row in enumerate(rows):
        for position, share in _taps(op, place(i, old, size, scale), scale):
            row[min(max(position, 0), old - 1)] += share
    matrix = torch.tensor(rows, dtype=x.dtype, device=x.device)
    return (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


@operator("Resize", "Upsample", reads=[1, 2, 3], floats=[1, 2])
def _resize(op: Operation, x: Tensor, *numbers: Numbers | None) -> Tensor:
    op.allow(antialias=0, exclude_outside=0, keep_aspect_ratio_policy="stretch")
    if len(numbers) == 1:  # before opset 11
        numbers = (None, *numbers)
    scales: Numbers = (numbers[1] if len(numbers) > 1 else None) or list(op.get("scales", ()))
    sizes = numbers[2] if len(numbers) > 2 else None
    for i, axis in enumerate(op.get("axes", range(x.ndim))):
        old = x.shape[axis]
        size = int(sizes[i]) if sizes else math.floor(old * scales[i])
        scale = size / old if sizes else scales[i]
        if size != old or scale != 1:
            x = _resized(op, x, axis, size, scale)
    return x
