"""What each operator says about the axes of what it reads and makes: one equation or two for each.

A rule is given the scene and a node. It says which axes are one (``scene.unify``), which must keep their sizes
(``scene.freeze``), and what part a weight's axes play (``scene.play``). Nothing here computes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from growkit_onnx.operation import used
from growkit_specs.layout import Axis, concatenation, product
from growkit_specs.unification import ONE

if TYPE_CHECKING:
    from growkit_onnx.infer import Part, Scene

Axes = tuple[Axis, ...]
Rule = Callable[["Scene", ir.Node], None]

RULES: dict[tuple[str, str], Rule] = {}
CONTRIB = "com.microsoft"

READ = "growkit.read"
"""The mark, in an Identity's metadata, of where a stream is read back: behind it everything keeps its size."""

MEASURES = frozenset({"Shape", "Size"})
"""Operators whose outputs say how large a value is, not what it holds: the stream doesn't flow through them."""

ELEMENTWISE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Mod",
        "Where",
        "And",
        "Or",
        "Xor",
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "Max",
        "Min",
        "Sum",
        "Mean",
        "PRelu",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "BitShift",
    ]
)
"""Operators that work entry by entry on inputs that are broadcast to each other."""

NONLINEAR = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BiasGelu",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Cosh",
        "Elu",
        "Erf",
        "Exp",
        "FastGelu",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
        "Mish",
        "PRelu",
        "Pow",
        "QuickGelu",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
        "Max",
        "Min",
        "Mod",
    ]
)
"""Operators that are nonlinear in each entry: only what leaves the entries apart commutes with them."""

PASSING = frozenset(
    ["Cast", "CastLike", "Identity", "Neg", "Not", "IsNaN", "IsInf", "Dropout", "CumSum", "Trilu", "BitwiseNot"]
)
"""Operators of one input that leave its axes as they are."""


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule for operators of a domain."""

    def registered(function: Rule) -> Rule:
        RULES.update({(domain, name): function for name in names})
        return function

    return registered


def rule_of(node: ir.Node) -> Rule:
    """The rule of a node's operator; of an operator nobody knows, that everything it touches stays as it is."""
    return RULES.get((node.domain.replace("ai.onnx", ""), node.op_type), unknown)


def unknown(scene: Scene, node: ir.Node) -> None:
    """Of an operator nobody knows: everything it touches stays as it is."""
    scene.unknown.append(node)
    for value in (*used(node), *node.outputs):
        scene.freeze(value, f"the operator {node.domain + '.' if node.domain else ''}{node.op_type} ({node.name})")


# --- entry by entry ------------------------------------------------------------------------------------------------


@rule(*ELEMENTWISE)
@rule("BiasGelu", "FastGelu", "BiasAdd", domain=CONTRIB)
def _elementwise(scene: Scene, node: ir.Node) -> None:
    (out,) = node.outputs
    given = [value for value in node.inputs if value is not None]
    for value in given:
        broadcast(scene, value, scene.axes(out))
    if not scene.derive_scaled(node):
        for value in given:
            scene.play(value, "scale" if node.op_type in ("Mul", "Div", "PRelu", "Pow") else "write")


def broadcast(scene: Scene, value: ir.Value | None, to: Axes) -> None:
    """The axes of ``value`` are the last of ``to``, where they are not of size 1."""
    axes = scene.axes(value)
    for mine, other in zip(axes[::-1], to[::-1], strict=False):
        if mine != ONE:
            scene.unify(mine, other)


@rule(*(NONLINEAR - ELEMENTWISE - {"BiasGelu", "FastGelu", "QuickGelu"}), *PASSING)
@rule("Gelu", "QuickGelu", domain=CONTRIB)
def _unary(scene: Scene, node: ir.Node) -> None:
    if READ in node.metadata_props:
        for mine, other in zip(scene.axes(node.inputs[0]), scene.axes(node.outputs[0]), strict=True):
            if scene.is_dynamic(mine):
                scene.unify(mine, other)
        return
    scene.same(node.inputs[0], node.outputs[0])
    scene.derive(node.inputs[0], node.outputs[0])


