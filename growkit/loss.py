"""The loss of a model on a batch, as it stands: what a grown model starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from growkit.matrices import Array
from growkit.model import Model
from growkit_specs import GrowkitError, LayerGraph, Port

IGNORED = -100
"""The label of an entry that does not count."""


@dataclass(frozen=True)
class Batch:
    """Inputs by name, and what the ``logits`` should say.

    Attributes:
        inputs: The model's inputs; batch first.
        labels: The right entries of the last axis of the logits, of the logits' other axes' shape: ``labels[i]`` is
            what ``logits[i]`` should say, the next token of a causal model; -100 does not count. None where there are
            none.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None


def logits_port(graph: LayerGraph) -> Port | None:
    """The output that labels are for: the one called ``logits``, or the first over tokens or labels; None without."""
    named = [port for port in graph.outputs if port.name == "logits"]
    fixed = [port for port in graph.outputs if graph.kinds.get(port.space or "") == "fixed"]
    return next(iter((*named, *fixed)), None)


def refuse_unfit(graph: LayerGraph, batch: Batch) -> None:
    """Refuse a batch that a model cannot be run on, or whose labels it cannot say.

    Args:
        graph: The model.
        batch: Arrays, or tensors of any framework.

    Raises:
        GrowkitError: Where there are no inputs, numbers of examples differ, or an entry is not in its space.
    """
    if not batch.inputs:
        raise GrowkitError(f"the batch has no inputs; the model takes {', '.join(p.name for p in graph.inputs)}")
    named = dict(batch.inputs) | ({} if batch.labels is None else {"labels": batch.labels})
    counts = {name: len(value) if value.ndim else 1 for name, value in named.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise GrowkitError(f"the batch's examples differ in number: {told}; expected as many of each")
    spaces = {port.name: port.space for port in graph.inputs if port.kind in ("tokens", "types")}
    for name, value in batch.inputs.items():
        _refuse_outside(name, value, graph.sizes.get(spaces.get(name) or ""))
    port = logits_port(graph)
    if batch.labels is not None and port is not None and "int" in str(batch.labels.dtype):
        _refuse_outside("labels", batch.labels, graph.sizes.get(port.space or ""), ignored=IGNORED)


def _refuse_outside(name: str, value: Array, size: int | None, *, ignored: int | None = None) -> None:
    if size is None or 0 in value.shape:
        return
    outside = (value < 0) | (value >= size)
    if ignored is not None:
        outside = outside & (value != ignored)
    if outside.any():
        raise GrowkitError(f"{name}: the batch has the entry {int(value[outside][0])}; expected 0 to {size - 1}")


def start_loss(model: Model, batch: Batch, *, device: str = "auto") -> float:
    """The mean cross-entropy of a model's ``logits``, in nats.

    Args:
        model: The model, grown or not.
        batch: What it is run on.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.

    Raises:
        GrowkitError: Where it has no ``logits``, or their shape is not that of the labels.
    """
    if batch.labels is None:
        raise GrowkitError("the data has no labels; expected them beside the inputs")
    labels = np.asarray(batch.labels)
    outputs = model.adapter.forward(model, device)(batch.inputs)
    port = logits_port(model.graph)
    name = port.name if port is not None else "logits"
    if name not in outputs:
        raise GrowkitError(f"the model gives {', '.join(outputs)}; expected logits; read it as a class with a head")
    logits = np.asarray(outputs[name], dtype=np.float64)
    if logits.shape[:-1] != labels.shape:
        raise GrowkitError(f"labels: shape {list(labels.shape)}; the logits' are {list(logits.shape[:-1])}")
    top = logits.max(axis=-1, keepdims=True)
    log_total = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
    counted = labels != IGNORED
    right = np.take_along_axis(logits, np.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return float((log_total - right)[counted].mean())
