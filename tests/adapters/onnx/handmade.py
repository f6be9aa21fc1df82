"""Test files that no exporter of torch writes, made node by node from the weights of a tiny model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.adapters.onnx.families import Axes, Family

MICROSOFT = "com.microsoft"
LOCAL = "local"  # the domain of a model's own functions


@dataclass
class Builder:
    """Nodes and initializers, in the order in which they are made."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of one output; "com.microsoft::Kind" names its domain too."""
        return self.nodes_of(kind, inputs, [f"value_{len(self.nodes)}"], **attributes)

    def nodes_of(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node with these outputs; the first one's name."""
        *domain, kind = kind.split("::")
        name = f"node_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, domain="".join(domain), **attributes))
        return outputs[0]

    def constant(self, name: str, array: np.ndarray) -> str:
        """Adds an initializer."""
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name


def save(builder: Builder, family: Family, path: Path, functions: Sequence[onnx.FunctionProto] = ()) -> None:
    """Writes the file; every output must be the name of a value."""
    stack, (_, sequence) = family.stacks[0], family.traced
    example = family.inputs.draw(1, sequence, np.random.default_rng(0))
    types = {
        name: TensorProto.INT64 if value.dtype == np.int64 else TensorProto.FLOAT for name, value in example.items()
    }

    def shape(name: str, labels: tuple[str | None, ...]) -> list[str | int | None]:
        if name == "logits":
            return [*labels, family.vocab]
        fixed = {1: stack.kv_heads, 3: stack.head_dim}
        return [label or fixed[axis] for axis, label in enumerate(labels)]

    def values(axes: Axes) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape(name, labels))
            for name, labels in axes.items()
        ]

    inputs, outputs = values(family.inputs.axes), values(family.outputs)
    graph = helper.make_graph(builder.nodes, "main", inputs, outputs, builder.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    opsets += [helper.make_opsetid(LOCAL, 1)] if functions else []
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    onnx.save(model, path)


def generator(family: Family, path: Path) -> None:
    """A Llama as generators for ONNX Runtime lay it out: GroupQueryAttention on a cache, residuals fused into norms.

    With position ids as an input, the rotation is a node of its own; without, GroupQueryAttention rotates. It may be
    given queries, keys and values as one, from one matrix.
    """
    stack, rotates, packed = family.stacks[0], "position_ids" not in family.inputs.axes, family.name.endswith("packed")
    model: Any = family.build("eager").model
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    build = Builder()

    def linear(value: str, name: str) -> str:
        return build.node("MatMul", value, build.constant(f"{name}.MatMul.weight", weights[f"{name}.weight"].T))

    def projected(value: str, name: str) -> list[str]:
        """The queries, keys and values that attention takes."""
        parts = [f"{name}.{part}_proj" for part in "qkv"]
        if not packed:
            query, key, wide = (linear(value, part) for part in parts)
            return [rotated(query, stack.heads), rotated(key, stack.kv_heads), wide]
        weights[f"{name}.qkv_proj.weight"] = np.concatenate([weights[f"{part}.weight"] for part in parts])
        return [linear(value, f"{name}.qkv_proj"), "", ""]

    lengths = build.node("ReduceSum", "attention_mask", build.constant("axis_one", np.array([1])))
    lengths = build.node("Cast", build.node("Sub", lengths, build.constant("one", np.array([1]))), to=TensorProto.INT32)
    total = build.node(
        "Gather", build.node("Shape", "attention_mask"), build.constant("index_one", np.array(1)), axis=0
    )
    total = build.node("Cast", total, to=TensorProto.INT32)
    angles = torch.outer(torch.arange(model.config.max_position_embeddings).float(), model.model.rotary_emb.inv_freq)
    tables = (build.constant("cos_cache", angles.cos().numpy()), build.constant("sin_cache", angles.sin().numpy()))
    epsilon = model.config.rms_norm_eps

    def rotated(value: str, heads: int) -> str:
        if rotates:
            return value
        attributes = {"num_heads": heads, "rotary_embedding_dim": stack.head_dim, "interleaved": 0}
        return build.node(f"{MICROSOFT}::RotaryEmbedding", value, "position_ids", *tables, **attributes)

    def attention(value: str, layer: int) -> str:
        name = f"model.layers.{layer}.self_attn"
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        inputs = [*projected(value, name), *past, lengths, total]
        attended = build.nodes_of(
            f"{MICROSOFT}::GroupQueryAttention",
            [*inputs, *(tables if rotates else ())],
            [f"attention_{layer}", f"present.{layer}.key", f"present.{layer}.value"],
            num_heads=stack.heads,
            kv_num_heads=stack.kv_heads,
            scale=stack.head_dim**-0.5,
            do_rotary=int(rotates),
            rotary_interleaved=0,
        )
        return linear(attended, f"{name}.o_proj")

    def ffn(value: str, layer: int) -> str:
        gate, up = (linear(value, f"model.layers.{layer}.mlp.{part}_proj") for part in ("gate", "up"))
        return linear(
            build.node("Mul", build.node("Mul", gate, build.node("Sigmoid", gate)), up),
            f"model.layers.{layer}.mlp.down_proj",
        )

    def norm(stream: str, branch: str | None, name: str) -> tuple[str, str]:
        """The normalised sum of stream and branch, and the sum."""
        scale = build.constant(f"{name}.weight", weights[f"{name}.weight"])
        if branch is None:
            attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            return build.node("SimplifiedLayerNormalization", stream, scale, **attributes), stream
        outputs = [f"{name}.output", "", "", f"{name}.sum"]
        kind = f"{MICROSOFT}::SkipSimplifiedLayerNormalization"
        return build.nodes_of(kind, [stream, branch, scale], outputs, epsilon=epsilon), outputs[3]

    embedding = build.constant("model.embed_tokens.weight", weights["model.embed_tokens.weight"])
    stream, branch = build.node("Gather", embedding, "input_ids"), None
    for layer in range(stack.layers):
        value, stream = norm(stream, branch, f"model.layers.{layer}.input_layernorm")
        value, stream = norm(stream, attention(value, layer), f"model.layers.{layer}.post_attention_layernorm")
        branch = ffn(value, layer)
    value, _ = norm(stream, branch, "model.norm")
    head = build.constant("lm_head.MatMul.weight", weights["lm_head.weight"].T)
    build.nodes_of("MatMul", [value, head], ["logits"])
    save(build, family, path)
    path.with_name("genai_config.json").write_text(json.dumps(_generation(family, path.name), indent=4))


def _generation(family: Family, filename: str) -> dict[str, Any]:
    """What a generator reads beside the file; its sizes are those of the model, so growth must write it anew."""
    stack = family.stacks[0]
    past, present = ("past_key_values.%d.", "present.%d.")
    decoder = {
        "session_options": {"provider_options": []},
        "filename": filename,
        "head_size": stack.head_dim,
        "hidden_size": stack.hidden,
        "inputs": {
            **{name: name for name in family.inputs.axes if not name.startswith("past")},
            "past_key_names": f"{past}key",
            "past_value_names": f"{past}value",
        },
        "outputs": {"logits": "logits", "present_key_names": f"{present}key", "present_value_names": f"{present}value"},
        "num_attention_heads": stack.heads,
        "num_hidden_layers": stack.layers,
        "num_key_value_heads": stack.kv_heads,
    }
    model = {"type": "llama", "context_length": 72, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"model": {**model, "vocab_size": family.vocab, "decoder": decoder}, "search": {"max_length": 72}}


def functions(family: Family, path: Path) -> None:
    """A decoder whose every block is a function of the model, which calls another one for its ffn."""
    model: Any = family.build("eager").model
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    build, made = Builder(), []
    for layer in range(family.stacks[0].layers):
        made += [_ffn_function(f"ffn_{layer}"), _block_function(f"block_{layer}", f"ffn_{layer}", family)]
    positions = build.node("Range", *_range(build))
    stream = build.node("Gather", build.constant("tokens.weight", weights["tokens.weight"]), "input_ids")
    at = build.node("Gather", build.constant("positions.weight", weights["positions.weight"]), positions)
    stream = build.node("Add", stream, at)
    for layer in range(family.stacks[0].layers):
        names = [f"blocks.{layer}.{part}" for part in BLOCK_WEIGHTS]
        arrays = [weights[name].T if weights[name].ndim == 2 else weights[name] for name in names]
        constants = map(build.constant, names, arrays)
        stream = build.node(f"{LOCAL}::block_{layer}", stream, *constants)
    scale, shift = (build.constant(name, weights[name]) for name in ("norm.weight", "norm.bias"))
    value = build.node("LayerNormalization", stream, scale, shift, axis=-1, epsilon=1e-5)
    build.nodes_of("MatMul", [value, build.constant("head.weight", weights["head.weight"].T)], ["logits"])
    save(build, family, path, made)


BLOCK_WEIGHTS = (
    *("attention_norm.weight", "attention_norm.bias", "qkv.weight", "qkv.bias", "out"),
    *("ffn_norm.weight", "ffn_norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"),
)


def _range(build: Builder) -> tuple[str, str, str]:
    """Zero, the length of the sequence, one."""
    length = build.node("Gather", build.node("Shape", "input_ids"), build.constant("sequence_axis", np.array(1)))
    return build.constant("zero", np.array(0)), length, build.constant("one", np.array(1))


def _ffn_function(name: str) -> onnx.FunctionProto:
    build = Builder()
    value = build.node("Add", build.node("MatMul", "value", "up"), "up_bias")
    value = build.node("MatMul", build.node("Gelu", value), "down")
    build.nodes_of("Add", [value, "down_bias"], ["result"])
    return _function(name, ["value", "up", "up_bias", "down", "down_bias"], build)


def _block_function(name: str, ffn: str, family: Family) -> onnx.FunctionProto:
    """What a block of the model computes; its constants are nodes, as a function has no initializers."""
    stack, build = family.stacks[0], Builder()

    def constant(value: Any) -> str:
        return build.node("Constant", value=numpy_helper.from_array(np.asarray(value)))

    weights = {part: part.replace(".", "_") for part in BLOCK_WEIGHTS}
    value = build.node("LayerNormalization", "stream", weights["attention_norm.weight"], weights["attention_norm.bias"])
    value = build.node("Add", build.node("MatMul", value, weights["qkv.weight"]), weights["qkv.bias"])
    value = build.node("Reshape", value, constant([0, 0, 3, stack.heads, stack.head_dim]))
    parts = build.node("Transpose", value, perm=[2, 0, 3, 1, 4])
    query, key, wide = (build.node("Gather", parts, constant(part), axis=0) for part in range(3))
    scores = build.node("MatMul", query, build.node("Transpose", key, perm=[0, 1, 3, 2]))
    scores = build.node("Mul", scores, constant(np.float32(stack.head_dim**-0.5)))
    ones = build.node("Expand", constant(np.float32(-np.inf)), build.node("Shape", scores, start=-2))
    weighted = build.node("Softmax", build.node("Add", scores, build.node("Trilu", ones, constant(1), upper=1)))
    value = build.node("Transpose", build.node("MatMul", weighted, wide), perm=[0, 2, 1, 3])
    value = build.node("Einsum", value, weights["out"], equation="bqhd,hdo->bqo")
    stream = build.node("Add", "stream", value)
    value = build.node("LayerNormalization", stream, weights["ffn_norm.weight"], weights["ffn_norm.bias"])
    value = build.node(f"{LOCAL}::{ffn}", value, *(weights[part] for part in BLOCK_WEIGHTS[-4:]))
    build.nodes_of("Add", [stream, value], ["result"])
    return _function(name, ["stream", *weights.values()], build)


def _function(name: str, inputs: Sequence[str], build: Builder) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(LOCAL, 1)]
    return helper.make_function(LOCAL, name, inputs, ["result"], build.nodes, opsets)


HANDMADE: dict[str, Callable[[Family, Path], None]] = {
    "genai": generator,
    "genai-positions": generator,
    "genai-packed": generator,
    "nano": functions,
}
