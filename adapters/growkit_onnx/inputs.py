"""What a file's inputs are: tokens, their types and positions, masks of them, images."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from growkit_onnx.infer import Scene
from growkit_onnx.names import Names
from growkit_specs import Port
from growkit_specs.layer_graph import Scalar
from growkit_specs.layout import Axis, Leaf

_MOVING = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Flatten")

_TABLES = {"vocab": "tokens", "token_types": "types", "positions": "positions"}
"""What looks up the rows of a space's table."""

_CALLED = {"mask": "mask", "position": "positions", "token_type": "types", "segment": "types"}
"""What exporters call the inputs that look up no table."""


def input_port(value: ir.Value, scene: Scene, names: Names) -> Port:
    """An input's port, by the table that its entries look up, or by its name; of kind ``values`` where neither tells.

    Args:
        value: The input.
        scene: What every axis means.
        names: The named spaces.
    """
    name, rank = str(value.name), len(value.shape or ())
    if value.dtype is None or rank == 0:
        return Port(name=name)
    if value.dtype.is_floating_point():
        return Port(name=name, kind="image" if _is_image(value) else "values")
    if rank != 2:
        return Port(name=name)
    tables = [names.axis(axis) for axis in looked_up(value, scene)]
    found = {table.space for table in tables if isinstance(table, Leaf)}
    if tables:
        kinds = {_TABLES[space]: space for space in found if space in _TABLES}
        if len(kinds) != 1:
            return Port(name=name)
        ((kind, space),) = kinds.items()
        return Port(name=name, kind=kind, space=space if kind != "positions" else None)
    called = next((kind for part, kind in _CALLED.items() if part in name), "values")
    return Port(name=name, kind=called)


def looked_up(value: ir.Value, scene: Scene) -> Iterator[Axis]:
    """The axes of weights that an input's entries count."""
    for each, user in _uses(value):
        if user.op_type == "Gather" and user.inputs[1] is each and scene.is_weight(user.inputs[0]):
            assert user.inputs[0] is not None
            yield scene.axes(user.inputs[0])[user.attributes.get_int("axis", 0)]


def _uses(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node]]:
    """What an input goes into, moved about but with its entries as they are: the moved value, and its user."""
    todo = [value]
    while todo:
        each = todo.pop()
        for user in each.consumers():
            if user.op_type in _MOVING and user.inputs[0] is each:
                todo.append(user.outputs[0])
            else:
                yield each, user


def image_attributes(graph: ir.Graph) -> dict[str, Scalar]:
    """The size of a graph's images, in pixels, and their channels, as far as the file declares them."""
    shapes = [list(value.shape or ()) for value in graph.inputs if _is_image(value)]
    if len(shapes) != 1:
        return {}
    _, channels, height, width = shapes[0]
    told: dict[str, Scalar] = {"channels": channels} if isinstance(channels, int) else {}
    return told | ({"image_size": height} if isinstance(height, int) and height == width else {})


def _is_image(value: ir.Value) -> bool:
    """Whether a value is four axes of floats that a convolution is over."""
    floats = value.dtype is not None and value.dtype.is_floating_point() and len(value.shape or ()) == 4
    return floats and any(user.op_type == "Conv" and user.inputs[0] is each for each, user in _uses(value))