@rule("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")
def _softmax(scene: Scene, node: ir.Node) -> None:
    axes = scene.axes(node.outputs[0])
    scene.same(node.inputs[0], node.outputs[0])
    default = -1 if scene.opset >= 13 or node.op_type == "LpNormalization" else 1
    axis = node.attributes.get_int("axis", default) % len(axes)
    for normalised in axes[axis:] if scene.opset < 13 else axes[axis : axis + 1]:
        scene.freeze_axis(normalised, f"{node.op_type} over it ({node.name})")


# --- products ------------------------------------------------------------------------------------------------------


@rule("MatMul")
@rule("FusedMatMul", domain=CONTRIB)
def _matmul(scene: Scene, node: ir.Node) -> None:
    left, right = node.inputs[:2]
    a, b, out = list(scene.axes(left)), list(scene.axes(right)), list(scene.axes(node.outputs[0]))
    if node.attributes.get_int("transA", 0):
        a[-2:] = a[:-3:-1]
    if node.attributes.get_int("transB", 0):
        b[-2:] = b[:-3:-1]
    if any(node.attributes.get_int(f"transBatch{side}", 0) for side in "AB"):
        return unknown(scene, node)
    scene.unify(a[-1], b[-2] if len(b) > 1 else b[0])
    rows = [a[-2]] if len(a) > 1 else []
    columns = [b[-1]] if len(b) > 1 else []
    for mine, other in zip(rows + columns, out[len(out) - len(rows + columns) :], strict=True):
        scene.unify(mine, other)
    batch = out[: len(out) - len(rows + columns)]
    for lead in (a[:-2], b[:-2]):
        for mine, other in zip(lead[::-1], batch[::-1], strict=False):
            if mine != ONE:
                scene.unify(mine, other)
    scene.play(left, "write", read=[max(len(a) - (2 if node.attributes.get_int("transA", 0) else 1), 0)])
    scene.play(right, "write", read=[max(len(b) - (1 if node.attributes.get_int("transB", 0) else 2), 0)])


@rule("Gemm")
@rule("FusedGemm", domain=CONTRIB)
def _gemm(scene: Scene, node: ir.Node) -> None:
    left, right, *bias = node.inputs
    trans = [node.attributes.get_int(f"trans{side}", 0) for side in "AB"]
    a, b, out = scene.axes(left), scene.axes(right), scene.axes(node.outputs[0])
    a, b = (axes[::-1] if t else axes for axes, t in zip((a, b), trans, strict=True))
    scene.unify(a[1], b[0])
    scene.unify(a[0], out[0])
    scene.unify(b[1], out[1])
    scene.play(left, "write", read=[0 if trans[0] else 1])
    scene.play(right, "write", read=[1 if trans[1] else 0])
    for value in bias:
        if value is not None:
            broadcast(scene, value, out)
            scene.play(value, "write")


@rule("Einsum")
def _einsum(scene: Scene, node: ir.Node) -> None:
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if "..." in equation or "->" not in equation:
        return unknown(scene, node)
    terms, out = equation.split("->")
    letters: dict[str, Axis] = dict(zip(out, scene.axes(node.outputs[0]), strict=True))
    inputs = [value for value in node.inputs if value is not None]
    for value, term in zip(inputs, terms.split(","), strict=True):
        for letter, axis in zip(term, scene.axes(value), strict=True):
            if axis != ONE:
                scene.unify(axis, letters.setdefault(letter, axis))
        scene.play(value, "write", read=[i for i, letter in enumerate(term) if letter not in out])


@rule("Conv")
def _conv(scene: Scene, node: ir.Node) -> None:
    image, kernel, *bias = node.inputs
    x, w, out = scene.axes(image), scene.axes(kernel), scene.axes(node.outputs[0])
    for axis in (*w[2:], *x[2:], *out[2:]):
        scene.freeze_axis(axis, f"a dimension of the convolution {node.name}")
    scene.unify(x[0], out[0])
    scene.unify(w[0], out[1])
    if node.attributes.get_int("group", 1) == 1:
        scene.unify(x[1], w[1])
    else:
        for axis in (x[1], *w[:2]):
            scene.freeze_axis(axis, f"the channels of the grouped convolution {node.name}")
    scene.play(kernel, "write", read=range(1, len(w)))
    for value in bias:
        if value is not None:
            scene.unify(scene.axes(value)[0], out[1])
            scene.play(value, "write")


