"""The ONNX files of the tests: the combinations of model, exporter and optimiser that users meet.

``python -m tests.adapters.onnx.zoo [part of a name ...]`` makes them and prints the seconds that each takes; ``slice``
instead of a name makes those of :data:`SLICE`.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.adapters.onnx.exports import make
from tests.adapters.onnx.families import FAMILIES, Arrays, Stack

__all__ = ["FILES", "SLICE", "File", "inputs", "make"]

GROWS = "grows"
BAKED = "shapes fixed as traced, although the file names them as varying"
WINDOWS = "attention in windows of an image"
STEM = "the length behind strided convolutions of the input"
EXPERTS = "experts, chosen for every token"

ANYWHERE = "anywhere"
TRACED = "only at the batch and sequence it was traced with"
ONE_ROW = "only with a batch of one"
NOWHERE = "nowhere"


@dataclass(frozen=True)
class File:
    """One test file.

    Attributes:
        family: The model; files of one family compute the same function, whatever exporter wrote them.
        exporter: "legacy" (TorchScript), "dynamo", or "hand" for a file made node by node.
        opset: Its version of the default operator set.
        attention: "eager" or "sdpa".
        post: The optimiser that worked on the exported file: "fused" and "mha" (the transformers optimiser of ONNX
            Runtime, with Attention or MultiHeadAttention), "basic" and "extended" (a session of ONNX Runtime),
            "onnxslim", "onnxsim"; "" for none.
        variant: What else is particular: "nofold" (no constant folding), "static" (shapes fixed as traced), "unnamed"
            (every input with symbols of its own), "unoptimised" (as converted), "external" (weights in a file beside),
            "fp16", "bf16", "functions" (blocks are functions of the model).
        expected: "grows", or in short for what it is refused. What is refused for :data:`WINDOWS`, :data:`STEM` or
            :data:`EXPERTS` may grow as well, as long as it grows right.
        runs: Where the CPU of ONNX Runtime runs it: :data:`ANYWHERE`, :data:`TRACED`, :data:`ONE_ROW`, :data:`NOWHERE`.
        cannot_be_made: A part of the exporter's message where it fails; "" where the file is made.
    """

    family: str
    exporter: str
    opset: int
    attention: str = "eager"
    post: str = ""
    variant: tuple[str, ...] = ()
    expected: str = GROWS
    runs: str = ANYWHERE
    cannot_be_made: str = ""

    @property
    def name(self) -> str:
        """For example "llama-dynamo18-sdpa-onnxslim"."""
        parts = (self.family, f"{self.exporter}{self.opset}", *self.variant, self.attention, self.post)
        return "-".join(filter(None, parts))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The sizes of its runs of equal blocks; an encoder comes before its decoder."""
        return FAMILIES[self.family].stacks

    @property
    def vocab(self) -> int | None:
        """Tokens of its vocabulary."""
        return FAMILIES[self.family].vocab

    @property
    def norm(self) -> str | None:
        """How its blocks normalise: "pre", "post" or None."""
        return FAMILIES[self.family].norm

    @property
    def tied(self) -> bool:
        """Whether the model's embedding is the weight of its output too; only "nofold" keeps that in a legacy file."""
        return FAMILIES[self.family].tied

    @property
    def traced(self) -> tuple[int, int]:
        """Batch and sequence that it was exported with."""
        return FAMILIES[self.family].traced


def inputs(file: File, batch: int, sequence: int, seed: int = 0) -> Arrays:
    """Valid inputs of `file`: padded rows, a cache longer than the sequence.

    Sizes at which it can't run are replaced by those at which it can; an image or a spectrogram has no sequence.
    """
    if file.runs == TRACED:
        batch, sequence = file.traced
    if file.runs == ONE_ROW:
        batch = 1
    return FAMILIES[file.family].inputs.draw(batch, sequence, np.random.default_rng(seed))


BERTS = ("bert", "bert-cls", "roberta", "distilbert")
CORE = (*BERTS, "gpt2", "vit", "deit", "llama", "qwen2", "qwen3", "t5")
ROTARY = ("llama", "qwen2", "qwen3")
EXTRA = (
    *("bert-mlm", "gpt2-untied", "neox-full", "neox-half", "gptj", "bloom", "opt", "phi3", "gemma2", "gemma2-odd"),
    *("gemma3", "falcon", "albert", "electra", "deberta-v2", "mpnet", "modernbert", "bart", "whisper", "clip-text"),
    *("clip-vision", "nano", "encoder", "swin", "wav2vec2", "mixtral", "gpt2-cache", "llama-cache"),
    *("bert-equal", "gpt2-equal", "vit-equal", "bert-fresh", "gpt2-fresh", "llama-fresh", "vit-fresh"),
)
EAGER_ONLY = ("gptj", "bloom", "gemma2", "gemma2-odd", "deberta-v2", "mpnet")
EXPECTED = {"swin": WINDOWS, "wav2vec2": STEM, "mixtral": EXPERTS}


def _core() -> Iterator[File]:
    """The common models in every combination."""
    for family in CORE:
        for attention, oldest in (("eager", 13), ("sdpa", 14)):
            yield File(family, "legacy", oldest, attention, variant=("nofold",))
            yield from (File(family, "legacy", opset, attention) for opset in (14, 17))
            yield File(family, "legacy", 17, attention, variant=("static",), runs=TRACED)
            yield from (File(family, "dynamo", opset, attention) for opset in (18, 20))
            yield File(family, "dynamo", 23, attention, runs=ONE_ROW if family in ROTARY else ANYWHERE)
        for post in ("fused", "basic", "extended", "onnxslim", "onnxsim"):
            yield File(family, "legacy", 17, post=post)
            yield File(family, "dynamo", 18, "sdpa", post)


