"""Losses: what a grown model is to make small.

Shape legend: ``b`` batch, ``l`` length, ``v`` entries of the vocabulary or labels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growkit.loss import IGNORED, logits_port
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError, LayerGraph, Port

Tensors = Mapping[str, Tensor]

LABELS = "labels"
"""What a batch's labels are called among its tensors."""


@dataclass(frozen=True)
class Loss:
    """A loss by its name: ``loss(outputs, batch)`` is a scalar.

    Attributes:
        name: As it was asked for, or what ``auto`` chose.
        function: Computes it of outputs and of a batch's inputs and labels, each by name.
        takes_labels: Whether it needs labels.
        takes_source: Whether it needs the source's outputs on the same inputs.
    """

    name: str
    function: Callable[..., Tensor]
    takes_labels: bool = True
    takes_source: bool = False

    def __call__(
        self,
        outputs: Tensors,
        batch: Tensors,
        *,
        source: Tensors | None = None,
        operator: GrowthOperator | None = None,
    ) -> Tensor:
        """The loss, a tensor of no axes.

        Args:
            outputs: The grown model's outputs by name.
            batch: The inputs and ``labels`` by name.
            source: The source's outputs on the same inputs, where the loss needs them.
            operator: What grows the source, where the loss needs its outputs.

        Raises:
            GrowkitError: Where something is missing, shapes do not fit, or what comes out is no scalar.
        """
        if self.takes_labels and LABELS not in batch:
            raise GrowkitError(f"the loss '{self.name}' needs labels; the data gives {', '.join(batch)}")
        if self.takes_source and source is None:
            raise GrowkitError(f"the loss '{self.name}' needs the outputs of the source")
        more = {"source": source, "operator": operator} if self.takes_source else {}
        loss = self.function(outputs, batch, **more)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise GrowkitError(f"the loss '{self.name}' gives {got}; expected one number, a tensor of no axes")
        return loss


def loss_named(name: str, graph: LayerGraph) -> Loss:
    """A loss by its name.

    Args:
        name: ``causal``, ``masked``, ``classification``, ``output`` or ``output:NAME``, ``distill``, a function of your
            own as ``module:function``, or ``auto`` for what the model's outputs say.
        graph: The model.

    Raises:
        GrowkitError: Where there is no such loss, or the model has no output for it.
    """
    if name == "auto":
        return _chosen(graph)
    if name in _OF_LABELS:
        port = logits_port(graph)
        if port is None:
            raise GrowkitError(f"the loss '{name}' needs logits; the model gives {_given(graph)}")
        return Loss(name, partial(_OF_LABELS[name], logits=port.name))
    kind, _, rest = name.partition(":")
    if kind == "output":
        return Loss(name, partial(output, name=rest or "loss"), takes_labels=False)
    if name == "distill":
        return Loss(name, partial(distill, graph=graph), takes_labels=False, takes_source=True)
    if rest:
        return Loss(name, _own(kind, rest), takes_labels=False)
    known = ", ".join((*_OF_LABELS, "output", "output:NAME", "distill", "module:function"))
    raise GrowkitError(f"the loss '{name}' is not known; expected auto, {known}")


def _chosen(graph: LayerGraph) -> Loss:
    """The model's own loss where it has one, else the cross-entropy of its logits."""
    if any(port.name == "loss" for port in graph.outputs):
        return loss_named("output", graph)
    port = logits_port(graph)
    if port is None:
        raise GrowkitError(
            f"the model gives {_given(graph)}, and nothing says what these should be; name the loss: distill, "
            "output:NAME or module:function"
        )
    if port.space not in {each.space for each in graph.inputs if each.kind == "tokens"}:
        return loss_named("classification", graph)
    causal = [layer.attributes.get("causal") for _, layer in graph.walk() if layer.kind == "attention"]
    return loss_named("causal" if all(causal) else "masked", graph)


def _given(graph: LayerGraph) -> str:
    return ", ".join(port.name for port in graph.outputs) or "nothing"


def _own(module: str, function: str) -> Callable[..., Tensor]:
    if str(Path.cwd()) not in sys.path:  # as `python -m` has it, and a command has not
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise GrowkitError(f"the loss '{module}:{function}' cannot be loaded ({error})") from None
    if not callable(found):
        raise GrowkitError(f"the loss '{module}:{function}' is a {type(found).__name__}; expected a function")
    return found


