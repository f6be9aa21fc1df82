"""PyTorch models in and out of the layer graph: ``nn.Module`` objects and model directories."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from growkit.adapters import BareForward, Forward
from growkit.example import Example
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit_specs import InvalidTarget, LayerGraph, Signature


class TorchAdapter:
    """Reads and writes transformers' modules and directories. Importing it imports no framework."""

    name = "torch"
    suffix = ""

    def matches(self, source: Any) -> bool:
        """Whether ``source`` is a directory with a config, a config file, or a module."""
        if isinstance(source, (str, Path)):
            path = Path(source)
            return (path / "config.json").is_file() or (path.suffix == ".json" and path.is_file())
        torch = sys.modules.get("torch")
        module = source.module if isinstance(source, Example) else source
        return torch is not None and isinstance(module, torch.nn.Module)

    def read(self, source: Any) -> Model:
        """The layer graph and lazy weights of a directory, a module, or a module of any kind beside example inputs."""
        from growkit_torch.exported import read_example
        from growkit_torch.read import read_directory, read_module

        if isinstance(source, Example):
            return read_example(self, source)
        return read_directory(self, source) if isinstance(source, Path) else read_module(self, source)

    def graph_like(self, source: Any) -> LayerGraph:
        """The layer graph of a config file, a directory's config, or a module."""
        from growkit_torch.read import read_config

        return read_config(source)

    def resized(
        self, origin: Any, graph: LayerGraph, operator: GrowthOperator, signature: Signature
    ) -> tuple[LayerGraph, Any]:
        """The graph, and the origin of what an operator makes of a model: its config, grown.

        Raises:
            InvalidTarget: Where the config cannot express the sizes, or outputs are to keep theirs.
        """
        if signature.outputs == "project" or signature.kv_cache == "refuse":
            raise InvalidTarget(
                "the outputs and caches of a PyTorch model grow with its config; leave out outputs 'project' and "
                "kv_cache 'refuse', which are for ONNX files"
            )
        return graph, origin.resized(graph, operator)

    def write(
        self,
        model: Model,
        like: Any,
        destination: Path,
        progress: Callable[[int], None],
        check: Callable[[Model], None],
    ) -> None:
        """Write a model directory in the form of ``like``, or an ONNX file where ``destination`` is called so."""
        from growkit_torch.exported import ExportedOrigin, refuse_directory, write_onnx
        from growkit_torch.write import write_directory

        if destination.suffix == ".onnx":
            write_onnx(model, destination, progress, check)
            return
        if isinstance(like, ExportedOrigin):
            refuse_directory(like, destination)
        write_directory(self, model, like, destination, progress, check)

    def build(self, model: Model) -> Any:
        """The model as an ``nn.Module`` of its class, whose tensors are its own: training it touches no other."""
        from growkit_torch.forward import build

        module = build(model)
        for tensor in (
            *module.parameters(),
            *module.buffers(),
        ):  # what did not grow is the source's, or another layer's
            tensor.data = tensor.data.clone()
        return module

    def forward(self, model: Model, device: str = "auto") -> Forward:
        """A function that runs the model in torch, on ``device``."""
        from growkit_torch.forward import ModuleForward

        return ModuleForward(model, device)

    def bare(
        self,
        model: Model,
        device: str = "auto",
        *,
        dtype: str = "float32",
        checkpointing: float | None = None,
        compiled: bool = False,
    ) -> BareForward:
        """The model as a function of its inputs and all of its weights; blocks may be run again for gradients."""
        from growkit_torch.forward import BareModule

        return BareModule(model, device, dtype=dtype, checkpointing=checkpointing, compiled=compiled)

    def inputs(self, model: Model, seed: int, forward: Forward) -> Iterator[dict[str, np.ndarray]]:
        """Inputs that exercise a model."""
        return model.origin.inputs(model.graph, seed)


__all__ = ["TorchAdapter"]
