"""The tiny random models behind the test files: how each is built, what goes in, and the sizes that a test can assert.

The sizes are ambiguous on purpose: hidden = heads x head_dim = 24, ffn = 4 x hidden, vocab = 2 x hidden, positions =
3 x hidden, so what an axis means can't be told from its size.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from growkit_torch.testing import random_module, randomised

Arrays = dict[str, np.ndarray]
Axes = dict[str, tuple[str | None, ...]]  # of each input or output: the names of its axes, None where one is fixed

VOCAB = 48
POSITIONS = 72
IMAGE = 24

ROWS = ("batch",)
TOKENS = ("batch", "sequence")
DECODER_TOKENS = ("batch", "decoder_sequence")


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
    """What a model takes: the axes of every input, and how to draw valid values from batch, sequence, a generator."""

    axes: Axes
    draw: Callable[[int, int, np.random.Generator], Arrays]


@dataclass(frozen=True)
class Family:
    """One model, always the same, whatever exporter writes it.

    Attributes:
        name: Its name.
        build: From the kind of attention, "eager" or "sdpa", the module: it takes its inputs by position and returns a
            tuple of tensors.
        inputs: What it takes.
        outputs: The axes of what it returns.
        stacks: Its runs of equal blocks, the encoder's before the decoder's.
        vocab: Tokens of its vocabulary; None without one.
        norm: "pre" or "post", where its blocks are clearly one or the other.
        tied: Whether the embedding is the weight of the output too.
        traced: Batch and sequence that it is exported with.
        record: All that its weights depend on, for the cache.
    """

    name: str
    build: Callable[[str], torch.nn.Module]
    inputs: Inputs
    outputs: Axes
    stacks: tuple[Stack, ...]
    vocab: int | None
    norm: str | None
    tied: bool
    traced: tuple[int, int]
    record: str


class Positional(torch.nn.Module):
    """A model that takes its inputs by position and returns only the tensors asked for."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(result[name] for name in self.outputs)


class Cached(torch.nn.Module):
    """A decoder of the transformers library whose cache goes in and comes out as one key and one value per layer."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(name for name in inputs if not name.startswith("past_key_values"))

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named, past = values[: len(self.inputs)], values[len(self.inputs) :]
        cache = transformers.DynamicCache(list(zip(past[0::2], past[1::2], strict=True)))
        arguments = dict(zip(self.inputs, named, strict=True))
        logits = self.model(**arguments, past_key_values=cache, use_cache=True).logits
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class Nano(torch.nn.Module):
    """A decoder as people write it by hand: query, key and value in one axis of three, attention in einsums."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCAB, stack.hidden)
        self.positions = torch.nn.Embedding(POSITIONS, stack.hidden)
        self.blocks = torch.nn.ModuleList(NanoBlock(stack) for _ in range(stack.layers))
        self.norm = torch.nn.LayerNorm(stack.hidden)
        self.head = torch.nn.Linear(stack.hidden, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        stream = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            stream = block(stream)
        return {"logits": self.head(self.norm(stream))}


class NanoBlock(torch.nn.Module):
    """One block of :class:`Nano`."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self.attention_norm = torch.nn.LayerNorm(stack.hidden)
        self.qkv = torch.nn.Linear(stack.hidden, 3 * stack.heads * stack.head_dim)
        self.out = torch.nn.Parameter(torch.zeros(stack.heads, stack.head_dim, stack.hidden))
        self.ffn_norm = torch.nn.LayerNorm(stack.hidden)
        self.up = torch.nn.Linear(stack.hidden, stack.ffn)
        self.down = torch.nn.Linear(stack.ffn, stack.hidden)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        batch, sequence, _ = stream.shape
        qkv = self.qkv(self.attention_norm(stream))
        query, key, value = qkv.view(batch, sequence, 3, self.stack.heads, self.stack.head_dim).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * self.stack.head_dim**-0.5
        causal = torch.ones(sequence, sequence, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        stream = stream + torch.einsum("bhqk,bkhd,hdo->bqo", weights, value, self.out)
        return stream + self.down(torch.nn.functional.gelu(self.up(self.ffn_norm(stream))))


class Encoder(torch.nn.Module):
    """torch's own encoder between an embedding and a head."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCAB, stack.hidden)
        layer = torch.nn.TransformerEncoderLayer(stack.hidden, stack.heads, stack.ffn, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, stack.layers, enable_nested_tensor=False)
        self.head = torch.nn.Linear(stack.hidden, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.encoder(self.tokens(input_ids)))}


