"""The loss of a model on some data, as it stands: what a grown model starts from.

Sequences of text for models with a head over the vocabulary: the next token where attention is causal, masked tokens
where it is not; for everything else named inputs and labels in an ``.npz`` file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from growkit.model import Model
from growkit_specs import GrowkitError, LayerGraph

SEQUENCES = 8
"""How many sequences are taken from a text or a file of tokens."""

LENGTH = 128
"""The longest of them, in tokens."""

IGNORED = -100
"""The label of an entry that does not count."""

MASKED = 0.15
"""The share of tokens that are masked for a model that sees both ways."""


@dataclass(frozen=True)
class Batch:
    """Inputs by name, and what the ``logits`` should say.

    Attributes:
        inputs: The model's inputs.
        labels: The right entries of the last axis of the logits, of the logits' other axes' shape; -100 does not count.
    """

    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray


def read_batch(model: Model, path: str | Path, *, seed: int = 0) -> Batch:
    """A batch from a file, for ``model`` and for what grows out of it.

    Args:
        model: The model.
        path: A text file, split into tokens by the model's own tokenizer; tokens as ``.npy`` or ``.bin`` (uint16); or
            ``.npz`` with an array for each input and ``labels``.
        seed: Which tokens are masked, where any are.

    Raises:
        GrowkitError: Where the file is missing or holds something else, or the model has no such loss.
    """
    path = Path(path)
    if not path.is_file():
        raise GrowkitError(f"{path}: no such file; expected text, .npy or .bin tokens, or an .npz of named inputs")
    if path.suffix == ".npz":
        return _named(path)
    return token_batch(model, _tokens(model, path), seed=seed)


def token_batch(model: Model, tokens: np.ndarray, *, seed: int = 0) -> Batch:
    """A batch of sequences from one long run of tokens.

    Args:
        model: The model.
        tokens: ``(n,)`` ids below the vocabulary's size.
        seed: Which tokens are masked, where any are.

    Raises:
        GrowkitError: Where there are too few tokens, one is out of range, or the model has no head over its vocabulary.
    """
    graph = model.graph
    _refuse_headless(graph)
    longest = graph.sizes.get("positions", LENGTH) - int(graph.attributes.get("reserved_positions") or 0)
    length = min(LENGTH, longest)
    count = min(len(tokens) // length, SEQUENCES)
    if count == 0:
        raise GrowkitError(f"the data holds {len(tokens)} tokens; expected at least one sequence of {length}")
    ids = np.asarray(tokens[: count * length], dtype=np.int64).reshape(count, length)
    if ids.min() < 0 or ids.max() >= graph.sizes["vocab"]:
        raise GrowkitError(f"the data holds the token {ids.max()}; expected ids below {graph.sizes['vocab']}")
    causal = [layer.attributes.get("causal") for _, layer in graph.walk() if layer.kind == "attention"]
    if all(causal):
        labels = np.concatenate([ids[:, 1:], np.full((count, 1), IGNORED)], axis=1)
    else:
        chosen = np.random.default_rng(seed).random(ids.shape) < MASKED
        labels = np.where(chosen, ids, IGNORED)
        ids = np.where(chosen, _mask_token(model), ids)
    made = {"tokens": ids, "types": np.zeros_like(ids), "mask": np.ones_like(ids)}
    return Batch({port.name: made[port.kind] for port in graph.inputs}, labels)


def start_loss(model: Model, batch: Batch, *, device: str = "auto") -> float:
    """The mean cross-entropy of a model's ``logits``, in nats.

    Args:
        model: The model, grown or not.
        batch: What it is run on.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.

    Raises:
        GrowkitError: Where it has no ``logits``, or their shape is not that of the labels.
    """
    outputs = model.adapter.forward(model, device)(batch.inputs)
    if "logits" not in outputs:
        raise GrowkitError(f"the model gives {', '.join(outputs)}; expected logits; read it as a class with a head")
    logits = np.asarray(outputs["logits"], dtype=np.float64)
    if logits.shape[:-1] != batch.labels.shape:
        raise GrowkitError(f"labels: shape {list(batch.labels.shape)}; the logits' are {list(logits.shape[:-1])}")
    top = logits.max(axis=-1, keepdims=True)
    log_total = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
    counted = batch.labels != IGNORED
    right = np.take_along_axis(logits, np.where(counted, batch.labels, 0)[..., None], axis=-1)[..., 0]
    return float((log_total - right)[counted].mean())


def _refuse_headless(graph: LayerGraph) -> None:
    if not any(port.name == "logits" and port.space == "vocab" for port in graph.outputs):
        raise GrowkitError(
            f"a {graph.attributes.get('class')} has no logits over its vocabulary, so text gives it no loss; expected "
            "a class with a language-modelling head, or named inputs and labels in an .npz file"
        )
    if sum(port.kind == "tokens" for port in graph.inputs) != 1:
        raise GrowkitError("an encoder-decoder's loss needs both sides: give named inputs and labels in an .npz file")


def _named(path: Path) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: not an .npz file ({error})") from None
    if "labels" not in arrays:
        raise GrowkitError(f"{path}: holds {', '.join(arrays)}; expected labels beside the inputs")
    return Batch({name: array for name, array in arrays.items() if name != "labels"}, arrays["labels"])


def _tokens(model: Model, path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False)).reshape(-1)[: SEQUENCES * LENGTH]
        if path.suffix == ".bin":
            return np.fromfile(path, dtype=np.uint16, count=SEQUENCES * LENGTH)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: cannot be read as {path.suffix or 'text'} ({error})") from None
    ids: list[int] = _tokenizer(model).encode(text[: SEQUENCES * LENGTH * 20], add_special_tokens=False).ids
    return np.asarray(ids)


def _tokenizer(model: Model) -> Any:
    folder = getattr(model.origin, "path", None)
    file = None if folder is None else Path(folder) / "tokenizer.json"
    if file is None or not file.is_file():
        raise GrowkitError(
            f"{folder or 'the model'}: no tokenizer.json beside the weights; give the data as tokens, .npy or .bin"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise GrowkitError("reading text needs tokenizers; pip install 'growkit[torch]'") from None
    return Tokenizer.from_file(str(file))


def _mask_token(model: Model) -> int:
    tokenizer = _tokenizer(model)
    for written in ("[MASK]", "<mask>"):
        token: int | None = tokenizer.token_to_id(written)
        if token is not None:
            return token
    raise GrowkitError("the tokenizer has no [MASK] or <mask>; give named inputs and labels in an .npz file")
