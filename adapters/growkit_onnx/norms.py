"""Norms in a graph: one operator, or the reduction, root and division that it is spelled out as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from growkit_onnx.infer import Scene, Weight

FUSED: dict[str, Literal["layer", "rms"]] = {
    "LayerNormalization": "layer",
    "RMSNormalization": "rms",
    "SimplifiedLayerNormalization": "rms",
}
DEFAULT_EPSILON = 1e-5
_CASTS = ("Cast", "CastLike", "Identity")


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis of a value.

    Attributes:
        kind: ``layer`` takes out the mean too, ``rms`` does not.
        nodes: The operators it is made of.
        source: What is normalised.
        output: What readers see, scale and shift included.
        epsilon: What is added to the variance, or to the mean square.
        epsilon_at: The operator whose attribute it is, or the operator and the place of its input.
        scale: Its scale, where it has one.
        shift: Its shift, where it has one.
    """

    kind: Literal["layer", "rms"]
    nodes: tuple[ir.Node, ...]
    source: ir.Value
    output: ir.Value
    epsilon: float
    epsilon_at: tuple[ir.Node, int | None]
    scale: Weight | None = None
    shift: Weight | None = None


def find_norms(scene: Scene) -> Iterator[Norm]:
    """Every norm of a graph, in topological order."""
    for node in scene.graph:
        found = _fused(scene, node) if node.op_type in FUSED else _spelled_out(scene, node)
        if found is not None:
            yield found


def _fused(scene: Scene, node: ir.Node) -> Norm | None:
    source, *affine = node.inputs
    scale, shift = (
        scene.weight(value) if value is not None and scene.is_weight(value) else None
        for value in (*affine, None, None)[:2]
    )
    rank = len(scene.axes(node.outputs[0]))
    if source is None or node.attributes.get_int("axis", -1) % rank != rank - 1:
        return None
    epsilon = node.attributes.get_float("epsilon", DEFAULT_EPSILON)
    return Norm(FUSED[node.op_type], (node,), source, node.outputs[0], epsilon, (node, None), scale, shift)


def _spelled_out(scene: Scene, root: ir.Node) -> Norm | None:
    """``x / sqrt(mean(square(x)) + epsilon)``, around its root; ``x`` may be centred first."""
    if not (root.op_type == "Sqrt" or (root.op_type == "Pow" and _scalar(scene, root.inputs[1]) == -0.5)):
        return None
    added = _producer(root.inputs[0], "Add")
    if added is None:
        return None
    place = next((i for i, value in enumerate(added.inputs) if _scalar(scene, value) is not None), None)
    mean = _producer(added.inputs[1 - place], "ReduceMean") if place is not None else None
    square = _producer(mean.inputs[0], "Pow", "Mul") if mean is not None and _over_last(scene, mean) else None
    if square is None or not _is_square(scene, square):
        return None
    assert mean is not None
    assert place is not None
    squared = _before_casts(square.inputs[0])
    centred = _producer(squared, "Sub")
    centre = _producer(centred.inputs[1], "ReduceMean") if centred is not None else None
    is_layer = (
        centred is not None
        and centre is not None
        and _over_last(scene, centre)
        and _before_casts(centre.inputs[0]) is _before_casts(centred.inputs[0])
    )
    source = _before_casts(centred.inputs[0]) if is_layer and centred is not None else squared
    inner = [centred, centre] if is_layer else []
    divided = _division(root, squared)
    if divided is None:
        return None
    nodes = [node for node in (*inner, square, mean, added, root, *divided) if node is not None]
    output, scale, shift, affine = _affine(scene, divided[-1].outputs[0])
    epsilon = _scalar(scene, added.inputs[place])
    assert epsilon is not None
    assert source is not None
    kind: Literal["layer", "rms"] = "layer" if is_layer else "rms"
    return Norm(kind, (*nodes, *affine), source, output, epsilon, (added, place), scale, shift)


def _division(root: ir.Node, divided: ir.Value | None) -> list[ir.Node] | None:
    """The operators by which ``divided`` is divided by a root, or multiplied by its reciprocal."""
    reciprocal = [] if root.op_type == "Sqrt" else [root]
    for user in _users(root.outputs[0]):
        if user.op_type == "Div" and user.inputs[1] is _follow(root.outputs[0], user) and root.op_type == "Sqrt":
            if _before_casts(user.inputs[0]) is divided:
                return [user]
            reciprocal.append(user)
        if user.op_type == "Reciprocal":
            reciprocal.append(user)
    for node in reciprocal:
        for user in _users(node.outputs[0]):
            if user.op_type == "Mul" and any(_before_casts(value) is divided for value in user.inputs):
                return [user] if node is root else [node, user]
    return None


def _affine(scene: Scene, value: ir.Value) -> tuple[ir.Value, Weight | None, Weight | None, list[ir.Node]]:
    """Scale and shift behind a normalised value, and what comes out."""
    found: dict[str, Weight] = {}
    nodes: list[ir.Node] = []
    for op, part in (("Mul", "scale"), ("Add", "shift")):
        users = _users(value)
        weights = [v for v in users[0].inputs if scene.is_weight(v)] if len(users) == 1 else []
        if len(users) == 1 and users[0].op_type == op and len(weights) == 1 and weights[0] is not None:
            node = users[0]
            if len(weights[0].shape or scene.axes(weights[0])) == 0:
                break
            found[part] = scene.weight(weights[0])
            nodes.append(node)
            value = node.outputs[0]
    return value, found.get("scale"), found.get("shift"), nodes


# --- walking -------------------------------------------------------------------------------------------------------


def _scalar(scene: Scene, value: ir.Value | None) -> float | None:
    """The one entry of a constant, or None."""
    found = scene.constant(value) if value is not None and value in scene.runs[0] else None
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def _before_casts(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) is not None and node.op_type in _CASTS:
        value = node.inputs[0]
    return value


def _producer(value: ir.Value | None, *names: str) -> ir.Node | None:
    """The operator that makes a value, casts aside, where it is one of ``names``."""
    value = _before_casts(value)
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in names else None


def _users(value: ir.Value) -> list[ir.Node]:
    """The operators that use a value, casts aside."""
    found: list[ir.Node] = []
    for user in value.consumers():
        found += _users(user.outputs[0]) if user.op_type in _CASTS else [user]
    return found


def _follow(value: ir.Value, user: ir.Node) -> ir.Value | None:
    """The input of ``user`` that is ``value``, casts aside."""
    return next((given for given in user.inputs if _before_casts(given) is value), None)


def _over_last(scene: Scene, node: ir.Node) -> bool:
    return scene.reduced(node) == {len(scene.axes(node.inputs[0])) - 1}


def _is_square(scene: Scene, node: ir.Node) -> bool:
    if node.op_type == "Pow":
        return _scalar(scene, node.inputs[1]) == 2
    return _before_casts(node.inputs[0]) is _before_casts(node.inputs[1])


def nodes_of(norms: Iterable[Norm]) -> frozenset[ir.Node]:
    """The operators of all norms."""
    return frozenset(node for norm in norms for node in norm.nodes)
