"""What a graph's operators do with its weights and its stream: the facts from which layers are made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import onnx_ir as ir

from growkit_onnx.infer import Scene, Weight
from growkit_onnx.names import Names
from growkit_onnx.norms import Norm, find_norms
from growkit_onnx.stream import Stream, residual_spaces
from growkit_specs import UnsupportedModel


class Facts:
    """What is known of a graph before it is taken apart.

    Args:
        scene: What its axes mean.
        ties: For each private copy of an initializer the name of the one it was copied from.
        where: What error messages call the model.

    Raises:
        UnsupportedModel: Where there is no residual stream; what stands in the way is named.
    """

    def __init__(self, scene: Scene, ties: Mapping[str, str], where: str) -> None:
        self.scene = scene
        self.ties = ties
        self.where = where
        self.names = Names(scene)
        self._unify_measured()
        self.norms = list(find_norms(scene))
        self.spaces = residual_spaces(scene)
        if not self.spaces:
            raise UnsupportedModel(
                f"{where}: no residual stream found: no space is written by several weights and read by several"
                f"{self._obstacle()}; growkit grows transformers"
            )
        self.stream = Stream(scene, self.spaces, self.norms)
        self.norm_of = {node: norm for norm in self.norms for node in norm.nodes}
        self.order = {node: i for i, node in enumerate(scene.graph)}
        self.readers: dict[ir.Value, ir.Node] = {}
        self.weights_of: dict[ir.Node, list[tuple[ir.Value, Weight]]] = {}
        for node in scene.graph:
            for value in node.inputs:
                if value is not None and scene.is_weight(value) and not scene.is_weight(node.outputs[0]):
                    weight = scene.weight(value)
                    self.weights_of.setdefault(node, []).append((value, weight))
                    self.readers[weight.stored] = node

    def _unify_measured(self) -> None:
        """A copy of a table that is only asked for its size is what the copy that is read is."""
        read: dict[str, ir.Value] = {}
        measured: list[ir.Value] = []
        for stored in self.scene.parts:
            node = next(iter(stored.consumers()), None)
            if node is not None and self.scene.is_only_measured(node.outputs[0]):
                measured.append(stored)
            else:
                read.setdefault(self.origin(stored), stored)
        for stored in measured:
            for a, b in zip(
                self.scene.axes(stored), self.scene.axes(read.get(self.origin(stored), stored)), strict=True
            ):
                self.scene.unify(a, b)

    def origin(self, stored: ir.Value) -> str:
        """The name of the initializer that a stored weight is, or is a private copy of."""
        return self.ties.get(str(stored.name), str(stored.name))

    def _obstacle(self) -> str:
        unknown = [reason for reason in self.scene.unifier.reasons() if reason.startswith("the operator")]
        return f"; {unknown[0]} is not understood" if unknown else ""

    def position(self, norm: Norm) -> str:
        """``pre`` where readers see the output, ``post`` where it is the stream, ``branch`` where it is added to it."""
        if not self.stream.carries(norm.output) or self.basis(norm.output) not in self.main:
            return "pre"
        adders = [node for node in norm.output.consumers() if node.op_type == "Add"]
        for adder in adders:
            other = next((v for v in adder.inputs if v is not norm.output), None)
            if other is not None and self.stream.carries(other) and not self.descends(other, norm.output):
                return "branch"
        return "post"

    def descends(self, value: ir.Value, ancestor: ir.Value) -> bool:
        """Whether a value is made of another one."""
        seen, todo = set(), [value]
        while todo:
            each = todo.pop()
            if each is ancestor:
                return True
            node = each.producer()
            if node is not None and node not in seen and self.order[node] >= self._order_of(ancestor):
                seen.add(node)
                todo += [given for given in node.inputs if given is not None]
        return False

    def _order_of(self, value: ir.Value) -> int:
        node = value.producer()
        return self.order[node] if node is not None else -1

    def basis(self, value: ir.Value) -> ir.Value:
        """A value that stands for the basis of ``value``."""
        return self.stream.basis(value)

    @cached_property
    def sums(self) -> list[ir.Node]:
        """Where two of the stream's values are added."""
        return [
            node
            for node in self.scene.graph
            if node.op_type == "Add"
            and node not in self.norm_of
            and all(value is not None and self.stream.carries(value) for value in node.inputs)
        ]

    @cached_property
    def main(self) -> set[ir.Value]:
        """The bases of the streams themselves: those of their sums."""
        return {self.basis(node.outputs[0]) for node in self.sums}

    def writes(self, node: ir.Node) -> bool:
        """Whether an operator maps something into the stream by a weight."""
        parts = (self.scene.parts.get(weight.stored, {}).values() for _, weight in self.weights_of.get(node, ()))
        maps = any("read" in role for weight in parts for role in weight)
        return maps and any(self.stream.carries(out) for out in node.outputs)

    def norm_before(self, value: ir.Value) -> Norm | None:
        """The norm whose output a value of the stream is; None where it is the stream itself, or something else."""
        carries, basis = self.stream.carries, self.basis(value)
        if basis in self.main:
            return None
        return next((n for n in self.norms if carries(n.output) and self.basis(n.output) is basis), None)

    def is_float(self, value: ir.Value) -> bool:
        """Whether a value holds floats."""
        return value in self.scene.runs[0] and self.scene.runs[0][value].dtype.is_floating_point