def _extra() -> Iterator[File]:
    """Every other model once by each exporter."""
    for family in EXTRA:
        expected = EXPECTED.get(family, GROWS)
        if family == "encoder":
            yield File(family, "legacy", 17, expected=BAKED, runs=TRACED)
        else:
            yield File(family, "legacy", 17, expected=expected)
        yield File(family, "dynamo", 18, "eager" if family in EAGER_ONLY else "sdpa", expected=expected)


def _particular() -> Iterator[File]:
    """What only some files have."""
    yield File("bert", "legacy", 13, "sdpa", cannot_be_made="scaled_dot_product_attention' to ONNX opset version 13")
    yield from (File(family, "legacy", 17, post="mha") for family in BERTS)
    for family in ("bert-mlm", "bert-equal", "gpt2-equal", "vit-equal", "gpt2-fresh"):
        yield File(family, "legacy", 13, variant=("nofold",))
    for family in ("bert-equal", "gpt2-equal", "vit-equal"):
        yield from (File(family, *how, variant=("static",), runs=TRACED) for how in (("legacy", 17), ("dynamo", 18)))
    for family in ("bert", "gpt2", "llama"):
        yield from (File(family, "dynamo", 18, variant=(variant,)) for variant in ("unnamed", "unoptimised"))
    for family in ("gpt2", "llama"):
        yield File(family, "dynamo", 18, variant=("fp16",))
        yield File(family, "dynamo", 18, variant=("bf16",), runs=NOWHERE)
    yield File("gpt2", "legacy", 17, variant=("fp16",))
    yield File("llama", "dynamo", 18, variant=("external",))
    yield from (File(family, "dynamo", 24, "sdpa") for family in ("bert", "llama"))
    yield File("gpt2-cache", "dynamo", 23, "sdpa")
    yield from (File(family, "legacy", 17, post="fused") for family in ("bart", "whisper", "clip-text", "electra"))
    yield from (File(family, "legacy", 17, post="extended") for family in ("deberta-v2", "nano", "phi3", "whisper"))
    yield from (File(family, "legacy", 17, post="onnxslim") for family in ("llama-cache", "nano", "bloom"))
    yield from (File(family, "hand", 21) for family in ("genai", "genai-positions", "genai-packed"))
    yield File("nano", "hand", 21, variant=("functions",))


FILES: tuple[File, ...] = (*_core(), *_extra(), *_particular())

# Every family, exporter, opset, kind of attention, optimiser and variant at least once, made in under three minutes.
_SLICE = (
    *(f"{family}-legacy17-eager" for family in (*CORE, *EXTRA)),
    *("genai-hand21-eager", "genai-positions-hand21-eager", "genai-packed-hand21-eager"),
    "nano-hand21-functions-eager",
    *("bert-dynamo18-sdpa", "bert-legacy13-nofold-eager", "bert-legacy17-static-eager", "bert-legacy17-eager-fused"),
    *("bert-legacy17-eager-mha", "bert-dynamo18-unnamed-eager", "bert-dynamo18-unoptimised-eager"),
    *("gpt2-legacy14-sdpa", "gpt2-legacy13-nofold-eager", "gpt2-dynamo20-eager", "gpt2-legacy17-fp16-eager"),
    *("gpt2-dynamo18-sdpa", "gpt2-dynamo18-sdpa-extended", "gpt2-legacy17-eager-fused", "gpt2-cache-dynamo18-sdpa"),
    *("llama-dynamo18-sdpa", "llama-dynamo18-sdpa-onnxslim", "llama-dynamo18-sdpa-basic", "llama-dynamo23-sdpa"),
    *("llama-dynamo24-sdpa", "llama-legacy17-eager-fused", "llama-legacy17-eager-extended"),
    *("llama-cache-dynamo18-sdpa", "llama-dynamo18-fp16-eager"),
    *("llama-dynamo18-bf16-eager", "llama-dynamo18-external-eager", "qwen2-legacy13-nofold-eager"),
    *("qwen3-dynamo20-sdpa", "vit-dynamo23-sdpa", "vit-legacy17-eager-onnxsim", "t5-dynamo18-sdpa"),
    *("t5-legacy17-eager-extended", "nano-dynamo18-sdpa", "gemma2-dynamo18-eager", "bert-equal-dynamo18-static-eager"),
)
_BY_NAME = {file.name: file for file in FILES}
SLICE: tuple[File, ...] = tuple(_BY_NAME[name] for name in _SLICE)

MESSAGE = 300  # characters shown of an exporter's error, which can hold a whole graph


def main(names: list[str]) -> None:
    """Makes the files whose name holds one of `names`, all without names; prints the seconds each takes."""
    files = (
        SLICE if names == ["slice"] else [file for file in FILES if any(name in file.name for name in names or [""])]
    )
    began = time.perf_counter()
    for file in files:
        start = time.perf_counter()
        try:
            make(file)
            result = ""
        except Exception as error:  # the others are still wanted
            result = f"{type(error).__name__}: {str(error).strip()[:MESSAGE]!r}"
        print(f"{time.perf_counter() - start:6.1f} s  {file.name} {result}", flush=True)
    print(f"{time.perf_counter() - began:6.1f} s  {len(files)} files")


if __name__ == "__main__":
    main(sys.argv[1:])
