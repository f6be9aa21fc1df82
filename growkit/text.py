"""Sequences of tokens, out of texts or files of tokens: packed, and labelled with what a model is to learn of them.

Shape legend: ``b`` sequences, ``l`` their length in tokens, ``n`` tokens of the whole data.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from growkit.loss import IGNORED, Batch, logits_port
from growkit.model import Model
from growkit_specs import GrowkitError, LayerGraph, LayerPort, Port
from growkit_specs.layout import axis_size, parse_layout

LENGTH = 128
"""How long a sequence is where nothing is said, in tokens; models with fewer positions get up to their last."""

MASKED = 0.15
"""The share of tokens that a model which sees both ways has to tell. Source: BERT (arXiv:1810.04805), 3.1."""

HIDDEN, REPLACED = 0.8, 0.1
"""Of these the shares that are hidden behind the mask, and that another token stands for; the rest stays as it is."""

PIECE = 1 << 16
"""How much text is split into tokens as one, in characters."""

PIECES = 16
"""How many of them at once: the tokenizer takes them side by side."""

BLOCK = 1 << 22
"""How many tokens are looked at at once."""

MASKS = ("[MASK]", "<mask>")
ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")

Objective = Literal["causal", "masked"]
"""What a model learns from text: the next token, or tokens that are hidden from it."""

NAMED_INPUTS = "give named inputs and labels in an .npz file"


@dataclass(frozen=True)
class Sequences:
    """Consecutive sequences of one length.

    Attributes:
        graph: The model that they are for.
        ids: ``(n,)`` tokens; a map of a file where they come from one.
        length: The length of a sequence; what is left at the end of ``ids`` is left out.
        objective: What the labels say; None where there are none.
        mask: The token that hides others.
        special: Tokens that are never hidden: what stands between documents.
    """

    graph: LayerGraph
    ids: np.ndarray
    length: int
    objective: Objective | None
    mask: int | None = None
    special: tuple[int, ...] = ()

    ordered = True

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def take(self, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
        """The sequences of these numbers; ``rng`` says which tokens are hidden, where any are."""
        runs = [self.ids[number * self.length : (number + 1) * self.length] for number in numbers.tolist()]
        ids, labels = np.stack(runs).astype(np.int64), None
        if self.objective == "causal":
            labels = following(ids)
        elif self.mask is not None:
            vocab = self.graph.sizes[str(tokens_port(self.graph).space)]
            ids, labels = masked(ids, self.mask, vocab, rng, special=self.special)
        return Batch(text_inputs(self.graph, ids), labels)


def following(ids: np.ndarray) -> np.ndarray:
    """The next token of each; the last of a sequence does not count."""
    return np.concatenate([ids[:, 1:], np.full((len(ids), 1), IGNORED)], axis=1)


def masked(
    ids: np.ndarray, mask: int, vocab: int, rng: np.random.Generator, *, special: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences with tokens hidden, and the labels that tell them.

    15% of the tokens have a label. Of these 80% are hidden behind ``mask``, for 10% a random token stands, 10% stay.

    Args:
        ids: ``(b, l)`` tokens.
        mask: The token that hides others.
        vocab: The random tokens are below it.
        rng: Says which.
        special: Tokens that are left alone.

    Source: BERT (arXiv:1810.04805), 3.1.
    """
    chosen = (rng.random(ids.shape) < MASKED) & ~np.isin(ids, special)
    if not chosen.any():  # a mean over nothing is no loss
        chosen.flat[rng.integers(ids.size)] = True
    share, others = rng.random(ids.shape), rng.integers(0, vocab, ids.shape)
    shown = np.where(share < HIDDEN, mask, np.where(share < HIDDEN + REPLACED, others, ids))
    return np.where(chosen, shown, ids), np.where(chosen, ids, IGNORED)


