"""Queries, keys and values in one input of ONNX Runtime's own attention."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import growkit
from growkit_onnx.execute import Executor
from tests.adapters.onnx.drawn import Blueprint
from tests.adapters.onnx.zoo import FILES, make

HEADS, HEAD_DIM = 2, 4
FILE = Blueprint(attention="MultiHeadAttention", qkv="Split", heads=HEADS, head_dim=HEAD_DIM)
EXACT = 2e-6


def packed(parts: int) -> onnx.ModelProto:
    """A file whose attention has its last ``parts`` of queries, keys and values in one input, beside each other."""
    model = FILE.model()
    nodes = model.graph.node
    apart = np.array([0, 0, HEADS, 3 if parts == 3 else 1, HEAD_DIM])
    model.graph.initializer.append(numpy_helper.from_array(apart, "apart"))
    for attention in [node for node in nodes if node.op_type == "MultiHeadAttention"]:
        split = next(node for node in nodes if attention.input[0] in node.output)
        read = split.input[:1] if parts == 3 else attention.input[1:3]
        reshaped = [f"{value}.apart" for value in read]
        pairs = zip(read, reshaped, strict=True)
        made = [helper.make_node("Reshape", [value, "apart"], [out], out) for value, out in pairs]
        whole = f"{attention.name}.packed"
        made.append(helper.make_node("Concat", reshaped, [whole], whole, axis=3))
        at = list(nodes).index(attention)
        for node in reversed(made):
            nodes.insert(at, node)
        attention.input[:] = [*attention.input[: 3 - parts], whole]
        if parts == 3:
            nodes.remove(split)
    return model


@pytest.mark.parametrize("parts", [3, 2])
def test_attention_on_packed_inputs_grows_and_computes_the_same(parts: int) -> None:
    """The runtime has these forms on other devices than the CPU only."""
    source = packed(parts)
    model = growkit.read(source)
    assert {"heads": HEADS, "head_dim": HEAD_DIM}.items() <= model.graph.sizes.items()
    plan = growkit.plan(model, hidden="1.5x", heads=4, head_dim="1.5x", layers=4)
    assert plan.preserving
    inputs = FILE.inputs(3, 5)
    before, after = (
        list(Executor(ir.from_proto(each))(inputs).values()) for each in (source, growkit.grow(model, plan).to_onnx())
    )
    for expected, got in zip(before, after, strict=True):
        np.testing.assert_allclose(got, expected, rtol=EXACT, atol=EXACT * float(expected.abs().max()))


def test_one_matrix_of_all_heads_is_one_projection() -> None:
    model = growkit.read(make(next(file for file in FILES if file.family == "genai-packed")))
    (attention,) = (layer for layer in model.graph.stacks[0].layers if layer.kind == "attention")
    assert {parameter.slot: parameter.layout for parameter in attention.parameters} == {
        "qkv_proj.weight": "hidden -> ((kv_heads group head_dim) + (kv_heads head_dim) + (kv_heads head_dim))",
        "o_proj.weight": "(kv_heads group head_dim) -> hidden",
    }
    plan = growkit.plan(model, hidden="1.5x", kv_heads="2x", head_dim="2x", layers=5)
    assert plan.preserving
    assert growkit.verify(model, growkit.grow(model, plan)).max_rel_diff <= EXACT
