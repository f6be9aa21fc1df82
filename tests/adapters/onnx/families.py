"""The tiny random models behind the test files: how each is built, what goes in, and the sizes that a test can assert.

The sizes are ambiguous on purpose: hidden = heads x head_dim = 24, ffn = 4 x hidden, and nothing else is prime, so what
an axis means can't be told from its size.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from growkit_torch.testing import random_module, randomised

Arrays = dict[str, np.ndarray]
Axes = dict[str, tuple[str | None, ...]]  # of each input: the name of every axis that varies, None where it is fixed

VOCAB = 48
POSITIONS = 72
IMAGE = 24


@dataclass(frozen=True)
class Stack:
    """The sizes of a run of equal blocks."""

    layers: int = 3
    hidden: int = 24
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 6
    ffn: int = 96


@dataclass(frozen=True)
class Inputs:
    """What a model takes: its axes by input, and how to draw valid values.

    Attributes:
        axes: The axes of every input that vary; "sequence" may be the only one besides "batch".
        draw: From batch, sequence and a random generator, the value of every input.
    """

    axes: Axes
    draw: Callable[[int, int, np.random.Generator], Arrays]


@dataclass(frozen=True)
class Family:
    """One model, always the same whatever exporter writes it.

    Attributes:
        name: Its name, which also seeds its weights.
        build: The module: takes its inputs by position, returns a tuple of tensors.
        inputs: What it takes.
        outputs: The names of what it returns.
        stacks: Its runs of equal blocks.
        vocab: Tokens of its vocabulary; None without one.
        norm: "pre" or "post" where its blocks are clearly one or the other.
        tied: Whether the embedding is the output's weight too.
        config: What distinguishes it, for the record.
    """

    name: str
    build: Callable[[str], torch.nn.Module]
    inputs: Inputs
    outputs: tuple[str, ...]
    stacks: tuple[Stack, ...]
    vocab: int | None
    norm: str | None
    tied: bool
    config: Mapping[str, Any] = field(hash=False)


class Positional(torch.nn.Module):
    """A model of the transformers library that takes its inputs by position and returns only the tensors asked for."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(result[name] for name in self.outputs)


def _tokens(batch: int, sequence: int, rng: np.random.Generator, vocab: int = VOCAB) -> np.ndarray:
    """Token ids without the first four, which are special (padding above all) in one model or another."""
    return rng.integers(4, vocab, (batch, sequence), dtype=np.int64)


def _mask(batch: int, sequence: int, rng: np.random.Generator) -> np.ndarray:
    """A mask with padding at the end of every row but the first; there is at least one token."""
    lengths = rng.integers(1, sequence + 1, batch)
    lengths[0] = sequence
    return (np.arange(sequence) < lengths[:, None]).astype(np.int64)


def _text(vocab: int = VOCAB) -> Inputs:
    def draw(batch: int, sequence: int, rng: np.random.Generator) -> Arrays:
        return {
            "input_ids": _tokens(batch, sequence, rng, vocab),
            "attention_mask": _mask(batch, sequence, rng),
        }

    return Inputs({"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}, draw)


def _two_texts() -> Inputs:
    def draw(batch: int, sequence: int, rng: np.random.Generator) -> Arrays:
        decoder = _tokens(batch, sequence + 2, rng)
        return {**_text().draw(batch, sequence, rng), "decoder_input_ids": decoder}

    return Inputs({**_text().axes, "decoder_input_ids": ("batch", "decoder_sequence")}, draw)


def _image(size: int = IMAGE, channels: int = 3) -> Inputs:
    def draw(batch: int, sequence: int, rng: np.random.Generator) -> Arrays:
        return {"pixel_values": rng.standard_normal((batch, channels, size, size), dtype=np.float32)}

    return Inputs({"pixel_values": ("batch", None, None, None)}, draw)


def _family(
    name: str,
    class_name: str,
    config: dict[str, Any],
    inputs: Inputs,
    outputs: str = "logits",
    *,
    stacks: Sequence[Stack] = (Stack(),),
    vocab: int | None = VOCAB,
    norm: str | None = "pre",
    random: bool = True,
) -> Family:
    """A model of the transformers library."""
    import transformers

    def build(attention: str) -> torch.nn.Module:
        full = {**config, "attn_implementation": attention}
        seed = zlib.crc32(name.encode())
        if random:
            model = random_module(class_name, full, seed=seed)
        else:
            torch.manual_seed(seed)
            model = getattr(transformers, class_name)(getattr(transformers, class_name).config_class(**full)).eval()
        model.config.use_cache = False
        return Positional(model, inputs.axes, outputs.split())

    tied = bool(config.get("tie_word_embeddings"))
    return Family(
        name,
        build,
        inputs,
        tuple(outputs.split()),
        tuple(stacks),
        vocab,
        norm,
        tied,
        {**config, "class": class_name, "random": random},
    )


BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
GPT2 = {
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": VOCAB,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": IMAGE,
    "patch_size": 6,
}
T5 = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 96,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
}
GQA = Stack(kv_heads=2)

_ALL = (
    _family("bert", "BertModel", BERT, _text(), "last_hidden_state pooler_output", norm="post"),
    _family("gpt2", "GPT2LMHeadModel", GPT2, _text()),
    _family("llama", "LlamaForCausalLM", LLAMA, _text(), stacks=[GQA]),
    _family("vit", "ViTModel", VIT, _image(), "last_hidden_state pooler_output", vocab=None),
    _family("t5", "T5ForConditionalGeneration", T5, _two_texts(), stacks=[Stack(), Stack()]),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
