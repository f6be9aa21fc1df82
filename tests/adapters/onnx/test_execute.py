"""The torch executor against ONNX Runtime, operator by operator; abstract runs; gradients; refusals."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from growkit_onnx.execute import TABLE, DataDependent, Executor, probe, run_node
from growkit_specs import GrowkitError, InvalidModel, UnsupportedModel

MICROSOFT = "com.microsoft"


class Fixed:
    """An input that is an initializer of the graph, not an input of it."""

    def __init__(self, value: Any, dtype: Any = np.int64) -> None:
        self.array = np.array(value, dtype)


def f(*shape: int) -> np.ndarray:
    """Floats, the same for the same shape."""
    return np.random.default_rng([len(shape), *shape]).standard_normal(shape).astype(np.float32)


def other(*shape: int) -> np.ndarray:
    """Other floats than `f`'s."""
    return np.flip(f(*shape)).copy()


def positive(*shape: int) -> np.ndarray:
    return np.abs(f(*shape)) + np.float32(0.5)


def small(*shape: int) -> np.ndarray:
    """Floats strictly between -1 and 1."""
    return np.tanh(f(*shape)).astype(np.float32)


def i(*values: Any, dtype: Any = np.int64) -> np.ndarray:
    return np.array(values, dtype)


def b(*shape: int) -> np.ndarray:
    return f(*shape) > 0


def value(array: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(array, dtype))


class Case:
    """One node as a model: which operator, its inputs (None where left out), its attributes, its outputs."""

    def __init__(self, op: str, *inputs: Any, opset: int = 18, domain: str = "", out: int | str = 1, **attributes: Any):
        self.op, self.opset, self.domain, self.attributes = op, opset, domain, attributes
        entry = TABLE.get((domain, op))
        reads = entry.reads if entry else frozenset()
        self.inputs = [
            Fixed(x, x.dtype) if isinstance(x, np.ndarray) and n in reads else x for n, x in enumerate(inputs)
        ]
        used = "x" * out if isinstance(out, int) else out  # "x-x": the second output is left out
        self.outputs = [f"y{n}" if mark == "x" else "" for n, mark in enumerate(used)]

    def __str__(self) -> str:
        attributes = ",".join(
            f"{k}={v if not isinstance(v, onnx.TensorProto) else '...'}" for k, v in self.attributes.items()
        )
        shapes = ",".join("-" if x is None else str(list(getattr(x, "array", x).shape)) for x in self.inputs)
        return f"{self.op}-{self.opset}({attributes};{shapes})".replace(" ", "")

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{n}": x for n, x in enumerate(self.inputs) if isinstance(x, np.ndarray)}

    def proto(self) -> onnx.ModelProto:
        names = ["" if x is None else f"x{n}" for n, x in enumerate(self.inputs)]
        node = helper.make_node(self.op, names, self.outputs, "node", domain=self.domain, **self.attributes)
        fixed = {f"x{n}": x.array for n, x in enumerate(self.inputs) if isinstance(x, Fixed)}
        return model([node], self.feeds, [name for name in self.outputs if name], fixed, self.opset)


