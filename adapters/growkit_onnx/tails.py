"""Tails: what comes after the last layer and looks at the stream in a way that growth would change.

An embedding model divides its vector by its length; a head of cosines compares two of them. Nothing of that reads
weights of the stream, so it can be given the stream as it was: where a tail begins, the stream is read back through the
read matrix, and everything behind keeps its size and its meaning. The place is marked by an Identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from growkit_onnx.facts import Facts
from growkit_onnx.rules import READ
from growkit_specs.layout import Leaf, spaces_of


def tails(facts: Facts) -> dict[ir.Value, list[ir.Node]]:
    """The stream's values at which tails begin, and what uses them there."""
    feeding = _feeding_layers(facts)
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in facts.scene.graph:
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            if value is None or node in feeding or not facts.stream.carries(value):
                continue
            if (maker is None or maker in feeding) and not facts.scene.is_only_measured(value):
                found.setdefault(value, []).append(node)
    return found


def _feeding_layers(facts: Facts) -> set[ir.Node]:
    """The nodes that something of the stream's layers is made of: a weight's map, a norm, or a sum."""
    streams = {space.space for space in facts.spaces if isinstance(space, Leaf)}
    anchors = {
        node
        for node, weights in facts.weights_of.items()
        for _, weight in weights
        for axis in facts.scene.axes(weight.stored)
        if streams & set(spaces_of(facts.scene.unifier.resolve(axis)))
    }
    anchors |= {node for norm in facts.norms if facts.stream.carries(norm.source) for node in norm.nodes}
    anchors |= set(facts.sums)
    todo, seen = list(anchors), set(anchors)
    while todo:
        for value in todo.pop().inputs:
            maker = value.producer() if value is not None else None
            if maker is not None and maker not in seen:
                seen.add(maker)
                todo.append(maker)
    return seen


def insert_reads(graph: ir.Graph, found: Mapping[ir.Value, Sequence[ir.Node]]) -> None:
    """Mark where tails begin, each by an Identity of its own."""
    for value, users in found.items():
        node = ir.node("Identity", [value])
        node.name = f"{value.name}.read"
        node.metadata_props[READ] = ""
        (out,) = node.outputs
        out.name, out.type, out.shape = node.name, value.type, value.shape
        graph.insert_before(users[0], node)
        for user in users:
            for index, given in enumerate(user.inputs):
                if given is value:
                    user.replace_input_with(index, out)