def text_inputs(graph: LayerGraph, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a model takes beside its tokens: no padding, one type, positions from 0, nothing cached.

    Args:
        graph: The model.
        ids: ``(b, l)`` tokens.

    Raises:
        GrowkitError: Where it takes an input of which it is not known what it is.
    """
    made = {"tokens": ids, "types": np.zeros_like(ids), "mask": np.ones_like(ids)}
    made["positions"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    cached = {name: port for port in graph.layer_inputs for name in port.names}
    given = {}
    for port in graph.inputs:
        if port.name not in cached and port.kind not in made:
            raise GrowkitError(f"the model's input {port.name} is neither tokens nor a mask of them; {NAMED_INPUTS}")
        given[port.name] = made[port.kind] if port.kind in made else _empty(graph, cached[port.name], len(ids))
    return given


def _empty(graph: LayerGraph, port: LayerPort, batch: int) -> np.ndarray:
    """A cache of no tokens: the batch's axis comes first, and every other axis of no space is one of tokens."""
    sizes = [axis_size(parse_layout(f"-> {axis}").axes[0], graph.sizes) if axis else 0 for axis in port.axes]
    return np.zeros((batch, *sizes[1:]), dtype=np.float32)


def tokens_port(graph: LayerGraph) -> Port:
    """The input that takes tokens.

    Raises:
        GrowkitError: Where there is none, or more than one.
    """
    ports = [port for port in graph.inputs if port.kind == "tokens" and port.space is not None]
    if len(ports) > 1:
        raise GrowkitError(f"an encoder-decoder's loss needs both sides: {NAMED_INPUTS}")
    if not ports:
        inputs = ", ".join(port.name for port in graph.inputs)
        raise GrowkitError(f"none of the model's inputs ({inputs}) is known to take tokens; {NAMED_INPUTS}")
    return ports[0]


# --- what a model learns ---------------------------------------------------------------------------------------------


def objective_of(model: Model) -> Objective | None:
    """What a model learns from text; None for one without a head over its vocabulary.

    A model that does not tell whether its attention is causal is run: whether the last token changes what it says of
    those before it.
    """
    graph = model.graph
    port = logits_port(graph)
    if port is None or port.space != tokens_port(graph).space:
        return None
    attentions = [layer.attributes for _, layer in graph.walk() if layer.kind == "attention"]
    if any("causal" in attributes for attributes in attentions):
        causal = all(attributes.get("causal") for attributes in attentions)
    else:
        causal = not _sees_ahead(model, port.name)
    return "causal" if causal else "masked"


def _sees_ahead(model: Model, output: str) -> bool:
    vocab, length = model.graph.sizes[str(tokens_port(model.graph).space)], sequence_length(model.graph, None)
    ids = np.random.default_rng(0).integers(0, vocab, (1, min(length, 8)))
    changed = ids.copy()
    changed[:, -1] = (ids[:, -1] + vocab // 2) % vocab
    forward = model.adapter.forward(model, "cpu")
    first, second = (np.float64(forward(text_inputs(model.graph, each))[output]) for each in (ids, changed))
    differences = np.abs(first - second).max(axis=-1)[0]
    return bool(differences[:-1].max(initial=0.0) > 1e-3 * differences[-1])


def sequence_length(graph: LayerGraph, asked: int | None) -> int:
    """The length of sequences in tokens: what is asked for, or as many as the model has positions, up to 128.

    Raises:
        GrowkitError: Where the model has fewer positions than are asked for.
    """
    longest = _positions(graph) or asked or LENGTH
    if asked is None:
        return min(LENGTH, longest)
    if not 1 < asked <= longest:
        raise GrowkitError(f"sequences of {asked} tokens were asked for; the model takes 2 to {longest}")
    return asked


def _positions(graph: LayerGraph) -> int | None:
    """How many tokens a model has positions for; None where nothing says so.

    Tables inside of blocks are looked up by something else, like the experts of an ONNX file.
    """
    held = [s for s, layer in graph.walk() for each in layer.parameters if "positions" in each.parsed.spaces]
    if "positions" not in graph.sizes or (held and None not in held):
        return None
    return graph.sizes["positions"] - int(graph.attributes.get("reserved_positions") or 0)


def sequences(
    model: Model,
    ids: np.ndarray,
    *,
    length: int | None = None,
    objective: Objective | None = None,
    tokenizer: Any = None,
    where: str = "the data",
) -> Sequences:
    """Sequences of one long run of tokens.

    Args:
        model: The model they are for.
        ids: ``(n,)`` tokens.
        length: The length of a sequence in tokens; None takes 128, or as many as the model has positions.
        objective: What the labels say; None takes what the model learns.
        tokenizer: The model's tokenizer, where it is at hand.
        where: What error messages call the tokens.

    Raises:
        GrowkitError: Where there are too few tokens or one is out of range, or nothing is known that hides tokens.
    """
    _refuse_unknown(ids, model.graph.sizes[str(tokens_port(model.graph).space)], where)
    length = sequence_length(model.graph, length)
    if len(ids) < length:
        raise GrowkitError(f"{where} holds {len(ids)} tokens; expected at least one sequence of {length}")
    objective = objective or objective_of(model)
    if objective != "masked":
        return Sequences(model.graph, ids, length, objective)
    tokenizer = tokenizer or tokenizer_of(model)
    return Sequences(model.graph, ids, length, objective, _mask_token(tokenizer), _special(tokenizer))


def _refuse_unknown(ids: np.ndarray, vocab: int, where: str) -> None:
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        if block.max() >= vocab or block.min() < 0:
            at = int(np.flatnonzero((block >= vocab) | (block < 0))[0])
            raise GrowkitError(
                f"{where} holds the token {block[at]}; expected ids below {vocab}, the size of the model's vocabulary; "
                f"it stands at entry {start + at}"
            )


# --- tokens ----------------------------------------------------------------------------------------------------------


def read_tokens(path: Path, vocab: int) -> np.ndarray:
    """The tokens of a file, ``(n,)``: mapped, and read where they are looked at.

    Args:
        path: ``.npy`` of integers, or ``.bin`` of uint16, uint32 where the vocabulary needs it.
        vocab: The size of the vocabulary.

    Raises:
        GrowkitError: Where the file is empty or holds something else.
    """
    dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
    _refuse_empty(path)
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else np.memmap(path, dtype, "r")
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: cannot be read as {path.suffix} ({error})") from None
    if ids.dtype.kind not in "iu":
        raise GrowkitError(f"{path}: holds {ids.dtype}; expected tokens, which are integers")
    return ids.reshape(-1)


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise GrowkitError(f"{path}: is empty; expected text or tokens")


def encoded(tokenizer: Any, texts: Iterable[Iterable[str]], *, end: int | None, most: int | None = None) -> np.ndarray:
    """Texts as one run of tokens, ``(n,)`` uint16 or uint32.

    Args:
        tokenizer: Splits them.
        texts: Each in pieces.
        end: The token between two of them; None for none.
        most: Where to stop, in tokens.
    """
    ids = array("H" if tokenizer.get_vocab_size() <= 1 << 16 else "I")
    for number, text in enumerate(texts):
        if number and end is not None:
            ids.append(end)
        pieces = iter(text)
        while some := list(islice(pieces, PIECES)):
            for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
                ids.extend(encoding.ids)
            if most is not None and len(ids) >= most:
                return np.frombuffer(ids, ids.typecode)[:most]
    return np.frombuffer(ids, ids.typecode)


def read_text(path: Path) -> Iterator[str]:
    """A text file in pieces that begin with a line, so that it is never in memory as a whole.

    Raises:
        GrowkitError: Where the file cannot be read as text.
    """
    try:
        with path.open(encoding="utf-8") as file:
            rest = ""
            while more := file.read(PIECE):
                text = rest + more
                cut = _cut(text)
                rest = text[cut:]
                if cut:
                    yield text[:cut]
            if rest:
                yield rest
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: cannot be read as text ({error})") from None


def _cut(text: str) -> int:
    """Where a text is cut: before the last line or word behind a single break, for no token lies across one."""
    for mark, ahead in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, 1, -1)
        while at > 0 and (text[at - 1].isspace() or text[at + 1].isspace()):
            at = text.rfind(mark, 1, at)
        if at > 0:
            return at + ahead
    return len(text)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def tokenizer_of(model: Model) -> Any:
    """The tokenizer beside a model.

    Raises:
        GrowkitError: Where there is none, it cannot be read, or it is not that of the model.
    """
    file = model.beside("tokenizer.json")
    if file is None:
        raise GrowkitError(
            f"{getattr(model.origin, 'path', None) or 'the model'}: no tokenizer.json beside the weights; give the "
            "data as tokens, .npy or .bin"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise GrowkitError("reading text needs tokenizers; pip install 'growkit[data]'") from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library's errors share no base class
        raise GrowkitError(f"{file}: cannot be read as a tokenizer ({error})") from None
    tokenizer.no_truncation()  # a file may say how inputs are cut and filled up, which is not for training
    tokenizer.no_padding()
    vocab = model.graph.sizes[str(tokens_port(model.graph).space)]
    if tokenizer.get_vocab_size() > vocab:
        raise GrowkitError(
            f"{file}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {vocab}; expected the tokenizer "
            "that the model was trained with"
        )
    return tokenizer


def end_token(model: Model, tokenizer: Any) -> int | None:
    """The token that ends a document; None where the tokenizer has none."""
    told = model.told_beside("tokenizer_config.json")
    named = [told.get("eos_token"), told.get("sep_token")]
    written = [each["content"] if isinstance(each, dict) else each for each in named if each]
    return _first(tokenizer, (*written, *ENDS))


def _mask_token(tokenizer: Any) -> int:
    token = _first(tokenizer, MASKS)
    if token is None:
        raise GrowkitError(f"the tokenizer has no {' or '.join(MASKS)}; {NAMED_INPUTS}")
    return token


def _special(tokenizer: Any) -> tuple[int, ...]:
    return tuple(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


def _first(tokenizer: Any, names: Iterable[str]) -> int | None:
    return next((token for name in names if (token := tokenizer.token_to_id(name)) is not None), None)
