"""Data: batches for a model by the number of the step, and others held out to validate on.

A batch depends on the data, the seed and the step, and on no batch before it: training resumes at any step. Batches
come from texts and files of tokens (:mod:`growkit.text`), from images (:mod:`growkit.images`), from named arrays
(:mod:`growkit.arrays`), or from whatever gives them one after the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from growkit import images, text
from growkit.arrays import Arrays, read_arrays
from growkit.loss import Batch
from growkit.model import Model
from growkit.text import Objective, Sequences
from growkit_specs import GrowkitError

BATCH = 8
"""How many examples a batch has where nothing is said."""

HELD_OUT = 20
"""One example of so many is held out."""

TEXTS = (".txt", ".md")
"""What the names of the files end with that are read of a folder of text."""

_TRAINING, _VALIDATION, _ORDER = range(3)
"""What is drawn, beside the seed and a number."""


class Data(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; there is one for every step.

        Raises:
            GrowkitError: Where there is none, because what gave batches has run out.
        """

    def validation(self) -> Iterator[Batch]:
        """The batches that are held out, the same ones at every call; none where the data has none to spare."""


class Examples(Protocol):
    """Examples by number."""

    ordered: bool
    """Whether neighbours belong together, so that its end is held out, and not one in so many from all over."""

    def __len__(self) -> int:
        """How many there are."""

    def take(self, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
        """The examples of these numbers as one batch; ``rng`` draws what is drawn of them."""


@dataclass(frozen=True)
class Sampled:
    """Batches of examples: all of them in a new order each epoch, apart from those that are held out.

    Attributes:
        examples: The examples.
        size: How many a batch has; where there are fewer it has them all.
        seed: The seed of the orders, and of what is drawn of examples. Which ones are held out does not depend on it.
    """

    examples: Examples
    size: int = BATCH
    seed: int = 0

    @property
    def held_out(self) -> int:
        """How many examples are held out: one in twenty, and a batch where that leaves as many."""
        count = len(self.examples)
        return max(count // HELD_OUT, min(self.size, count // 2))

    @property
    def trained_on(self) -> int:
        """How many examples are not held out."""
        return len(self.examples) - self.held_out

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        size, count = min(self.size, self.trained_on), self.trained_on
        places = step * size + np.arange(size)
        order = [_order(self.seed, int(place) // count, count)[place % count] for place in places]
        return self.examples.take(self._training(np.array(order, dtype=np.int64)), self._drawing(step, _TRAINING))

    def validation(self) -> Iterator[Batch]:
        """The examples that are held out, batch by batch."""
        numbers = self._validation()
        for i, start in enumerate(range(0, len(numbers), self.size)):
            yield self.examples.take(numbers[start : start + self.size], self._drawing(i, _VALIDATION))

    @property
    def _every(self) -> int:
        """One in how many examples is held out, where they are held out from all over."""
        return len(self.examples) // max(self.held_out, 1)

    def _validation(self) -> np.ndarray:
        if self.examples.ordered:
            return np.arange(self.trained_on, len(self.examples))
        return np.arange(1, self.held_out + 1) * self._every - 1

    def _training(self, places: np.ndarray) -> np.ndarray:
        """The numbers of the examples at these places among those that are not held out."""
        if self.examples.ordered or not self.held_out:
            return places
        numbers: np.ndarray = places + np.minimum(places // (self._every - 1), self.held_out)
        return numbers

    def _drawing(self, number: int, what: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, number, what))


@lru_cache(maxsize=2)  # a batch at the end of an epoch needs two
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch: ``(count,)``, four bytes an example up to 4 billion of them."""
    numbers = np.arange(count, dtype=np.min_scalar_type(count))
    order: np.ndarray = np.random.default_rng((seed, epoch, _ORDER)).permutation(numbers)
    return order


# --- reading ---------------------------------------------------------------------------------------------------------


def read_data(
    model: Model,
    path: str | Path,
    *,
    batch: int = BATCH,
    length: int | None = None,
    objective: Objective | None = None,
    seed: int = 0,
) -> Data:
    """Batches for a model, and for what grows out of it.

    Args:
        model: The model.
        path: Text, a file or a folder of ``.txt`` and ``.md``, which the model's own tokenizer splits; tokens, ``.npy``
            or ``.bin``; images, a folder with a folder for each class, or an IDX file beside that of its labels; a
            directory of Hugging Face ``datasets``; or an ``.npz`` with an array for each input and ``labels``.
        batch: How many examples a batch has.
        length: The length of sequences in tokens; None takes 128, or as many as the model has positions.
        objective: What sequences are labelled with: ``causal``, the next token, or ``masked``, tokens that are hidden.
            None takes what the model's attention says.
        seed: The seed of the order, and of which tokens are hidden.

    Raises:
        GrowkitError: Where nothing is there, or it does not fit the model.
    """
    if batch < 1:
        raise GrowkitError(f"batches of {batch} examples were asked for; expected at least one")
    return Sampled(_examples(model, Path(path), length=length, objective=objective), batch, seed)


def read_batch(model: Model, path: str | Path, *, seed: int = 0) -> Batch:
    """One batch, to measure a loss on: the first sequences, some images, or the whole of an ``.npz``.

    Args:
        model: The model.
        path: As :func:`read_data` takes it.
        seed: Which tokens are hidden or which images are taken, where any are.

    Raises:
        GrowkitError: Where nothing is there, or the model has no such loss.
    """
    return _first(_examples(model, Path(path), most=BATCH), seed)


def token_batch(model: Model, tokens: np.ndarray, *, seed: int = 0) -> Batch:
    """One batch of sequences from one long run of tokens, to measure a loss on.

    Args:
        model: The model.
        tokens: ``(n,)`` ids below the vocabulary's size.
        seed: Which tokens are hidden, where any are.

    Raises:
        GrowkitError: Where there are too few tokens, one is out of range, or the model has no head over its vocabulary.
    """
    return _first(text.sequences(model, tokens), seed)


def _first(examples: Examples, seed: int) -> Batch:
    rng, count = np.random.default_rng(seed), len(examples)
    if isinstance(examples, Sequences):
        _refuse_headless(examples)
        return examples.take(np.arange(min(count, BATCH)), rng)
    numbers = np.arange(count) if isinstance(examples, Arrays) else rng.permutation(count)[:BATCH]
    return examples.take(numbers, rng)


def _refuse_headless(sequences: Sequences) -> None:
    if sequences.objective is None:
        raise GrowkitError(
            f"a {sequences.graph.attributes.get('class', 'model')} has no logits over its vocabulary, so text gives it "
            "no loss; expected a class with a language-modelling head, or named inputs and labels in an .npz file"
        )


def _examples(
    model: Model,
    path: Path,
    *,
    length: int | None = None,
    objective: Objective | None = None,
    most: int | None = None,
) -> Examples:
    """The examples of a file or a directory; of text the first ``most`` sequences."""
    if not path.exists():
        raise GrowkitError(
            f"{path}: no such file; expected text, .npy or .bin tokens, an .npz of named inputs, images in folders, or "
            "a directory of datasets"
        )
    tokens = partial(_sequences, model, str(path), length=length, objective=objective, most=most)
    if path.is_dir():
        return _of_directory(model, path, tokens)
    if path.suffix == ".npz":
        return read_arrays(model, path)
    if images.is_idx(path):
        return images.idx_images(model, path)
    if path.suffix in (".npy", ".bin"):
        return tokens(ids=text.read_tokens(path, _vocab(model)))
    return tokens(texts=[text.read_text(path)])


def _of_directory(model: Model, path: Path, tokens: Callable[..., Sequences]) -> Examples:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _of_datasets(model, path, tokens)
    if images.takes_images(model):  # a folder of text may hold images too
        idx = [each for each in sorted(path.iterdir()) if images.is_idx(each)]
        if idx:
            return images.idx_images(model, next((each for each in idx if each.name.startswith("train")), idx[0]))
        if images.class_folders(path):
            return images.image_folder(model, path)
    texts = sorted(each for each in path.rglob("*") if each.suffix in TEXTS and each.is_file())
    if texts:
        return tokens(texts=map(text.read_text, texts))
    raise GrowkitError(
        f"{path}: holds no data; expected .txt or .md files, a folder of images for each class, IDX files, or what "
        "save_to_disk of datasets writes"
    )


def _sequences(
    model: Model,
    where: str,
    *,
    length: int | None,
    objective: Objective | None,
    most: int | None,
    texts: Iterable[Iterable[str]] = (),
    ids: np.ndarray | None = None,
) -> Sequences:
    """Sequences of tokens, or of texts, which are split into tokens first."""
    most = None if most is None else most * text.sequence_length(model.graph, length)
    tokenizer = None
    if ids is None:
        tokenizer = text.tokenizer_of(model)
        ids = text.encoded(tokenizer, texts, end=text.end_token(model, tokenizer), most=most)
        if not len(ids):
            raise GrowkitError(f"{where}: is empty; expected text or tokens")
    return text.sequences(
        model, ids[:most], length=length, objective=objective, tokenizer=tokenizer, where=f"{where}: the data"
    )


def _vocab(model: Model) -> int:
    return model.graph.sizes[str(text.tokens_port(model.graph).space)]


# --- datasets --------------------------------------------------------------------------------------------------------


def _of_datasets(model: Model, path: Path, tokens: Callable[..., Sequences]) -> Examples:
    """The examples of a directory that ``save_to_disk`` wrote; of several splits those to train on."""
    try:
        from datasets import load_from_disk
    except ImportError:
        raise GrowkitError(f"{path}: reading it needs datasets; pip install 'growkit[datasets]'") from None
    try:
        rows = load_from_disk(str(path))
        rows = rows["train"] if isinstance(rows, Mapping) else rows
    except (OSError, ValueError, KeyError) as error:
        raise GrowkitError(f"{path}: cannot be read as a dataset with a split 'train' ({error})") from None
    columns = list(rows.column_names)
    if "input_ids" in columns:
        ids = array("i")
        for row in _column(rows, "input_ids"):
            ids.frombytes(np.asarray(row, dtype=np.int32).tobytes())
        return tokens(ids=np.frombuffer(ids, np.int32))
    if "text" in columns:
        return tokens(texts=([each] for each in _column(rows, "text")))
    if {"image", "label"} <= set(columns):
        labels = np.asarray(rows["label"])
        images.refuse_classes(model, labels, path)
        return images.Images(images.format_of(model), lambda number: rows[number]["image"], labels)
    raise GrowkitError(f"{path}: its columns are {', '.join(columns)}; expected input_ids, text, or image and label")


def _column(rows: Any, name: str) -> Iterator[Any]:
    """A column's entries; a thousand rows are in memory at once."""
    for part in rows.select_columns([name]).iter(batch_size=1000):
        yield from part[name]


# --- batches that somebody makes -------------------------------------------------------------------------------------


def as_data(batches: Any, validation: Iterable[Any] = ()) -> Data:
    """Batches that a caller gives, as data.

    Args:
        batches: :class:`Data`, which is given back; or something to iterate over that gives :class:`Batch` objects, or
            mappings of arrays or tensors by the names of inputs, ``labels`` among them. What can be iterated over again
            starts again when it ends; what cannot, like a generator, has to last.
        validation: Batches that are held out.

    Raises:
        GrowkitError: Where it is nothing of that kind.
    """
    if hasattr(batches, "batch") and hasattr(batches, "validation"):
        data: Data = batches
        return data
    held = [_as_batch(each) for each in validation]
    if isinstance(batches, Sequence) and not isinstance(batches, (str, bytes)):
        return Listed([_as_batch(each) for each in batches], held)
    if isinstance(batches, Iterable) and not isinstance(batches, (str, bytes, Mapping)):
        return Streamed(batches, held)
    raise GrowkitError(f"batches of type {type(batches).__name__}; expected a path, or batches to iterate over")


def _as_batch(given: Any) -> Batch:
    if isinstance(given, Batch):
        return given
    if not isinstance(given, Mapping):
        raise GrowkitError(
            f"a batch is of type {type(given).__name__}; expected arrays or tensors by the names of inputs, and labels"
        )
    odd = next((name for name, value in given.items() if not hasattr(value, "shape")), None)
    if odd is not None:
        raise GrowkitError(f"the batch's {odd} is of type {type(given[odd]).__name__}; expected an array or a tensor")
    return Batch({name: value for name, value in given.items() if name != "labels"}, given.get("labels"))


@dataclass(frozen=True)
class Listed:
    """Batches in a list, over and over.

    Attributes:
        batches: They.
        held: Those to validate on.

    Raises:
        GrowkitError: Where there are none.
    """

    batches: Sequence[Batch]
    held: Sequence[Batch] = ()

    def __post_init__(self) -> None:
        if not self.batches:
            raise GrowkitError("there are no batches; expected at least one")

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return self.batches[step % len(self.batches)]

    def validation(self) -> Iterator[Batch]:
        """The batches to validate on."""
        return iter(self.held)


class Streamed:
    """Batches one after the other: a step passes over those before it.

    Attributes:
        batches: They.
        held: Those to validate on.
    """

    def __init__(self, batches: Iterable[Any], held: Sequence[Batch] = ()) -> None:
        self.batches, self.held = batches, held
        self._stream = iter(batches)
        self._again = self._stream is not batches
        self._next = 0

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            GrowkitError: Where the batches have run out, or it was passed over.
        """
        if step < self._next:
            raise GrowkitError(
                f"the batch of step {step} was asked for after that of step {self._next - 1}; batches that come one "
                "after the other cannot go back: give them as a list"
            )
        while True:
            given = self._following(step)
            self._next += 1
            if self._next > step:
                return _as_batch(given)

    def _following(self, step: int) -> Any:
        for given in self._stream:
            return given
        if self._again:
            self._stream = iter(self.batches)
            for given in self._stream:
                return given
        told = f" of {len(self.batches)}" if isinstance(self.batches, Sized) else ""
        raise GrowkitError(
            f"the batches{told} ran out at step {self._next}, on the way to step {step}; give more of them, fewer "
            "steps, or a list, which starts again"
        )

    def validation(self) -> Iterator[Batch]:
        """The batches to validate on."""
        return iter(self.held)
