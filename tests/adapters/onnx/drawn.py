"""Random small transformers as ONNX files: every choice that an exporter, an optimiser or an author may make."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.adapters.onnx.handmade import LOCAL, MICROSOFT, Builder

STATIC = (2, 5)  # batch and sequence of a file with fixed shapes
POSITIONS = 16
EPSILON = 1e-3
CLASSES = 3

UNARIES = ("Relu", "Erf", "Tanh", "Sigmoid", "Silu", "HardSwish", "Elu", "Softplus", "LeakyRelu", "Squared", "PRelu")
UNARIES += ("Gelu", "Clip", "Abs", "Mish", "Softsign", "Celu", "Selu", "HardSigmoid", "Neg", "")

NOISE = ("transpose", "swap", "unsqueeze", "identity", "flatten", "cast", "expand", "halves", "one", "slices")


@dataclass(frozen=True)
class Blueprint:
    """One file, choice by choice.

    Attributes:
        opset: The version of the default operator set; what it lacks is spelled out.
        blocks: The number of blocks.
        hidden, heads, group, head_dim, ffn, vocab: Sizes; ``heads`` counts those of keys and values, each of which
            serves ``group`` query heads.
        kind: "layer" or "rms", for what norms do.
        norms: "fused" (one operator), or how they are spelled: "pow", "mul"; "skip" fuses the residual sum, too.
        place: "pre", "post" or "none".
        linear: The operator of projections.
        biased: Whether they add a bias.
        qkv: "separate" weights, or one that is cut by "Split", "Slice", "unbind" (into 3 by heads) or "headwise".
        attention: "" for no attention, "spelled", "Einsum", or a fused operator.
        repeat: How keys and values are repeated for their group, each by itself; "heads" repeats all of them in turn.
        scale: Where scores are scaled.
        mask: "", "causal", or "input".
        mlp: "plain", "gated", or "Split" and "Slice" for a gated one whose two projections have one weight.
        unary: Its activation.
        flipped: Whether sums have the stream second.
        parallel: Whether attention and MLP read the same.
        layer_scale: Whether branches are multiplied with a vector before they are added.
        noise: What is done to no effect, at one place after the other.
        source: What comes in: "tokens", "narrow" (projected to the hidden size) or "floats".
        positions: "", "Gather" or "Slice" for how a table is read.
        head: What comes out: "linear", "tied", "stream", "pooled", or "first" (the first token's).
        second: A second output: "", "stream" or "block" (what the first block gives).
        unknown: Where an operator stands that no rule knows: "", "stream", "ffn", "logits", or "custom" where no
            runtime knows it either.
        static: Whether shapes are fixed.
        shared: Whether equal integers are one initializer.
        seed: Of the weights.
    """

    opset: int = 18
    blocks: int = 2
    hidden: int = 8
    heads: int = 2
    group: int = 1
    head_dim: int = 4
    ffn: int = 12
    vocab: int = 11
    kind: str = "layer"
    norms: str = "fused"
    place: str = "pre"
    linear: str = "MatMul"
    biased: bool = True
    qkv: str = "separate"
    attention: str = "spelled"
    repeat: str = "Expand"
    scale: str = "scores"
    mask: str = ""
    mlp: str = "plain"
    unary: str = "Relu"
    flipped: bool = False
    parallel: bool = False
    layer_scale: bool = False
    noise: tuple[str, ...] = ()
    source: str = "tokens"
    positions: str = ""
    head: str = "linear"
    second: str = ""
    unknown: str = ""
    static: bool = False
    shared: bool = False
    seed: int = 0

    @property
    def is_ordinary(self) -> bool:
        """Whether nothing stands in the way of reading it: all is known, and the stream isn't put together of parts."""
        return not self.unknown and "halves" not in self.noise and (self.blocks > 1 or self.attention != "")

    @property
    def fused(self) -> bool:
        """Whether attention is one operator."""
        possible = {"MultiHeadAttention": self.group == 1, "Attention": self.opset >= 23}
        return possible.get(self.attention, False) and self.qkv in ("separate", "Split", "Slice")

    @property
    def is_masked(self) -> bool:
        """Whether a mask comes in."""
        return self.mask == "input" and self.attention != "" and not self.fused

    def model(self) -> onnx.ModelProto:
        """The file."""
        return _Drawing(self).model()

    def inputs(self, batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Valid inputs; of these sizes where the file leaves them open."""
        rng = np.random.default_rng(seed)
        shape = STATIC if self.static else (batch, sequence)
        if self.source == "floats":
            values = {"x": rng.standard_normal((*shape, self.hidden)).astype(np.float32)}
        else:
            values = {"x": rng.integers(0, self.vocab, shape)}
        if self.is_masked:
            values["mask"] = rng.integers(0, 2, shape)
            values["mask"][:, 0] = 1
        return values


def blueprints() -> st.SearchStrategy[Blueprint]:
    """Any blueprint; sizes often coincide."""
    rarely = st.sampled_from([False, False, False, True])
    return st.builds(
        Blueprint,
        opset=st.sampled_from([14, 17, 18, 20, 21, 23]),
        blocks=st.integers(1, 4),
        hidden=st.sampled_from([4, 8, 12, 16]),
        heads=st.sampled_from([1, 2, 4]),
        group=st.sampled_from([1, 1, 2, 3]),
        head_dim=st.sampled_from([2, 4, 6]),
        ffn=st.sampled_from([4, 8, 16, 20]),
        vocab=st.sampled_from([4, 8, 11]),
        kind=st.sampled_from(["layer", "rms"]),
        norms=st.sampled_from(["fused", "pow", "mul", "skip"]),
        place=st.sampled_from(["pre", "pre", "post", "none"]),
        linear=st.sampled_from(["MatMul", "transposed", "Gemm", "GemmT", "Einsum", "FusedMatMul"]),
        biased=st.booleans(),
        qkv=st.sampled_from(["separate", "Split", "Slice", "unbind", "headwise"]),
        attention=st.sampled_from(["spelled", "spelled", "Einsum", "MultiHeadAttention", "Attention", ""]),
        repeat=st.sampled_from(["Expand", "Tile", "heads"]),
        scale=st.sampled_from(["scores", "query", "Div", ""]),
        mask=st.sampled_from(["", "causal", "input"]),
        mlp=st.sampled_from(["plain", "gated", "Split", "Slice"]),
        unary=st.sampled_from(UNARIES),
        flipped=st.booleans(),
        parallel=rarely,
        layer_scale=rarely,
        noise=st.lists(st.sampled_from(NOISE), max_size=3).map(tuple),
        source=st.sampled_from(["tokens", "tokens", "narrow", "floats"]),
        positions=st.sampled_from(["", "Gather", "Slice"]),
        head=st.sampled_from(["linear", "tied", "stream", "pooled", "first"]),
        second=st.sampled_from(["", "", "stream", "block"]),
        unknown=st.sampled_from([*[""] * 16, "stream", "ffn", "logits", "custom"]),
        static=rarely,
        shared=st.booleans(),
        seed=st.integers(0, 9),
    )


class _Drawing:
    """A file in the making."""

    def __init__(self, chosen: Blueprint) -> None:
        self.is_ = chosen
        self.build = Builder()
        self.rng = np.random.default_rng(chosen.seed)
        self.numbers: dict[object, str] = {}
        self.places = 0

    # --- the parts ---------------------------------------------------------------------------------------------------

    def model(self) -> onnx.ModelProto:
        chosen = self.is_
        stream = self.noised(self.embedded())
        outputs = []
        for block in range(chosen.blocks):
            stream = self.block(stream, f"blocks.{block}")
            if block == 0 and chosen.second == "block":
                outputs.append((stream, [*self.sizes, chosen.hidden]))
        if chosen.unknown == "stream":
            stream = self.node("Shrink", stream, lambd=0.01)
        if chosen.place == "pre":
            stream = self.norm(stream, "norm")
        if chosen.second == "stream":
            outputs.append((stream, [*self.sizes, chosen.hidden]))
        value, shape = self.headed(stream)
        if chosen.unknown == "logits":
            value = self.node("Shrink", value, lambd=0.01)
        return self.finished([(value, shape), *outputs])

    def embedded(self) -> str:
        chosen = self.is_
        if chosen.source == "floats":
            value = self.linear("x", "into", chosen.hidden, chosen.hidden)
        else:
            width = chosen.hidden if chosen.source == "tokens" else 6
            value = self.node("Gather", self.weight("embed", chosen.vocab, width), "x")
            if chosen.source == "narrow":
                value = self.linear(value, "into", width, chosen.hidden)
        if chosen.positions:
            table = self.weight("positions", POSITIONS, chosen.hidden)
            value = self.sum(value, self.looked_up(table))
        return value

    def looked_up(self, table: str) -> str:
        if self.is_.static:
            length = self.integer([STATIC[1]])
        else:
            length = self.node("Slice", self.node("Shape", "x"), self.integer([1]), self.integer([2]))
        if self.is_.positions == "Slice":
            return self.node("Slice", table, self.integer([0]), length, self.integer([0]))
        end = self.node("Squeeze", length, self.integer([0]))
        return self.node("Gather", table, self.node("Range", self.integer(0), end, self.integer(1)))

    def block(self, stream: str, name: str) -> str:
        chosen = self.is_
        if not chosen.attention:
            return self.residual(stream, lambda x: self.mlp(x, name), f"{name}.mlp")
        if chosen.parallel and chosen.place == "pre":
            normed = self.norm(stream, f"{name}.norm")
            both = self.node("Add", self.attention(normed, name), self.mlp(normed, name))
            return self.sum(stream, both)
        stream = self.residual(stream, lambda x: self.attention(x, name), f"{name}.attention")
        return self.residual(self.noised(stream), lambda x: self.mlp(x, name), f"{name}.mlp")

    def residual(self, stream: str, branch: Callable[[str], str], name: str) -> str:
        chosen = self.is_
        normed = self.norm(stream, f"{name}.norm") if chosen.place == "pre" else stream
        made = self.noised(branch(normed))
        if chosen.layer_scale:
            made = self.node("Mul", made, self.weight(f"{name}.layer_scale", chosen.hidden))
        if chosen.place == "post" and chosen.norms == "skip":
            return self.skip(stream, made, f"{name}.norm")
        stream = self.sum(stream, made)
        return self.norm(stream, f"{name}.norm") if chosen.place == "post" else stream

    def attention(self, value: str, name: str) -> str:
        chosen = self.is_
        queries = chosen.heads * chosen.group
        query, key, wide = self.projected(self.noised(value), name)
        if not chosen.fused:
            mixed = self.spelled(query, key, wide)
        elif chosen.attention == "Attention":
            mixed = self.node("Attention", query, key, wide, q_num_heads=queries, kv_num_heads=chosen.heads)
        else:
            mixed = self.node(f"{MICROSOFT}::MultiHeadAttention", query, key, wide, num_heads=queries)
        return self.linear(mixed, f"{name}.out", queries * chosen.head_dim, chosen.hidden)

    def projected(self, value: str, name: str) -> list[str]:
        """Queries, keys and values: by heads where they were cut by heads."""
        chosen = self.is_
        heads, head_dim = chosen.heads, chosen.head_dim
        wide = [heads * chosen.group * head_dim, heads * head_dim, heads * head_dim]
        if chosen.qkv == "separate" or (chosen.group > 1 and chosen.qkv in ("unbind", "headwise")):
            return [self.linear(value, f"{name}.{part}", chosen.hidden, w) for part, w in zip("qkv", wide, strict=True)]
        value = self.linear(value, f"{name}.qkv", chosen.hidden, sum(wide))
        if chosen.qkv in ("Split", "Slice"):
            return self.cut(value, wide, chosen.qkv)
        if chosen.qkv == "headwise":
            parts = self.cut(self.shaped(value, 0, 0, heads, 3 * head_dim), [head_dim] * 3, "Split")
            return [self.node("Transpose", part, perm=[0, 2, 1, 3]) for part in parts]
        parts = self.node("Transpose", self.shaped(value, 0, 0, 3, heads, head_dim), perm=[2, 0, 3, 1, 4])
        return [self.node("Gather", parts, self.integer(i), axis=0) for i in range(3)]

    def spelled(self, query: str, key: str, wide: str) -> str:
        chosen = self.is_
        if chosen.qkv in ("separate", "Split", "Slice") or chosen.group > 1:
            query = self.by_heads(query, chosen.heads * chosen.group)
            key, wide = (self.repeated(self.by_heads(value, chosen.heads)) for value in (key, wide))
        factor = np.float32(chosen.head_dim**-0.5)
        if chosen.scale == "query":
            query = self.node("Mul", query, self.number(factor))
        if chosen.attention == "Einsum":
            scores = self.node("Einsum", query, key, equation="bhqd,bhkd->bhqk")
        else:
            scores = self.node("MatMul", query, self.node("Transpose", key, perm=[0, 1, 3, 2]))
        if chosen.scale == "scores":
            scores = self.node("Mul", scores, self.number(factor))
        if chosen.scale == "Div":
            scores = self.node("Div", scores, self.number(1 / factor))
        weights = self.node("Softmax", self.masked(scores), axis=-1)
        if chosen.attention == "Einsum":
            mixed = self.node("Einsum", weights, wide, equation="bhqk,bhkd->bqhd")
        else:
            mixed = self.node("Transpose", self.node("MatMul", weights, wide), perm=[0, 2, 1, 3])
        return self.shaped(mixed, 0, 0, chosen.heads * chosen.group * chosen.head_dim)

    def by_heads(self, value: str, heads: int) -> str:
        return self.node("Transpose", self.shaped(value, 0, 0, heads, self.is_.head_dim), perm=[0, 2, 1, 3])

    def repeated(self, value: str) -> str:
        chosen = self.is_
        if chosen.group == 1:
            return value
        if chosen.repeat == "heads":
            return self.node("Tile", value, self.integer([1, chosen.group, 1, 1]))
        value = self.node("Unsqueeze", value, self.integer([2]))
        value = self.node(chosen.repeat, value, self.integer([1, 1, chosen.group, 1, 1]))
        return self.shaped(value, 0, chosen.heads * chosen.group, -1, chosen.head_dim)

    def masked(self, scores: str) -> str:
        if self.is_.mask == "causal":
            shape = self.node("Slice", self.node("Shape", scores), self.integer([2]), self.integer([4]))
            ones = self.node("Expand", self.number(np.float32(-1e4)), shape)
            return self.node("Add", scores, self.node("Trilu", ones, self.integer(1), upper=1))
        if self.is_.mask == "input":
            kept = self.node("Cast", self.node("Unsqueeze", "mask", self.integer([1, 2])), to=TensorProto.FLOAT)
            hidden = self.node("Sub", self.number(np.float32(1)), kept)
            return self.node("Add", scores, self.node("Mul", hidden, self.number(np.float32(-1e4))))
        return scores

    def mlp(self, value: str, name: str) -> str:
        chosen = self.is_
        value = self.noised(value)
        if chosen.mlp in ("Split", "Slice"):
            both = self.linear(value, f"{name}.gate_up", chosen.hidden, 2 * chosen.ffn)
            gate, up = self.cut(both, [chosen.ffn] * 2, chosen.mlp)
        else:
            gate = self.linear(value, f"{name}.gate", chosen.hidden, chosen.ffn)
            up = self.linear(value, f"{name}.up", chosen.hidden, chosen.ffn) if chosen.mlp == "gated" else ""
        value = self.activated(gate, name)
        if chosen.unknown == "ffn":
            value = self.node("Shrink", value, lambd=0.01)
        if chosen.unknown == "custom":
            value = self.node(f"{LOCAL}::Unheard", value)
        value = self.node("Mul", value, up) if up else value
        return self.linear(value, f"{name}.down", chosen.ffn, chosen.hidden)

    def activated(self, value: str, name: str) -> str:
        node, kind = self.node, self.is_.unary
        if (kind, self.is_.opset) in (("Gelu", 14), ("Gelu", 17), ("Gelu", 18)):
            kind = "Erf"
        if (kind, self.is_.opset) in (("Mish", 14), ("Mish", 17)):
            kind = "Silu"
        match kind:
            case "":
                return value
            case "Erf":
                inner = node("Erf", node("Div", value, self.number(np.float32(2**0.5))))
                product = node("Mul", value, node("Add", inner, self.number(np.float32(1))))
                return node("Mul", product, self.number(np.float32(0.5)))
            case "Silu":
                return node("Mul", value, node("Sigmoid", value))
            case "Squared":
                value = node("Relu", value)
                return node("Mul", value, value)
            case "PRelu":
                return node("PRelu", value, self.weight(f"{name}.slope", self.is_.ffn))
            case "Clip":
                return node("Clip", value, self.number(np.float32(-0.5)), self.number(np.float32(0.75)))
        return node(kind, value)

    def headed(self, stream: str) -> tuple[str, list[int | str]]:
        chosen = self.is_
        if chosen.head == "stream":
            return self.node("Identity", stream), [*self.sizes, chosen.hidden]
        if chosen.head == "tied" and chosen.source == "tokens":
            table = self.node("Transpose", "embed", perm=[1, 0])
            return self.node("MatMul", stream, table), [*self.sizes, chosen.vocab]
        if chosen.head in ("pooled", "first"):
            if chosen.head == "first":
                stream = self.node("Gather", stream, self.integer(0), axis=1)
            else:
                stream = self.reduced(stream, 1, 0)
            weight = self.weight("classify", chosen.hidden, CLASSES)
            return self.node("MatMul", stream, weight), [self.sizes[0], CLASSES]
        return self.linear(stream, "logits", chosen.hidden, chosen.vocab), [*self.sizes, chosen.vocab]

    # --- operators ---------------------------------------------------------------------------------------------------

    def norm(self, value: str, name: str) -> str:
        chosen = self.is_
        scale = self.weight(f"{name}.scale", chosen.hidden, around=1)
        layer = chosen.kind == "layer"
        shift = self.weight(f"{name}.shift", chosen.hidden) if layer else ""
        if chosen.norms in ("fused", "skip"):
            if layer and chosen.opset >= 17:
                return self.node("LayerNormalization", value, scale, shift, axis=-1, epsilon=EPSILON)
            if not layer and chosen.opset >= 23:
                return self.node("RMSNormalization", value, scale, axis=-1, epsilon=EPSILON)
            if not layer:
                return self.node("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=EPSILON)
        if layer:
            value = self.node("Sub", value, self.reduced(value, -1))
        spelled = self.node("Pow", value, self.number(np.float32(2)))
        square = spelled if chosen.norms == "pow" else self.node("Mul", value, value)
        root = self.node("Sqrt", self.node("Add", self.reduced(square, -1), self.number(np.float32(EPSILON))))
        if chosen.norms == "pow":
            value = self.node("Div", value, root)
        else:
            value = self.node("Mul", value, self.node("Reciprocal", root))
        value = self.node("Mul", scale, value) if chosen.flipped else self.node("Mul", value, scale)
        return self.node("Add", value, shift) if layer else value

    def skip(self, stream: str, branch: str, name: str) -> str:
        scale = self.weight(f"{name}.scale", self.is_.hidden, around=1)
        if self.is_.kind == "layer":
            shift = self.weight(f"{name}.shift", self.is_.hidden)
            return self.node(f"{MICROSOFT}::SkipLayerNormalization", stream, branch, scale, shift, epsilon=EPSILON)
        return self.node(f"{MICROSOFT}::SkipSimplifiedLayerNormalization", stream, branch, scale, epsilon=EPSILON)

    def reduced(self, value: str, axis: int, keepdims: int = 1) -> str:
        if self.is_.opset >= 18:
            return self.node("ReduceMean", value, self.integer([axis]), keepdims=keepdims)
        return self.node("ReduceMean", value, axes=[axis], keepdims=keepdims)

    def linear(self, value: str, name: str, width_in: int, width_out: int) -> str:
        kind, node = self.is_.linear, self.node
        turned = kind in ("transposed", "GemmT", "FusedMatMul")
        weight = self.weight(f"{name}.weight", *((width_out, width_in) if turned else (width_in, width_out)))
        bias = self.weight(f"{name}.bias", width_out) if self.is_.biased else ""
        if kind.startswith("Gemm"):
            flat = self.shaped(value, -1, width_in)
            made = node("Gemm", flat, weight, *filter(None, [bias]), transB=int(turned))
            return node("Reshape", made, self.shape_of(value, 2, width_out))
        if kind == "Einsum":
            made = node("Einsum", value, weight, equation="bsi,io->bso")
        elif kind == "FusedMatMul":
            made = node(f"{MICROSOFT}::FusedMatMul", value, weight, transB=1)
        else:
            made = node("MatMul", value, node("Transpose", weight, perm=[1, 0]) if turned else weight)
        if not bias:
            return made
        return node("Add", bias, made) if self.is_.flipped else node("Add", made, bias)

    def shape_of(self, value: str, lead: int, *sizes: int) -> str:
        """The first sizes of a value, and then these."""
        if self.is_.static and lead == 2:
            return self.integer([*STATIC, *sizes])
        first = self.node("Slice", self.node("Shape", value), self.integer([0]), self.integer([lead]))
        return self.node("Concat", first, self.integer([*sizes]), axis=0) if sizes else first

    def shaped(self, value: str, *shape: int) -> str:
        return self.node("Reshape", value, self.integer([*shape]))

    def cut(self, value: str, sizes: list[int], how: str) -> list[str]:
        """A value cut along its last axis."""
        if how == "Split":
            outputs = [f"part_{len(self.build.nodes)}.{i}" for i in range(len(sizes))]
            self.build.nodes_of("Split", [value, self.integer(sizes)], outputs, axis=-1)
            return outputs
        ends = np.cumsum([0, *sizes]).tolist()
        return [
            self.node("Slice", value, self.integer([a]), self.integer([b]), self.integer([-1]))
            for a, b in pairwise(ends)
        ]

    def noised(self, value: str) -> str:
        """The same value of rank 3, by a detour."""
        self.places += 1
        noise, node = self.is_.noise, self.node
        match noise[self.places % len(noise)] if noise else "":
            case "transpose":
                return node("Transpose", node("Transpose", value, perm=[1, 0, 2]), perm=[1, 0, 2])
            case "swap":
                return node("Transpose", node("Transpose", value, perm=[0, 2, 1]), perm=[0, 2, 1])
            case "unsqueeze":
                return node("Squeeze", node("Unsqueeze", value, self.integer([1])), self.integer([1]))
            case "identity":
                return node("Identity", value)
            case "flatten":
                flat = self.shaped(value, -1, self.is_.hidden)
                return node("Reshape", flat, self.node("Shape", value))
            case "cast":
                return node("Cast", node("Cast", value, to=TensorProto.DOUBLE), to=TensorProto.FLOAT)
            case "expand":
                return node("Expand", value, node("Shape", value))
            case "halves":
                return node("Concat", *self.cut(value, [self.is_.hidden // 2] * 2, "Split"), axis=-1)
            case "one":
                return node("Mul", value, self.number(np.float32(1)))
            case "slices":
                return node("Slice", value, self.integer([0]), self.integer([2**31 - 1]), self.integer([-1]))
        return value

    def sum(self, stream: str, branch: str) -> str:
        return self.node("Add", branch, stream) if self.is_.flipped else self.node("Add", stream, branch)

    # --- nodes, weights and numbers ----------------------------------------------------------------------------------

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.build.node(kind, *inputs, **attributes)

    @property
    def sizes(self) -> list[int | str]:
        return [*STATIC] if self.is_.static else ["batch", "sequence"]

    def weight(self, name: str, *shape: int, around: float = 0) -> str:
        scale = prod(shape[:1]) ** -0.5 if len(shape) > 1 else 0.2
        drawn = around + scale * self.rng.standard_normal(shape)
        return self.build.constant(name, drawn.astype(np.float32))

    def integer(self, entries: int | list[int]) -> str:
        return self.number(np.array(entries, dtype=np.int64))

    def number(self, array: np.ndarray) -> str:
        array = np.asarray(array)
        key = (array.dtype, array.shape, array.tobytes()) if self.is_.shared else len(self.numbers)
        if key not in self.numbers:
            self.numbers[key] = f"number_{len(self.numbers)}"
            self.build.initializers.append(numpy_helper.from_array(array, self.numbers[key]))
        return self.numbers[key]

    def finished(self, outputs: list[tuple[str, list[int | str]]]) -> onnx.ModelProto:
        chosen = self.is_
        floats = chosen.source == "floats"
        shape = [*self.sizes, chosen.hidden] if floats else self.sizes
        kind = TensorProto.FLOAT if floats else TensorProto.INT64
        inputs = [helper.make_tensor_value_info("x", kind, shape)]
        if chosen.is_masked:
            inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, self.sizes))
        given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in outputs]
        graph = helper.make_graph(self.build.nodes, "drawn", inputs, given, self.build.initializers)
        opsets = [helper.make_opsetid("", chosen.opset), helper.make_opsetid(MICROSOFT, 1)]
        opsets += [helper.make_opsetid(LOCAL, 1)] if chosen.unknown == "custom" else []
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
