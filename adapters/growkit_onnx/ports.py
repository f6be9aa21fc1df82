"""Inputs and outputs: those that every layer has one of, and what they are in a graph that has grown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx_ir as ir

from growkit_onnx.blocks import Blocks
from growkit_onnx.describe import Description
from growkit_onnx.infer import Scene
from growkit_onnx.names import Names
from growkit_onnx.rules import CONTRIB
from growkit_specs import LayerGraph, LayerPort, Port
from growkit_specs.layout import Axis, spaces_of

_PRODUCTS = ("MatMul", "FusedMatMul", "Einsum")

SourceOf = Callable[[ir.Value], ir.Value]
"""Gives the value of the source that a value is, or is a copy of."""


def with_ports(
    graph: LayerGraph,
    onnx_graph: ir.Graph,
    stacks: Mapping[str, Blocks],
    scene: Scene,
    description: Description,
    source_of: SourceOf = lambda value: value,
) -> LayerGraph:
    """A layer graph with the inputs and outputs of its ONNX graph.

    Args:
        graph: The layer graph.
        onnx_graph: The ONNX graph, which may have grown.
        stacks: Its blocks, by stack.
        scene: The source's axes.
        description: What the source is.
        source_of: What the ONNX graph's values were in the source.
    """
    layers = _Layers(scene, description.names, graph, source_of)
    return graph.model_copy(
        update={
            "inputs": tuple(
                _input(description.graph, value, source_of)
                for value in onnx_graph.inputs
                if value.name not in onnx_graph.initializers
            ),
            "outputs": tuple(_output(graph, description.graph, value, source_of) for value in onnx_graph.outputs),
            "layer_inputs": tuple(
                layers.port(name, role)
                for name, stack in stacks.items()
                for role in zip(*(block.inputs for block in stack.blocks), strict=True)
            ),
            "layer_outputs": tuple(
                layers.port(name, role)
                for name, stack in stacks.items()
                for role in zip(*(block.outputs for block in stack.blocks), strict=True)
            ),
        }
    ).revalidated()


def _input(before: LayerGraph, value: ir.Value, source_of: SourceOf) -> Port:
    """An input's port: that of the source, or of the source's input that it is a copy of."""
    known = {port.name: port for port in before.inputs}
    port = known.get(str(value.name)) or known.get(str(source_of(value).name)) or Port(name=str(value.name))
    return port.model_copy(update={"name": str(value.name)})


def _output(graph: LayerGraph, before: LayerGraph, value: ir.Value, source_of: SourceOf) -> Port:
    """An output's port; one that keeps its size although its space grew is of that space no longer."""
    name = str(value.name)
    known = {port.name: port for port in before.outputs}
    port = known.get(name) or known.get(str(source_of(value).name)) or Port(name=name)
    size = value.shape[-1] if value.shape else None
    if port.space is not None and isinstance(size, int) and size != graph.sizes[port.space]:
        return Port(name=name)
    return port.model_copy(update={"name": name})


class _Layers:
    """What every layer of a stack has one of."""

    def __init__(self, scene: Scene, names: Names, graph: LayerGraph, source_of: SourceOf) -> None:
        self.scene, self.names, self.graph, self.source_of = scene, names, graph, source_of
        self.bases = {
            value: basis
            for attention in scene.attentions
            if (attention.node.domain, attention.node.op_type) != (CONTRIB, "Attention")
            for value, basis in scene.caches(attention.node)
        }

    def port(self, stack: str, values: Sequence[ir.Value]) -> LayerPort:
        """The port of one value in each layer."""
        value = self.source_of(values[0])
        axes = tuple(map(self._axis, self.scene.axes(value)))
        basis = self.bases.get(value) or _basis(value)
        names = tuple(str(each.name) for each in values)
        return LayerPort(stack=stack, names=names, axes=axes, bases=(basis,) if basis else ())

    def _axis(self, axis: Axis) -> str:
        """An axis in the notation; empty where it is not made of spaces."""
        named = self.names.axis(axis)
        spaces = set(spaces_of(named))
        return str(named) if spaces and spaces <= set(self.graph.sizes) else ""


def _basis(value: ir.Value) -> str | None:
    """Whether a value becomes keys, ``k``, whose product with queries a softmax is over; or what it weighs, ``v``."""
    product = next((node for node in _after(value) if node.op_type in _PRODUCTS), None)
    if product is None:
        return None
    return "k" if any(node.op_type == "Softmax" for node in _after(product.outputs[0])) else "v"


def _after(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that a value goes into, up to the next products."""
    todo, seen = [value], set[ir.Node]()
    while todo:
        for node in todo.pop(0).consumers():
            if node not in seen:
                seen.add(node)
                yield node
                if node.op_type not in (*_PRODUCTS, "Shape"):
                    todo += node.outputs
