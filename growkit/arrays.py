"""Named arrays: inputs and labels of any model, out of one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from growkit.loss import IGNORED, Batch, logits_port
from growkit.model import Model
from growkit_specs import GrowkitError, LayerGraph


@dataclass(frozen=True)
class Arrays:
    """Examples along the first axis of named arrays.

    Attributes:
        inputs: The model's inputs.
        labels: Their labels, where there are any.
    """

    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray | None

    ordered = False

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
        """The examples of these numbers; nothing is drawn."""
        labels = None if self.labels is None else self.labels[numbers]
        return Batch({name: array[numbers] for name, array in self.inputs.items()}, labels)


def read_arrays(model: Model, path: Path) -> Arrays:
    """The examples of an ``.npz``: an array for each input, and ``labels``, which is an input too where it is one.

    Raises:
        GrowkitError: Where an input is missing, arrays are of several lengths, or ids are out of range.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: not an .npz file ({error})") from None
    names = [port.name for port in model.graph.inputs]
    inputs = {name: array for name, array in arrays.items() if name != "labels" or name in names}
    if not set(names) & set(inputs):
        raise GrowkitError(f"{path}: holds {', '.join(arrays) or 'nothing'}; the model's inputs are {', '.join(names)}")
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise GrowkitError(f"{path}: arrays of several lengths, or empty ({told}); expected one row for each example")
    _refuse_ids(model.graph, inputs, path)
    if "labels" in arrays:
        _refuse_labels(model.graph, arrays["labels"], path)
    return Arrays(inputs, arrays.get("labels"))


def _refuse_ids(graph: LayerGraph, inputs: Mapping[str, np.ndarray], path: Path) -> None:
    for port in graph.inputs:
        if port.name in inputs and port.kind in ("tokens", "types") and port.space is not None:
            array, size = inputs[port.name], graph.sizes[port.space]
            wrong = (array >= size) | (array < 0)
            if wrong.any():
                place = np.argwhere(wrong)[0].tolist()
                raise GrowkitError(
                    f"{path}: {port.name}{place} is {array[tuple(place)]}; expected ids below {size}, the size of "
                    f"{port.space}"
                )


def _refuse_labels(graph: LayerGraph, labels: np.ndarray, path: Path) -> None:
    port = logits_port(graph)
    if port is None or port.space is None or labels.dtype.kind not in "iu":
        return
    wrong = (labels >= graph.sizes[port.space]) | ((labels < 0) & (labels != IGNORED))
    if wrong.any():
        place = np.argwhere(wrong)[0].tolist()
        raise GrowkitError(
            f"{path}: labels{place} is {labels[tuple(place)]}; expected numbers below {graph.sizes[port.space]}, the "
            f"size of {port.space}, or {IGNORED} for what does not count"
        )