def _ids(batch: int, sequence: int, rng: np.random.Generator, vocab: int = VOCAB) -> np.ndarray:
    """Token ids without the first four, which are special (padding above all) in one model or another."""
    return rng.integers(4, vocab, (batch, sequence), dtype=np.int64)


def _mask(batch: int, sequence: int, rng: np.random.Generator) -> np.ndarray:
    """A mask with up to two tokens of padding at the end of every row but the first.

    With more, a query in the padding that attends to a window around it sees nothing: kinds of attention differ there.
    """
    padding = rng.integers(0, min(3, sequence), batch)
    padding[0] = 0
    return (np.arange(sequence) < sequence - padding[:, None]).astype(np.int64)


def _text(vocab: int = VOCAB) -> Inputs:
    def draw(batch: int, sequence: int, rng: np.random.Generator) -> Arrays:
        return {"input_ids": _ids(batch, sequence, rng, vocab), "attention_mask": _mask(batch, sequence, rng)}

    return Inputs({"input_ids": TOKENS, "attention_mask": TOKENS}, draw)


TEXT = _text()
IDS = Inputs({"input_ids": TOKENS}, lambda batch, sequence, rng: {"input_ids": _ids(batch, sequence, rng)})
TWO_TEXTS = Inputs(
    {**TEXT.axes, "decoder_input_ids": DECODER_TOKENS},
    lambda batch, sequence, rng: {
        **TEXT.draw(batch, sequence, rng),
        "decoder_input_ids": _ids(batch, sequence + 2, rng),
    },
)


def _floats(name: str, *shape: int) -> Callable[[int, np.random.Generator], Arrays]:
    return lambda batch, rng: {name: rng.standard_normal((batch, *shape), dtype=np.float32)}


def _image(size: int = IMAGE, channels: int = 3) -> Inputs:
    draw = _floats("pixel_values", channels, size, size)
    return Inputs({"pixel_values": ("batch", None, None, None)}, lambda batch, sequence, rng: draw(batch, rng))


# An encoder of speech takes a spectrogram of fixed length, twice its positions: its convolution halves that.
SPECTROGRAM = Inputs(
    {
        "input_features": ("batch", None, None),
        "decoder_input_ids": DECODER_TOKENS,
        "decoder_attention_mask": DECODER_TOKENS,
    },
    lambda batch, sequence, rng: {
        **_floats("input_features", 12, 48)(batch, rng),
        "decoder_input_ids": _ids(batch, sequence, rng),
        "decoder_attention_mask": _mask(batch, sequence, rng),
    },
)
SOUND = Inputs(
    {"input_values": ("batch", "samples")},
    lambda batch, sequence, rng: _floats("input_values", 40 * sequence)(batch, rng),
)


def _cached(stack: Stack, *, positions: bool = True, prompts: bool = False) -> Inputs:
    """Tokens after a cache that holds two more than they are.

    With `prompts` they come after an empty cache unless there is one alone: what GroupQueryAttention takes in batches.
    """
    total = "past_sequence + sequence"
    past = {f"past_key_values.{i}.{part}": PAST for i in range(stack.layers) for part in ("key", "value")}
    axes: Axes = {"input_ids": TOKENS, "attention_mask": ("batch", total)}
    axes |= {"position_ids": TOKENS} if positions else {}

    def draw(batch: int, sequence: int, rng: np.random.Generator) -> Arrays:
        before = 0 if prompts and sequence > 1 else sequence + 2
        padding = rng.integers(0, 1 if prompts else before, batch)  # at the start, as generation pads
        mask = (np.arange(before + sequence) >= padding[:, None]).astype(np.int64)
        values = {"input_ids": _ids(batch, sequence, rng), "attention_mask": mask}
        if positions:
            values["position_ids"] = (mask.cumsum(1) - 1).clip(0)[:, before:]
        shape = (batch, stack.kv_heads, before, stack.head_dim)
        return values | {name: rng.standard_normal(shape, dtype=np.float32) for name in past}

    return Inputs(axes | past, draw)


