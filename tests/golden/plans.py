"""Plans of published models at their real sizes, from hand-written configs and without weights.

python -m tests.golden.plans      writes the stored plans anew; read the difference before it is committed
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import growkit
from growkit.testing import MemoryAdapter
from growkit_specs import architectures

FOLDER = Path(__file__).parent

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MINILM = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}
BERT_BASE: dict[str, Any] = {}  # the defaults
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}


@dataclass(frozen=True)
class Case:
    """A model and what is asked of it."""

    architecture: str
    class_name: str
    config: Mapping[str, Any]
    sizes: Mapping[str, Any]
    method: str = "lossless"

    def plan(self) -> growkit.Plan:
        """The plan, of a model that has no weights."""
        graph = architectures()[self.architecture].graph(self.config, self.class_name)
        model = growkit.Model(graph, {}, MemoryAdapter())
        return growkit.plan(model, method=self.method, **self.sizes)

    def text(self) -> str:
        """What is stored."""
        return json.dumps(self.plan().to_json(), indent=2) + "\n"


CASES = {
    "smollm2-135m": Case(
        "llama",
        "LlamaForCausalLM",
        SMOLLM2_135M,
        {"hidden": 768, "heads": 12, "kv_heads": 4, "ffn": 2048, "layers": 36},
    ),
    "llama-1b-net2net": Case("llama", "LlamaForCausalLM", LLAMA_1B, {"hidden": "2x"}, "net2net"),
    "minilm": Case("bert", "BertModel", MINILM, {"hidden": 768}),
    "minilm-inexact": Case("bert", "BertModel", MINILM, {"hidden": 576}),
    "bert-base-deeper": Case(
        "bert", "BertForMaskedLM", BERT_BASE, {"hidden": 1536, "layers": 24}, "width=net2net,depth=stack"
    ),
    "gpt2-medium": Case("gpt2", "GPT2LMHeadModel", GPT2, {"hidden": 1024, "heads": 16, "layers": 24}),
}


if __name__ == "__main__":
    for name, case in CASES.items():
        (FOLDER / f"{name}.json").write_text(case.text(), encoding="utf-8")
