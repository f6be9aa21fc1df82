"""Modules that no architecture file knows: exported in memory, and what is inferred mapped back to their parameters.

The exporter keeps every parameter's name and storage order, so the layouts of the exported graph are the module's. Only
names differ where a module shares a tensor: it has several names then, and the graph a parameter for each use.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from growkit.adapters import Adapter, adapters
from growkit.example import Example
from growkit.model import LazyWeights, Model
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
from growkit_specs.layout import Leaf
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
        made: The spaces of tensors that the module makes by itself, and one such tensor for each: its entries would
            be others at another size.
        operator: What grows it; None of a model that was read.
    """

    example: Example
    graph: LayerGraph
    exported: Model
    made: Mapping[str, str]
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
        for space, name in self.made.items():
            if graph.sizes[space] != self.graph.sizes[space]:
                raise InvalidTarget(
                    f"{space} cannot grow from {self.graph.sizes[space]} to {graph.sizes[space]}: the module makes "
                    f"{name} by itself, which is neither a parameter nor a buffer in its state; ask for sizes that keep it"
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
        return module.to(dtype)

    def _larger(self, graph: LayerGraph, state: Mapping[str, Any]) -> Any:
        if self.example.build is None:
            raise GrowkitError(
                f"nothing says how a larger {self.class_name} is made; give growkit.read a function build, or load the "
                "weights into one: dict(large.weights)"
            )
        module = self.example.build(graph)
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
    naming = _Naming(exported, module)
    graph = naming.graph()
    weights = LazyWeights({tensor.name: state[tensor.name] for tensor in graph.tensors()}, as_numpy)
    return Model(graph, weights, adapter, ExportedOrigin(example, graph, exported, naming.made))


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
    exported = replace(_read_as_onnx(example), growth=model.growth)
    exported.adapter.write(exported, exported.origin, destination, progress, check)


def refuse_directory(origin: ExportedOrigin, destination: Path) -> None:
    """Refuse to write a module that no library would load from a directory.

    Raises:
        UnsupportedFormat: Always.
    """
    raise UnsupportedFormat(
        f"{destination}: no library reads a directory of a {origin.class_name}; name a file OUT.onnx, or save the state "
        "of large.to_torch()"
    )


def _read_as_onnx(example: Example) -> Model:
    config = getattr(example.module, "config", None)
    caches = getattr(config, "use_cache", None)
    try:
        if caches:
            config.use_cache = False  # keys and values of earlier tokens are no outputs of the model
        return adapters()["onnx"].read(example)
    except (KeyError, ImportError) as error:
        raise GrowkitError(
            f"a module is exported to ONNX for this, which takes growkit[onnx]; install it ({error})"
        ) from None
    finally:
        if caches:
            config.use_cache = caches


# --- names -----------------------------------------------------------------------------------------------------------


class _Naming:
    """The exported graph in the names of the module's state."""

    def __init__(self, exported: Model, module: Any) -> None:
        self.exported = exported
        self.module = module
        self.state = module.state_dict()
        self.first = shared_names(self.state)
        self.holders: dict[str, str] = {}
        self.made: dict[str, str] = {}
        heads = exported.origin.description.names.leaves("head_dim")
        self.is_rotary = any(len(factors) > 1 or not isinstance(factors[0], Leaf) for factors in heads)

    def graph(self) -> LayerGraph:
        told = self.exported.graph
        named = told.model_copy(
            update={
                "architecture": "exported",
                "attributes": {**told.attributes, "class": type(self.module).__name__},
                "stem": self.layers(told.stem, None),
                "stacks": tuple(s.model_copy(update={"layers": self.layers(s.layers, s)}) for s in told.stacks),
                "head": self.layers(told.head, None),
            }
        ).revalidated()
        return _with_settable_epsilons(named, self.module)

    def layers(self, layers: Sequence[Layer], stack: Stack | None) -> tuple[Layer, ...]:
        """The layers of a block that hold parameters of the module."""
        return tuple(named for layer in layers if (named := self.layer(layer, stack)).parameters)

    def layer(self, layer: Layer, stack: Stack | None) -> Layer:
        parameters = []
        for parameter in layer.parameters:
            name = self.name(parameter.name, stack)
            if name is None:
                self.made |= dict.fromkeys(parameter.parsed.spaces, parameter.name)
                continue
            tied = self.holders.get(name)
            own = self.alias(name) if tied else name
            self.holders.setdefault(name, name)
            parameters.append(parameter.model_copy(update={"name": own, "tied_to": tied}))
        return layer.model_copy(update={"parameters": tuple(parameters), "attributes": self.attributes(layer)})

    def attributes(self, layer: Layer) -> dict[str, Any]:
        """A file scales by the numbers in it, a module by what it computes from its sizes."""
        attributes = {key: value for key, value in layer.attributes.items() if key != "scale"}
        return attributes | ({"rope": True} if layer.kind == "attention" and self.is_rotary else {})

    def name(self, name: str, stack: Stack | None) -> str | None:
        """The first name that the module has for a parameter; None for what it makes by itself.

        Raises:
            UnsupportedModel: Where only some layers have it.
        """
        plain = name.rstrip("'")
        layers = range(stack.depth) if stack is not None and not stack.shared else range(1)
        names = [plain.replace(NUMBER, str(i)) for i in layers]
        missing = [name for name in names if name not in self.state]
        if len(missing) == len(names):
            return None
        if missing:
            raise UnsupportedModel(
                f"{type(self.module).__name__}: no {missing[0]} beside {(set(names) - set(missing)).pop()}; expected "
                "blocks that are numbered from 0 in the names of their parameters"
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


def _with_settable_epsilons(graph: LayerGraph, module: Any) -> LayerGraph:
    """The graph without the epsilon keys of norms whose module holds no epsilon that could follow a growth."""
    fixed = {
        tensor.owner.name
        for tensor in graph.tensors(tied=True)
        if tensor.owner.kind == "norm" and not _epsilons(module, tensor)
    }

    def settled(layers: Sequence[Layer]) -> tuple[Layer, ...]:
        return tuple(
            layer.model_copy(update={"attributes": {k: v for k, v in layer.attributes.items() if k != "epsilon_key"}})
            if layer.name in fixed
            else layer
            for layer in layers
        )

    stacks = tuple(stack.model_copy(update={"layers": settled(stack.layers)}) for stack in graph.stacks)
    update = {"stem": settled(graph.stem), "stacks": stacks, "head": settled(graph.head)}
    return graph.model_copy(update=update).revalidated()


def _epsilons(module: Any, tensor: Tensor) -> list[str]:
    """The attributes that hold the epsilon of the norm that a tensor belongs to."""
    holder = module.get_submodule(tensor.name.rpartition(".")[0])
    epsilon = float(tensor.owner.attributes.get("epsilon") or 0)
    return [
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and math.isclose(value, epsilon, rel_tol=1e-5)
    ]


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
            f"the built {name} has {missing} {list(own[missing].shape)}, which the source has not; expected a module of "
            f"{sizes}"
        )
    for alias, first in shared_names(own).items():
        if alias in layouts and first in layouts:
            raise GrowkitError(f"the built {name} ties {alias} to {first}; build it with tensors of their own")
    module.load_state_dict({**own, **state})


__all__ = ["ExportedOrigin", "read_example", "refuse_directory", "write_onnx"]
