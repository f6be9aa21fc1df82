"""What every axis of every value means, found by dataflow alone.

The graph is run twice without data at different sizes of its dynamic inputs (:mod:`growkit_onnx.execute`), which gives
every shape and every shape-computing integer. Then each operator says which axes are one (:mod:`growkit_onnx.rules`).
What no rule understands is never guessed: the spaces it touches are frozen, and the reason is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from growkit_onnx.operation import as_numpy, data_type, named
from growkit_onnx.rules import CONTRIB, MEASURES, Axes, rule_of, unknown
from growkit_specs import InvalidModel, UnsupportedModel
from growkit_specs.layout import Axis
from growkit_specs.unification import ONE, Conflict, Sizes, Unifier

Part = Literal["read", "write", "scale", "shift"]
Run = Mapping[ir.Value, Any]
"""A trial run: every value's tensor; floats without data, integers real."""


def same_in_all(runs: Sequence[Run], value: ir.Value | None) -> np.ndarray | None:
    """The entries of a value that are the same in every run; None where they are not, or not known."""
    if value is None or any(value not in run or run[value].is_meta for run in runs):
        return None
    found = [as_numpy(run[value]) for run in runs]
    same = all(each.shape == found[0].shape and each.tobytes() == found[0].tobytes() for each in found)
    return found[0] if same else None


