"""Reading: an ONNX file or model becomes a layer graph with lazy weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from growkit.adapters import Adapter
from growkit.caches import changed
from growkit.example import Example
from growkit.model import Growth, LazyWeights, Model
from growkit.operator import GrowthOperator
from growkit_onnx.describe import Description, describe
from growkit_onnx.files import from_proto, load
from growkit_onnx.infer import Scene
from growkit_onnx.normalise import Normalised, normalise
from growkit_onnx.operation import named
from growkit_onnx.ports import with_ports
from growkit_onnx.surgery import Surgery
from growkit_onnx.tails import insert_reads
from growkit_onnx.trial import Trial, trial
from growkit_specs import InvalidModel, InvalidTarget, LayerGraph, Recipe, Signature, UnsupportedModel
from growkit_specs.recipe import CachePolicy, OutputPolicy

OPERATOR = ".growkit_operator.safetensors"
"""What the name of a grown file's operator ends with; it stands beside the file."""

RECIPE = ".growkit_recipe.yaml"
"""What the name of the recipe ends with that a file was grown by; it stands beside the file."""


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
    kv_cache: CachePolicy = "grow"
    target: LayerGraph | None = None
    operator: GrowthOperator | None = None

    def resized(self, graph: LayerGraph, operator: GrowthOperator, signature: Signature) -> tuple[LayerGraph, Origin]:
        """The graph with the grown file's inputs and outputs, and the origin of what an operator makes of this model.

        Raises:
            InvalidTarget: Where the file cannot have these sizes, element types or this signature.
        """
        if self.operator is not None:
            raise InvalidTarget("this model was grown in memory; write it and read it again to grow it further")
        self._refuse_frozen(graph)
        self._refuse_types(graph)
        policies = {name: policy for name, policy in signature if policy is not None}
        grown = replace(self, target=graph, operator=operator, **policies)
        surgery = grown.surgery()
        surgery.resize()  # the integers are patched, or it is said why they cannot be
        target = with_ports(
            graph, surgery.graph, surgery.stacks, self.scene, self.description, lambda value: surgery.copies[value]
        )
        if grown.kv_cache == "refuse":
            _refuse_caches(changed(self.description.graph, target))
        return target, replace(grown, target=target)

    def initializer(self, tensor: str) -> str:
        """What the model calls the initializer that holds a tensor."""
        name = str(self.description.stored[tensor][0].name)
        return self.normalised.ties.get(name, name)

    @property
    def is_external(self) -> bool:
        """Whether the source's weights lie in a file beside it."""
        weights = (value.const_value for value in self.model.graph.initializers.values())
        own = self.path.name if self.path is not None else None
        return any(isinstance(w, ir.ExternalTensor) and str(w.location) != own for w in weights)

    def _refuse_frozen(self, graph: LayerGraph) -> None:
        for space in self.description.graph.spaces:
            size = graph.sizes[space.name]
            if size != space.size and space.frozen is not None:
                raise InvalidTarget(
                    f"{space.name} cannot grow from {space.size} to {size}: {space.frozen}; to leave it, ask for "
                    f"{space.name}={space.size}"
                )

    def _refuse_types(self, graph: LayerGraph) -> None:
        before = {tensor.key: tensor.parameter.dtype for tensor in self.description.graph.tensors()}
        for tensor in graph.tensors():
            if tensor.parameter.dtype != before.get(tensor.key, tensor.parameter.dtype):
                raise InvalidTarget(
                    f"an ONNX file keeps its element types, its operators expect them; got {tensor.parameter.dtype} "
                    f"for {before[tensor.key]}; leave the dtype out"
                )

    def surgery(self) -> Surgery:
        """The surgery that makes the grown model's graph."""
        assert self.target is not None
        assert self.operator is not None
        return Surgery(
            self.model,
            self.normalised,
            self.scene,
            self.description,
            self.trial,
            self.operator,
            self.target,
            self.outputs,
        )