PAST = ("batch", None, "past_sequence", None)
PRESENT = ("batch", None, "past_sequence + sequence", None)


def _present(stack: Stack) -> Axes:
    return {f"present.{i}.{part}": PRESENT for i in range(stack.layers) for part in ("key", "value")}


LOGITS: Axes = {"logits": TOKENS}
STATES: Axes = {"last_hidden_state": TOKENS}
POOLED: Axes = {"pooler_output": ROWS}
CLASSES: Axes = {"logits": ROWS}
IMAGE_STATES: Axes = {"last_hidden_state": ROWS}


def _family(
    name: str,
    class_name: str,
    config: Mapping[str, Any],
    inputs: Inputs,
    outputs: Axes = LOGITS,
    *,
    stacks: Sequence[Stack] = (Stack(),),
    vocab: int | None = VOCAB,
    norm: str | None = "pre",
    weights: str = "",
    traced: tuple[int, int] = (2, 7),
) -> Family:
    """A model of the transformers library.

    `weights` are "" (all random, the same for every family of one `class_name` and `config`) or "fresh" (as the library
    initialises them: biases of zero, scales of one).
    """
    record = f"{class_name} {sorted(config.items())} {weights}"

    def build(attention: str) -> torch.nn.Module:
        seed = zlib.crc32(record.encode())
        full = {**config, "attn_implementation": attention}
        model = _fresh(class_name, full, seed) if weights == "fresh" else random_module(class_name, full, seed=seed)
        if "past_key_values.0.key" in inputs.axes:
            return Cached(model, list(inputs.axes)).eval()
        model.config.use_cache = False
        return Positional(model, list(inputs.axes), list(outputs)).eval()

    tied = bool(config.get("tie_word_embeddings"))
    return Family(name, build, inputs, outputs, tuple(stacks), vocab, norm, tied, traced, record)


