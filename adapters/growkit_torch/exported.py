"""Modules that no architecture file knows: exported in memory, and what is inferred mapped back to their parameters.

The exporter keeps every parameter's name and storage order, so the layouts of the exported graph are the module's. Only
names differ where a module shares a tensor: it has several names then, and the graph a parameter for each use.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from growkit.adapters import Adapter, adapters
from growkit.example import Example
from growkit.model import Growth, LazyWeights, Model
from growkit.operator import GrowthOperator
from growkit_specs import (
    GrowkitError,
    InvalidTarget,
    Layer,
    LayerGraph,
    Signature,
    Stack,
    Tensor,
    UnsupportedFormat,
    UnsupportedModel,
)
from growkit_torch.read import as_numpy, shared_names

NUMBER = "{layer}"
"""What stands for a layer's number in the name of a stack's parameter."""


@dataclass(frozen=True)
class ExportedOrigin:
    """Where a model came from that was read by exporting a module; it is its own library.

    Attributes:
        example: The module, the inputs it runs on, and what builds larger ones.
        graph: The layer graph in the names of the module's state.
        exported: The exported model, as the ONNX adapter read it.
        operator: What grows it; None of a model that was read.
    """

    example: Example
    graph: LayerGraph
    exported: Model
    operator: GrowthOperator | None = None

    path = None

    @property
    def module(self) -> Any:
        """The module."""
        return self.example.module

    @property
    def class_name(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    @property
    def library(self) -> ExportedOrigin:
        """What builds its modules: itself."""
        return self

    def resized(self, graph: LayerGraph, operator: GrowthOperator) -> ExportedOrigin:
        """The origin of what an operator makes of this model; the exported graph is resized as a trial.

        Raises:
            InvalidTarget: Where the module cannot have these sizes.
        """
        if self.operator is not None:
            raise InvalidTarget("this model was grown in memory; read the larger module to grow it further")
        for space in self.graph.spaces:
            if graph.sizes[space.name] != space.size and space.frozen is not None:
                raise InvalidTarget(
                    f"{space.name} cannot grow from {space.size} to {graph.sizes[space.name]}: {space.frozen}; to "
                    f"leave it, ask for {space.name}={space.size}"
                )
        same = self.exported.graph.resized(graph.sizes, graph.depths)
        self.exported.adapter.resized(self.exported.origin, same, operator, Signature())
        return replace(self, operator=operator)

    def inputs(self, graph: LayerGraph, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Inputs as the exported graph takes them."""
        adapter = self.exported.adapter
        return adapter.inputs(self.exported, seed, adapter.forward(self.exported, "cpu"))

    def build(self, model: Model, state: Mapping[str, Any], dtype: Any) -> Any:
        """The module, or a larger one with the tensors of ``state``.

        Raises:
            GrowkitError: Where nothing builds larger modules, or what was built does not take the tensors.
        """
        module = copy.deepcopy(self.module) if self.operator is None else self._larger(model.graph, state)
        own = next(module.parameters()).dtype
        return module.to(dtype) if self._runs(module, dtype) else module.to(own)

    def _runs(self, module: Any, dtype: Any) -> bool:
        """Whether a module runs in another type than its own; many make tensors of a type that they name."""
        import torch

        if dtype == next(self.module.parameters()).dtype:
            return True
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in self.example.inputs.items()
        }
        try:
            with torch.no_grad():
                module.to(dtype).eval()(**inputs)
        except RuntimeError:
            return False
        return True

    def _larger(self, graph: LayerGraph, state: Mapping[str, Any]) -> Any:
        if self.example.build is None:
            raise GrowkitError(
                f"nothing says how a larger {self.class_name} is made; give growkit.read a function build, or load the "
                "weights into one: dict(large.weights)"
            )
        module = self.example.build(graph).to(next(iter(state.values())).dtype)
        _fill(module, {**self._carried(module), **self._by_every_name(graph, state)}, graph)
        self._set_epsilons(module, graph)
        return module

    # --- tensors -----------------------------------------------------------------------------------------------------

    def _by_every_name(self, graph: LayerGraph, state: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors under all the names that the module has for them."""
        found = dict(state)
        for alias, name in shared_names(self.module.state_dict()).items():
            if name in state and alias not in found:
                found[alias] = state[name]
        return found

    def _carried(self, module: Any) -> dict[str, Any]:
        """What no layer of the graph holds, as the source has it, where the built module has the same shape for it."""
        own = self.module.state_dict()
        grown = {tensor.name for tensor in self.graph.tensors(tied=True)}
        found = {}
        for name, tensor in module.state_dict().items():
            source = self._source_name(name)
            if source in own and source not in grown and own[source].shape == tensor.shape:
                found[name] = own[source]
        return found

    def _source_name(self, name: str) -> str:
        """The name of what a layer of the larger model was copied from."""
        assert self.operator is not None
        for stack in self.graph.stacks:
            prefixes = {parameter.name.partition(NUMBER)[0] for _, parameter in stack.slots()}
            for prefix in prefixes if not stack.shared else ():
                found = re.fullmatch(rf"{re.escape(prefix)}(\d+)(\..*)", name)
                if found and int(found[1]) < len(self.operator.layer_map(stack.name)):
                    return f"{prefix}{self.operator.layer_map(stack.name)[int(found[1])]}{found[2]}"
        return name

    # --- norms -------------------------------------------------------------------------------------------------------

    def _set_epsilons(self, module: Any, graph: LayerGraph) -> None:
        before = {tensor.key: tensor for tensor in self.graph.tensors()}
        for tensor in graph.tensors():
            source, epsilon = before[tensor.key], tensor.owner.attributes.get("epsilon")
            if tensor.owner.kind == "norm" and epsilon != source.owner.attributes.get("epsilon"):
                holder = module.get_submodule(tensor.name.rpartition(".")[0])
                for attribute in _epsilons(self.module, source):
                    setattr(holder, attribute, epsilon)


def read_example(adapter: Adapter, example: Example) -> Model:
    """Read a module by exporting it.

    Args:
        adapter: The torch adapter.
        example: The module, and inputs it runs on.

    Raises:
        GrowkitError: Where it cannot be exported, nothing in it can grow, or the names of its parameters do not follow
            its layers.
    """
    exported = _read_as_onnx(example)
    module = example.module
    state = module.state_dict()
    graph = _Naming(exported, module).graph()
    weights = LazyWeights({tensor.name: state[tensor.name] for tensor in graph.tensors()}, as_numpy)
    return Model(graph, weights, adapter, ExportedOrigin(example, graph, exported))


def write_onnx(
    model: Model, destination: Path, progress: Callable[[int], None], check: Callable[[Model], None]
) -> None:
    """Write a torch model as an ONNX file.

    Args:
        model: The model.
        destination: The file; nothing appears there unless the whole of it is right.
        progress: Called with the number of bytes written since the last call.
        check: Called with the written model, read back, before it is put in place.

    Raises:
        GrowkitError: Where it cannot be exported or written; nothing is left behind.
    """
    import torch

    inputs = next(iter(model.origin.inputs(model.graph, 0)))
    example = Example.of(model.to_torch(), {name: torch.from_numpy(value) for name, value in inputs.items()})
    exported = replace(_read_as_onnx(example), growth=_told_from(model, destination))
    exported.adapter.write(exported, exported.origin, destination, progress, check)


def _told_from(model: Model, destination: Path) -> Growth | None:
    """How a model was grown, as it is told beside a file: its source's path starts there."""
    growth = model.growth
    if growth is None or growth.recipe is None or model.origin.path is None:
        return growth
    source = os.path.relpath(model.origin.path, destination.parent)
    return replace(growth, recipe=growth.recipe.model_copy(update={"source": source}))


def refuse_directory(origin: ExportedOrigin, destination: Path) -> None:
    """Refuse to write a module that no library would load from a directory.

    Raises:
        UnsupportedFormat: Always.
    """
    raise UnsupportedFormat(
        f"{destination}: no library reads a directory of a {origin.class_name}; name a file OUT.onnx, or save the "
        "state of large.to_torch()"
    )


def _read_as_onnx(example: Example) -> Model:
    try:
        with _without_cache(example.module):
            return adapters()["onnx"].read(example)
    except (KeyError, ImportError) as error:
        raise GrowkitError(f"a module is exported to ONNX for this; install growkit[onnx] ({error})") from None


@contextmanager
def _without_cache(module: Any) -> Iterator[None]:
    """A module whose config asks for it keeps keys and values of earlier tokens, which are no outputs of the model."""
    config = vars(module).get("config")
    if config is None or not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


# --- names -----------------------------------------------------------------------------------------------------------


class _Naming:
    """The exported graph in the names of the module's state."""

    def __init__(self, exported: Model, module: Any) -> None:
        self.exported = exported
        self.module = module
        self.state = module.state_dict()
        self.first = shared_names(self.state)
        self.holders: dict[str, str] = {}
        self.frozen: dict[str, str] = {}
        self.factors = exported.origin.description.factors
        self.is_rotary = exported.origin.description.names.is_divided("head_dim")

    def graph(self) -> LayerGraph:
        told = self.exported.graph
        layers: dict[str, Any] = {
            "stem": self.layers(told.stem, None),
            "stacks": tuple(s.model_copy(update={"layers": self.layers(s.layers, s)}) for s in told.stacks),
            "head": self.layers(told.head, None),
        }
        facts = {
            "architecture": "exported",
            "attributes": {**told.attributes, "class": type(self.module).__name__},
            "spaces": tuple(s.model_copy(update={"frozen": s.frozen or self.frozen.get(s.name)}) for s in told.spaces),
        }
        named = told.model_copy(update=layers | facts).revalidated()
        return _with_own_epsilons(named, self.module)

    def layers(self, layers: Sequence[Layer], stack: Stack | None) -> tuple[Layer, ...]:
        """The layers of a block that hold parameters of the module."""
        return tuple(named for layer in layers if (named := self.layer(layer, stack)).parameters)

    def layer(self, layer: Layer, stack: Stack | None) -> Layer:
        parameters = []
        for parameter in layer.parameters:
            name = self.name(parameter.name, stack)
            if name is None:
                reason = f"the module makes {parameter.name} by itself, which is not in its state"
                self.frozen |= dict.fromkeys(parameter.parsed.spaces, reason)
                continue
            tied = self.holders.get(name)
            own = self.alias(name) if tied else name
            self.holders.setdefault(name, name)
            parameters.append(parameter.model_copy(update={"name": own, "tied_to": tied}))
        return layer.model_copy(update={"parameters": tuple(parameters), "attributes": self.attributes(layer, stack)})

    def attributes(self, layer: Layer, stack: Stack | None) -> dict[str, Any]:
        """A file scales by the numbers in it, a module by what it computes from its sizes.

        A number that is a power of a size is taken for computed; any other stays what it is.
        """
        attributes = {key: value for key, value in layer.attributes.items() if key != "scale"}
        factor = self.factors.get(f"{stack.name if stack is not None else ''}/{layer.name}", 1.0)
        if layer.kind == "attention":
            attributes |= self.scale(factor) | ({"rope": True} if self.is_rotary else {})
        elif factor is not None and (power := _power(factor, self.exported.graph.sizes.get("hidden"), (0.5, -0.5, -1))):
            attributes["hidden_power"] = power
        return attributes

    def scale(self, factor: float | None) -> dict[str, str]:
        """What the module divides its scores by, as attributes."""
        if factor is None:
            self.frozen["head_dim"] = "the module multiplies its attention scores by several numbers"
            return {}
        power = _power(factor, self.exported.graph.sizes.get("head_dim"), (-0.5, -1))
        return {-0.5: {}, -1: {"scale": "head_dim"}}.get(power, {"scale": "none"})

    def name(self, name: str, stack: Stack | None) -> str | None:
        """The first name that the module has for a parameter; None for what it makes by itself.

        Raises:
            UnsupportedModel: Where its layers' names do not follow their numbers.
        """
        layers = range(stack.depth) if stack is not None and not stack.shared else range(1)
        own = [self.exported.origin.initializer(name.replace(NUMBER, str(i))) for i in layers]
        if not self.state.keys() & set(own):
            return None
        plain = name.rstrip("'") if NUMBER in name else own[0]
        if own != [plain.replace(NUMBER, str(i)) for i in layers] or not self.state.keys() >= set(own):
            raise UnsupportedModel(
                f"{type(self.module).__name__}: expected blocks that are numbered from 0 in the names of their "
                f"parameters, got {', '.join(own[:3])}"
            )
        return self.first.get(plain, plain)

    def alias(self, name: str) -> str:
        """Another name of a tensor: one that the module has for it, or one that is made up."""
        own = [alias for alias, first in self.first.items() if first == name and alias not in self.holders]
        alias = own[0] if own else f"{name}'"
        while alias in self.holders:
            alias += "'"
        self.holders[alias] = name
        return alias


def _power(number: float, size: int | None, powers: Sequence[float]) -> float:
    """The power of a size that a number is, as exactly as a file tells it; 0 where it is none of them."""
    found = (power for power in powers if size and math.isclose(number, size**power, rel_tol=1e-5))
    return next(found, 0.0) if number != 1 else 0.0


def _with_own_epsilons(graph: LayerGraph, module: Any) -> LayerGraph:
    """The graph with the epsilons that the module holds; those that it does not hold cannot follow a growth.

    A file holds them in float32.
    """
    own = {
        tensor.key.rpartition("/")[0]: next(iter(_epsilons(module, tensor).values()), None)
        for tensor in graph.tensors(tied=True)
        if tensor.owner.kind == "norm"
    }

    def settled(layers: Sequence[Layer], stack: str) -> tuple[Layer, ...]:
        return tuple(_with_epsilon(layer, own.get(f"{stack}/{layer.name}")) for layer in layers)

    stacks = tuple(s.model_copy(update={"layers": settled(s.layers, s.name)}) for s in graph.stacks)
    update = {"stem": settled(graph.stem, ""), "stacks": stacks, "head": settled(graph.head, "")}
    return graph.model_copy(update=update).revalidated()


def _with_epsilon(norm: Layer, epsilon: float | None) -> Layer:
    """A norm with another epsilon; with none it has no key by which it could be changed."""
    if norm.kind != "norm":
        return norm
    attributes = dict(norm.attributes)
    if epsilon is None:
        attributes.pop("epsilon_key", None)
    else:
        attributes["epsilon"] = epsilon
    return norm.model_copy(update={"attributes": attributes})


def _epsilons(module: Any, tensor: Tensor) -> dict[str, float]:
    """The attributes that hold the epsilon of the norm that a tensor belongs to, and their values."""
    holder = module.get_submodule(tensor.name.rpartition(".")[0])
    epsilon = float(tensor.owner.attributes.get("epsilon") or 0)
    return {
        name: value
        for name, value in vars(holder).items()
        if isinstance(value, float) and math.isclose(value, epsilon, rel_tol=1e-5)
    }


# --- a larger module -------------------------------------------------------------------------------------------------


def _fill(module: Any, state: Mapping[str, Any], graph: LayerGraph) -> None:
    """Load tensors into a module that was built for them.

    Raises:
        GrowkitError: Where it has no such parameter, has others, or has one of another shape.
    """
    own = module.state_dict()
    name = type(module).__name__
    layouts = {tensor.name: tensor.parameter.layout for tensor in graph.tensors()}
    sizes = ", ".join(f"{space} {size}" for space, size in {**graph.sizes, **graph.depths}.items())
    for key, tensor in state.items():
        if key not in own:
            raise GrowkitError(f"the built {name} has no {key} {list(tensor.shape)}; expected a module of {sizes}")
        if own[key].shape != tensor.shape:
            raise GrowkitError(
                f"the built {name} has {key} {list(own[key].shape)}; expected {list(tensor.shape)} "
                f"({layouts.get(key, 'as it was')}), a module of {sizes}"
            )
    missing = next((key for key, _ in module.named_parameters() if key not in state), None)
    if missing is not None:
        raise GrowkitError(
            f"the built {name} has {missing} {list(own[missing].shape)}, for which the source has nothing of that "
            f"shape; expected a module of {sizes}"
        )
    for alias, first in shared_names(own).items():
        if alias in layouts and first in layouts:
            raise GrowkitError(f"the built {name} ties {alias} to {first}; build it with tensors of their own")
    module.load_state_dict({**own, **state})


__all__ = ["ExportedOrigin", "read_example", "refuse_directory", "write_onnx"]
