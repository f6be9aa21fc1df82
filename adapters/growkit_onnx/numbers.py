"""The numbers that values are multiplied by on their way: of scores, of what tables give, of what a head reads.

They stay in a file whatever grows. A module may compute them from its sizes, and then a larger one has others.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import onnx_ir as ir

from growkit_onnx.infer import Scene

_PASSING = ("Cast", "CastLike", "Identity", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Add")


def multiplier(scene: Scene, node: ir.Node, value: ir.Value) -> float:
    """The number by which a node multiplies all entries of an input; 1 where it does something else with them."""
    if node.op_type in ("FusedMatMul", "Gemm"):
        return node.attributes.get_float("alpha", 1.0)
    if node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and node.inputs[0] is not value):
        return 1.0
    numbers = [scene.constant(other) for other in node.inputs if other is not value]
    number = float(numbers[0].reshape(-1)[0]) if numbers and numbers[0] is not None and numbers[0].size == 1 else 1.0
    return 1 / number if node.op_type == "Div" and number else number


def made_of(
    scene: Scene, value: ir.Value | None, ends: Callable[[ir.Node], bool], passes: Callable[[ir.Value], bool]
) -> float | None:
    """The product of the numbers between a value and the nearest operators before it.

    Args:
        scene: What is known of the graph.
        value: The value.
        ends: Whether an operator is one of those.
        passes: Whether a value may lie on the way.

    Returns:
        The product on the first way that leads there; None where none does.
    """
    seen: set[ir.Node] = set()

    def back(value: ir.Value | None) -> float | None:
        node = value.producer() if value is not None and passes(value) else None
        if node is None or node in seen:
            return None
        seen.add(node)
        if ends(node):
            return 1.0
        for given in node.inputs:
            if given is not None and (before := back(given)) is not None:
                return before * multiplier(scene, node, given)
        return None

    return back(value)


def goes_through(scene: Scene, value: ir.Value) -> float:
    """The product of the numbers that a value is multiplied by before anything else is done with it."""
    factors = []
    while len(users := value.consumers()) == 1:
        (user,) = users
        if user.op_type not in (*_PASSING, "Mul", "Div"):
            break
        factor = multiplier(scene, user, value)
        if factor == 1 and user.op_type not in _PASSING:
            break
        factors.append(factor)
        (value,) = user.outputs[:1]
    return prod(factors)


__all__ = ["goes_through", "made_of", "multiplier"]
