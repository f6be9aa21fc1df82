"""Running an ONNX graph in torch: with numbers, differentiable in its weights, or abstractly, for shapes alone.

Both are one interpreter over one table of operators; what differs is where tensors live. On a real device every number
is computed. On ``meta`` floats have only a shape, while the integers from which graphs compute shapes stay real, so
that an abstract run knows every concrete shape and every concrete target of a Reshape without reading a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from growkit_onnx import attention, fused, operators, spatial
from growkit_onnx.laws import shown
from growkit_onnx.operation import DataDependent, Operation, as_torch, named, run_type, torch_dtype
from growkit_specs import GrowkitError, InvalidModel, UnsupportedModel

__all__ = ["SMALL", "DataDependent", "Executor", "probe", "run_node"]

TABLE = operators.TABLE | spatial.TABLE | attention.TABLE | fused.TABLE

# Constants of at most so many entries keep their numbers in an abstract run: axes, sizes, scales.
SMALL = 64

# What torch and Python raise where the inputs of a node do not fit its operator.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Outputs = tuple[Tensor | None, ...]


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _gathered(inputs: Sequence[Any]) -> list[Any]:
    """The inputs with every tensor on one device: ``meta`` where one is there, else the one that isn't the CPU."""
    devices = {value.device for value in inputs if isinstance(value, Tensor)}
    if len(devices) <= 1:
        return list(inputs)
    device = max(devices, key=lambda device: (device.type == "meta", device.type != "cpu"))
    return [value.to(device) if isinstance(value, Tensor) else value for value in inputs]


def run_node(node: ir.Node, inputs: Sequence[Tensor | None], opset: int, dtype: torch.dtype | None = None) -> Outputs:
    """Run one node, abstractly where one of its inputs is on ``meta``.

    Args:
        node: The node; not one that holds subgraphs.
        inputs: A tensor, or None for what is left out, for each of its inputs.
        opset: The version of the standard operator set.
        dtype: The type in which all floating point runs; None leaves every tensor its own.

    Returns:
        A tensor for each of its outputs; None for one that nothing uses and the handler does not compute.

    Raises:
        UnsupportedModel: For an operator, or a form of one, that is not in the table.
        DataDependent: Where a shape depends on numbers that an abstract run does not have.
        InvalidModel: Where the inputs do not fit the operator.
    """
    entry = TABLE.get((_domain(node), node.op_type))
    if entry is None:
        domain, operator = (shown(text)[1:-1] for text in (node.domain or "ai.onnx", node.op_type))
        raise UnsupportedModel(f"{named(node)}: the operator {operator} of domain {domain} is not known to growkit")
    op = Operation(node, opset, dtype)
    arguments = [op.read(value) if value is not None and i in entry.reads else value for i, value in enumerate(inputs)]
    try:
        found = entry.run(op, *_gathered(arguments))
    except GrowkitError:
        raise
    except MISFITS as error:
        shapes = ", ".join("-" if value is None else str(list(value.shape)) for value in inputs)
        reason = str(error).strip().split("\n")[0]
        raise InvalidModel(f"{named(node)} does not take inputs of shapes {shapes}: {reason}") from error
    outputs: Outputs = found if isinstance(found, tuple) else (found,)
    outputs = (*outputs, *(None,) * len(node.outputs))[: len(node.outputs)]
    for value, tensor in zip(node.outputs, outputs, strict=True):
        if tensor is None and (value.uses() or value.is_graph_output()):
            raise UnsupportedModel(f"{named(node)}: its output '{value.name}' is not supported")
    return outputs


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _used(node: ir.Node) -> Iterator[ir.Value]:
    """What a node needs: its inputs, and what its subgraphs take from around them."""
    yield from (value for value in node.inputs if value is not None)
    for graph in _graphs(node):
        for inner in graph:
            yield from _used(inner)
        yield from graph.outputs


def _last_uses(graph: ir.Graph) -> dict[ir.Node, list[ir.Value]]:
    """For each node, the values computed in the graph that nothing needs once the node has run."""
    computed = {value for node in graph for value in node.outputs}
    pending = computed - set(graph.outputs)
    last: dict[ir.Node, list[ir.Value]] = {}
    for node in reversed(graph):
        done = pending & {*_used(node), *node.outputs}
        pending -= done
        last[node] = list(done)
    return last


