"""Caches: what the layers of a stack take from call to call and give to the next, in a larger model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np

from growkit.matrices import Array, Matrix
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError, LayerGraph, LayerPort, Port, parse_layout
from growkit_specs.layout import Axis, axis_size, product, spaces_of


def fed(
    source: LayerGraph, target: LayerGraph, operator: GrowthOperator | None, inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """The inputs that mean to the target what ``inputs`` means to the source.

    A layer's cache is that of the source layer it copies, mapped by the matrices that write it.

    Args:
        source: The source.
        target: The target.
        operator: What grew it; None where that is not known, and the inputs stay as they are.
        inputs: The source's inputs by name.

    Raises:
        GrowkitError: Where the target's caches are not the source's, grown.
    """
    if operator is None:
        return dict(inputs)
    cached = {name for port in source.layer_inputs for name in port.names}
    given = {name: array for name, array in inputs.items() if name not in cached}
    for port, grown in _pairs(source.layer_inputs, target.layer_inputs):
        for t, j in enumerate(operator.layer_map(port.stack)):
            given[grown.names[t]] = _written(source, operator, port, np.asarray(inputs[port.names[j]]), t)
    return given


def brought_back(
    source: LayerGraph, target: LayerGraph, operator: GrowthOperator | None, outputs: Mapping[str, Array]
) -> dict[str, Array]:
    """The target's outputs as the source gives them: what every layer has one of by the source's names, in its sizes.

    Args:
        source: The source.
        target: The target.
        operator: What grew it; None where that is not known, and the outputs stay as they are.
        outputs: The target's outputs by name.

    Raises:
        GrowkitError: Where the target's layers do not give what the source's do.
    """
    if operator is None:
        return dict(outputs)
    layered = {name for port in target.layer_outputs for name in port.names}
    found = {name: array for name, array in outputs.items() if name not in layered}
    for port, grown in _pairs(source.layer_outputs, target.layer_outputs):
        copies = operator.layer_map(port.stack)
        for j, name in enumerate(port.names):
            if j in copies:
                t = copies.index(j)
                found[name] = _read(operator, port, np.asarray(outputs[grown.names[t]]), t)
    return found


def changed(source: LayerGraph, target: LayerGraph) -> dict[str, list[str]]:
    """What growth does to caches: new names of ``inputs`` and ``outputs``, and the ``spaces`` that widen them."""
    stream = {space for space, kind in source.kinds.items() if kind in ("residual", "pointwise")}
    ports = [set(_spaces(port)) for port in (*source.layer_inputs, *source.layer_outputs)]
    spaces = set().union(*(spaces for spaces in ports if not spaces & stream))
    return {
        "inputs": _new(source.layer_inputs, target.layer_inputs, target.inputs),
        "outputs": _new(source.layer_outputs, target.layer_outputs, target.outputs),
        "spaces": [name for name, size in source.sizes.items() if name in spaces and size != target.sizes[name]],
    }


def grown_spaces(port: LayerPort, operator: GrowthOperator) -> list[str]:
    """The spaces of a layer port that an operator grows."""
    return [space for space in _spaces(port) if operator.expansions[space].grows]


def _new(source: Sequence[LayerPort], target: Sequence[LayerPort], order: Sequence[Port]) -> list[str]:
    new = {name for port in target for name in port.names} - {name for port in source for name in port.names}
    return [port.name for port in order if port.name in new]


def _pairs(source: Sequence[LayerPort], target: Sequence[LayerPort]) -> Iterator[tuple[LayerPort, LayerPort]]:
    if [(port.stack, port.axes) for port in source] != [(port.stack, port.axes) for port in target]:
        told = ["; ".join(f"{port.names[0]} ({', '.join(port.axes)})" for port in each) for each in (source, target)]
        raise GrowkitError(f"the target's caches are not those of the source: expected {told[0]}, got {told[1]}")
    return zip(source, target, strict=True)


def _written(source: LayerGraph, operator: GrowthOperator, port: LayerPort, array: np.ndarray, t: int) -> np.ndarray:
    """A source layer's cache as target layer ``t`` has it."""
    axes = _axes(port)
    if not axes:
        return array
    normed = any(
        layer.kind == "norm" and parameter.bases == port.bases and set(parameter.parsed.spaces) & set(_spaces(port))
        for _, layer in source.walk()
        for parameter in layer.parameters
    )
    matrix = operator.matrix("seen" if normed else "write", product(*axes), port.bases, f"{port.stack}/{t}")
    return _mapped(matrix, port, array, _sizes(operator, axes, target=True))


def _read(operator: GrowthOperator, port: LayerPort, array: np.ndarray, t: int) -> np.ndarray:
    """What target layer ``t`` gives, in the source's sizes; untouched where it is not in its own."""
    axes = _axes(port)
    if not axes or [array.shape[place] for place in _places(port)] != _sizes(operator, axes, target=True):
        return array
    matrix = operator.matrix("read", product(*axes), port.bases, f"{port.stack}/{t}").mT
    return _mapped(matrix, port, array.astype(np.float64), _sizes(operator, axes, target=False))


def _mapped(matrix: Matrix, port: LayerPort, array: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """An array multiplied by a matrix over all its axes of spaces at once, which have the new ``sizes`` then."""
    last = range(array.ndim - len(sizes), array.ndim)
    moved = np.moveaxis(array, _places(port), last)
    others = moved.shape[: last.start]
    flat = moved.reshape(*others, prod(moved.shape[last.start :]))
    mapped = np.asarray(matrix.apply(flat, last.start)).astype(array.dtype)
    return np.moveaxis(mapped.reshape(*others, *sizes), last, _places(port))


def _places(port: LayerPort) -> list[int]:
    return [place for place, axis in enumerate(port.axes) if axis]


def _axes(port: LayerPort) -> list[Axis]:
    return [parse_layout(f"-> {axis}").axes[0] for axis in port.axes if axis]


def _spaces(port: LayerPort) -> list[str]:
    return list(dict.fromkeys(space for axis in _axes(port) for space in spaces_of(axis)))


def _sizes(operator: GrowthOperator, axes: Sequence[Axis], *, target: bool) -> list[int]:
    sizes = {name: e.write.shape[0 if target else 1] for name, e in operator.expansions.items()}
    return [axis_size(axis, sizes) for axis in axes]
