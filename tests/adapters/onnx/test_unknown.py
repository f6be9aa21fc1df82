"""Operators that nobody knows: what they touch stays as it is, and all else grows."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import growkit
from growkit_specs import InvalidTarget, UnsupportedModel
from tests.adapters.onnx.drawn import Blueprint
from tests.adapters.onnx.handmade import MICROSOFT

WIDTH, FFN, VOCAB = 8, 12, 11
FILE = Blueprint(hidden=WIDTH, ffn=FFN, vocab=VOCAB)

SHRINK = "Shrink"  # the standard tells the shape of what it gives
SAMPLE = f"{MICROSOFT}::SampleOp"  # nobody does but the file
EXACT = 2e-6

# Behind which values an operator stands: those that the first one, a norm's or a projection's input, is named by.
PLACES = {
    "logits": (("logits", VOCAB),),
    "tail": (("norm.scale", WIDTH),),
    "branch": (("blocks.0.down.weight", FFN), ("blocks.1.down.weight", FFN)),
    "stream": (("blocks.0.mlp.norm.scale", WIDTH), ("blocks.1.mlp.norm.scale", WIDTH)),
}
GROWN = {
    "hidden": {"hidden": "1.5x", "ffn": FFN},
    "ffn": {"ffn": "1.5x"},
    "heads": {"heads": 4},
    "layers": {"layers": 4},
}
STAYS = {"logits": (), "tail": (), "branch": ("ffn",), "stream": ("hidden",)}


def with_operator(kind: str, place: str, *, told: bool = True) -> onnx.ModelProto:
    """The file with an operator at a place; it tells the shape of what that gives or leaves it out."""
    model = FILE.model()
    *domain, name = kind.split("::")
    nodes = model.graph.node
    for reader, width in PLACES[place]:
        value = next((node.input[0] for node in nodes if reader in node.input), model.graph.output[0].name)
        at = next(i for i, node in enumerate(nodes) if value in node.output)
        nodes[at].output[0] = before = f"{value}_before"
        attributes = {"lambd": 0.1, "bias": 0.2} if kind == SHRINK else {}
        node = helper.make_node(name, [before], [value], f"odd_{at}", domain="".join(domain), **attributes)
        nodes.insert(at + 1, node)
        if told:
            shape = ["batch", "sequence", width]
            model.graph.value_info.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, shape))
    return model


@pytest.mark.parametrize("kind", [SHRINK, SAMPLE])
@pytest.mark.parametrize("place", PLACES)
def test_only_what_an_unknown_operator_touches_stays(kind: str, place: str) -> None:
    model = growkit.read(with_operator(kind, place, told=kind == SAMPLE))
    for space, asked in GROWN.items():
        if space in STAYS[place]:
            with pytest.raises(InvalidTarget, match=f"{space} cannot grow .*: the operator .*{kind.split('::')[-1]}"):
                growkit.plan(model, **asked)
            continue
        plan = growkit.plan(model, **asked)
        assert plan.preserving == ((place, space) != ("stream", "layers"))
        if plan.preserving:
            assert growkit.verify(model, growkit.grow(model, plan)).max_rel_diff <= EXACT


@pytest.mark.parametrize("kind", ["Tanh", SHRINK])
def test_a_block_that_bends_the_stream_is_not_the_identity(kind: str) -> None:
    model = growkit.read(with_operator(kind, "stream"))
    plan = growkit.plan(model, layers=4)
    assert [reason.detail for reason in plan.verdict.broken] == [
        f"2 to 4 layers: a block that writes nothing still passes the stream through {kind} (odd_23)"
    ]


def test_where_nobody_tells_a_shape_the_operator_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"SampleOp of domain com.microsoft is not known .* tell what shape"):
        growkit.read(with_operator(SAMPLE, "branch", told=False))


def test_a_shape_that_depends_on_an_unknown_operator_names_it() -> None:
    model = with_operator(SAMPLE, "logits")
    (logits,) = model.graph.output
    flat = [helper.make_node("Cast", [logits.name], ["whole"], to=TensorProto.INT64)]
    flat.append(helper.make_node("ReduceMax", ["whole"], ["size"], keepdims=0))
    flat.append(helper.make_node("Range", ["size", "size", "size"], ["out"], "range"))
    model.graph.node.extend(flat)
    model.graph.output.append(helper.make_tensor_value_info("out", TensorProto.INT64, ["any"]))
    with pytest.raises(UnsupportedModel, match=r"node 'range' \(Range\) needs numbers .*; node 'odd_\d+' .*SampleOp"):
        growkit.read(model)


# --- quantised files -------------------------------------------------------------------------------------------------


def dequantised(model: onnx.ModelProto, weights: Sequence[str]) -> onnx.ModelProto:
    """The model with weights as bytes, each behind a DequantizeLinear."""
    graph = model.graph
    for stored in [each for each in graph.initializer if each.name in weights]:
        array = numpy_helper.to_array(stored)
        scale = np.float32(np.abs(array).max() / 127)
        parts = {"bytes": np.round(array / scale).astype(np.int8), "scale": scale, "zero": np.int8(0)}
        names = [f"{stored.name}.{part}" for part in parts]
        graph.initializer.remove(stored)
        graph.initializer.extend(map(numpy_helper.from_array, map(np.asarray, parts.values()), names))
        graph.node.insert(0, helper.make_node("DequantizeLinear", names, [stored.name], f"{stored.name}.read"))
    return model


def in_four_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every product by a weight as MatMulNBits: blocks of 16 weights, two in a byte."""
    graph = model.graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in arrays]:
        name = node.input[1]
        read, written = arrays[name].shape
        blocks = -(-read // 16)
        parts = {"bytes": np.zeros((written, blocks, 8), np.uint8), "scales": np.ones(written * blocks, np.float32)}
        node.input[1:] = [f"{name}.{part}" for part in parts]
        graph.initializer.extend(map(numpy_helper.from_array, parts.values(), node.input[1:]))
        node.op_type, node.domain = "MatMulNBits", MICROSOFT
        node.attribute.extend(helper.make_attribute(*pair) for pair in {"K": read, "N": written, "bits": 4}.items())
        node.attribute.append(helper.make_attribute("block_size", 16))
        shape = ["batch", "sequence", written]
        graph.value_info.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, shape))
    return model


def matrices(model: onnx.ModelProto) -> list[str]:
    return [each.name for each in model.graph.initializer if len(each.dims) == 2]


@pytest.mark.parametrize(
    ("operator", "model"),
    [
        ("DequantizeLinear", dequantised(FILE.model(), matrices(FILE.model()))),
        ("com.microsoft.MatMulNBits", in_four_bits(FILE.model())),
    ],
    ids=["bytes", "four bits"],
)
def test_a_quantised_file_is_refused_by_the_operator(operator: str, model: onnx.ModelProto) -> None:
    with pytest.raises(UnsupportedModel, match=f"the operator {operator} .* is not understood") as refused:
        growkit.read(model)
    assert str(refused.value).isprintable()


def test_around_a_head_of_bytes_all_grows() -> None:
    model = growkit.read(dequantised(FILE.model(), ["logits.weight"]))
    plan = growkit.plan(model, hidden="1.5x", ffn="1.5x", layers=4)
    assert plan.preserving
    assert growkit.verify(model, growkit.grow(model, plan)).max_rel_diff <= EXACT