def model(
    nodes: list[onnx.NodeProto],
    feeds: dict[str, np.ndarray],
    outputs: list[str],
    initializers: dict[str, np.ndarray] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for k, x in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def loaded(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)


def runtime(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


BINARY = ["Add", "Sub", "Mul", "Div", "PRelu", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"]
LOSSES = ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss")
UNARY = (
    *("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "Exp", "Erf", "Sigmoid", "Relu", "Sin", "Cos", "Tan"),
    *("Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Softplus", "Softsign", "HardSwish", "Mish", "Identity", "IsNaN"),
    *("LeakyRelu", "Elu", "Celu", "Selu", "HardSigmoid", "ThresholdedRelu", "Reciprocal"),
)
WITH_INFINITIES = np.array([1.0, np.inf, -np.inf, np.nan, 0.0], np.float32)

ELEMENTWISE = [
    *(Case(op, f(2, 3, 4)) for op in UNARY),
    *(Case(op, positive(2, 3)) for op in ("Sqrt", "Log", "Acosh")),
    *(Case(op, small(2, 3)) for op in ("Asin", "Acos", "Atanh")),
    *(Case(op, f(2, 3, 4), f(3, 1)) for op in BINARY),
    *(Case(op, b(2, 3), b(3)) for op in ("And", "Or", "Xor")),
    *(Case(op, f(2, 3), other(3), f(1, 1)) for op in ("Sum", "Mean", "Max", "Min")),
    *(Case(op, i(1, 6, 3), i(4, 4, 1), opset=18) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    Case("BitwiseNot", i(1, 6, 3)),
    Case("Not", b(2, 3)),
    Case("Max", i(1, 5), i(3, 2)),
    Case("Det", f(2, 3, 3)),
    Case("Div", i(7, -7, 7, -7), i(2, 2, -2, -2)),
    Case("Pow", positive(2, 3), f(3)),
    Case("Pow", f(2, 3), i(2)),
    Case("Pow", i(2, 3), np.array([2.0], np.float32)),
    Case("Mod", i(7, -7, 7, -7), i(3, 3, -3, -3)),
    Case("Mod", i(7, -7, 7, -7), i(3, 3, -3, -3), fmod=1),
    Case("Mod", f(4), positive(4), fmod=1),
    Case("BitShift", i(1, 2, dtype=np.uint8), i(3, 1, dtype=np.uint8), direction="LEFT"),
    Case("BitShift", i(9, 2, dtype=np.uint8), i(3, 1, dtype=np.uint8), direction="RIGHT"),
    Case("IsInf", WITH_INFINITIES),
    Case("IsInf", WITH_INFINITIES, detect_negative=0),
    Case("IsInf", WITH_INFINITIES, detect_positive=0),
    Case("Where", b(2, 3), f(3), other(2, 1)),
    Case("LeakyRelu", f(9), alpha=0.3),
    Case("Elu", f(9), alpha=0.3),
    Case("Celu", f(9), alpha=0.3),
    Case("Selu", f(9), alpha=1.5, gamma=2.0),
    Case("HardSigmoid", f(9), alpha=0.4, beta=0.3),
    Case("ThresholdedRelu", f(9), alpha=0.2),
    Case("Gelu", f(2, 9), opset=20),
    Case("Gelu", f(2, 9), opset=20, approximate="tanh"),
    Case("Swish", f(2, 9), opset=24, alpha=1.5),
    Case("Softplus", np.array([-100, -1, 0, 25, 100], np.float32)),
    Case("Clip", f(9), opset=9, min=-0.5, max=0.5),
    Case("Clip", f(9), opset=9, max=0.5),
    Case("Clip", f(9), Fixed(-0.5, np.float32), Fixed(0.5, np.float32)),
    Case("Clip", f(9), None, Fixed(0.5, np.float32)),
    Case("Clip", i(1, 5, 9), Fixed(2), None),
    *(Case(op, f(2, 3, 4), opset=11) for op in ("Softmax", "LogSoftmax")),
    *(Case(op, f(4, 3), i(2, 0, 1, 1), reduction=how) for op in LOSSES for how in ("mean", "sum", "none")),
    *(Case(op, f(2, 3, 2), i([2, -7], [1, 1]), positive(3), ignore_index=-7) for op in LOSSES),
    *(Case(op, f(4, 3), i(2, 0, 1, 1, dtype=np.int32)) for op in LOSSES),
    Case("SoftmaxCrossEntropyLoss", f(4, 3), i(2, 0, 1, 1), out=2),
    *(Case(op, f(2, 3, 4), opset=11, axis=axis) for op in ("Softmax", "LogSoftmax") for axis in (0, 1, -1)),
    *(Case(op, f(2, 3, 4), opset=13) for op in ("Softmax", "LogSoftmax")),
    *(Case(op, f(2, 3, 4), opset=13, axis=axis) for op in ("Softmax", "LogSoftmax") for axis in (0, 1)),
]

CONSTANTS = [
    Case("Cast", f(2, 3), to=TensorProto.INT64),
    Case("Cast", f(2, 3), to=TensorProto.BOOL),
    Case("Cast", i(0, 3), to=TensorProto.BOOL),
    Case("Cast", i(1, 0), to=TensorProto.FLOAT),
    Case("CastLike", i(1, 0), f(1)),
    Case("CastLike", f(3), i(1)),
    *(Case("Constant", **{k: v}) for k, v in (("value_float", 1.5), ("value_int", 3))),
    *(Case("Constant", **{k: v}) for k, v in (("value_floats", [1.5, 2.0]), ("value_ints", [1, 2]))),
    Case("Constant", value=value([[1.0, 2.0]])),
    Case("ConstantOfShape", i(2, 3)),
    Case("ConstantOfShape", i(2, 3), value=value([7], np.int64)),
    Case("ConstantOfShape", np.zeros(0, np.int64), value=value([1.5])),
    Case("EyeLike", f(3, 4), k=1),
    Case("EyeLike", f(3, 4), dtype=TensorProto.INT64, k=-1),
    Case("Range", Fixed(1), Fixed(8), Fixed(3)),
    Case("Range", Fixed(5), Fixed(-2), Fixed(-2)),
    Case("Range", Fixed(3), Fixed(1), Fixed(1)),
    Case("Range", Fixed(0.5, np.float32), Fixed(2.1, np.float32), Fixed(0.4, np.float32)),
    Case("Shape", f(2, 3, 4)),
    *(Case("Shape", f(2, 3, 4), start=start, end=end) for start, end in ((1, 3), (-1, 9), (0, -1), (2, 1))),
    Case("Size", f(2, 3, 4)),
    Case("NonZero", i([0, 1, 2], [3, 0, 0])),
    Case("Dropout", f(2, 3), opset=10),
    Case("Dropout", f(2, 3), None, Fixed(False, bool), out=2),
]

SHAPES = [
    Case("Reshape", f(2, 3, 4), i(0, -1)),
    Case("Reshape", f(2, 3, 4), i(6, 4)),
    Case("Reshape", f(0, 3), i(3, 0), allowzero=1),
    *(Case("Flatten", f(2, 3, 4), axis=axis) for axis in (0, 1, 3, -1)),
    Case("Transpose", f(2, 3, 4)),
    Case("Transpose", f(2, 3, 4), perm=[1, 2, 0]),
    Case("Unsqueeze", f(2, 3), opset=11, axes=[0, 3]),
    Case("Unsqueeze", f(2, 3), i(-1, 1)),
    Case("Unsqueeze", f(2, 3), i(2, 0, 1)),
    Case("Squeeze", f(1, 2, 1), opset=11, axes=[0]),
    Case("Squeeze", f(1, 2, 1), i(-1)),
    Case("Squeeze", f(1, 2, 1)),
    Case("Expand", f(3, 1), i(2, 3, 4)),
    Case("Expand", f(2, 3, 4), i(3, 1)),
    Case("Tile", f(2, 3), i(2, 3)),
    Case("Concat", f(2, 3), f(2, 1), axis=1),
    Case("Concat", f(2, 3), f(1, 3), axis=-2),
    Case("Split", f(2, 6), opset=11, axis=1, out=3),
    Case("Split", f(2, 6), opset=11, axis=1, split=[2, 4], out=2),
    Case("Split", f(2, 6), opset=13, axis=-1, out=2),
    Case("Split", f(2, 6), i(1, 5), opset=13, axis=-1, out=2),
    Case("Split", f(2, 7), axis=1, num_outputs=3, out=3),
    Case("Split", f(2, 7), i(1, 0, 6), axis=1, out=3),
    Case("Slice", f(5, 6), opset=9, starts=[1, -3], ends=[3, 99]),
    Case("Slice", f(5, 6), opset=9, starts=[1], ends=[-1], axes=[1]),
    Case("Slice", f(5, 6), i(1, 0), i(4, 6), opset=10),
    Case("Slice", f(5, 6), i(-1), i(np.iinfo(np.int64).min), i(1), i(-1)),
    Case("Slice", f(5, 6), i(4, -2), i(0, -6), i(0, -1), i(-2, -3)),
    Case("Slice", f(5, 6), i(0, 1), i(np.iinfo(np.int64).max, 9), i(-1, -2), i(2, 3)),
    Case("Slice", f(5, 6), i(3), i(3), i(0)),
    Case("Pad", f(2, 3), opset=9, pads=[1, 0, 2, 1], value=2.5),
    Case("Pad", f(2, 3), i(1, 0, 2, 1)),
    Case("Pad", f(2, 3), i(0, -1, 1, 0), np.array(1.5, np.float32)),
    Case("Pad", f(2, 3), i(2, 1), np.array(1.5, np.float32), i(-1)),
    Case("Pad", i([1, 2], [3, 4]), i(1, 0, 0, 1)),
    *(Case("Pad", f(3, 5), i(1, 2, 2, 3), mode=mode, opset=19) for mode in ("reflect", "edge", "wrap")),
    Case("DepthToSpace", f(2, 8, 2, 3), blocksize=2),
    Case("DepthToSpace", f(2, 8, 2, 3), blocksize=2, mode="CRD"),
    Case("SpaceToDepth", f(2, 3, 4, 6), blocksize=2),
    *(Case("Trilu", f(2, 4, 5), upper=upper) for upper in (0, 1)),
    *(Case("Trilu", f(4, 5), np.array(k), upper=0) for k in (-1, 2)),
]

SCATTERED = f(2, 3)
GATHERS = [
    Case("Gather", f(4, 3), i([0, -1], [2, 1])),
    Case("Gather", f(4, 3), np.array(-2), axis=1),
    Case("Gather", i(4, 5, 6), np.array(1)),
    Case("GatherElements", f(3, 4), i([0, -1, 2, 1]), axis=0),
    Case("GatherElements", f(3, 4), i([0], [3], [-1]), axis=1),
    Case("GatherND", f(3, 4, 2), i([0, 1], [-1, 3])),
    Case("GatherND", f(3, 4, 2), i([0], [2])),
    Case("GatherND", f(2, 3, 4), i([[0], [2]], [[1], [-1]]), batch_dims=1),
    Case("GatherND", f(2, 3, 4), i([[0, 1, 1]])),
    Case("ScatterND", f(4, 3), i([1], [-1]), f(2, 3)),
    *(Case("ScatterND", f(4, 3), i([1, 2], [1, 2], [0, 0]), f(3), reduction=r) for r in ("add", "mul", "max", "min")),
    Case("ScatterND", f(4, 3), i([1], [3]), f(2, 3), reduction="max"),
    Case("ScatterElements", f(4, 3), i([1, 0, 2], [0, -1, 1]), f(2, 3)),
    *(
        Case("ScatterElements", f(4, 3), i([1, 0], [0, 0]), f(2, 2), reduction=r, axis=1)
        for r in ("add", "mul", "max", "min")
    ),
    Case("OneHot", i([0, 3], [-1, 9]), i(4), f(2)),
    Case("OneHot", i(0, 3), np.array(4), i(0, 1), axis=0),
]

REDUCED = ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"]
POSITIVE_REDUCED = ["ReduceLogSum", "ReduceLogSumExp"]
REDUCTIONS = [
    *(Case(op, positive(2, 3, 4)) for op in REDUCED + POSITIVE_REDUCED),
    *(Case(op, positive(2, 3, 4), i(0, -1), keepdims=0) for op in REDUCED + POSITIVE_REDUCED),
    *(Case(op, positive(2, 3, 4), opset=11, axes=[1], keepdims=0) for op in REDUCED + POSITIVE_REDUCED),
    Case("ReduceSum", f(2, 3), opset=13),
    Case("ReduceSum", f(2, 3), i(1), opset=13, keepdims=0),
    Case("ReduceMean", f(2, 3), opset=17, axes=[-1]),
    Case("ReduceSum", f(2, 3), np.zeros(0, np.int64), noop_with_empty_axes=1),
    Case("ReduceSum", f(2, 3), np.zeros(0, np.int64)),
    Case("ReduceSum", i([1, 2], [3, 4]), i(0)),
    Case("ReduceMax", i([1, 2], [3, 4]), i(0)),
    Case("ReduceProd", i([1, 2], [3, 4])),
    *(Case(op, f(3, 4), axis=axis, keepdims=k) for op in ("ArgMax", "ArgMin") for axis, k in ((0, 1), (-1, 0))),
    *(Case(op, i([2, 1, 2, 1]), axis=1, select_last_index=s) for op in ("ArgMax", "ArgMin") for s in (0, 1)),
    Case("TopK", f(3, 5), i(2), out=2),
    Case("TopK", f(3, 5), i(2), axis=0, largest=0, out=2),
    Case("TopK", f(3, 5), opset=9, k=3, out=2),
    Case("TopK", np.array([1, 3, 3, 2, 3], np.float32), i(2), out=2),
    *(Case("CumSum", f(3, 4), np.array(1), exclusive=e, reverse=r) for e in (0, 1) for r in (0, 1)),
    Case("CumSum", i(1, 2, 3), i(0)),
]

PRODUCTS = [
    Case("MatMul", f(2, 3, 4), f(4, 5)),
    Case("MatMul", f(4), f(2, 4, 5)),
    Case("MatMul", f(2, 1, 3, 4), f(3, 4, 5)),
    Case("MatMul", i([1, 2], [3, 4]), i([1], [2])),
    Case("Gemm", f(2, 3), f(3, 4)),
    Case("Gemm", f(2, 3), f(3, 4), f(4)),
    Case("Gemm", f(3, 2), f(4, 3), f(2, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    Case("Einsum", f(2, 3, 4), f(2, 5, 4), equation="bik, bjk -> bij"),
    Case("Einsum", f(2, 3, 4), f(4, 5), equation="...k,kd->...d"),
    Case("Einsum", f(3, 3), equation="ii->i"),
    *(
        Case("FusedGemm", f(2, 3), f(4, 3), f(4), domain=MICROSOFT, transB=1, alpha=0.5, activation=activation)
        for activation in ("Relu", "Tanh", "Sigmoid")
    ),
    Case("FusedMatMul", f(2, 4, 3), f(2, 5, 4), domain=MICROSOFT, transA=1, transB=1, alpha=0.5),
]

NORMS = [
    Case("LayerNormalization", f(2, 3, 4), f(4), other(4), opset=17),
    Case("LayerNormalization", f(2, 3, 4), f(3, 4), opset=17, axis=1, epsilon=0.1, out=3),
    Case("RMSNormalization", f(2, 3, 4), f(4), opset=23, epsilon=0.1),
    Case("RMSNormalization", f(2, 3, 4), f(3, 4), opset=23, axis=-2),
    Case("SimplifiedLayerNormalization", f(2, 3, 4), f(4), opset=17, epsilon=0.1, axis=-1),
    Case("GroupNormalization", f(2, 6, 4), f(2), other(2), num_groups=2),
    Case("GroupNormalization", f(2, 6, 3, 2), f(6), other(6), opset=21, num_groups=3, epsilon=0.1),
    Case("InstanceNormalization", f(2, 3, 5), f(3), other(3)),
    Case("InstanceNormalization", f(2, 3, 5, 2), f(3), other(3), epsilon=0.1),
    Case("BatchNormalization", f(2, 3, 5), f(3), other(3), f(3), positive(3), epsilon=0.1),
    Case("LpNormalization", f(2, 3), p=1, axis=0),
    Case("LpNormalization", f(2, 3)),
    Case("MeanVarianceNormalization", f(2, 3, 4, 5), opset=13),
    Case("SkipLayerNormalization", f(2, 3, 4), small(2, 3, 4), f(4), other(4), domain=MICROSOFT),
    Case(
        "SkipLayerNormalization",
        f(2, 3, 4),
        f(1, 3, 4),
        f(4),
        None,
        other(4),
        domain=MICROSOFT,
        out="x--x",
        epsilon=0.1,
    ),
    Case("SkipSimplifiedLayerNormalization", f(2, 3, 4), other(2, 3, 4), f(4), domain=MICROSOFT),
    Case("SkipSimplifiedLayerNormalization", f(2, 3, 4), other(2, 3, 4), f(4), other(4), domain=MICROSOFT, out="x--x"),
    Case("BiasGelu", f(2, 3, 4), f(4), domain=MICROSOFT),
    Case("FastGelu", f(2, 3, 4), f(4), domain=MICROSOFT),
    Case("FastGelu", f(2, 3, 4), domain=MICROSOFT),
    Case("Gelu", f(2, 3, 4), domain=MICROSOFT),
    Case("QuickGelu", f(2, 3, 4), domain=MICROSOFT, alpha=1.5),
    Case("DequantizeLinear", i(1, 200, dtype=np.uint8), np.array(0.5, np.float32), np.array(100, np.uint8)),
    Case("DequantizeLinear", i([1, 2], [3, -4], dtype=np.int8), positive(2), i(1, -1, dtype=np.int8), axis=0),
    Case("QuantizeLinear", 5 * f(2, 3), np.array(0.5, np.float32), np.array(3, np.int8)),
    Case("QuantizeLinear", 50 * f(2, 3), positive(3)),
]

SPATIAL = [
    Case("Conv", f(2, 3, 9), f(4, 3, 3), f(4), strides=[2], pads=[1, 2]),
    Case("Conv", f(2, 4, 8, 9), f(6, 2, 3, 2), group=2, dilations=[2, 1], pads=[1, 0, 0, 2]),
    Case("Conv", f(2, 4, 8, 9), f(4, 1, 3, 3), f(4), group=4),
    *(
        Case("Conv", f(1, 2, 8, 9), f(3, 2, 3, 4), strides=[2, 3], auto_pad=p)
        for p in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    Case("Conv", f(1, 2, 4, 5, 6), f(3, 2, 2, 3, 2)),
    Case("ConvTranspose", f(2, 3, 5), f(3, 4, 3), f(4), strides=[2], pads=[1, 0], output_padding=[1]),
    Case("ConvTranspose", f(2, 4, 5, 4), f(4, 3, 3, 2), group=2, dilations=[2, 1]),
    Case("ConvTranspose", f(1, 2, 3, 3), f(2, 1, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    Case("ConvTranspose", f(1, 2, 3, 3), f(2, 1, 3, 3), strides=[2, 2], output_shape=[6, 7]),
    *(Case(op, f(2, 3, 4, 5)) for op in ("GlobalAveragePool", "GlobalMaxPool")),
    *(
        Case(op, f(2, 3, 7, 8), kernel_shape=[3, 2], opset=19, **a)
        for op in ("MaxPool", "AveragePool")
        for a in (
            {},
            {"strides": [2, 2], "pads": [1, 0, 1, 1]},
            {"strides": [2, 3], "ceil_mode": 1},
            {"dilations": [2, 1]},
            {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        )
    ),
    Case("AveragePool", f(1, 1, 5), kernel_shape=[3], pads=[1, 1], count_include_pad=1),
    *(
        Case("Resize", f(1, 2, 4, 6), None, None, i(1, 2, 7, 3), opset=19, mode=mode, coordinate_transformation_mode=c)
        for mode in ("nearest", "linear", "cubic")
        for c in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    ),
    *(
        Case("Resize", f(1, 1, 4, 6), None, np.array([1, 1, 2, 0.5], np.float32), opset=13, nearest_mode=mode)
        for mode in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ),
    Case("Resize", f(1, 1, 4, 6), np.array([1, 1, 2, 2], np.float32), opset=10, mode="linear"),
    Case("Resize", f(1, 1, 4, 6), None, None, i(8, 3), axes=[2, 3], mode="cubic", cubic_coeff_a=-0.5),
    Case("Resize", f(1, 1, 4, 6), np.array([1, 1, 0.5, 0.4], np.float32), opset=10),
    Case("Upsample", f(1, 1, 4, 6), np.array([1, 1, 2, 3], np.float32), opset=9),
]

MASK4 = np.where(b(2, 1, 3, 5) | (np.arange(5) == 0), 0, -np.inf).astype(np.float32)
BOOL_MASK = b(3, 5) | (np.arange(5) == 0)
COS, SIN = np.cos(f(8, 3)), np.sin(f(8, 3))
POSITIONS = i([3, 1, 0, 5], [0, 1, 2, 7])
GQA = {"domain": MICROSOFT, "num_heads": 4, "kv_num_heads": 2, "out": 3}
ROTARY16 = (np.cos(f(9, 8)), np.sin(f(9, 8)))


def bert_attention(*more: Any, out: int = 1, **attributes: Any) -> Case:
    inputs = (f(2, 3, 8), f(8, 24), f(24), *more)
    return Case("Attention", *inputs, domain=MICROSOFT, num_heads=2, out=out, **attributes)


def multi_head(*inputs: Any, out: int = 1, **attributes: Any) -> Case:
    return Case("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=2, out=out, **attributes)


ATTENTION = [
    Case("Attention", f(2, 4, 3, 6), f(2, 4, 5, 6), f(2, 4, 5, 8), opset=23),
    Case("Attention", f(2, 3, 24), f(2, 5, 12), f(2, 5, 8), opset=23, q_num_heads=4, kv_num_heads=2, scale=0.3),
    Case("Attention", f(2, 4, 3, 6), f(2, 2, 5, 6), f(2, 2, 5, 6), MASK4, opset=23, softcap=0.7),
    Case("Attention", f(2, 4, 3, 6), f(2, 2, 5, 6), f(2, 2, 5, 6), BOOL_MASK, opset=23),
    Case("Attention", f(2, 2, 4, 6), f(2, 2, 4, 6), other(2, 2, 4, 6), opset=23, is_causal=1),
    Case(
        "Attention",
        *(f(2, 2, 3, 6), f(2, 2, 3, 6), other(2, 2, 3, 6), f(3, 5), f(2, 2, 2, 6), other(2, 2, 2, 6)),
        opset=23,
        out=3,
    ),
    *(
        Case(
            "Attention",
            *(f(2, 2, 3, 6), f(2, 2, 5, 6), other(2, 2, 5, 6), f(3, 5)),
            opset=24,
            out="x--x",
            softcap=0.7,
            qk_matmul_output_mode=mode,
        )
        for mode in (0, 1, 2, 3)
    ),
    Case("Attention", f(2, 2, 1, 6), f(2, 2, 5, 6), other(2, 2, 5, 6), None, None, None, i(3, 5), opset=24),
    Case("RotaryEmbedding", f(2, 2, 4, 6), COS, SIN, POSITIONS, opset=23),
    Case("RotaryEmbedding", f(2, 2, 4, 6), COS, SIN, POSITIONS, opset=23, interleaved=1),
    Case("RotaryEmbedding", f(2, 2, 4, 6), np.cos(f(2, 4, 3)), np.sin(f(2, 4, 3)), opset=23),
    Case("RotaryEmbedding", f(2, 4, 12), COS, SIN, POSITIONS, opset=23, num_heads=2),
    Case("RotaryEmbedding", f(2, 4, 20), COS, SIN, POSITIONS, opset=23, num_heads=2, rotary_embedding_dim=6),
    Case("RotaryEmbedding", f(2, 4, 12), POSITIONS, COS, SIN, domain=MICROSOFT),
    Case("RotaryEmbedding", f(2, 4, 12), i(3), COS, SIN, domain=MICROSOFT, interleaved=1),
    Case("RotaryEmbedding", f(2, 2, 4, 6), POSITIONS, COS, SIN, domain=MICROSOFT),
    Case("RotaryEmbedding", f(2, 4, 20), i(2), COS, SIN, domain=MICROSOFT, num_heads=2, rotary_embedding_dim=6),
    bert_attention(),
    bert_attention(unidirectional=1, scale=0.3),
    bert_attention(i(3, 2, dtype=np.int32)),
    bert_attention(i(3, 2, 1, 0, dtype=np.int32)),
    bert_attention(i([1, 1, 1], [1, 1, 0], dtype=np.int32)),
    bert_attention(i([1, 1, 1], [1, 1, 0], dtype=np.int32), mask_filter_value=-1.0),
    bert_attention(np.tril(np.ones((2, 3, 3), np.int32))),
    bert_attention(np.tril(np.ones((2, 3, 4), np.int32)), f(2, 2, 2, 1, 4), out=2),
    bert_attention(None, None, f(2, 2, 3, 3)),
    bert_attention(None, f(2, 2, 2, 4, 4), unidirectional=1, out=2),
    Case("Attention", f(2, 3, 8), f(8, 20), f(20), domain=MICROSOFT, num_heads=2, qkv_hidden_sizes=[8, 8, 4]),
    multi_head(f(2, 3, 8), f(2, 5, 8), f(2, 5, 4)),
    multi_head(f(2, 3, 8), f(2, 5, 8), f(2, 5, 8), f(24), i([1] * 5, [1, 1, 1, 0, 0], dtype=np.int32), scale=0.2),
    multi_head(f(2, 3, 8), f(2, 5, 8), f(2, 5, 8), None, i(5, 2, dtype=np.int32)),
    multi_head(f(2, 3, 8), f(2, 3, 8), f(2, 3, 8), None, None, f(1, 2, 3, 3), unidirectional=1),
    multi_head(f(2, 3, 8), f(2, 2, 5, 4), f(2, 2, 5, 4)),
    multi_head(f(2, 3, 8), f(2, 3, 8), other(2, 3, 8), None, None, None, f(2, 2, 4, 4), other(2, 2, 4, 4), out=3),
    Case(
        "GroupQueryAttention",
        f(2, 3, 64),
        f(2, 3, 32),
        other(2, 3, 32),
        None,
        None,
        i(2, 2, dtype=np.int32),
        i(3, dtype=np.int32),
        **GQA,
    ),
    Case(
        "GroupQueryAttention",
        f(2, 3, 128),
        None,
        None,
        None,
        None,
        i(2, 2, dtype=np.int32),
        i(3, dtype=np.int32),
        scale=0.2,
        softcap=0.7,
        **GQA,
    ),
    Case(
        "GroupQueryAttention",
        f(1, 3, 64),
        f(1, 3, 32),
        other(1, 3, 32),
        f(1, 2, 4, 16),
        other(1, 2, 4, 16),
        i(6, dtype=np.int32),
        i(7, dtype=np.int32),
        *ROTARY16,
        do_rotary=1,
        **GQA,
    ),
    Case(
        "GroupQueryAttention",
        f(2, 1, 64),
        f(2, 1, 32),
        other(2, 1, 32),
        f(2, 2, 6, 16),
        other(2, 2, 6, 16),
        i(5, 3, dtype=np.int32),
        i(6, dtype=np.int32),
        *ROTARY16,
        do_rotary=1,
        rotary_interleaved=1,
        **GQA,
    ),
    Case(
        "GroupQueryAttention",
        f(2, 5, 64),
        f(2, 5, 32),
        other(2, 5, 32),
        None,
        None,
        i(4, 4, dtype=np.int32),
        i(5, dtype=np.int32),
        local_window_size=2,
        **GQA,
    ),
    Case(
        "EmbedLayerNormalization",
        *(i([0, 3, 2], [1, 1, 0], dtype=np.int32), i([0, 1, 1], [0, 0, 0], dtype=np.int32)),
        *(f(5, 4), f(6, 4), f(2, 4), f(4), other(4), i([1, 1, 1], [1, 1, 0], dtype=np.int32)),
        domain=MICROSOFT,
        out=3,
    ),
    Case(
        "EmbedLayerNormalization",
        *(i([0, 3, 2], [1, 1, 0], dtype=np.int32), None, f(5, 4), f(6, 4), None, f(4), other(4), None),
        i([4, 3, 2], dtype=np.int32),
        domain=MICROSOFT,
        epsilon=0.1,
        out=2,
    ),
]
CASES = [*ELEMENTWISE, *CONSTANTS, *SHAPES, *GATHERS, *REDUCTIONS, *PRODUCTS, *NORMS, *SPATIAL, *ATTENTION]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_onnx_runtime_does(case: Case) -> None:
    proto = case.proto()
    wanted = runtime(proto, case.feeds)
    found = Executor(loaded(proto))(case.feeds)
    precise = Executor(loaded(proto), dtype=torch.float64)(case.feeds)
    for want, got, double in zip(wanted, found.values(), precise.values(), strict=True):
        assert got.numpy().dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
        assert double.dtype == (torch.float64 if got.is_floating_point() else got.dtype)
        np.testing.assert_allclose(double, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_abstract_run_has_the_shapes_and_types_of_a_real_one(case: Case) -> None:
    graph = loaded(case.proto())
    abstract = {k: torch.from_numpy(x).to("meta" if x.dtype == np.float32 else "cpu") for k, x in case.feeds.items()}
    values = probe(graph, abstract).values
    for name, real in Executor(graph)(case.feeds).items():
        found = values[next(value for value in graph.graph.outputs if value.name == name)]
        assert (found.shape, found.dtype) == (real.shape, real.dtype)


HALVES = [
    c for c in CASES if c.op in {"LayerNormalization", "Softmax", "MatMul", "Gelu", "Attention", "Conv", "ReduceSum"}
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_half_types_stay_what_they_are(case: Case, dtype: torch.dtype) -> None:
    run = Executor(loaded(case.proto()))
    whole = run(case.feeds)["y0"]
    feeds = {name: torch.from_numpy(x) for name, x in case.feeds.items()}
    half = run({name: x.to(dtype) if x.is_floating_point() else x for name, x in feeds.items()})["y0"]
    assert half.dtype == (dtype if whole.is_floating_point() else whole.dtype)
    torch.testing.assert_close(half.to(whole.dtype), whole, rtol=0.05, atol=0.05 * whole.abs().max().item())


def test_a_mask_for_every_query_has_four_axes_or_three() -> None:
    """ONNX Runtime runs the form with four axes on GPUs only."""
    mask = np.tril(np.ones((2, 7, 7), np.int32))
    past = f(2, 2, 2, 1, 4)
    three, four = (bert_attention(m, past, out=2) for m in (mask[:, 1:4, :4].copy(), mask[:, None]))
    torch.testing.assert_close(Executor(loaded(four.proto()))(four.feeds), Executor(loaded(three.proto()))(three.feeds))


# Whole graphs


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), f"the_{op}", **attributes)


def unreadable(graph: ir.Model) -> ir.Model:
    """The same model, whose float initializers refuse to be read unless they are small."""

    def refuse() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if tensor.dtype == ir.DataType.FLOAT and tensor.size > 64:
            value.const_value = ir.LazyTensor(refuse, dtype=tensor.dtype, shape=tensor.shape)
    return graph


def attending(batch: int = 2, positions: int = 3) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Attention over tokens, the shapes taken from the input as exporters do."""
    nodes = [
        node("Gather", "table tokens", "x"),
        node("Shape", "x", "shape"),
        node("Gather", "shape rows", "dynamic"),
        node("Concat", "dynamic heads", "split", axis=0),
        node("LayerNormalization", "x scale shift", "normed"),
        node("MatMul", "normed w", "q"),
        node("Reshape", "q split", "q4"),
        node("Transpose", "q4", "queries", perm=[0, 2, 1, 3]),
        node("Transpose", "q4", "keys", perm=[0, 2, 3, 1]),
        node("MatMul", "queries keys", "scores"),
        node("Div", "scores root", "scaled"),
        node("Softmax", "scaled", "shares"),
        node("MatMul", "shares queries", "mixed"),
        node("ReduceSum", "mixed", "y", keepdims=0),
    ]
    weights = {"table": f(11, 8), "w": f(8, 9), "scale": positive(8), "shift": f(8), "root": np.float32(1.7)}
    weights |= {"rows": i(0, 1), "heads": i(3, -1)}
    tokens = np.arange(batch * positions).reshape(batch, positions) % 11
    return model(nodes, {"tokens": tokens}, ["y"], weights), {"tokens": tokens}


def test_an_abstract_run_reads_no_weight_and_knows_every_integer() -> None:
    proto, feeds = attending()
    graph = unreadable(loaded(proto))
    values = {
        value.name: tensor
        for value, tensor in probe(graph, {"tokens": torch.from_numpy(feeds["tokens"])}).values.items()
    }
    assert values["split"].tolist() == [2, 3, 3, -1]
    assert {name for name, t in values.items() if not t.is_meta} == {
        *("tokens", "shape", "rows", "heads", "dynamic", "split", "root", "scale", "shift")
    }
    assert values["mixed"].shape == (2, 3, 3, 3)


def test_gradients_flow_into_given_weights() -> None:
    proto, feeds = attending()
    run = Executor(loaded(proto), dtype=torch.float64)
    names = ["table", "w", "scale", "shift", "root"]
    weights = [run.graph.initializers[name].const_value.numpy().astype(np.float64) for name in names]
    given_weights = [torch.tensor(array, requires_grad=True) for array in weights]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return run(feeds, dict(zip(names, tensors, strict=True)))["y"]

    assert torch.autograd.gradcheck(loss, given_weights)
    assert loss(*given_weights).item() == pytest.approx(run(feeds)["y"].item(), rel=1e-6)


def test_a_cast_to_a_float_keeps_the_type_of_the_run() -> None:
    nodes = [
        node("Cast", "x", "half", to=TensorProto.FLOAT16),
        node("Cast", "half", "whole", to=TensorProto.INT64),
        node("Cast", "half", "y", to=TensorProto.FLOAT),
    ]
    feeds = {"x": np.array([1.00001, 2.7], np.float32)}
    found = Executor(loaded(model(nodes, feeds, ["y", "whole"])), dtype=torch.float64)(feeds)
    assert found["y"].tolist() == feeds["x"].astype(np.float64).tolist()
    assert found["whole"].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.DOUBLE], ids=str)
def test_weights_of_every_float_type_are_read(dtype: ir.DataType) -> None:
    weight = f(3, 4).astype(dtype.numpy())
    graph = loaded(model([node("Identity", "w", "y")], {}, ["y"], {"w": weight}))
    assert Executor(graph, dtype=torch.float64)({})["y"].numpy().tolist() == weight.astype(np.float64).tolist()
    assert probe(graph, {}).values[graph.graph.outputs[0]].dtype == Executor(graph)({})["y"].dtype


def test_two_runs_are_compared_node_by_node() -> None:
    proto, feeds = attending()
    run = Executor(loaded(proto))
    changed = {"w": torch.from_numpy(other(8, 9))}
    pairs = zip(run.values(feeds), run.values(feeds, changed), strict=True)
    different = [a.op_type for (a, (x, *_)), (_, (y, *_)) in pairs if not torch.equal(x, y)]
    assert different[0] == "MatMul"


def test_a_value_is_released_after_its_last_use() -> None:
    nodes = [node("Relu" if n % 2 else "Exp", f"v{n}", f"v{n + 1}") for n in range(9)]
    feeds = {"v0": f(3)}
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []
    for _, (output,) in Executor(loaded(model(nodes, feeds, ["v9"]))).values(feeds):
        alive.append(weakref.ref(output))
        del output
        counts.append(sum(ref() is not None for ref in alive))
    assert max(counts) <= 3


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does() -> None:
    proto, feeds = attending()
    found = Executor(loaded(proto), device="cuda", dtype=torch.float64)(feeds)["y"]
    torch.testing.assert_close(found.cpu(), Executor(loaded(proto), dtype=torch.float64)(feeds)["y"])


def test_a_node_that_is_added_ahead_of_an_abstract_run_is_run() -> None:
    proto, feeds = attending()
    run = Executor(unreadable(loaded(proto)), device="meta")
    seen = []
    for ran, _ in run.values({"tokens": torch.from_numpy(feeds["tokens"])}):
        seen.append(ran.op_type)
        if ran.op_type == "Softmax":
            run.graph.insert_after(ran, ir.node("Neg", [ran.inputs[0]]))
    assert seen[seen.index("Softmax") + 1] == "Neg"


def test_nodes_that_are_alike_are_computed_once_in_an_abstract_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike in attributes, in numbers that they read, and in the shapes of what they are given."""
    ran = []
    entry = TABLE["", "Transpose"]
    counted = replace(entry, run=lambda op, *inputs: ran.append(op.node.name) or entry.run(op, *inputs))
    monkeypatch.setitem(TABLE, ("", "Transpose"), counted)
    nodes = [
        *(node("Transpose", "x", f"same{n}", perm=[1, 0]) for n in range(2)),
        node("Transpose", "same1", "back", perm=[1, 0]),
        node("Transpose", "x", "kept", perm=[0, 1]),
        node("Reshape", "x flat", "flattened"),
        node("Reshape", "x pairs", "paired"),
    ]
    outputs = {"same0": (3, 2), "same1": (3, 2), "back": (2, 3), "kept": (2, 3), "flattened": (6,), "paired": (3, 2)}
    proto = model(nodes, {"x": f(2, 3)}, list(outputs), {"flat": i(-1), "pairs": i(-1, 2)})
    given = torch.empty(2, 3, device="meta")
    found = Executor(loaded(proto), device="meta")({"x": given})
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == outputs
    assert len(ran) == 3


# Subgraphs


def branches(condition: np.ndarray | None, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    def branch(op: str) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.float32(3), "three")
        inside = [helper.make_node("Mul", ["x", "three"], ["scaled"]), helper.make_node(op, ["scaled", "x"], [op])]
        return helper.make_graph(inside, op, [], [onnx.ValueInfoProto(name=op)], [weight])

    chosen = node("If", "condition", "y", then_branch=branch("Add"), else_branch=branch("Sub"))
    return model([chosen], feeds, ["y"], {} if condition is None else {"condition": condition})


@pytest.mark.parametrize(("condition", "factor"), [(True, 4), (False, 2)])
def test_the_branch_that_a_condition_chooses_is_run(condition: bool, factor: int) -> None:
    feeds = {"x": f(2, 3)}
    proto = branches(np.array(condition), feeds)
    graph = loaded(proto)
    np.testing.assert_allclose(Executor(graph)(feeds)["y"], factor * feeds["x"], rtol=1e-6)
    assert probe(graph, {"x": torch.empty(2, 3, device="meta")}).values[graph.graph.outputs[0]].shape == (2, 3)


def test_loops_are_refused() -> None:
    body = helper.make_graph([node("Identity", "c", "d")], "body", [], [onnx.ValueInfoProto(name="d")])
    proto = model([node("Loop", "x", "y", body=body)], {"x": i(3)}, ["y"])
    with pytest.raises(UnsupportedModel, match=r"node 'the_Loop' \(Loop\) runs a subgraph; .* only If"):
        Executor(loaded(proto))({"x": i(3)})


# Refusals


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("LSTM", f(2, 3)), r"node 'node' \(LSTM\): the operator LSTM of domain ai.onnx is not known"),
        (Case("MatMulNBits", f(2, 3), domain=MICROSOFT), r"\(com.microsoft.MatMulNBits\): .* of domain com.microsoft"),
        (Case("RandomNormal", shape=[2]), "the operator RandomNormal"),
        (Case("MaxPool", f(1, 1, 4), kernel_shape=[2], out=2), "its output 'y1' is not supported"),
        (Case("Resize", f(1, 1, 4, 6), None, None, i(1, 1, 8, 3), antialias=1), "antialias=1 is not supported"),
        (Case("Constant", value_string="a"), "a constant in value_string is not supported"),
        (Case("Dropout", f(2), None, Fixed(True, bool)), "training mode is not supported"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(case: Case, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        Executor(loaded(case.proto()))(case.feeds)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("NonZero", "x", "y")],
        [
            node("ReduceMax", "x", "largest"),
            node("Cast", "largest", "size", to=TensorProto.INT64),
            node("ConstantOfShape", "size", "y"),
        ],
        [node("Greater", "x x", "c"), node("Cast", "c", "m", to=TensorProto.INT64), node("Range", "m m m", "y")],
    ],
    ids=lambda nodes: nodes[-1].op_type,
)
def test_a_shape_that_depends_on_floats_is_named_in_an_abstract_run(nodes: list[onnx.NodeProto]) -> None:
    graph = loaded(model(nodes, {"x": f(3)}, ["y"]))
    with pytest.raises(DataDependent, match=f"node 'the_{nodes[-1].op_type}' .* needs numbers that depend on"):
        probe(graph, {"x": torch.empty(3, device="meta")})


def test_floats_are_no_axes_and_no_sizes() -> None:
    graph = loaded(
        model([helper.make_node("Unsqueeze", ["x", "axes"], ["y"], name="widen")], {"x": f(3), "axes": f(1)}, ["y"])
    )
    with pytest.raises(InvalidModel, match=r"node 'widen' .*: its input 1 is of type torch\.float32; expected whole"):
        Executor(graph)({"x": torch.zeros(3), "axes": torch.zeros(1)})


def test_inputs_that_do_not_fit_a_node_are_shown_with_it() -> None:
    case = Case("MatMul", f(2, 3), f(4, 5))
    with pytest.raises(
        InvalidModel, match=r"node 'node' \(MatMul\) does not take inputs of shapes \[2, 3\], \[4, 5\]: "
    ):
        Executor(loaded(case.proto()))(case.feeds)


@pytest.mark.parametrize(
    ("feeds", "weights", "message"),
    [
        ({}, {}, "the graph's inputs are tokens; got none; missing: tokens"),
        ({"tokens": i([1]), "mask": i(1)}, {}, "the graph's inputs are tokens; got tokens, mask"),
        ({"tokens": i([1])}, {"v": torch.ones(1)}, "a weight is given for 'v', which is no initializer"),
    ],
)
def test_names_that_the_graph_does_not_have_are_refused(feeds: Any, weights: Any, message: str) -> None:
    with pytest.raises(GrowkitError, match=message):
        Executor(loaded(attending()[0]))(feeds, weights)


def test_a_value_that_nothing_computes_is_named() -> None:
    graph = loaded(attending()[0])
    del graph.graph.initializers["w"]
    graph.graph.node("the_MatMul").inputs[1].const_value = None
    with pytest.raises(InvalidModel, match="the value 'w' is used and never computed"):
        Executor(graph)(attending()[1])


# Parameters drawn at random, against numpy


def one(op: str, inputs: list[Any], opset: int = 18, **attributes: Any) -> tuple[torch.Tensor, ...]:
    """One node, really and abstractly; the shapes agree."""
    case = Case(op, *inputs, opset=opset, out=attributes.pop("out", 1), **attributes)
    graph = loaded(case.proto()).graph
    tensors = [None if x is None else torch.from_numpy(getattr(x, "array", x)) for x in case.inputs]
    outputs = run_node(graph[0], tensors, opset)
    abstract = run_node(graph[0], [tensors[0].to("meta"), *tensors[1:]], opset)
    assert [x.shape for x in outputs] == [x.shape for x in abstract]
    return outputs


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes, st.data())
def test_slices(shape: list[int], data: st.DataObject) -> None:
    x = f(*shape)
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True))
    bound = st.integers(-6, 6)
    starts, ends = ([data.draw(bound) for _ in axes] for _ in range(2))
    steps = [data.draw(st.integers(-3, 3).filter(bool)) for _ in axes]
    index: list[Any] = [slice(None)] * x.ndim
    for axis, *parts in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(*parts)
    signed = [data.draw(st.sampled_from([axis, axis - x.ndim])) for axis in axes]
    (found,) = one("Slice", [x, i(*starts), i(*ends), i(*signed), i(*steps)])
    np.testing.assert_array_equal(found, x[tuple(index)])


@given(sizes, st.data())
def test_reshapes(shape: list[int], data: st.DataObject) -> None:
    x = f(*shape)
    target = data.draw(st.permutations(shape))
    copied = [0 if n == shape[at] and data.draw(st.booleans()) else n for at, n in enumerate(target)]
    if data.draw(st.booleans()):
        copied[data.draw(st.integers(0, len(shape) - 1))] = -1
    (found,) = one("Reshape", [x, i(*copied)])
    np.testing.assert_array_equal(found, x.reshape(target))


@given(sizes, st.data())
def test_splits(shape: list[int], data: st.DataObject) -> None:
    x = f(*shape)
    axis = data.draw(st.integers(0, x.ndim - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    parts = np.diff([0, *cuts, shape[axis]]).tolist()
    found = one("Split", [x, i(*parts)], axis=axis - x.ndim, out=len(parts))
    for got, want in zip(found, np.split(x, cuts, axis), strict=True):
        np.testing.assert_array_equal(got, want)


@given(sizes, st.data())
def test_broadcasts(shape: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(shape)))
    a, c = f(*shape), f(*[data.draw(st.sampled_from([1, n])) for n in shape[kept:]])
    functions: dict[str, Callable[..., Any]] = {"Add": np.add, "Mul": np.multiply, "Less": np.less, "Max": np.maximum}
    for (op, function), (x, y) in itertools.product(functions.items(), [(a, c), (c, a)]):
        np.testing.assert_array_equal(one(op, [x, y])[0], function(x, y))