def _fresh(class_name: str, config: Mapping[str, Any], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    cls = getattr(transformers, class_name)
    return cls(cls.config_class(**config))


def _own(name: str, module: Callable[[Stack], torch.nn.Module], norm: str) -> Family:
    """A model of this module, which has one kind of attention."""

    def build(attention: str) -> torch.nn.Module:
        model = randomised(module(Stack()), zlib.crc32(name.encode()))
        return Positional(model, list(IDS.axes), list(LOGITS)).eval()

    return Family(name, build, IDS, LOGITS, (Stack(),), VOCAB, norm, False, (2, 7), name)


ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "n_positions": POSITIONS, **ENDS}
LLAMA = {**BERT, **ENDS, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
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
}
BART = {
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 2,
    **ENDS,
}
WHISPER = {
    **BART,
    "num_mel_bins": 12,
    "max_source_positions": 24,
    "max_target_positions": POSITIONS,
}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": IMAGE,
    "patch_size": 6,
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [4, 4], "window_size": 4}
WAV2VEC2 = {
    **BERT,
    "conv_dim": [24, 24],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
# Every size is 16, or 4 where it must divide 16.
EQUAL_BERT = {**BERT, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 16, "max_position_embeddings": 16}
EQUAL_GPT2 = {**GPT2, "n_embd": 16, "n_inner": 16, "vocab_size": 16, "n_positions": 16, **TIED}
EQUAL_VIT = {**VIT, "hidden_size": 16, "intermediate_size": 16, "image_size": 16, "patch_size": 4, "num_channels": 4}

GQA = Stack(kv_heads=2)
WIDE_HEADS = Stack(kv_heads=2, head_dim=8)  # hidden is not heads x head_dim
EQUAL = Stack(hidden=16, head_dim=4, ffn=16)
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

_ALL = (
    _family("bert", "BertModel", BERT, TEXT, STATES | POOLED, norm="post"),
    _family("bert-cls", "BertForSequenceClassification", {**BERT, "num_labels": 3}, TEXT, CLASSES, norm="post"),
    _family("bert-mlm", "BertForMaskedLM", {**BERT, **TIED}, TEXT, norm="post"),
    _family("roberta", "RobertaModel", {**BERT, **ENDS}, TEXT, STATES | POOLED, norm="post"),
    _family(
        "distilbert",
        "DistilBertModel",
        {
            "dim": 24,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 96,
            "vocab_size": VOCAB,
            "max_position_embeddings": POSITIONS,
        },
        TEXT,
        STATES,
        norm="post",
    ),
    _family("gpt2", "GPT2LMHeadModel", {**GPT2, **TIED}, TEXT),
    _family("gpt2-untied", "GPT2LMHeadModel", {**GPT2, **UNTIED}, TEXT),
    _family("vit", "ViTModel", VIT, _image(), IMAGE_STATES | POOLED, vocab=None),
    _family("deit", "DeiTForImageClassification", {**VIT, "num_labels": 3}, _image(), CLASSES, vocab=None),
    _family("llama", "LlamaForCausalLM", {**LLAMA, **UNTIED}, TEXT, stacks=[GQA]),
    _family("qwen2", "Qwen2ForCausalLM", {**LLAMA, **TIED}, TEXT, stacks=[GQA]),
    _family("qwen3", "Qwen3ForCausalLM", {**LLAMA, **UNTIED, "head_dim": 8}, TEXT, stacks=[WIDE_HEADS]),
    _family(
        "t5", "T5ForConditionalGeneration", {**T5, **TIED}, TWO_TEXTS, {"logits": DECODER_TOKENS}, stacks=[Stack()] * 2
    ),
    _family(
        "neox-full",
        "GPTNeoXForCausalLM",
        {**BERT, **ENDS, **UNTIED, "rope_parameters": {**ROTARY, "partial_rotary_factor": 1.0}},
        TEXT,
    ),
    _family(
        "neox-half",
        "GPTNeoXForCausalLM",
        {
            **BERT,
            **ENDS,
            **UNTIED,
            "hidden_size": 32,
            "intermediate_size": 128,
            "rope_parameters": {**ROTARY, "partial_rotary_factor": 0.5},
        },
        TEXT,
        stacks=[Stack(hidden=32, head_dim=8, ffn=128)],
    ),
    _family("gptj", "GPTJForCausalLM", {**GPT2, **UNTIED, "rotary_dim": 4}, TEXT),
    _family(
        "bloom",
        "BloomForCausalLM",
        {"hidden_size": 24, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, **ENDS, **TIED},
        TEXT,
        norm=None,
    ),
    _family("opt", "OPTForCausalLM", {**BERT, **ENDS, **TIED, "ffn_dim": 96, "word_embed_proj_dim": 24}, TEXT),
    _family("phi3", "Phi3ForCausalLM", {**LLAMA, **UNTIED}, TEXT, stacks=[GQA]),
    _family(
        "gemma2", "Gemma2ForCausalLM", {**GEMMA, **TIED, "num_hidden_layers": 4}, TEXT, stacks=[Stack(4, 24, 4, 2, 8)]
    ),
    _family("gemma2-odd", "Gemma2ForCausalLM", {**GEMMA, **TIED}, TEXT, stacks=[WIDE_HEADS]),
    _family(
        "gemma3",
        "Gemma3ForCausalLM",
        {**GEMMA, **TIED, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        TEXT,
        stacks=[Stack(4, 24, 4, 2, 8)],
    ),
    _family(
        "falcon",
        "FalconForCausalLM",
        {**BERT, **ENDS, **TIED, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
        TEXT,
        stacks=[Stack(kv_heads=1)],
    ),
    _family("albert", "AlbertModel", {**BERT, "embedding_size": 12}, TEXT, STATES | POOLED, norm="post"),
    _family("electra", "ElectraModel", {**BERT, "embedding_size": 12}, TEXT, STATES, norm="post"),
    _family(
        "deberta-v2",
        "DebertaV2Model",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16},
        TEXT,
        STATES,
        norm="post",
    ),
    _family("mpnet", "MPNetModel", {**BERT, **ENDS}, TEXT, STATES | POOLED, norm="post"),
    _family(
        "modernbert",
        "ModernBertModel",
        {**BERT, **ENDS, "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 4, "local_attention": 4},
        TEXT,
        STATES,
        stacks=[Stack(layers=4)],
    ),
    _family(
        "bart",
        "BartForConditionalGeneration",
        {**BART, **TIED, "max_position_embeddings": POSITIONS},
        TWO_TEXTS,
        {"logits": DECODER_TOKENS},
        stacks=[Stack()] * 2,
        norm="post",
    ),
    _family(
        "whisper",
        "WhisperForConditionalGeneration",
        {**WHISPER, **TIED},
        SPECTROGRAM,
        {"logits": DECODER_TOKENS},
        stacks=[Stack()] * 2,
    ),
    _family("clip-text", "CLIPTextModel", {**BERT, **ENDS}, TEXT, STATES | POOLED),
    _family("clip-vision", "CLIPVisionModel", VIT, _image(), IMAGE_STATES | POOLED, vocab=None),
    _own("nano", Nano, "pre"),
    _own("encoder", Encoder, "post"),
    _family("swin", "SwinModel", SWIN, _image(32), IMAGE_STATES | POOLED, vocab=None, stacks=[]),
    _family(
        "wav2vec2",
        "Wav2Vec2Model",
        WAV2VEC2,
        SOUND,
        {"last_hidden_state": ("batch", "frames")},
        vocab=None,
        norm="post",
    ),
    _family(
        "mixtral",
        "MixtralForCausalLM",
        {**LLAMA, **UNTIED, "num_local_experts": 4, "experts_implementation": "batched_mm"},
        TEXT,
        stacks=[GQA],
    ),
    _family("gpt2-cache", "GPT2LMHeadModel", {**GPT2, **TIED}, _cached(Stack()), LOGITS | _present(Stack())),
    _family("llama-cache", "LlamaForCausalLM", {**LLAMA, **UNTIED}, _cached(GQA), LOGITS | _present(GQA), stacks=[GQA]),
    _family(
        "genai",
        "LlamaForCausalLM",
        {**LLAMA, **UNTIED, "head_dim": 16},
        _cached(Stack(kv_heads=2, head_dim=16), positions=False, prompts=True),
        LOGITS | _present(GQA),
        stacks=[Stack(kv_heads=2, head_dim=16)],
    ),
    _family(
        "genai-packed",
        "LlamaForCausalLM",
        {**LLAMA, **UNTIED, "head_dim": 16},
        _cached(Stack(kv_heads=2, head_dim=16), positions=False, prompts=True),
        LOGITS | _present(GQA),
        stacks=[Stack(kv_heads=2, head_dim=16)],
    ),
    _family(
        "genai-positions",
        "LlamaForCausalLM",
        {**LLAMA, **UNTIED, "head_dim": 16},
        _cached(Stack(kv_heads=2, head_dim=16), prompts=True),
        LOGITS | _present(GQA),
        stacks=[Stack(kv_heads=2, head_dim=16)],
    ),
    _family(
        "bert-equal",
        "BertModel",
        EQUAL_BERT,
        _text(16),
        STATES | POOLED,
        stacks=[EQUAL],
        vocab=16,
        norm="post",
        traced=(4, 16),
    ),
    _family("gpt2-equal", "GPT2LMHeadModel", EQUAL_GPT2, _text(16), stacks=[EQUAL], vocab=16, traced=(4, 16)),
    _family(
        "vit-equal",
        "ViTModel",
        EQUAL_VIT,
        _image(16, 4),
        IMAGE_STATES | POOLED,
        stacks=[EQUAL],
        vocab=None,
        traced=(4, 16),
    ),
    _family("bert-fresh", "BertModel", BERT, TEXT, STATES | POOLED, norm="post", weights="fresh"),
    _family("gpt2-fresh", "GPT2LMHeadModel", {**GPT2, **TIED}, TEXT, weights="fresh"),
    _family("llama-fresh", "LlamaForCausalLM", {**LLAMA, **UNTIED}, TEXT, stacks=[GQA], weights="fresh"),
    _family("vit-fresh", "ViTModel", VIT, _image(), IMAGE_STATES | POOLED, vocab=None, weights="fresh"),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