@dataclass(frozen=True)
class Weight:
    """How a value was made of one stored weight, by operators that only move its entries.

    Attributes:
        stored: The initializer.
        axes: For each axis of the value the axes of the initializer it is made of.
        offset: What was added to every entry on the way (Gemma's ``1 + scale``).
    """

    stored: ir.Value
    axes: tuple[tuple[int, ...], ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Where queries meet keys, and scores meet values.

    Attributes:
        node: The operator; of attention that is spelled out, the product of queries and keys.
        heads: The axis of the query heads.
        kv_heads: The axis of the key and value heads.
        scores: The axis that queries and keys are contracted over.
        values: The entries of one value head.
    """

    node: ir.Node
    heads: Axis
    kv_heads: Axis
    scores: Axis
    values: Axis


@dataclass
class Scene:
    """What is known of a graph's axes, and the equations that rules may state.

    Args:
        graph: The normalised graph.
        runs: Trial runs at different sizes.
        opset: The version of the default operator set.
        opaque: The nodes that the runs went past: what they touch stays as it is.
    """

    graph: ir.Graph
    runs: Sequence[Run]
    opset: int
    opaque: Set[ir.Node] = frozenset()
    unifier: Unifier = field(init=False)
    parts: dict[ir.Value, dict[int, set[Part]]] = field(default_factory=dict)
    attentions: list[Attention] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    unknown: list[ir.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unifier = Unifier(len(self.runs))
        self._axes: dict[ir.Value, Axes] = {}
        self._weights: dict[ir.Value, Weight] = {
            value: Weight(value, tuple((i,) for i in range(len(self.axes(value)))))
            for value in self.graph.initializers.values()
            if value.dtype is not None and value.dtype.is_floating_point() and value in self.runs[0]
        }
        self._node: ir.Node | None = None
        for node in self.graph:
            if node in self.opaque or all(out in self.runs[0] for out in node.outputs if out.name):
                self._node = node
                self._state(node)

    def _state(self, node: ir.Node) -> None:
        """State what an operator says of the axes of what it reads and makes."""
        try:
            (unknown if node in self.opaque else rule_of(node))(self, node)
        except (ValueError, IndexError):  # it runs, but not as the operator is meant
            given = [list(self.runs[0][value].shape) for value in node.inputs if value is not None]
            raise UnsupportedModel(
                f"{named(node)}: inputs of shapes {given} are in no form that is understood"
            ) from None

    # --- looking up --------------------------------------------------------------------------------------------------

    def axes(self, value: ir.Value | None) -> Axes:
        """The axes of a value, in storage order.

        Raises:
            InvalidModel: Where an operator lacks the input that is asked for.
        """
        if value is None:
            node = self._node
            raise InvalidModel(f"{node.op_type if node else 'a node'} ({node.name if node else '?'}) lacks an input")
        if value not in self._axes:
            shapes = zip(*(tuple(run[value].shape) for run in self.runs), strict=True)
            self._axes[value] = tuple(self.unifier.fresh(sizes) for sizes in shapes)
        return self._axes[value]

    def sizes(self, axis: Axis) -> Sizes:
        """An axis's sizes in the trial runs."""
        return self.unifier.sizes(axis)

    def is_dynamic(self, axis: Axis) -> bool:
        """Whether an axis's size depends on the inputs."""
        return self.unifier.is_dynamic(axis)

    def is_empty(self, value: ir.Value) -> bool:
        """Whether a value has no entries."""
        return any(0 in run[value].shape for run in self.runs)

    def dtype(self, value: ir.Value) -> ir.DataType:
        """The element type of a value, whether the file tells it or not."""
        return value.dtype if value.dtype is not None else data_type(self.runs[0][value].dtype)

    def is_only_measured(self, value: ir.Value) -> bool:
        """Whether nothing is asked of a value but its size."""
        users = value.consumers()
        return bool(users) and all(user.op_type in MEASURES for user in users)

    def is_weight(self, value: ir.Value | None) -> bool:
        """Whether a value is a stored weight, or one whose entries were only moved."""
        return value in self._weights

    def weight(self, value: ir.Value) -> Weight:
        """How a value was made of a stored weight."""
        return self._weights[value]

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The entries of a value that are the same in every run; None where they are not, or not known."""
        return same_in_all(self.runs, value)

    # --- equations ---------------------------------------------------------------------------------------------------

    def unify(self, a: Axis, b: Axis) -> None:
        """Two axes are one; where they cannot be, both stay as they are."""
        try:
            self.unifier.unify(a, b)
        except Conflict as conflict:
            self._conflict(conflict, a, b)

    def same(self, a: ir.Value | None, b: ir.Value) -> None:
        """Two values have the same axes."""
        assert a is not None
        for mine, other in zip(self.axes(a), self.axes(b), strict=True):
            self.unify(mine, other)

    def part(self, axis: Axis, start: int, size: int) -> Axis | None:
        """The ``size`` entries of an axis from ``start`` on; None where they are no part of their own."""
        runs = self.unifier.runs
        try:
            rest = self.unifier.split_sum(axis, (start,) * runs)[1] if start else axis
            assert rest is not None
            return self.unifier.split_sum(rest, (size,) * runs)[0]
        except Conflict as conflict:
            self._conflict(conflict, axis)
            return None

    def stride(self, axis: Axis, taken: Axis, step: int, node: ir.Node) -> None:
        """Every ``step``-th entry of an axis: the axis is a product of what is taken and of ``step`` entries."""
        if step > 1 and self.sizes(axis) == tuple(s * step for s in self.sizes(taken)):
            try:
                head, between = self.unifier.split_product(axis, self.sizes(taken))
            except Conflict as conflict:
                return self._conflict(conflict, axis, taken)
            self.unify(head, taken)
            return self.freeze_axis(between, f"entries are taken in turns ({node.name})")
        for each in (axis, taken):
            self.freeze_axis(each, f"entries are taken in steps of {step} ({node.name})")
        return None

    def freeze_axis(self, axis: Axis, reason: str) -> None:
        """An axis must keep its size."""
        self.unifier.freeze(axis, reason)

    def freeze(self, value: ir.Value, reason: str) -> None:
        """All axes of a value must keep their sizes."""
        if value in self.runs[0]:
            for axis in self.axes(value):
                self.freeze_axis(axis, reason)

    def _conflict(self, conflict: Conflict, *axes: Axis) -> None:
        where = f"{self._node.op_type} ({self._node.name})" if self._node is not None else "?"
        self.conflicts.append(f"{where}: {conflict}")
        for axis in axes:
            self.freeze_axis(axis, f"axes that do not fit together at {where}")

    # --- the part a weight plays -------------------------------------------------------------------------------------

    def play(self, value: ir.Value | None, part: Part, read: Iterable[int] = ()) -> None:
        """Say what the axes of a weight do: ``part``, but those at ``read`` are read over."""
        if value is None or value not in self._weights:
            return
        weight = self._weights[value]
        read = set(read)
        parts = self.parts.setdefault(weight.stored, {})
        for i, stored in enumerate(weight.axes):
            for axis in stored:
                parts.setdefault(axis, set()).add("read" if i in read else part)

    def derive(self, source: ir.Value | None, made: ir.Value, order: Sequence[int] | None = None) -> None:
        """``made`` holds the entries of ``source``, its axes in another order."""
        if source is not None and source in self._weights:
            weight = self._weights[source]
            axes = tuple(weight.axes[i] for i in order) if order is not None else weight.axes
            self._weights[made] = Weight(weight.stored, axes, weight.offset)

    def derive_reshaped(self, source: ir.Value | None, made: ir.Value) -> None:
        """``made`` holds the entries of ``source`` in the same order, in another shape."""
        if source is None or source not in self._weights:
            return
        weight = self._weights[source]
        ends = np.cumprod([1, *(self.sizes(axis)[0] for axis in self.axes(source))]).tolist()
        axes, done = [], 1
        for axis in self.axes(made):
            start, done = done, done * self.sizes(axis)[0]
            covered = [i for i, (a, b) in enumerate(itertools.pairwise(ends)) if a < done and b > start]
            axes.append(tuple(j for i in covered for j in weight.axes[i]) if done > start else ())
        self._weights[made] = Weight(weight.stored, tuple(axes), weight.offset)

    def derive_scaled(self, node: ir.Node) -> bool:
        """A weight times a number, or plus one, is still that weight; whether the operator is such a one."""
        weights = [value for value in node.inputs if value is not None and self._is_large(value)]
        others = [value for value in node.inputs if value is not None and value not in weights]
        if len(weights) != 1 or weights[0] not in self._weights or node.op_type not in ("Add", "Sub", "Mul", "Div"):
            return False
        numbers = [self.constant(value) for value in others]
        if not all(number is not None and number.size == 1 for number in numbers) or self._moves_rank(node, weights[0]):
            return False
        weight = self._weights[weights[0]]
        added = float(numbers[0].reshape(-1)[0]) if numbers and node.op_type == "Add" else 0.0  # type: ignore[union-attr]
        self._weights[node.outputs[0]] = Weight(weight.stored, weight.axes, weight.offset + added)
        return True

    def _is_large(self, value: ir.Value) -> bool:
        return any(axis != ONE for axis in self.axes(value))

    def _moves_rank(self, node: ir.Node, weight: ir.Value) -> bool:
        return len(self.axes(weight)) != len(self.axes(node.outputs[0]))

    def attends(self, node: ir.Node, heads: Axis, kv_heads: Axis, scores: Axis, values: Axis) -> None:
        """An operator is a whole attention."""
        self.attentions.append(Attention(node, heads, kv_heads, scores, values))

    # --- what operators' integers say --------------------------------------------------------------------------------

    def slices(self, node: ir.Node) -> dict[int, tuple[int | None, int]]:
        """For each axis that a Slice cuts, where it starts (None where that depends on the inputs), and its step."""
        rank = len(self.axes(node.inputs[0]))
        if len(node.inputs) == 1:
            starts = node.attributes.get_ints("starts", ())
            axes = node.attributes.get_ints("axes", tuple(range(len(starts))))
            steps: Sequence[int] = (1,) * len(starts)
            found: list[int | None] = list(starts)
        else:
            given = [self.constant(value) for value in (*node.inputs[1:5], None, None)][:4]
            (length,) = self.axes(node.inputs[1])
            count = self.sizes(length)[0]
            found = [None] * count if given[0] is None else [int(s) for s in given[0]]
            axes = tuple(range(count)) if given[2] is None else tuple(int(a) for a in given[2])
            steps = (1,) * count if given[3] is None else tuple(int(s) for s in given[3])
        cut: dict[int, tuple[int | None, int]] = {}
        for axis, start, step in zip(axes, found, steps, strict=True):
            size = self.sizes(self.axes(node.inputs[0])[axis % rank])[0]
            if start is not None:
                start = max(start + size, 0) if start < 0 else min(start, size)
            cut[axis % rank] = (start, step)
        return cut

    def reduced(self, node: ir.Node) -> frozenset[int]:
        """The axes that a reduction takes away."""
        rank = len(self.axes(node.inputs[0]))
        axes: Sequence[int] | None = node.attributes.get_ints("axes", None)
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            told = self.constant(node.inputs[1])
            axes = [int(axis) for axis in told] if told is not None else axes
        if axes is None or len(axes) == 0:
            axes = () if node.attributes.get_int("noop_with_empty_axes", 0) else range(rank)
        return frozenset(axis % rank for axis in axes)

    def added_scores(self, node: ir.Node) -> Iterator[ir.Value]:
        """What a fused attention adds to its scores, ``[batch, heads, rows, columns]``."""
        place = {("", "Attention"): 3, (CONTRIB, "GroupQueryAttention"): 10}.get((node.domain, node.op_type), 5)
        value = node.inputs[place] if len(node.inputs) > place else None
        if value is not None and len(self.axes(value)) == 4:
            yield value

    def caches(self, node: ir.Node) -> Iterator[tuple[ir.Value, Literal["k", "v"]]]:
        """The past and present keys and values of a fused attention."""
        first = {("", "Attention"): 4, (CONTRIB, "MultiHeadAttention"): 6, (CONTRIB, "GroupQueryAttention"): 3}
        start = first[node.domain, node.op_type]
        for values in (node.inputs[start : start + 2], node.outputs[1:3]):
            for value, which in zip(values, ("k", "v"), strict=False):
                if value is not None and value in self.runs[0] and not self.is_empty(value):
                    yield value, which  # type: ignore[misc]
