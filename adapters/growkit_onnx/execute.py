"""Running an ONNX graph in torch: with numbers, differentiable in its weights, or abstractly, for shapes alone.

Both are one interpreter over one table of operators; what differs is where tensors live. On a real device every number
is computed. On ``meta`` floats have only a shape, while the integers from which graphs compute shapes stay real, so
that an abstract run knows every concrete shape and every concrete target of a Reshape without reading a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from growkit_onnx import attention, fused, operators, spatial
from growkit_onnx.laws import shown
from growkit_onnx.operation import (
    DTYPES,
    DataDependent,
    Operation,
    as_numpy,
    as_torch,
    data_type,
    named,
    run_type,
    subgraphs,
    torch_dtype,
    used,
)
from growkit_specs import GrowkitError, InvalidModel, UnsupportedModel

__all__ = ["SMALL", "DataDependent", "Executor", "Probe", "probe", "run_node"]

TABLE = operators.TABLE | spatial.TABLE | attention.TABLE | fused.TABLE

# Constants of at most so many entries keep their numbers in an abstract run: axes, sizes, scales.
SMALL = 64

# The attributes that are a number or a text, and those that are several.
SINGLE = frozenset((ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING))
LISTS = frozenset((ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS))

# What torch and Python raise where the inputs of a node do not fit its operator.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Outputs = tuple[Tensor | None, ...]
Steps = Generator[tuple[ir.Node, Outputs], None, Outputs]


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
    for i in entry.reads - entry.floats:
        given = inputs[i] if i < len(inputs) else None
        if given is not None and given.is_floating_point():
            raise InvalidModel(f"{named(node)}: its input {i} is of type {given.dtype}; expected whole numbers")
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
        if tensor is None and _is_needed(value):
            raise UnsupportedModel(f"{named(node)}: its output '{value.name}' is not supported")
    return outputs


def _alike(node: ir.Node, inputs: Sequence[Tensor | None]) -> Hashable | None:
    """All that a node's outputs follow from; None where that is much, or nothing is abstract."""
    if all(value is None or not value.is_meta for value in inputs):
        return None
    attributes = []
    for name, attribute in node.attributes.items():
        if attribute.is_ref() or attribute.type not in SINGLE | LISTS:
            return None
        value = attribute.value
        attributes.append((name, attribute.type, tuple(value) if attribute.type in LISTS else value))
    given: list[Hashable] = []
    for value in inputs:
        if value is None or value.is_meta:
            given.append(value if value is None else (value.dtype, value.shape, value.stride()))
        elif value.numel() <= SMALL:
            given.append((value.dtype, value.shape, value.device, as_numpy(value).tobytes()))
        else:
            return None
    needed = tuple(_is_needed(value) for value in node.outputs)
    return _domain(node), node.op_type, tuple(sorted(attributes)), tuple(given), needed


