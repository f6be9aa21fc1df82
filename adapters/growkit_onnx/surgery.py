"""The larger graph: blocks cloned, weights exchanged, integers patched, outputs brought back to their shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from growkit.matrices import Matrix
from growkit.operator import GrowthOperator
from growkit_onnx.blocks import Block, Blocks, deepen
from growkit_onnx.describe import Description
from growkit_onnx.infer import Scene
from growkit_onnx.normalise import Normalised, restore
from growkit_onnx.norms import Norm
from growkit_onnx.patch import Resizing
from growkit_onnx.rules import READ
from growkit_onnx.trial import Trial
from growkit_specs import LayerGraph, Tensor
from growkit_specs.layout import Axis, spaces_of
from growkit_specs.recipe import OutputPolicy
from growkit_specs.unification import ONE

Copies = Mapping[ir.Value, ir.Value]
"""For each value of the new graph the value of the source that it is, or is a copy of."""


class Surgery:
    """The larger graph of a model.

    Args:
        source: The normalised source, which is left as it is.
        normalised: What normalising it did.
        scene: Its axes.
        description: Its layer graph.
        trial: How it was run to infer them.
        operator: The growth operator.
        target: The larger model's layer graph.
        outputs: Whether outputs that live in a grown space are brought back (``project``), or grow.
    """

    def __init__(
        self,
        source: ir.Model,
        normalised: Normalised,
        scene: Scene,
        description: Description,
        trial: Trial,
        operator: GrowthOperator,
        target: LayerGraph,
        outputs: OutputPolicy = "project",
    ) -> None:
        self.source, self.normalised, self.scene, self.description = source, normalised, scene, description
        self.trial, self.operator, self.target, self.outputs = trial, operator, target, outputs
        self.model = source.clone()
        self.graph = self.model.graph
        self.patches = 0
        same = dict(zip(_values(source.graph), _values(self.graph), strict=True))
        self._new = same
        nodes = dict(zip(source.graph, self.graph, strict=True))
        self.copies: dict[ir.Value, ir.Value] = {new: old for old, new in same.items()}
        self._tied: dict[str, list[str]] = defaultdict(list)
        for _, layer in target.walk():
            for parameter in layer.parameters:
                if parameter.tied_to is not None:
                    self._tied[parameter.tied_to].append(parameter.name)
        self.stacks: dict[str, Blocks] = {}
        for name, blocks in description.stacks.items():
            mine = _translated(blocks, same, nodes)
            self.stacks[name], copied = deepen(self.graph, mine, operator.layer_map(name))
            self.copies.update({new: self.copies[old] for new, old in copied.items()})

    def model_with(self, weights: Mapping[str, np.ndarray]) -> ir.Model:
        """The larger model.

        Args:
            weights: Its tensors by name, made when they are asked for.

        Raises:
            InvalidTarget: Where the graph cannot have these sizes.
        """
        self.resize(weights)
        restore(self.model, self.normalised)
        return self.model

    def resize(self, weights: Mapping[str, np.ndarray] = MappingProxyType({})) -> None:
        """Bring the graph to the target's sizes; no weight is made.

        Raises:
            InvalidTarget: Where it cannot have them.
        """
        grown = self._exchange_weights(weights)
        self._patch_epsilons()
        self._read_back()
        resizing = Resizing(
            self.graph,
            self.scene,
            self.description.names,
            self.target.sizes,
            self.copies,
            self.trial.inputs,
            frozenset(grown),
        )
        self.patches += resizing.patched()
        self._show_shapes(resizing)
        if self.outputs == "project":
            self._project_outputs(resizing)

    # --- weights -----------------------------------------------------------------------------------------------------

    def holders(self, tensor: Tensor) -> list[ir.Value]:
        """The initializers of the new graph that hold a tensor."""
        stored = self.description.slots[tensor.key]
        if tensor.stack is None:
            names = [tensor.name, *self._tied[tensor.name]]
            return [self._new[value] for name in names for value in self.description.stored[name]]
        place = self.description.stacks[tensor.stack].blocks[0].weights.index(stored)
        blocks = self.stacks[tensor.stack].blocks
        return [blocks[layer].weights[place] for layer in self.target.layers_of(tensor) if layer is not None]

    def _exchange_weights(self, weights: Mapping[str, np.ndarray]) -> list[ir.Value]:
        found = []
        for tensor in self.target.tensors():
            for value in self.holders(tensor):
                assert value.const_value is not None
                value.const_value = _lazy(weights, tensor, value)
                value.shape = ir.Shape(tensor.shape)
                found.append(value)
        return found

    # --- norms -------------------------------------------------------------------------------------------------------

    def _patch_epsilons(self) -> None:
        before = {
            f"{stack.name if stack else ''}/{layer.name}": layer for stack, layer in self.description.graph.walk()
        }
        for stack, layer in self.target.walk():
            key = f"{stack.name if stack else ''}/{layer.name}"
            if key not in self.description.norms:
                continue
            ratio = _epsilon(layer.attributes["epsilon"]) / (_epsilon(before[key].attributes["epsilon"]) or 1.0)
            if ratio == 1:
                continue
            norms = self.description.norms[key]
            for t, j in enumerate(self.operator.layer_map(stack.name) if stack else [0]):
                self._patch_epsilon(norms[j], ratio, self.stacks[stack.name].blocks[t] if stack else None)

    def _patch_epsilon(self, norm: Norm, ratio: float, block: Block | None) -> None:
        source, index = norm.epsilon_at
        node = self._node_of(source, block)
        epsilon = norm.epsilon * ratio
        self.patches += 1
        if index is None:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
            return
        number = self.scene.constant(source.inputs[index])
        assert number is not None
        name = f"{node.name}_epsilon"
        array = np.full_like(number, epsilon)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        value.type = ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]
        self.graph.register_initializer(value)
        node.replace_input_with(index, value)

    def _node_of(self, source: ir.Node, block: Block | None) -> ir.Node:
        """The node of the new graph, or of one of its blocks, that is or copies a node of the source."""
        out = source.outputs[0]
        node = (
            self._new[out].producer()
            if block is None
            else next(node for node in block.nodes if self.copies[node.outputs[0]] is out)
        )
        assert node is not None
        return node

    # --- inputs and outputs ------------------------------------------------------------------------------------------

    def _show_shapes(self, resizing: Resizing) -> None:
        """Sizes that grew show in the signature; what was noted of inner values is dropped."""
        for node in self.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
        for value in (*self.graph.inputs, *self.graph.outputs):
            if value.shape is not None and resizing.source(value) in self.scene.runs[0]:
                predicted = resizing.predicted(value, 0)
                value.shape = ir.Shape(
                    [new if isinstance(old, int) else old for old, new in zip(value.shape, predicted, strict=True)]
                )

    def _project_outputs(self, resizing: Resizing) -> None:
        for index, value in enumerate(list(self.graph.outputs)):
            source = resizing.source(value)
            port = next((p for p in self.target.outputs if p.name == source.name), None)
            for at, axis in enumerate(resizing.axes(value)):
                named = self.description.names.axis(axis)
                if axis != ONE and self._grows(named) and not self._is_cache(named):
                    matrix = self._read_matrix(named, port.through if port is not None else None)
                    value = self._projected(index, value, at, matrix)

    def _read_back(self) -> None:
        """Where a tail begins the stream is read back; where it does not grow, nothing is left of the mark."""
        for node in [node for node in self.graph if READ in node.metadata_props]:
            (value,), (out,) = node.inputs, node.outputs
            assert value is not None
            axes = [self.description.names.axis(axis) for axis in self.scene.axes(self.copies[value])]
            at = next((i for i, named in enumerate(axes) if self._grows(named)), None)
            read = value
            if at is not None:
                matrix = self._read_matrix(axes[at], self.description.reads[str(node.name)])
                read = self._times(value, len(axes), at, matrix, str(node.name), before=node)
                self.copies[read] = self.copies[out]
            out.replace_all_uses_with(read)
            self.graph.remove(node, safe=True)

    def _grows(self, named: Axis) -> bool:
        return any(
            space in self.operator.expansions and self.operator.expansions[space].grows for space in spaces_of(named)
        )

    def _is_cache(self, named: Axis) -> bool:
        return not set(spaces_of(named)) & {s.name for s in self.target.spaces if s.kind in ("residual", "pointwise")}

    def _read_matrix(self, named: Axis, through: str | None) -> Matrix:
        spaces = list(spaces_of(named))
        if len(spaces) == 1 and str(named) == spaces[0]:
            return self.operator.read_matrix(spaces[0], through)
        return self.operator.matrix("read", named).mT

    def _projected(self, index: int, value: ir.Value, axis: int, matrix: Matrix) -> ir.Value:
        """An output multiplied with the read matrix along one axis; it keeps its name and gets its shape back."""
        assert value.shape is not None
        name = str(value.name)
        value.name = f"{name}.grown"
        out = self._times(value, len(value.shape), axis, matrix, name)
        out.shape = ir.Shape([matrix.shape[0] if i == axis else size for i, size in enumerate(value.shape)])
        out.name, value.shape = name, None
        self.graph.outputs[index] = out
        self.copies[out] = self.copies[value]
        return out

    def _times(
        self, value: ir.Value, rank: int, axis: int, matrix: Matrix, name: str, before: ir.Node | None = None
    ) -> ir.Value:
        """A value multiplied with a matrix along one axis, by new nodes before another one, or at the end."""
        dtype = self.scene.dtype(self.copies[value])
        entries = matrix.as_matrix().T.astype(dtype.numpy())
        table = ir.Value(name=f"{name}.matrix", const_value=ir.tensor(entries, name=f"{name}.matrix"))
        table.shape, table.type = ir.Shape(entries.shape), ir.TensorType(dtype)
        self.graph.register_initializer(table)
        order = [i for i in range(rank) if i != axis] + [axis]
        moves = order != list(range(rank))
        nodes = [ir.node("Transpose", [value], {"perm": order})] if moves else []
        nodes.append(ir.node("MatMul", [nodes[0].outputs[0] if moves else value, table]))
        if moves:
            nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [order.index(i) for i in range(rank)]}))
        for i, node in enumerate(nodes):
            node.name = node.outputs[0].name = f"{name}.times_{i}"
            node.outputs[0].type = ir.TensorType(dtype)
            if before is None:
                self.graph.append(node)
            else:
                self.graph.insert_before(before, node)
        return nodes[-1].outputs[0]


def _epsilon(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _lazy(weights: Mapping[str, np.ndarray], tensor: Tensor, value: ir.Value) -> ir.LazyTensor:
    """A grown weight that is computed when it is written."""
    assert value.const_value is not None

    def made() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(weights[tensor.name]), name=value.name)

    return ir.LazyTensor(made, dtype=value.const_value.dtype, shape=ir.Shape(tensor.shape), name=value.name)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if value not in set(graph.inputs))
    yield from (value for node in graph for value in node.outputs)


def _translated(blocks: Blocks, values: Mapping[ir.Value, ir.Value], nodes: Mapping[ir.Node, ir.Node]) -> Blocks:
    """The same blocks of a copy of their graph."""

    def each(old: tuple[ir.Value, ...]) -> tuple[ir.Value, ...]:
        return tuple(values[value] for value in old)

    return Blocks(
        tuple(
            Block(
                tuple(nodes[node] for node in block.nodes),
                values[block.entry],
                values[block.exit],
                each(block.weights),
                each(block.inputs),
                each(block.outputs),
            )
            for block in blocks.blocks
        ),
        each(blocks.side),
    )