def read_model(adapter: Adapter, source: Any) -> Model:
    """Read an ONNX file, an ``onnx.ModelProto``, or a torch module beside inputs it runs on, which is exported.

    Raises:
        GrowkitError: Where it is malformed, or nothing in it can grow; one line says what stands in the way.
    """
    if isinstance(source, Example):
        return _read_example(adapter, source)
    if isinstance(source, Path):
        return _read(adapter, partial(load, source), source)
    return _read(adapter, partial(from_proto, source))


def _read_example(adapter: Adapter, example: Example) -> Model:
    """The model of a module; one that computes with the number of its rows may run at the example's sizes only."""
    from growkit_onnx.export import export

    try:
        return _read(adapter, export(example).clone)
    except UnsupportedModel as error:
        try:
            return _read(adapter, export(example, fixed=True).clone)
        except UnsupportedModel:
            raise error from None


def _read(adapter: Adapter, loaded: Callable[[], ir.Model], path: Path | None = None) -> Model:
    where = str(path) if path is not None else "the model"
    model = loaded()
    normalised = normalise(model)
    runs, scene, description = _inferred(model, normalised, where)
    if description.tails:
        insert_reads(model.graph, description.tails)
        runs, scene, description = _inferred(model, normalised, where)
    names = {tensor.name: description.stored[tensor.name][0] for tensor in description.graph.tensors()}
    weights = LazyWeights(names, _array)
    origin = Origin(loaded, model, normalised, scene, runs, description, path)
    return Model(description.graph, weights, adapter, origin, _growth_beside(path))


def _inferred(model: ir.Model, normalised: Normalised, where: str) -> tuple[Trial, Scene, Description]:
    runs = trial(model)
    _refuse_other_ranks(model, runs)
    scene = Scene(model.graph, runs.runs, model.opset_imports.get("", 1), runs.opaque)
    description = _described(model, describe(scene, normalised.ties, where), scene)
    _refuse_unknown(description, scene, where)
    return runs, scene, description


def _described(model: ir.Model, description: Description, scene: Scene) -> Description:
    """A description whose graph tells the file's inputs and outputs, and which spaces cannot grow."""
    graph = with_ports(description.graph, model.graph, description.stacks, scene, description)
    spaces = tuple(s.model_copy(update={"frozen": description.frozen.get(s.name)}) for s in graph.spaces)
    return replace(description, graph=graph.model_copy(update={"spaces": spaces}).revalidated())


def _refuse_unknown(description: Description, scene: Scene, where: str) -> None:
    """Refuse a file in which unknown operators leave nothing to grow."""
    graph = description.graph
    if scene.unknown and not graph.stacks and all(space.frozen for space in graph.spaces):
        (first, *_) = scene.unknown
        raise UnsupportedModel(f"{where}: nothing of it can grow; {named(first)} is not understood")


def _refuse_caches(changes: Mapping[str, Sequence[str]]) -> None:
    if any(changes.values()):
        what = ", ".join(
            [*changes["spaces"], *(["the number of layers"] if changes["inputs"] or changes["outputs"] else [])]
        )
        raise InvalidTarget(
            f"the cached keys and values among the inputs and outputs change with {what}; leave out kv_cache 'refuse', "
            "or ask for sizes that leave them"
        )


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


def recipe_beside(path: Path) -> Path:
    """The file of the recipe that a grown file was made by."""
    return path.with_name(path.name + RECIPE)


def _growth_beside(path: Path | None) -> Growth | None:
    if path is None or not operator_beside(path).is_file():
        return None
    recipe = Recipe.load(recipe_beside(path)) if recipe_beside(path).is_file() else None
    return Growth(GrowthOperator.load(operator_beside(path)), recipe)


def build(model: Model) -> ir.Model:
    """A model as an ``ir.Model``; grown weights are made when they are asked for."""
    origin: Origin = model.origin
    if origin.operator is None:
        return origin.load()
    return origin.surgery().model_with(model.weights)
