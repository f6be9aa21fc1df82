"""ONNX models in and out of the layer graph: files and ``onnx.ModelProto`` objects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.adapters import BareForward, Forward
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit_specs import LayerGraph, Signature

if TYPE_CHECKING:
    import numpy as np


class OnnxAdapter:
    """Reads and writes ONNX files of any exporter. Importing it imports no framework."""

    name = "onnx"
    suffix = ".onnx"

    def matches(self, source: Any) -> bool:
        """Whether ``source`` is an ``.onnx`` file or an ``onnx.ModelProto``."""
        if isinstance(source, (str, Path)):
            return Path(source).suffix == ".onnx" and Path(source).is_file()
        onnx = sys.modules.get("onnx")
        return onnx is not None and isinstance(source, onnx.ModelProto)

    def read(self, source: Any) -> Model:
        """The layer graph, inferred from the file's own graph, and lazy weights; a torch example is exported first."""
        from growkit_onnx.read import read_model

        return read_model(self, source)

    def graph_like(self, source: Any) -> LayerGraph:
        """The layer graph of a file or model."""
        return self.read(source).graph

    def resized(
        self, origin: Any, graph: LayerGraph, operator: GrowthOperator, signature: Signature
    ) -> tuple[LayerGraph, Any]:
        """The origin of what an operator makes of a model; its graph is resized without weights, as a trial."""
        resized: tuple[LayerGraph, Any] = origin.resized(graph, operator, signature)
        return resized

    def write(
        self,
        model: Model,
        like: Any,
        destination: Path,
        progress: Callable[[int], None],
        check: Callable[[Model], None],
    ) -> None:
        """Write an ``.onnx`` file in the form of ``like``."""
        from growkit_onnx.write import write_model

        write_model(self, model, like, destination, progress, check)

    def build(self, model: Model) -> Any:
        """The model as an ``onnx.ModelProto``."""
        import onnx_ir as ir

        from growkit_onnx.read import build

        return ir.to_proto(build(model))

    def forward(self, model: Model, device: str = "auto") -> Forward:
        """A function that runs the model in ONNX Runtime, on ``device``; in torch where weights are given."""
        from growkit_onnx.forward import GraphForward

        return GraphForward(model, device)

    def bare(
        self,
        model: Model,
        device: str = "auto",
        *,
        dtype: str = "float32",
        checkpointing: float | None = None,
        compiled: bool = False,
    ) -> BareForward:
        """The model as a function of its inputs and all of its weights, in torch."""
        import torch

        from growkit_onnx.forward import BareGraph
        from growkit_specs import GrowkitError

        if compiled:
            raise GrowkitError("an ONNX graph is not compiled; leave out compile")
        if checkpointing:
            raise GrowkitError("the blocks of an ONNX graph cannot be run again; leave out checkpointing")
        return BareGraph(model, device, getattr(torch, dtype))

    def inputs(self, model: Model, seed: int, forward: Forward) -> Iterator[dict[str, np.ndarray]]:
        """Inputs that exercise a model, at sizes at which it runs."""
        from growkit_onnx.forward import random_inputs

        return random_inputs(model, seed, forward)


__all__ = ["OnnxAdapter"]