class Executor:
    """A graph as a function of its inputs and, where they are given, its weights.

    The graph is read anew in every run, so it may be edited between two of them, and during an abstract one after the
    node that was last run; its initializers are read once.

    Args:
        model: A model, or a graph of one. Functions are to be inlined before.
        device: Where to run; ``meta`` runs abstractly.
        dtype: The type in which all floating point runs, whatever the file says, casts included; None keeps the file's.
    """

    def __init__(
        self, model: ir.Model | ir.Graph, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.graph = model.graph if isinstance(model, ir.Model) else model
        self.device = torch.device(device)
        self.dtype = dtype
        imports = self.graph.opset_imports
        self.opset = imports.get("", imports.get("ai.onnx", 1))
        self._initializers: dict[ir.Value, Tensor] = {}

    def __call__(
        self, inputs: Mapping[str, Tensor | np.ndarray], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            inputs: Tensors or arrays by the names of the graph's inputs.
            weights: Tensors to use in place of initializers, by their names; gradients flow into them.

        Returns:
            The graph's outputs by name.

        Raises:
            GrowkitError: Where inputs are missing, or inputs or weights are named that the graph does not have.
            UnsupportedModel: For an operator that is not in the table, and for loops.
            InvalidModel: Where a node's inputs do not fit it.
        """
        environment = self._start(inputs, weights)
        for _ in self._run(self.graph, environment):
            pass
        return {str(value.name): self.find(value, environment) for value in self.graph.outputs}

    def values(
        self, inputs: Mapping[str, Tensor | np.ndarray], weights: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[ir.Node, Outputs]]:
        """Run the graph one node at a time: each node and its outputs, as soon as they are computed.

        Takes and raises what a call does. Of an If, the nodes of the branch come before the If itself.
        """
        yield from self._run(self.graph, self._start(inputs, weights))

    def _start(
        self, inputs: Mapping[str, Tensor | np.ndarray], weights: Mapping[str, Tensor] | None
    ) -> dict[ir.Value, Tensor]:
        """The values that are known before the first node has run."""
        places = {str(value.name): value for value in self.graph.inputs}
        required = [name for name, value in places.items() if value.const_value is None]
        if (missing := [name for name in required if name not in inputs]) or not places.keys() >= inputs.keys():
            raise GrowkitError(
                f"the graph's inputs are {', '.join(places)}; got {', '.join(inputs) or 'none'}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        environment = {places[name]: self._placed(value) for name, value in inputs.items()}
        for name, value in (weights or {}).items():
            if name not in self.graph.initializers:
                raise GrowkitError(f"a weight is given for '{name}', which is no initializer of the graph")
            environment[self.graph.initializers[name]] = self._placed(value)
        return environment

    def _placed(self, value: Tensor | np.ndarray) -> Tensor:
        """A tensor on the device, in the type in which it is run; in an abstract run, integers stay real."""
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if not tensor.is_floating_point():
            return tensor if self.device.type == "meta" else tensor.to(self.device)
        return tensor.to(self.device, run_type(tensor.dtype, self.dtype))

    def stored(self, tensor: ir.TensorProtocol, where: str) -> Tensor:
        """What the file holds: in an abstract run without its numbers, unless it is small or integer."""
        dtype = torch_dtype(tensor.dtype, where)
        abstract, floating, small = self.device.type == "meta", dtype.is_floating_point, tensor.size <= SMALL
        if abstract and floating and not small:
            return torch.empty(tensor.shape.numpy(), dtype=run_type(dtype, self.dtype), device="meta")
        found = as_torch(tensor, where)
        stays = small and (abstract or not floating)  # small integers on the CPU too, where shapes are computed
        return found.to(run_type(dtype, self.dtype)) if stays else self._placed(found)

    def find(self, value: ir.Value, environment: Mapping[ir.Value, Tensor] = MappingProxyType({})) -> Tensor:
        """A value that is computed, given, or an initializer."""
        if value in environment:
            return environment[value]
        if value not in self._initializers:
            if value.const_value is None:
                raise InvalidModel(
                    f"the value '{value.name}' is used and never computed; expected a node before its use"
                )
            self._initializers[value] = self.stored(value.const_value, f"initializer '{value.name}'")
        return self._initializers[value]

    def _run(self, graph: ir.Graph, environment: dict[ir.Value, Tensor]) -> Iterator[tuple[ir.Node, Outputs]]:
        """Run a graph's nodes in order, keeping in the environment what is still needed, or all that costs nothing."""
        last_uses = {} if self.device.type == "meta" else _last_uses(graph)
        for node in graph:
            if any(_graphs(node)):
                branch = self._branch(node, environment)
                yield from self._run(branch, environment)
                outputs: Outputs = tuple(self.find(value, environment) for value in branch.outputs)
            elif node.op_type == "Constant":
                outputs = (self.stored(operators.constant(node), named(node)),)
            else:
                inputs = [value if value is None else self.find(value, environment) for value in node.inputs]
                outputs = run_node(node, inputs, self.opset, self.dtype)
            environment.update((value, t) for value, t in zip(node.outputs, outputs, strict=True) if t is not None)
            yield node, outputs
            for value in last_uses.get(node, ()):
                environment.pop(value, None)

    def _branch(self, node: ir.Node, environment: Mapping[ir.Value, Tensor]) -> ir.Graph:
        """The branch of an If that its condition chooses."""
        if node.op_type != "If" or _domain(node):
            raise UnsupportedModel(f"{named(node)} runs a subgraph; of the operators that do, only If is supported")
        (condition,) = Operation(node, self.opset).read(self.find(next(_used(node)), environment))
        branch: ir.Graph = node.attributes["then_branch" if condition else "else_branch"].as_graph()
        return branch


def probe(model: ir.Model, inputs: Mapping[str, Tensor]) -> dict[ir.Value, Tensor]:
    """Run a model abstractly: no weight is read, and no float is computed that no shape could depend on.

    Args:
        model: The model.
        inputs: A tensor for each of its inputs: integers real, floats real or on ``meta``.

    Returns:
        Every value's tensor, inputs and initializers included. Integers are real; floats are on ``meta`` unless they
        follow from integers and from constants of at most `SMALL` entries alone.

    Raises:
        DataDependent: Where a shape depends on numbers of floats.
        UnsupportedModel: For an operator that is not in the table, and for loops.
        InvalidModel: Where a node's inputs do not fit it.
    """
    executor = Executor(model, device="meta")
    found = executor._start(inputs, None)
    for _ in executor._run(executor.graph, found):
        pass
    return {value: executor.find(value, found) for value in executor.graph.initializers.values()} | found