# --- tables, parts and positions -----------------------------------------------------------------------------------


@rule("Gather")
def _gather(scene: Scene, node: ir.Node) -> None:
    data, indices = node.inputs
    axes, picked, out = scene.axes(data), scene.axes(indices), scene.axes(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(axes)
    behind = axis + len(picked)
    for mine, other in zip(
        (*axes[:axis], *axes[axis + 1 :], *picked), (*out[:axis], *out[behind:], *out[axis:behind]), strict=True
    ):
        scene.unify(mine, other)
    scene.play(data, "write", read=[axis])
    chosen = scene.constant(indices)
    if scene.is_weight(data) or chosen is None or scene.is_only_measured(node.outputs[0]):
        return
    if chosen.size == 1:  # one entry of the axis: a slice of length 1
        scene.part(axes[axis], int(chosen.reshape(-1)[0]) % scene.sizes(axes[axis])[0], 1)
    else:
        scene.freeze_axis(axes[axis], f"entries of it are picked by number ({node.name})")


@rule("GatherElements", "ScatterElements")
def _indexed_along(scene: Scene, node: ir.Node) -> None:
    """One axis is addressed by number; along the others entries stay where they are."""
    axes = scene.axes(node.outputs[0])
    along = node.attributes.get_int("axis", 0) % len(axes)
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            scene.freeze_axis(scene.axes(value)[along], f"entries are addressed by number ({node.op_type} {node.name})")
            for axis, (mine, other) in enumerate(zip(scene.axes(value), axes, strict=True)):
                if axis != along and mine != ONE:
                    scene.unify(mine, other)


@rule("GatherND")
def _gather_nd(scene: Scene, node: ir.Node) -> None:
    """The axes that an index addresses stay as they are; those before are a batch, those behind come along."""
    data, indices = (scene.axes(value) for value in node.inputs)
    out, batch = scene.axes(node.outputs[0]), node.attributes.get_int("batch_dims", 0)
    depth = scene.sizes(indices[-1])[0]
    chosen = scene.constant(node.inputs[1])
    if chosen is not None and chosen.size == 1:  # one entry of one axis
        scene.part(data[batch], int(chosen.reshape(-1)[0]) % scene.sizes(data[batch])[0], 1)
    else:
        _addressed(scene, node, data[batch : batch + depth])
    for mine, other in zip(indices[:-1], out[: len(indices) - 1], strict=True):
        scene.unify(mine, other)
    for mine, other in zip(data[:batch], indices[:batch], strict=True):
        scene.unify(mine, other)
    for mine, other in zip(data[batch + depth :], out[len(indices) - 1 :], strict=True):
        scene.unify(mine, other)


@rule("ScatterND")
def _scatter_nd(scene: Scene, node: ir.Node) -> None:
    """As for GatherND, with updates in the place of what is gathered."""
    data, indices, updates = (scene.axes(value) for value in node.inputs)
    depth = scene.sizes(indices[-1])[0]
    scene.same(node.inputs[0], node.outputs[0])
    _addressed(scene, node, data[:depth])
    for mine, other in zip((*indices[:-1], *data[depth:]), updates, strict=True):
        scene.unify(mine, other)


def _addressed(scene: Scene, node: ir.Node, axes: Axes) -> None:
    for axis in axes:
        if not scene.is_dynamic(axis):
            scene.freeze_axis(axis, f"entries are addressed by number ({node.op_type} {node.name})")


@rule("ArgMax", "ArgMin", "TopK", "OneHot", "NonZero", "Unique", "Compress")
def _ranked(scene: Scene, node: ir.Node) -> None:
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            scene.freeze(value, f"entries are ranked or counted ({node.op_type} {node.name})")


@rule("Slice")
def _sliced(scene: Scene, node: ir.Node) -> None:
    source, out = scene.axes(node.inputs[0]), scene.axes(node.outputs[0])
    cuts = scene.slices(node)
    for axis, (mine, other) in enumerate(zip(source, out, strict=True)):
        if axis not in cuts:
            scene.unify(mine, other)
            continue
        if 0 in scene.sizes(other):
            continue
        start, step = cuts[axis]
        if scene.sizes(mine) == scene.sizes(other) and step == 1:
            scene.unify(mine, other)
        elif start is None or scene.is_dynamic(mine) or scene.is_dynamic(other):
            scene.freeze_axis(mine, f"a part of it is taken that depends on the input ({node.name})")
        elif step == 1:
            taken = scene.part(mine, start, scene.sizes(other)[0])
            if taken is not None:
                scene.unify(taken, other)
        else:
            scene.stride(mine, other, step, node)


@rule("Split")
def _split(scene: Scene, node: ir.Node) -> None:
    source = scene.axes(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(source)
    parts = [scene.axes(out) for out in node.outputs]
    scene.unify(source[axis], concatenation(*(part[axis] for part in parts)))
    for part in parts:
        for other, (mine, whole) in enumerate(zip(part, source, strict=True)):
            if other != axis:
                scene.unify(mine, whole)


@rule("Concat")
def _concat(scene: Scene, node: ir.Node) -> None:
    out = scene.axes(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(out)
    parts = [value for value in node.inputs if value is not None and not scene.is_empty(value)]
    scene.unify(out[axis], concatenation(*(scene.axes(value)[axis] for value in parts)))
    for value in parts:
        scene.play(value, "write")
        for other, (mine, whole) in enumerate(zip(scene.axes(value), out, strict=True)):
            if other != axis:
                scene.unify(mine, whole)


@rule("Pad")
def _pad(scene: Scene, node: ir.Node) -> None:
    for mine, other in zip(scene.axes(node.inputs[0]), scene.axes(node.outputs[0]), strict=True):
        if scene.sizes(mine) == scene.sizes(other):
            scene.unify(mine, other)
        else:
            scene.freeze_axis(mine, f"it is padded ({node.name})")


# --- shapes --------------------------------------------------------------------------------------------------------


@rule("Reshape", "Flatten", "Unsqueeze", "Squeeze")
def _reshape(scene: Scene, node: ir.Node) -> None:
    """Storage order stays: the product of all axes does."""
    scene.unify(product(*scene.axes(node.inputs[0])), product(*scene.axes(node.outputs[0])))
    scene.derive_reshaped(node.inputs[0], node.outputs[0])


@rule("Transpose")
def _transpose(scene: Scene, node: ir.Node) -> None:
    axes = scene.axes(node.inputs[0])
    order = node.attributes.get_ints("perm", tuple(range(len(axes)))[::-1])
    for i, out in zip(order, scene.axes(node.outputs[0]), strict=True):
        scene.unify(axes[i], out)
    scene.derive(node.inputs[0], node.outputs[0], order)


@rule("Expand")
def _expand(scene: Scene, node: ir.Node) -> None:
    broadcast(scene, node.inputs[0], scene.axes(node.outputs[0]))
    lead = len(scene.axes(node.outputs[0])) - len(scene.axes(node.inputs[0]))
    if lead == 0:
        scene.derive(node.inputs[0], node.outputs[0])
    else:
        scene.play(node.inputs[0], "write")


@rule("Tile")
def _tile(scene: Scene, node: ir.Node) -> None:
    pairs = list(zip(scene.axes(node.inputs[0]), scene.axes(node.outputs[0]), strict=True))
    if all(mine == ONE or scene.sizes(mine) == scene.sizes(other) for mine, other in pairs):  # one entry, spread out
        return _expand(scene, node)
    for mine, other in pairs:
        times = tuple(o // m for o, m in zip(scene.sizes(other), scene.sizes(mine), strict=True))
        scene.unify(other, product(scene.unifier.fresh(times), mine))
    return None


@rule(
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSumExp", "ReduceLogSum",
)  # fmt: skip
def _reduce(scene: Scene, node: ir.Node) -> None:
    axes, out = scene.axes(node.inputs[0]), list(scene.axes(node.outputs[0]))
    gone = scene.reduced(node)
    if node.attributes.get_int("keepdims", 1):
        out = [axis for i, axis in enumerate(out) if i not in gone]
    for mine, other in zip((axis for i, axis in enumerate(axes) if i not in gone), out, strict=True):
        scene.unify(mine, other)


@rule(*MEASURES, "Range", "Constant", "ConstantOfShape", "EyeLike")
def _made(scene: Scene, node: ir.Node) -> None:
    """Made of sizes: its axes are what later operators say."""


@rule("GlobalAveragePool", "GlobalMaxPool")
def _pooled(scene: Scene, node: ir.Node) -> None:
    for mine, other in zip(scene.axes(node.inputs[0])[:2], scene.axes(node.outputs[0])[:2], strict=True):
        scene.unify(mine, other)


# --- norms ---------------------------------------------------------------------------------------------------------


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
@rule("SimplifiedLayerNormalization", domain=CONTRIB)
def _norm(scene: Scene, node: ir.Node) -> None:
    scene.same(node.inputs[0], node.outputs[0])
    parts: tuple[Part, ...] = ("scale", "shift")
    for value, part in zip(node.inputs[1:], parts, strict=False):
        if value is not None:
            broadcast(scene, value, scene.axes(node.outputs[0]))
            scene.play(value, part)


# --- fused attention -----------------------------------------------------------------------------------------------


@rule("Attention", domain=CONTRIB)
def _fused_attention(scene: Scene, node: ir.Node) -> None:
    """One weight for q, k and v, ``hidden -> (q + k + v)``, each by heads."""
    x, weight, *rest = node.inputs
    heads = scene.unifier.fresh((node.attributes.get_int("num_heads", 1),) * scene.unifier.runs)
    total = scene.sizes(scene.axes(weight)[1])[0]
    sizes = node.attributes.get_ints("qkv_hidden_sizes", (total // 3,) * 3)
    dims = [scene.unifier.fresh((size // scene.sizes(heads)[0],) * scene.unifier.runs) for size in sizes]
    scene.unify(dims[0], dims[1])
    scene.unify(scene.axes(weight)[1], concatenation(*(product(heads, d) for d in dims)))
    scene.unify(scene.axes(x)[-1], scene.axes(weight)[0])
    out = scene.axes(node.outputs[0])
    for mine, other in zip(scene.axes(x)[:-1], out[:-1], strict=True):
        scene.unify(mine, other)
    scene.unify(out[-1], product(heads, dims[2]))
    scene.play(weight, "write", read=[0])
    if rest and rest[0] is not None:
        scene.unify(scene.axes(rest[0])[0], scene.axes(weight)[1])
        scene.play(rest[0], "write")
    if (len(rest) > 2 and rest[2] is not None) or len(node.outputs) > 1:  # past [2, batch, heads, past, head_dim]
        for value in (*rest[2:3], *node.outputs[1:2]):
            if value is not None:
                scene.unify(scene.axes(value)[2], heads)
                scene.unify(scene.axes(value)[4], dims[2])
    for value in scene.added_scores(node):
        if scene.axes(value)[1] != ONE:
            scene.unify(scene.axes(value)[1], heads)
    scene.attends(node, heads, heads, dims[0], dims[2])


@rule("Attention")
@rule("MultiHeadAttention", "GroupQueryAttention", domain=CONTRIB)
def _attention(scene: Scene, node: ir.Node) -> None:
    """Queries, keys and values as inputs, ``[batch, sequence, heads * head_dim]``, by heads, or several in one."""
    q, k, v = (list(node.inputs) + [None] * 3)[:3]
    names = ("q_num_heads", "kv_num_heads") if node.domain != CONTRIB else ("num_heads", "kv_num_heads")
    out = scene.axes(node.outputs[0])
    runs, batch = scene.unifier.runs, scene.axes(q)[0]
    if k is None or v is None:
        heads, kv_heads, dqk, dv = _packed(scene, node)
        scene.unify(out[1], scene.axes(q)[1])
        scene.unify(out[2], product(heads, dv))
    elif len(scene.axes(q)) == 4:
        (_, heads, rows, dqk), (_, kv_heads, _, dk), (_, v_heads, _, dv) = map(scene.axes, (q, k, v))
        scene.unify(dqk, dk)
        scene.unify(kv_heads, v_heads)
        scene.unify(out[3], dv)
        scene.unify(out[1], heads)
        scene.unify(out[2], rows)
    else:
        count = node.attributes.get_int(names[0], 1)
        kv_count = node.attributes.get_int(names[1], count)
        heads, kv_heads = scene.unifier.fresh((count,) * runs), scene.unifier.fresh((kv_count,) * runs)
        dqk = scene.unifier.fresh((scene.sizes(scene.axes(q)[-1])[0] // count,) * runs)
        dv_size = scene.sizes(scene.axes(v)[-1 if len(scene.axes(v)) == 3 else 3])[0]
        dv = scene.unifier.fresh((dv_size // (kv_count if len(scene.axes(v)) == 3 else 1),) * runs)
        scene.unify(scene.axes(q)[-1], product(heads, dqk))
        for value, dim in ((k, dqk), (v, dv)):
            if len(scene.axes(value)) == 3:
                scene.unify(scene.axes(value)[-1], product(kv_heads, dim))
            else:
                scene.unify(scene.axes(value)[1], kv_heads)
                scene.unify(scene.axes(value)[3], dim)
        scene.unify(out[1], scene.axes(q)[1])
        scene.unify(out[2], product(heads, dv))
    scene.unify(out[0], batch)
    if scene.sizes(heads) != scene.sizes(kv_heads):
        group = scene.unifier.fresh(
            tuple(h // n for h, n in zip(scene.sizes(heads), scene.sizes(kv_heads), strict=True))
        )
        scene.unify(heads, product(kv_heads, group))
    else:
        scene.unify(heads, kv_heads)
    if node.op_type == "MultiHeadAttention" and len(node.inputs) > 3 and (bias := node.inputs[3]) is not None:
        parts = (product(heads, dqk), product(kv_heads, dqk), product(kv_heads, dv))
        scene.unify(scene.axes(bias)[0], concatenation(*parts))
        scene.play(bias, "write")
    for value in scene.added_scores(node):
        if scene.axes(value)[1] != ONE:
            scene.unify(scene.axes(value)[1], heads)
    for value, which in scene.caches(node):
        scene.unify(scene.axes(value)[1], kv_heads)
        scene.unify(scene.axes(value)[3], dqk if which == "k" else dv)
    scene.attends(node, heads, kv_heads, dqk, dv)


def _packed(scene: Scene, node: ir.Node) -> tuple[Axis, Axis, Axis, Axis]:
    """The heads, those of keys, and their entries, where one input holds keys, values and maybe queries."""
    query, keys = (*node.inputs, None)[:2]
    last, runs = scene.axes(query)[-1], scene.unifier.runs
    if node.op_type == "GroupQueryAttention":  # [batch, sequence, (heads + 2 kv_heads) * head_dim]
        counts = [node.attributes.get_int(name, 1) for name in ("num_heads", "kv_num_heads")]
        size = scene.sizes(last)[0] // (counts[0] + 2 * counts[1])
        heads, kv_heads, dim = (scene.unifier.fresh((each,) * runs) for each in (*counts, size))
        scene.unify(last, concatenation(*(product(each, dim) for each in (heads, kv_heads, kv_heads))))
        return heads, kv_heads, dim, dim
    _, _, heads, several, dim = scene.axes(
        query if keys is None else keys
    )  # [batch, sequence, heads, 2 or 3, head_dim]
    scene.freeze_axis(several, f"queries, keys and values beside each other ({node.name})")
    if keys is not None:
        scene.unify(last, product(heads, dim))
    return heads, heads, dim, dim


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", domain=CONTRIB)
def _rotary(scene: Scene, node: ir.Node) -> None:
    """Pairs of entries of each head are turned: half the head apart, or beside each other."""
    scene.same(node.inputs[0], node.outputs[0])
    axis = scene.axes(node.inputs[0])[-1]
    if len(scene.axes(node.inputs[0])) == 3:
        count = node.attributes.get_int("num_heads", 0)
        if not count:
            return scene.freeze_axis(axis, f"the heads of the rotary embedding {node.name}")
        _, axis = scene.unifier.split_product(axis, (count,) * scene.unifier.runs)
    scene.freeze_axis(axis, f"rotary positions turn its entries in pairs ({node.name})")