# --- the losses ------------------------------------------------------------------------------------------------------


def causal(outputs: Tensors, batch: Tensors, *, logits: str = "logits") -> Tensor:
    """The mean cross-entropy of ``(b, l, v)`` logits and ``(b, l)`` labels, which are the next tokens already.

    Args:
        outputs: The model's outputs.
        batch: ``labels``; -100 does not count.
        logits: The name of the logits.
    """
    return _cross_entropy(outputs, batch[LABELS], logits)


def masked(outputs: Tensors, batch: Tensors, *, logits: str = "logits") -> Tensor:
    """The mean cross-entropy of ``(b, l, v)`` logits and the ``(b, l)`` tokens that were hidden; arguments as above."""
    return _cross_entropy(outputs, batch[LABELS], logits)


def classification(outputs: Tensors, batch: Tensors, *, logits: str = "logits") -> Tensor:
    """The mean cross-entropy of ``(b, v)`` logits and ``(b,)`` numbers of classes; arguments as above."""
    return _cross_entropy(outputs, batch[LABELS], logits)


_OF_LABELS = {"causal": causal, "masked": masked, "classification": classification}


def output(outputs: Tensors, batch: Tensors, *, name: str = "loss") -> Tensor:
    """The loss that the model computes itself.

    Args:
        outputs: The model's outputs.
        batch: Of no use here.
        name: The output's name.
    """
    return _output(outputs, name)


def distill(
    outputs: Tensors,
    batch: Tensors,
    *,
    source: Tensors,
    graph: LayerGraph,
    operator: GrowthOperator | None = None,
) -> Tensor:
    """How far a grown model is from saying what its source says on the same inputs, summed over outputs.

    The cross-entropy of the source's shares where an output is logits over tokens or labels; elsewhere the mean squared
    difference, a grown output being brought back by the operator's read matrix.

    Args:
        outputs: The grown model's outputs.
        batch: Of no use here.
        source: The source's outputs.
        graph: The source's graph.
        operator: What grows it.

    Raises:
        GrowkitError: Where the two have no output in common, or nothing brings one back to the source's shape.
    """
    cached = {name for port in graph.layer_outputs for name in port.names}
    ports = {port.name: port for port in graph.outputs if port.name in source and port.name not in cached}.values()
    terms = [
        _apart(_read(outputs, port, source[port.name], operator), source[port.name], port, graph) for port in ports
    ]
    if not terms:
        raise GrowkitError(f"the source gives {', '.join(source)}; expected an output to match: {_given(graph)}")
    return torch.stack(terms).sum()


def _apart(ours: Tensor, theirs: Tensor, port: Port, graph: LayerGraph) -> Tensor:
    ours, theirs = _wide(ours), _wide(theirs.detach()).to(ours.device)
    if port.space is not None and graph.kinds[port.space] == "fixed":
        return F.cross_entropy(ours.flatten(0, -2), theirs.to(ours.dtype).flatten(0, -2).softmax(-1))
    return F.mse_loss(ours, theirs.to(ours.dtype))


def _read(outputs: Tensors, port: Port, theirs: Tensor, operator: GrowthOperator | None) -> Tensor:
    """An output in the source's shape."""
    ours = _output(outputs, port.name)
    if ours.shape != theirs.shape and operator is not None and port.space in operator.expansions:
        ours = operator.read_matrix(str(port.space), port.through).apply(ours, ours.ndim - 1)
    if ours.shape != theirs.shape:
        raise GrowkitError(
            f"the output {port.name} is {list(theirs.shape)} in the source, {list(ours.shape)} in the grown model, and "
            "no read matrix brings it back"
        )
    return ours


def _cross_entropy(outputs: Tensors, labels: Tensor, name: str) -> Tensor:
    logits = _wide(_output(outputs, name))
    if logits.shape[:-1] != labels.shape:
        raise GrowkitError(f"labels: shape {list(labels.shape)}; the logits' are {list(logits.shape[:-1])}")
    labels = labels.to(logits.device, torch.long)
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)  # of a part without any labels zero, and no gradient


def _output(outputs: Tensors, name: str) -> Tensor:
    if name not in outputs:
        raise GrowkitError(f"the model gives {', '.join(outputs)}; the loss needs {name}")
    return outputs[name]


def _wide(tensor: Tensor) -> Tensor:
    """Half types have too few digits for sums of exponentials."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
