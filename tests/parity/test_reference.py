"""The reference forward against transformers' own, in float64: what everything else is compared with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import growkit
from growkit.reference import reference_forward
from growkit.verify import generated_inputs
from growkit_specs import GrowkitError

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 20,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "attention_bias": True}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama, bare": lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED, mlp_bias=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=8)),
    # The root of 24 would be rounded to float32.
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**{**GROUPED, "hidden_size": 16}, head_dim=8, pad_token_id=0)
    ),
    # Scores divided by 1, no caps, and one base of rotary positions.
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **{**GROUPED, "hidden_size": 16},
            head_dim=8,
            query_pre_attn_scalar=1,
            layer_types=["sliding_attention"] * 2,
            pad_token_id=0,
        )
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=50, n_positions=20)
    ),
    "bert": lambda: transformers.BertForPreTraining(transformers.BertConfig(**SIZES)),
    "bert, relu": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="relu")),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_computes_what_transformers_does(name: str) -> None:
    torch.manual_seed(0)
    module = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    model = growkit.read(module)
    forward = model.adapter.forward(model, "cpu")
    for inputs in generated_inputs(model.graph, 0):
        expected, found = forward(inputs), reference_forward(model.graph, model.weights, inputs)
        assert found.keys() >= {"logits", "last_hidden_state", "pooler_output", "prediction_logits"} & expected.keys()
        for output in found.keys() & expected.keys():
            difference = np.abs(found[output] - expected[output]).max()
            # transformers' rotary tables are float32, whatever the model is.
            assert difference < (1e-6 if name.startswith(("gemma", "phi3", "llama", "qwen")) else 1e-12), output


def test_what_is_not_understood_is_named() -> None:
    module = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="mish")).eval()
    model = growkit.read(module)
    with pytest.raises(GrowkitError, match="does not know the activation 'mish' of layer 'mlp'; known: None, gelu"):
        reference_forward(model.graph, model.weights, next(generated_inputs(model.graph, 0)))
