"""Tasks that a benchmark trains tiny models on: a decoder and an encoder of text, and an encoder of images.

The text is the standard library's own help pages, the images fashion-MNIST, a package of Debian. What is held out is
in two parts: one to choose learning rates and defaults on, the other to report.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from growkit.data import Examples
from growkit.images import idx_images
from growkit.loss import Batch
from growkit.model import Model
from growkit.text import sequences

Split = Literal["training", "choice", "reported"]

END, MASK = "<|end|>", "[MASK]"
HEAD = 12  # head_dim, of every model here
PIXELS, PATCH, CLASSES = 28, 7, 10
IMAGES = {"choice": (0, 2000), "reported": (2000, 4000)}  # of the 10,000 to test on
PACKAGE = "dataset-fashion-mnist"


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, and those of what it is shown."""

    hidden: int
    layers: int
    vocab: int = 300
    context: int = 32  # tokens


@dataclass(frozen=True)
class Task:
    """What a model is trained to do.

    Attributes:
        name: Its name.
        module: Makes an untrained torch module of some sizes; the caller seeds it.
        examples: The examples of a split, for a model.
        batch: How many examples make about five hundred tokens or patches.
        source_steps: Steps that the source is trained for.
    """

    name: str
    module: Callable[[Sizes], Any]
    examples: Callable[[Model, Sizes, Split], Examples]
    batch: int
    source_steps: int


@dataclass(frozen=True)
class Drawn:
    """Batches drawn at random from examples, the same ones for the same seed."""

    examples: Examples
    size: int
    seed: int

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        rng = np.random.default_rng((self.seed, step))
        return self.examples.take(rng.integers(0, len(self.examples), self.size), rng)

    def validation(self) -> Iterator[Batch]:
        """Nothing: the fit sees what is trained on alone."""
        return iter(())


def in_order(examples: Examples, size: int) -> Iterator[Batch]:
    """All of the examples once, in batches; what is drawn of them is the same every time."""
    for start in range(0, len(examples), size):
        numbers = np.arange(start, min(start + size, len(examples)))
        yield examples.take(numbers, np.random.default_rng(start))


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A tokenizer, and the tokens of each split, ``(n,)``."""

    tokenizer: Tokenizer
    ids: dict[str, np.ndarray]


@cache
def text(vocab: int) -> Text:
    """The help pages, and a byte-level BPE trained on the eight tenths of them that models are trained on."""
    pages = list(distinct_pages())
    splits = {
        "training": [page for i, page in enumerate(pages) if i % 10 not in (0, 5)],
        "choice": pages[0::10],
        "reported": pages[5::10],
    }
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(splits["training"], vocab_size=vocab, special_tokens=[END, MASK], show_progress=False)
    ids = {name: np.array([i for page in part for i in bpe.encode(page + END).ids]) for name, part in splits.items()}
    return Text(Tokenizer.from_str(bpe.to_str()), ids)


def distinct_pages() -> Iterator[str]:
    """The help pages without the paragraphs of earlier ones, so that none is both trained on and held out."""
    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = {" ".join(part.split()): part for part in topics[name].split("\n\n")}
        if fresh := [part for words, part in paragraphs.items() if words not in seen]:
            yield "\n\n".join(fresh)
        seen |= paragraphs.keys()


def text_examples(model: Model, sizes: Sizes, split: Split) -> Examples:
    """Sequences of a split, labelled with what the model learns: the next token, or tokens that are hidden."""
    read = text(sizes.vocab)
    return sequences(model, read.ids[split], length=sizes.context, tokenizer=read.tokenizer)


def decoder(sizes: Sizes) -> Any:
    """A Llama: RMSNorm before each branch, rotary positions, grouped queries, gated MLP, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // HEAD,
        num_key_value_heads=sizes.hidden // HEAD // 2,
        max_position_embeddings=sizes.context,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def encoder(sizes: Sizes) -> Any:
    """A BERT that tells hidden tokens: LayerNorm after each addition, learned positions, GELU, tied head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        initializer_range=0.05,  # of so narrow a model's; with 0.02 it learns nothing but frequencies for longer
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // HEAD,
        max_position_embeddings=sizes.context,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


# --- images ----------------------------------------------------------------------------------------------------------


def image_encoder(sizes: Sizes) -> Any:
    """A ViT that tells what is on an image: LayerNorm before each branch, 16 patches and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // HEAD,
        image_size=PIXELS,
        patch_size=PATCH,
        num_channels=1,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def image_examples(model: Model, sizes: Sizes, split: Split) -> Examples:
    """The images of a split, and their classes."""
    folder = fashion_mnist()
    if split == "training":
        return idx_images(model, folder / "train-images-idx3-ubyte")
    found = idx_images(model, folder / "t10k-images-idx3-ubyte")
    start, stop = IMAGES[split]
    return replace(found, load=lambda number: found.load(start + number), labels=found.labels[start:stop])


@cache
def fashion_mnist() -> Path:
    """The folder of fashion-MNIST's files, from Debian's package, unpacked once into the tests' cache.

    Raises:
        SystemExit: Where it cannot be had.
    """
    kept = Path(os.environ.get("GROWKIT_TEST_CACHE") or Path.home() / ".cache" / "growkit-tests") / PACKAGE
    folder = kept / "usr/share/datasets/fashion-mnist"
    if folder.is_dir():
        return folder
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=f".{PACKAGE}-") as work:
        _run(["apt-get", "download", PACKAGE], work)
        (package,) = Path(work).glob("*.deb")
        _run(["dpkg-deb", "-x", package.name, "unpacked"], work)
        files = [str(file) for file in (Path(work) / "unpacked").rglob("*-ubyte.gz")]
        _run(["gzip", "--decompress", *files], work)  # plain files are mapped, not read
        (Path(work) / "unpacked").rename(kept)
    return folder


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        said = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        raise SystemExit(
            f"fashion-MNIST can't be had: {' '.join(command)} failed ({said}); it takes Debian's apt and dpkg, and the "
            "network; leave the images out with --task decoder --task encoder"
        )


TASKS = {
    task.name: task
    for task in (
        Task("decoder", decoder, text_examples, batch=16, source_steps=700),
        Task("encoder", encoder, text_examples, batch=16, source_steps=3000),
        Task("images", image_encoder, image_examples, batch=32, source_steps=700),
    )
}
