"""Layers that no architecture file names are called what people call them."""

import pytest

import growkit
from tests.adapters.onnx.drawn import Blueprint
from tests.adapters.onnx.zoo import FILES, make

POST = ("attention", "attention_norm", "mlp", "mlp_norm")
CROSS = ("attention", "attention_norm", "cross_attention", "cross_attention_memory", "cross_attention_norm", *POST[2:])
NAMES = {
    "bart": {
        None: ("embedding", "embedding_norm", "decoder_embedding", "decoder_embedding_norm", "lm_head"),
        "encoder": POST,
        "decoder": CROSS,
    },
    "bert-mlm": {None: ("embedding", "embedding_norm", "linear", "inner_norm"), "layers": POST},
}


@pytest.mark.parametrize("family", NAMES)
def test_layers_are_called_by_what_they_do(family: str) -> None:
    graph = growkit.read(make(next(file for file in FILES if file.family == family))).graph
    found: dict[str | None, list[str]] = {}
    for stack, layer in graph.walk():
        found.setdefault(stack.name if stack else None, []).append(layer.name)
    assert {stack: sorted(names) for stack, names in found.items()} == {
        stack: sorted(names) for stack, names in NAMES[family].items()
    }


def test_what_is_added_by_a_bias_is_no_position() -> None:
    graph = growkit.read(make(next(file for file in FILES if file.family == "electra"))).graph
    (embedding,) = (layer for _, layer in graph.walk() if layer.name == "embedding")
    assert {"embedding.weight", "embedding.bias"} <= {parameter.slot for parameter in embedding.parameters}


def test_the_mlp_of_a_single_block_has_an_ffn() -> None:
    model = growkit.read(Blueprint(blocks=1, ffn=12).model())
    assert model.graph.sizes["ffn"] == 12
    plan = growkit.plan(model, hidden="1.5x", ffn="2x")
    assert plan.preserving
    assert growkit.verify(model, growkit.grow(model, plan)).max_rel_diff <= 2e-6
