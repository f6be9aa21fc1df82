"""What does not commute with growth: spaces that a computation looks at in a way no growth matrix is known for.

Growth maps a space linearly, and keeps the function where what reads the space sees the same again. A mean over all
entries, a product of two entries, a size that the caller fixes: where such a thing is not part of a norm or of
attention, the space is frozen, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import onnx_ir as ir

from growkit_onnx.facts import Facts
from growkit_onnx.infer import Weight
from growkit_onnx.rules import NONLINEAR
from growkit_specs.layout import Axis, Leaf, spaces_of
from growkit_specs.unification import ONE

Hazard = tuple[Axis, str]
_PRODUCTS = ("MatMul", "FusedMatMul", "Einsum")


def freeze_hazards(facts: Facts) -> None:
    """Freeze every space that something looks at which growth would change."""
    for find in (
        _reductions,
        _contractions,
        _repetitions,
        _stream_products,
        _odd_readers,
        _odd_axes,
        _wide_norms,
        _inputs,
        _buffers,
    ):
        for axis, reason in list(find(facts)):
            if axis != ONE and not facts.scene.is_dynamic(axis):
                facts.scene.freeze_axis(axis, reason)


def _reductions(facts: Facts) -> Iterator[Hazard]:
    """Sums, means and extremes over a space, outside of norms; running sums too."""
    for node in facts.scene.graph:
        if node in facts.norm_of or node.inputs[:1] == (None,):
            continue
        if node.op_type.startswith("Reduce"):
            axes = facts.scene.axes(node.inputs[0])
            yield from ((axes[i], f"{node.op_type} over it ({node.name})") for i in facts.scene.reduced(node))
        elif node.op_type == "CumSum":
            along = facts.scene.constant(node.inputs[1])
            axes = facts.scene.axes(node.inputs[0])
            for axis in axes if along is None else [axes[int(along.reshape(-1)[0])]]:
                yield axis, f"a running sum over it ({node.name})"


def _contractions(facts: Facts) -> Iterator[Hazard]:
    """Products of two activations that sum over a space, apart from queries with keys."""
    scene = facts.scene
    for node in scene.graph:
        if node.op_type not in _PRODUCTS or any(scene.is_weight(value) for value in node.inputs):
            continue
        left, right = (scene.axes(value) for value in node.inputs[:2])
        out = {leaf for axis in scene.axes(node.outputs[0]) for leaf in scene.unifier.leaves(axis)}
        for axis in left:
            leaves = set(scene.unifier.leaves(axis))
            shared = leaves <= {leaf for other in right for leaf in scene.unifier.leaves(other)}
            if leaves and shared and not leaves & out and not facts.names.is_scores(axis):
                yield axis, f"a product of two activations sums over it ({node.name})"


def _repetitions(facts: Facts) -> Iterator[Hazard]:
    """How often a whole axis is repeated, apart from keys and values that are repeated for their queries."""
    unifier, names = facts.scene.unifier, facts.names
    for node in facts.scene.graph:
        sides = (node.inputs[0], node.outputs[0]) if node.op_type == "Tile" else ()
        for mine, other in zip(*map(facts.scene.axes, sides), strict=True):
            own = set(unifier.leaves(mine))
            for factor in unifier.factors(other) if own else ():
                kinds = {names.kinds.get(space) for space in spaces_of(names.axis(factor))}
                if kinds != {"scores"} and not own & set(unifier.leaves(factor)):
                    yield factor, f"a number of repetitions ({node.name})"


def _stream_products(facts: Facts) -> Iterator[Hazard]:
    """Entries of the stream multiplied with each other, or each by a number of its own that is no layer scale."""
    for node in facts.scene.graph:
        if node in facts.norm_of or node.op_type not in ("Mul", "Div"):
            continue
        carrying = [value for value in node.inputs if value is not None and facts.stream.carries(value)]
        scales = [weight for _, weight in facts.weights_of.get(node, ()) if _touches(facts, weight)]
        apart = len(carrying) > 1 and len(facts.stream.entrywise_roots(node)) > 1
        if apart or (carrying and scales and facts.basis(carrying[0]) in facts.main):
            reason = f"entries are multiplied one by one ({node.name})"
            yield from ((axis, reason) for axis in _stream_axes(facts, node))


def _odd_readers(facts: Facts) -> Iterator[Hazard]:
    """Weights that read the stream through anything but a norm."""
    seen = facts.main | {facts.basis(norm.output) for norm in facts.norms if facts.stream.carries(norm.output)}
    for node, weights in facts.weights_of.items():
        reads = any("read" in part for _, w in weights for part in facts.scene.parts.get(w.stored, {}).values())
        for value in node.inputs:
            if reads and value is not None and facts.stream.carries(value) and facts.basis(value) not in seen:
                made = value.producer()
                through = f"{made.op_type} ({made.name})" if made is not None else "an input"
                yield from ((a, f"it is read through {through}") for a in _stream_axes(facts, node))
    for basis, nodes in facts.stream.bent.items():
        for node in nodes:
            if node.op_type in NONLINEAR and basis in facts.main and _reaches_stream(facts, node):
                yield from ((a, f"{node.op_type} ({node.name}) over the stream") for a in _stream_axes(facts, node))


def _odd_axes(facts: Facts) -> Iterator[Hazard]:
    """Weights that have the stream as a part of an axis, or whose axes read and write in turns."""
    scene = facts.scene
    for stored, parts in scene.parts.items():
        axes = scene.axes(stored)
        for axis in axes:
            resolved = scene.unifier.resolve(axis)
            if not isinstance(resolved, Leaf):
                for space in facts.spaces:
                    if isinstance(space, Leaf) and space.space in spaces_of(resolved):
                        yield space, f"the weight {stored.name} has it as a part of an axis"
        sides = [parts.get(i) == {"read"} for i in range(len(axes))]
        if sum(a != b for a, b in pairwise(sides)) > 1:
            reason = f"the weight {stored.name} reads and writes over axes that lie between each other"
            yield from ((axis, reason) for axis in axes)


def _wide_norms(facts: Facts) -> Iterator[Hazard]:
    """Norms over several spaces at once, and norms without a scale that could take back what growth multiplies."""
    for norm in facts.norms:
        last = facts.scene.axes(norm.output)[-1]
        resolve = facts.scene.unifier.resolve
        scaled = () if norm.scale is None else map(resolve, facts.scene.axes(norm.scale.stored))
        if resolve(last) not in scaled:
            yield last, f"a norm without a scale for each entry ({norm.nodes[-1].name})"
        if len(facts.scene.unifier.factors(last)) > 1 and not facts.names.is_named(last):
            yield last, f"a norm over several spaces ({norm.nodes[-1].name})"


def _inputs(facts: Facts) -> Iterator[Hazard]:
    """Sizes that the caller fixes, apart from cached keys and values."""
    for value in facts.scene.graph.inputs:
        if value in facts.scene.runs[0] and facts.stream.carries(value):
            yield from ((axis, f"the input {value.name} has its size") for axis in facts.scene.axes(value))


def _buffers(facts: Facts) -> Iterator[Hazard]:
    """Stored integers, which no matrix grows."""
    for stored in facts.scene.graph.initializers.values():
        is_table = stored.dtype == ir.DataType.BOOL or len(stored.shape or ()) > 1  # a vector may be a shape
        if stored in facts.scene.runs[0] and not facts.is_float(stored) and is_table:
            yield from ((axis, f"the stored integers {stored.name}") for axis in facts.scene.axes(stored))


def _touches(facts: Facts, weight: Weight) -> bool:
    spaces = set(facts.spaces)
    return any(facts.scene.unifier.resolve(axis) in spaces for axis in facts.scene.axes(weight.stored))


def _stream_axes(facts: Facts, node: ir.Node) -> list[Axis]:
    spaces = set(facts.spaces)
    return [
        axis
        for value in node.inputs
        if value is not None and value in facts.scene.runs[0]
        for axis in facts.scene.axes(value)
        if facts.scene.unifier.resolve(axis) in spaces
    ]


def _reaches_stream(facts: Facts, node: ir.Node) -> bool:
    return any(facts.stream.carries(out) for out in node.outputs)
