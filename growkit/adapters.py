"""Adapters: where a model comes from and goes to. Found by the entry-point group ``growkit.adapters``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from growkit.example import Build, Example
from growkit.matrices import Array
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError, LayerGraph, Signature, UnsupportedFormat, UnsupportedModel

Forward = Callable[..., Mapping[str, Array]]
"""Runs a model: ``forward(inputs, weights=None)`` gives its outputs by name, differentiable in ``weights``.

One that computes in no wider type than the weights are stored in has an attribute ``rounding``: how far the outputs of
two models that compute the same may be apart then, relative to the largest.
"""


class BareForward(Protocol):
    """Runs a model that holds no weights of its own; everything is torch's, and differentiable in the weights.

    Attributes:
        checkpointed: How many blocks are run again for their gradients, and not kept.
    """

    checkpointed: int

    def __call__(self, inputs: Mapping[str, Any], weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """The outputs by name, given every tensor by name."""

    def clear(self) -> None:
        """Let go of the weights of the last call, which gradients may need until they are there."""


class Adapter(Protocol):
    """Translates models of one framework to and from the layer graph.

    Laws, held by one conformance test: reading what was written gives the same; growth by identity gives equal
    outputs; the source is unmodified; every parameter appears exactly once.
    """

    name: str
    suffix: str
    """What the names of what it writes end with; empty for directories."""

    def matches(self, source: Any) -> bool:
        """Whether this adapter reads ``source``; cheap, and imports no framework."""

    def read(self, source: Any) -> Model:
        """The layer graph and lazy weights of ``source``."""

    def graph_like(self, source: Any) -> LayerGraph:
        """The layer graph of a config or model whose weights are not needed."""

    def resized(
        self, origin: Any, graph: LayerGraph, operator: GrowthOperator, signature: Signature
    ) -> tuple[LayerGraph, Any]:
        """The graph, with the inputs and outputs that the format gives it, and the origin of a grown model.

        Args:
            origin: The source's origin.
            graph: The grown model's graph.
            operator: What grows it.
            signature: What is to become of inputs and outputs.

        Raises:
            InvalidTarget: Where the format cannot express ``graph``'s sizes or element types, or the signature.
        """

    def write(
        self,
        model: Model,
        like: Any,
        destination: Path,
        progress: Callable[[int], None],
        check: Callable[[Model], None],
    ) -> None:
        """Write ``model`` at ``destination`` in the form of ``like``, which is untouched.

        Args:
            model: The model.
            like: The origin of the model it was grown from.
            destination: A path at which nothing exists; nothing appears there unless the whole of it is right.
            progress: Called with the number of bytes written since the last call.
            check: Called with the written model, read back, before it is put in place; it may raise.

        Raises:
            UnsupportedFormat: Where this adapter writes no models at all.
        """

    def build(self, model: Model) -> Any:
        """The model in memory, as the framework's own object."""

    def forward(self, model: Model, device: str = "auto") -> Forward:
        """A function that runs the model on ``device``: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one."""

    def bare(
        self,
        model: Model,
        device: str = "auto",
        *,
        dtype: str = "float32",
        checkpointing: float | None = None,
        compiled: bool = False,
    ) -> BareForward:
        """A function of the inputs and of all the weights, for fitting; it takes no memory for weights of its own.

        Args:
            model: The model; only its graph and origin count.
            device: As for ``forward``.
            dtype: The element type in which it runs, that of the weights.
            checkpointing: The share of the stacks' blocks that are run again for their gradients, and not kept; None
                leaves it to the format.
            compiled: Whether the model is compiled; the weights are matrices then, and nothing that stands for them.

        Raises:
            GrowkitError: Where it cannot be run so.
        """

    def inputs(self, model: Model, seed: int, forward: Forward) -> Iterator[dict[str, np.ndarray]]:
        """Inputs that exercise the model and that ``forward`` runs it on: plain, padded, and at several sizes."""


@cache
def adapters() -> Mapping[str, Adapter]:
    """Every installed adapter, by name."""
    from importlib.metadata import entry_points  # slow to import, and `growkit --help` needs no adapter

    return {entry.name: entry.load()() for entry in entry_points(group="growkit.adapters")}


def adapter_for(source: Any) -> Adapter:
    """The adapter that reads ``source``.

    Raises:
        UnsupportedModel: Where none does.
    """
    for adapter in adapters().values():
        if adapter.matches(source):
            return adapter
    if isinstance(source, (str, Path)):
        path = Path(source)
        what = (
            "no such file or directory"
            if not path.exists()
            else "a directory without config.json"
            if path.is_dir()
            else "not a model"
        )
        raise UnsupportedModel(
            f"{path}: {what}; expected a model directory with config.json and safetensors, or an .onnx file"
        )
    raise UnsupportedModel(f"an object of type {type(source).__name__} is no model that an installed adapter reads")


def read(source: Any, *, example_inputs: Any = None, build: Build | None = None) -> Model:
    """Read a model.

    Args:
        source: A model directory, an ``nn.Module``, an ``.onnx`` file, or an ``onnx.ModelProto``.
        example_inputs: Inputs that a module runs on, where no architecture file knows it: a tensor, several in the
            order of ``forward``, or tensors by name; batch first. What its axes mean is then inferred.
        build: Makes such a module at the sizes and depths of a layer graph, where the larger one is to be run:
            ``lambda graph: Mine(width=graph.sizes["hidden"], depth=graph.depths["layers"])``.

    Returns:
        The model; its weights are loaded when they are asked for.

    Raises:
        GrowkitError: Where it cannot be read; one line says what is wrong, and where.
    """
    if example_inputs is not None:
        source = Example.of(source, example_inputs, build)
    elif build is not None:
        raise GrowkitError("build makes modules that were read with example_inputs; give these too")
    return adapter_for(source).read(Path(source) if isinstance(source, str) else source)


def read_graph(source: Any) -> LayerGraph:
    """The layer graph of a model or of a config file, without its weights: what ``--like`` takes."""
    return adapter_for(source).graph_like(Path(source) if isinstance(source, str) else source)


def write(
    model: Model,
    destination: str | Path,
    *,
    progress: Callable[[int], None] = lambda written: None,
    check: Callable[[Model], None] = lambda written: None,
) -> None:
    """Write a model in the form its source had.

    Args:
        model: The model.
        destination: Where; nothing may exist there, and nothing appears there unless the whole of it is right.
        progress: Called with the number of bytes written since the last call.
        check: Called with the written model, read back, before it is put in place; it may raise.

    Raises:
        GrowkitError: Where ``destination`` exists, its folder does not, or the disk is full.
    """
    path = Path(destination)
    refuse_existing(path)
    refuse_misnamed(path, model.adapter)
    model.adapter.write(model, model.origin, path, progress, check)


def refuse_existing(path: Path) -> None:
    """Refuse a destination that exists, or whose folder does not.

    Raises:
        GrowkitError: Saying which.
    """
    if path.exists() or path.is_symlink():
        raise GrowkitError(f"{path} exists; growkit overwrites nothing; remove it or name another destination")
    if not path.absolute().parent.is_dir():
        raise GrowkitError(f"{path.absolute().parent} is no directory; make it first")


def refuse_misnamed(path: Path, adapter: Adapter) -> None:
    """Refuse a destination whose name is not that of what the adapter writes.

    Raises:
        UnsupportedFormat: Saying how it should end.
    """
    if adapter.suffix and path.suffix != adapter.suffix:
        raise UnsupportedFormat(
            f"{path}: growkit writes what it read, here {adapter.name}; give it a name that ends with {adapter.suffix}"
        )
