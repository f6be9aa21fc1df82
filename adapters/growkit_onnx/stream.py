"""The residual stream of a graph: where it lives, and which of its values share a basis.

Size and basis are apart. A norm's output has the size of the stream, and entries that mean something else; so have
what an activation makes of the stream, and a branch before its layer scale. Values that are added to each other, or
that only move or scale the stream's entries together, share one basis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from growkit_onnx.infer import Scene
from growkit_onnx.norms import Norm, nodes_of
from growkit_onnx.rules import ELEMENTWISE, NONLINEAR
from growkit_specs.layout import Axis, Leaf

ADDED = frozenset({"Add", "Sub", "Sum", "Where", "Concat", "Mean"})
"""Operators whose inputs must share the basis of their output."""

SCALING = frozenset({"Mul", "Div"})


def residual_spaces(scene: Scene) -> list[Axis]:
    """The spaces that several weights write and several read: a residual stream each, the most used first."""
    _unify_continued(scene)
    reads, writes = _uses(scene)
    found = [leaf for leaf in reads if reads[leaf] >= 2 and writes[leaf] >= 2]
    return sorted(found, key=lambda leaf: -(reads[leaf] + writes[leaf]))


def _uses(scene: Scene) -> tuple[Counter[Axis], Counter[Axis]]:
    """How many weights read a space, and how many write it; tables and vectors apart."""
    reads: Counter[Axis] = Counter()
    writes: Counter[Axis] = Counter()
    for stored, parts in scene.parts.items():
        if _is_table(scene, stored):
            continue
        roles = {role for roles in parts.values() for role in roles}
        if not {"read", "write"} <= roles:
            continue
        for i, axis in enumerate(scene.axes(stored)):
            factors = scene.unifier.factors(axis)
            if len(factors) == 1 and isinstance(factors[0], Leaf) and not scene.is_dynamic(factors[0]):
                (reads if parts.get(i) == {"read"} else writes)[factors[0]] += 1
    return reads, writes


def _unify_continued(scene: Scene) -> None:
    """What an unknown operator gives is the stream that it takes, where weights write to both.

    Growth relies on nothing of that: all that such an operator touches keeps its size.
    """
    _, writes = _uses(scene)
    written = set(writes)
    for node in scene.unknown:
        given, made = node.inputs[0], node.outputs[0]
        if given is not None and {given, made} <= scene.runs[0].keys():
            for a, b in zip(scene.axes(given), scene.axes(made), strict=False):
                pair = {scene.unifier.resolve(a), scene.unifier.resolve(b)}
                if scene.sizes(a) == scene.sizes(b) and pair <= written:
                    scene.unify(a, b)
                    written.add(scene.unifier.resolve(a))


def _is_table(scene: Scene, stored: ir.Value) -> bool:
    return any(node.op_type == "Gather" for node in stored.consumers())


@dataclass
class Stream:
    """Which values carry a residual stream, and in which basis.

    Attributes:
        scene: The graph's axes.
        spaces: The streams' spaces.
        norms: The graph's norms.
        bent: For each basis the operators that are nonlinear in its entries.
    """

    scene: Scene
    spaces: Sequence[Axis]
    norms: Sequence[Norm]
    bent: dict[ir.Value, list[ir.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._same: dict[ir.Value, ir.Value] = {}
        self._leaves = set(self.spaces)
        self._carrying: dict[ir.Value, bool] = {}
        self._flat: set[ir.Value] = set()
        for node in self.scene.graph:
            if self._spreads(node):
                self._flat.update(node.outputs)
        inside = nodes_of(self.norms)
        bent: list[tuple[ir.Value, ir.Node]] = []
        for node in self.scene.graph:
            carrying = [value for value in node.inputs if value is not None and self.carries(value)]
            if node in inside or not carrying or not self.carries(node.outputs[0]):
                bent += [(v, node) for v in carrying if node not in inside and self._bends(node)]
                continue
            divides = node.op_type == "Div" and node.inputs[1] in carrying and node.inputs[0] not in carrying
            if divides or node.op_type in NONLINEAR:
                bent += [(value, node) for value in carrying]
            elif node.op_type in SCALING and self._scales_entries(node):
                roots = self.entrywise_roots(node)
                bent += [(root, node) for root in roots if len(roots) == 1]
            elif self._keeps_basis(node):
                for value in (*carrying[1:], *node.outputs):
                    if self.carries(value):
                        self._unite(carrying[0], value)
        for value, node in bent:
            self.bent.setdefault(self.basis(value), []).append(node)

    def carries(self, value: ir.Value) -> bool:
        """Whether a value that is computed, not stored, lives in a residual stream's space."""
        if value not in self._carrying:
            known = value in self.scene.runs[0] and not self.scene.is_weight(value) and value not in self._flat
            self._carrying[value] = known and self._has_axis(value)
        return self._carrying[value]

    def _has_axis(self, value: ir.Value) -> bool:
        return any(self.scene.unifier.resolve(axis) in self._leaves for axis in self.scene.axes(value))

    def _spreads(self, node: ir.Node) -> bool:
        """Whether a node gives one number for all entries of the stream: a mask that is spread over them."""
        if any(out not in self.scene.runs[0] for out in node.outputs) or not self._has_axis(node.outputs[0]):
            return False
        living = [v for v in node.inputs if v is not None and v in self.scene.runs[0] and self._has_axis(v)]
        if node.op_type in ("Expand", "Tile", "ConstantOfShape"):
            return not living or self._flat.issuperset(living)
        known = node.op_type in ELEMENTWISE | NONLINEAR | _MOVING
        return known and bool(living) and self._flat.issuperset(living)

    def basis(self, value: ir.Value) -> ir.Value:
        """A value that stands for the basis of ``value``."""
        while value in self._same:
            value = self._same[value]
        return value

    def _unite(self, a: ir.Value, b: ir.Value) -> None:
        a, b = self.basis(a), self.basis(b)
        if a is not b:
            self._same[b] = a

    def _scales_entries(self, node: ir.Node) -> bool:
        """Whether a product multiplies each entry of the stream by a factor of its own."""
        lives_there = [
            value
            for value in node.inputs
            if value is not None
            and value in self.scene.runs[0]
            and any(self.scene.unifier.resolve(axis) in self._leaves for axis in self.scene.axes(value))
        ]
        return len(lives_there) > 1

    def entrywise_roots(self, node: ir.Node) -> set[ir.Value]:
        """The stream's values that a node's output is an entry by entry function of: one, of ``x * sigmoid(x)``."""
        roots: set[ir.Value] = set()
        todo, seen = list(node.inputs), set()
        while todo:
            value = todo.pop()
            if value is None or value in seen or not self.carries(value):
                continue
            seen.add(value)
            maker = value.producer()
            if maker is not None and maker.op_type in NONLINEAR | ELEMENTWISE | {"Cast"}:
                todo += maker.inputs
            else:
                roots.add(value)
        return roots

    @staticmethod
    def _keeps_basis(node: ir.Node) -> bool:
        return node.op_type in ADDED | SCALING or node.op_type in _MOVING

    @staticmethod
    def _bends(node: ir.Node) -> bool:
        return node.op_type in NONLINEAR - ELEMENTWISE or node.op_type.startswith("Reduce")


_MOVING = frozenset(
    [
        "Cast",
        "CastLike",
        "Identity",
        "Neg",
        "Dropout",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Expand",
        "Tile",
        "Pad",
        "ReduceMean",
        "ReduceSum",
        "CumSum",
        "ScatterND",
        "ScatterElements",
        "GatherND",
        "GlobalAveragePool",
    ]
)
