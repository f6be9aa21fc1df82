"""Operators that nobody knows: what they touch stays as it is, and all else grows."""

import onnx
import pytest
from onnx import TensorProto, helper

import growkit
from tests.adapters.onnx.drawn import Blueprint
from tests.adapters.onnx.handmade import MICROSOFT

FILE = Blueprint(blocks=2, hidden=8, ffn=12, vocab=11)


def inserted(model: onnx.ModelProto, kind: str, value: str, shape: list[str | int] | None = None, **attributes: float):
    """The model with an operator behind a value; the file tells the shape of what it gives where there is one."""
    *domain, name = kind.split("::")
    nodes = model.graph.node
    at = next(i for i, node in enumerate(nodes) if value in node.output)
    nodes[at].output[0] = f"{value}_before"
    nodes.insert(at + 1, helper.make_node(name, [f"{value}_before"], [value], f"odd_{value}", domain="".join(domain), **attributes))
    if shape is not None:
        model.graph.value_info.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, shape))
    return model


def read_by(model: onnx.ModelProto, weight: str) -> str:
    return next(node.input[0] for node in model.graph.node if weight in node.input)


if __name__ == "__main__":
    for kind in ("Shrink","Tanh"):
        for place in ("norm.scale", "both", "blocks.0.mlp.norm.scale"):
            model = FILE.model()
            width = {"logits": 11, "blocks.0.down.weight": 12}.get(place, 8)
            values = [model.graph.output[0].name] if place == "logits" else [read_by(model, p) for p in (["blocks.0.mlp.norm.scale", "blocks.1.mlp.norm.scale"] if place == "both" else [place.replace("up","gate")])]
            for v in values:
                inserted(model, kind, v, ["batch", "sequence", width] if kind != "Shrink" and place != "logits" else None, **({"lambd":0.1, "bias": 0.2} if kind == "Shrink" else {}))
            print(kind, place)
            try:
                m = growkit.read(model)
            except Exception as e:
                print("   ", type(e), e); continue
            print("   ", [(s.name, s.size, s.frozen) for s in m.graph.spaces], m.graph.depths)
            for asked in ({"hidden": "1.5x"}, {"ffn": "1.5x"}, {"heads": "2x"}, {"layers": 4}):
                try:
                    plan = growkit.plan(m, **asked)
                    g = growkit.grow(m, plan)
                    print("   ", asked, plan.preserving, growkit.verify(m, g).max_rel_diff)
                except Exception as e:
                    print("   ", asked, type(e), e)
