"""Reading: an ONNX file or model becomes a layer graph with lazy weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from growkit.adapters import Adapter
from growkit.model import Growth, LazyWeights, Model
from growkit.operator import GrowthOperator
from growkit_onnx.describe import Description, describe
from growkit_onnx.files import from_proto, load
from growkit_onnx.infer import Scene
from growkit_onnx.normalise import Normalised, normalise
from growkit_onnx.surgery import OutputPolicy, Surgery
from growkit_onnx.trial import Trial, trial
from growkit_specs import GrowkitError, InvalidModel, InvalidTarget, LayerGraph
from growkit_specs.layout import spaces_of

OPERATOR = ".growkit_operator.safetensors"
"""What the name of a grown file's operator ends with; it stands beside the file."""


@dataclass(frozen=True)
class Origin:
    """Where an ONNX model came from, and what was inferred of it.

    Attributes:
        load: Gives the model as it was read.
        model: The normalised model; never changed.
        normalised: What normalising it did.
        scene: What every axis means.
        trial: The runs by which that was found.
        description: Its layer graph, and which initializer holds which tensor.
        path: Its file, where it has one.
        outputs: What becomes of outputs that live in a space that grows.
        kv_cache: What becomes of cached keys and values, whose shapes are part of the signature.
        target: The grown model's graph; None of a model that was read.
        operator: What grows it.
    """

    load: Callable[[], ir.Model]
    model: ir.Model
    normalised: Normalised
    scene: Scene
    trial: Trial
    description: Description
    path: Path | None = None
    outputs: OutputPolicy = "project"
    kv_cache: Literal["grow", "refuse"] = "grow"
    target: LayerGraph | None = None
    operator: GrowthOperator | None = None

    def resized(self, graph: LayerGraph, operator: GrowthOperator) -> Origin:
        """The origin of what an operator makes of this model.

        Raises:
            InvalidTarget: Where the file cannot have these sizes.
        """
        if self.operator is not None:
            raise InvalidTarget("this model was grown in memory; write it and read it again to grow it further")
        for space, size in graph.sizes.items():
            why = self.description.frozen.get(space)
            if size != self.description.graph.sizes[space] and why is not None:
                raise InvalidTarget(f"{space} cannot grow from {self.description.graph.sizes[space]} to {size}: {why}")
        self._refuse_caches(graph)
        grown = replace(self, target=graph, operator=operator)
        grown.surgery().resize()  # the integers are patched, or it is said why they cannot be
        return grown

    @property
    def is_external(self) -> bool:
        """Whether the source's weights lie in a file beside it."""
        return any(isinstance(v.const_value, ir.ExternalTensor) for v in self.model.graph.initializers.values())

    def _refuse_caches(self, graph: LayerGraph) -> None:
        if self.kv_cache == "grow":
            return
        changed = {space for space, size in graph.sizes.items() if size != self.description.graph.sizes[space]}
        for value in self.model.graph.inputs:
            named = [self.description.names.axis(axis) for axis in self.scene.axes(value)]
            grown = {space for axis in named for space in spaces_of(axis)} & changed
            deeper = any(
                value in block.inputs and graph.depths[name] != len(blocks.blocks)
                for name, blocks in self.description.stacks.items()
                for block in blocks.blocks
            )
            if grown or deeper:
                what = ", ".join(sorted(grown)) or "the number of layers"
                raise InvalidTarget(
                    f"the input {value.name} is a cache whose signature changes with {what}; ask for --kv-cache grow, "
                    "or for sizes that leave it"
                )

    def surgery(self) -> Surgery:
        """The surgery that makes the grown model's graph."""
        assert self.target is not None and self.operator is not None
        return Surgery(
            self.model, self.normalised, self.scene, self.description, self.trial, self.operator, self.target, self.outputs
        )


def read_model(adapter: Adapter, source: Any) -> Model:
    """Read an ONNX file or an ``onnx.ModelProto``.

    Raises:
        GrowkitError: Where it is malformed, or nothing in it can grow; one line says what stands in the way.
    """
    path = source if isinstance(source, Path) else None

    def loaded() -> ir.Model:
        return load(path) if path is not None else from_proto(source)

    where = str(path) if path is not None else "the model"
    model = loaded()
    normalised = normalise(model)
    runs = trial(model)
    _refuse_other_ranks(model, runs)
    scene = Scene(model.graph, runs.runs, model.opset_imports.get("", 1))
    description = describe(scene, normalised.ties, where)
    names = {name: values[0] for name, values in description.stored.items()}
    weights = LazyWeights(names, _array)
    origin = Origin(loaded, model, normalised, scene, runs, description, path)
    return Model(description.graph, weights, adapter, origin, _growth_beside(path))


def _refuse_other_ranks(model: ir.Model, trial: Trial) -> None:
    for value in model.graph.outputs:
        given = trial.runs[0].get(value)
        if value.shape is not None and given is not None and len(value.shape) != given.ndim:
            raise InvalidModel(f"the output {value.name} is declared with {len(value.shape)} axes; it has {given.ndim}")


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array


def operator_beside(path: Path) -> Path:
    """The file of the operator that a grown file was made with."""
    return path.with_name(path.name + OPERATOR)


def _growth_beside(path: Path | None) -> Growth | None:
    if path is None or not operator_beside(path).is_file():
        return None
    return Growth(GrowthOperator.load(operator_beside(path)))


def is_model(source: Any) -> bool:
    """Whether a source is an ONNX model in memory."""
    return isinstance(source, onnx.ModelProto)


def build(model: Model) -> ir.Model:
    """A model as an ``ir.Model``; grown weights are made when they are asked for.

    Raises:
        GrowkitError: Where its element types are not those of the file.
    """
    origin: Origin = model.origin
    if origin.operator is None:
        return origin.load()
    before = {tensor.key: tensor.parameter.dtype for tensor in origin.description.graph.tensors()}
    changed = next((t for t in model.graph.tensors() if t.parameter.dtype != before[t.key]), None)
    if changed is not None:
        raise GrowkitError(
            f"an ONNX file keeps its element types, its operators expect them; got {changed.parameter.dtype} for "
            f"{before[changed.key]}; leave --dtype out"
        )
    return origin.surgery().model_with(model.weights)