def _last_uses(graph: ir.Graph) -> dict[ir.Node, list[ir.Value]]:
    """For each node, the values computed in the graph that nothing needs once the node has run."""
    computed = {value for node in graph for value in node.outputs}
    pending = computed - set(graph.outputs)
    last: dict[ir.Node, list[ir.Value]] = {}
    for node in reversed(graph):
        done = pending & {*used(node), *node.outputs}
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
        self._known: dict[Hashable, Outputs] = {}

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
            outputs = yield from self._outputs(node, environment)
            environment.update((value, t) for value, t in zip(node.outputs, outputs, strict=True) if t is not None)
            yield node, outputs
            for value in last_uses.get(node, ()):
                environment.pop(value, None)

    def _outputs(self, node: ir.Node, environment: dict[ir.Value, Tensor]) -> Steps:
        """What a node gives; on the way, the nodes of the branch that an If takes."""
        if any(subgraphs(node)):
            branch = self._branch(node, environment)
            yield from self._run(branch, environment)
            return tuple(self.find(value, environment) for value in branch.outputs)
        if node.op_type == "Constant":
            return (self.stored(operators.constant(node), named(node)),)
        return self.run(node, [value if value is None else self.find(value, environment) for value in node.inputs])

    def run(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> Outputs:
        """What :func:`run_node` gives; in an abstract run it is computed once for nodes and inputs that are alike.

        Layers repeat, and torch takes much longer over a tensor without numbers than it takes to see that.
        """
        alike = _alike(node, inputs) if self.device.type == "meta" else None
        if alike is None:
            return run_node(node, inputs, self.opset, self.dtype)
        if alike not in self._known:
            self._known[alike] = run_node(node, inputs, self.opset, self.dtype)
        return self._known[alike]

    def _branch(self, node: ir.Node, environment: Mapping[ir.Value, Tensor]) -> ir.Graph:
        """The branch of an If that its condition chooses."""
        if node.op_type != "If" or _domain(node):
            raise UnsupportedModel(f"{named(node)} runs a subgraph; of the operators that do, only If is supported")
        (condition,) = Operation(node, self.opset).read(self.find(next(used(node)), environment))
        branch: ir.Graph = node.attributes["then_branch" if condition else "else_branch"].as_graph()
        return branch


@dataclass(frozen=True)
class Probe:
    """An abstract run.

    Attributes:
        values: Every value's tensor, inputs and initializers included. Integers are real; floats are on ``meta`` unless
            they follow from integers and from constants of at most `SMALL` entries alone.
        opaque: The nodes of which only the shapes of what they give are known.
    """

    values: Mapping[ir.Value, Tensor]
    opaque: frozenset[ir.Node]


def probe(model: ir.Model, inputs: Mapping[str, Tensor]) -> Probe:
    """Run a model abstractly: no weight is read, and no float is computed that no shape could depend on.

    What an operator gives that cannot be run is taken from the shapes that the file or the standard tells.

    Args:
        model: The model.
        inputs: A tensor for each of its inputs: integers real, floats real or on ``meta``.

    Raises:
        DataDependent: Where a shape depends on numbers of floats, or of what cannot be run.
        UnsupportedModel: For an operator that cannot be run where nobody tells the shapes of what it gives.
        InvalidModel: Where a node's inputs do not fit it.
    """
    prober = _Prober(model, device="meta")
    found = prober._start(inputs, None)
    for _ in prober._run(prober.graph, found):
        pass
    return Probe(prober.held() | found, frozenset(prober.opaque))


class _Prober(Executor):
    """An abstract run that goes on behind what it cannot run."""

    def __init__(self, model: ir.Model, device: str) -> None:
        super().__init__(model, device)
        self.opaque: dict[ir.Node, str] = {}

    def held(self) -> dict[ir.Value, Tensor]:
        """The initializers, apart from those of types that torch does not have, which nothing known reads."""
        held = {}
        for value in self.graph.initializers.values():
            try:
                held[value] = self.find(value)
            except UnsupportedModel:
                if not all(node in self.opaque for node in value.consumers()):
                    raise
        return held

    def _outputs(self, node: ir.Node, environment: dict[ir.Value, Tensor]) -> Steps:
        try:
            return (yield from super()._outputs(node, environment))
        except UnsupportedModel as error:
            reason = str(error) if str(error).startswith(named(node)) else f"{named(node)}: {error}"
            self._refuse_malformed(node)
            told = self._told(node, environment)
            if any(tensor is None and _is_needed(value) for value, tensor in zip(node.outputs, told, strict=True)):
                lack = (
                    self._cause(node)
                    or "the file does not tell what shape it gives; shape inference by ONNX Runtime adds that"
                )
                raise type(error)(f"{reason}; {lack}") from None
            self.opaque[node] = reason
            return told

    def _refuse_malformed(self, node: ir.Node) -> None:
        """Refuse a node of the standard whose attributes are not those of its operator."""
        if _domain(node) or not onnx.defs.has(node.op_type, self.opset):
            return
        known = onnx.defs.get_schema(node.op_type, self.opset).attributes
        if odd := sorted(node.attributes.keys() - known.keys()):
            raise InvalidModel(f"{named(node)} has an attribute that the operator does not have, {shown(odd[0])}")
        if lack := sorted(name for name, each in known.items() if each.required and name not in node.attributes):
            raise InvalidModel(f"{named(node)} lacks the attribute '{lack[0]}'")

    def _told(self, node: ir.Node, environment: Mapping[ir.Value, Tensor]) -> Outputs:
        """Tensors without numbers in the shapes that the standard or the file tells of a node's outputs."""
        types = _standard_types(node, environment, self.opset)
        sizes = _named_sizes(environment)
        told: list[Tensor | None] = []
        for value in node.outputs:
            dtype, shape = types.get(str(value.name)) or (value.dtype, _resolved(value.shape, sizes))
            if dtype is None or shape is None or dtype not in DTYPES:
                told.append(None)
            else:
                told.append(torch.empty(shape, dtype=run_type(DTYPES[dtype], self.dtype), device="meta"))
        return tuple(told)

    def _cause(self, node: ir.Node) -> str | None:
        """Why the first of the opaque nodes that a node depends on is one."""
        seen: set[ir.Node] = set()
        todo = [node]
        while todo:
            makers = {maker for value in used(todo.pop()) if (maker := value.producer()) is not None} - seen
            seen |= makers
            todo += makers
        return next((reason for each, reason in self.opaque.items() if each in seen), None)


def _is_needed(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _named_sizes(environment: Mapping[ir.Value, Tensor]) -> dict[str, int]:
    """What the named dimensions of a file measure in a run, where all values that have one agree."""
    found: dict[str, set[int]] = defaultdict(set)
    for value, tensor in environment.items():
        if value.shape is not None and len(value.shape) == tensor.ndim:
            for told, size in zip(value.shape, tensor.shape, strict=True):
                if not isinstance(told, int) and told.value is not None:
                    found[str(told.value)].add(size)
    return {name: sizes.pop() for name, sizes in found.items() if len(sizes) == 1}


def _resolved(shape: ir.Shape | None, sizes: Mapping[str, int]) -> list[int] | None:
    """A shape in numbers; None where one of them is not known."""
    found = [size if isinstance(size, int) else sizes.get(str(size.value), -1) for size in shape or ()]
    return found if shape is not None and -1 not in found else None


def _standard_types(
    node: ir.Node, environment: Mapping[ir.Value, Tensor], opset: int
) -> dict[str, tuple[ir.DataType, list[int]]]:
    """Element types and shapes of a node's outputs where the ONNX standard tells them; none for other operators."""
    given, numbers = {}, {}
    for value in node.inputs:
        if value is None:
            continue
        stored = value.const_value
        if stored is not None:
            given[str(value.name)] = onnx.helper.make_tensor_type_proto(int(stored.dtype), list(stored.shape.numpy()))
            if stored.size <= SMALL:
                numbers[str(value.name)] = ir.to_proto(stored)
        elif value in environment:
            tensor = environment[value]
            dtype = value.dtype if value.dtype is not None else data_type(tensor.dtype)
            given[str(value.name)] = onnx.helper.make_tensor_type_proto(int(dtype), list(tensor.shape))
        else:
            return {}
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, _domain(node))
        imports = [onnx.helper.make_opsetid("", opset)]
        types = onnx.shape_inference.infer_node_outputs(
            schema, ir.to_proto(node), given, numbers, opset_imports=imports
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
        return {}
    found = {}
    for name, each in types.items():
        dims = each.tensor_type.shape.dim
        if each.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[name] = (ir.DataType(each.tensor_type.elem_type), [dim.dim_value for dim in dims])
    return found
