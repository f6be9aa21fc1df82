"""Trial runs: a graph run without data at two sizes of its dynamic inputs.

Sizes are primes that no other size of the file has as a factor, so that reshapes never align by chance. A file may say
too little of its inputs (dynamo gives each input a symbol of its own), so looser readings follow where one fails.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import onnx_ir as ir
import torch

from growkit_onnx.execute import probe
from growkit_specs import GrowkitError, UnsupportedModel

_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
_BATCH = (2, 3)
_SHORT = (5, 7)
"""For position tables that are shorter than the primes."""

_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
_DTYPES |= {"INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "BOOL": "bool", "INT16": "int16"}

Dimension = int | str
Reading = Callable[[str, int, Dimension], object]
"""Which dimensions are one: a key for a dimension, given its input's name, its axis and what it is called."""

InputSizes = Mapping[tuple[str, int], int]
"""The size of every dynamic dimension, by the input's name and the axis."""


@dataclass(frozen=True)
class Trial:
    """Runs of a graph without data.

    Attributes:
        graph: The graph.
        runs: Every value's tensor, run by run.
        inputs: What the runs were given.
        reading: Which dynamic dimensions of the inputs are one.
        opaque: The nodes that were not run: only the shapes of what they give are known.
    """

    graph: ir.Graph
    runs: Sequence[Mapping[ir.Value, Any]]
    inputs: Sequence[Mapping[str, torch.Tensor]]
    reading: Reading
    opaque: frozenset[ir.Node]

    def shapes(self, batch: int, lengths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs at a size of the batch, and at sizes of the other dynamic dimensions in turn."""
        sizes = _sized(self.graph, self.reading, batch, lengths)
        return {str(value.name): _shape(value, sizes) for value in _fed(self.graph)}


def trial(model: ir.Model) -> Trial:
    """Run a model without data at two sizes of its dynamic inputs.

    Raises:
        UnsupportedModel: Where no reading of the inputs' dimensions runs; the first reason is told.
    """
    failure: str | None = None
    for reading, sizes in _readings(model):
        try:
            inputs = [_inputs(model, run) for run in sizes]
            probes = [probe(model, given) for given in inputs]
            opaque = frozenset[ir.Node]().union(*(each.opaque for each in probes))
            return Trial(model.graph, [each.values for each in probes], inputs, reading, opaque)
        except UnsupportedModel:
            raise
        except (GrowkitError, RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            failure = failure or str(error).splitlines()[0][:200]
    raise UnsupportedModel(f"the graph does not run at trial sizes of its inputs: {failure}")


def _readings(model: ir.Model) -> Iterator[tuple[Reading, list[InputSizes]]]:
    """The sizes of every input's dimensions in both runs, for each reading of what is dynamic."""
    graph = model.graph
    taken = {size for value in graph.initializers.values() for size in _numbers(value)}
    primes = [p for p in _PRIMES if all(size % p or size == 0 for size in taken)] or list(_PRIMES)
    for choice in (primes, list(_SHORT)):
        for key in (_by_name, _by_axis, _after_cache):
            yield key, [_sized(graph, key, _BATCH[run], choice[run::2]) for run in (0, 1)]


def _numbers(value: ir.Value) -> Iterator[int]:
    for size in value.shape or ():
        if isinstance(size, int):
            yield size


def _by_name(name: str, axis: int, dimension: Dimension) -> object:
    return dimension


def _by_axis(name: str, axis: int, dimension: Dimension) -> object:
    """Batch first, then the sequence: what exporters mean when they name each input's dimensions apart."""
    return ("axis", axis)


_SEQUENCE, _CACHED = ("axis", 1), ("axis", 2)
_TOTAL = "total"
"""A dimension of what was cached and what comes after it."""


def _after_cache(name: str, axis: int, dimension: Dimension) -> object:
    """As by axis, with a mask over the whole length: exporters that name it apart lose that it is a sum."""
    return _TOTAL if "mask" in name and axis == 1 else _by_axis(name, axis, dimension)


def _sized(graph: ir.Graph, key: Reading, batch: int, lengths: Sequence[int]) -> InputSizes:
    """The size of every dynamic dimension of the inputs."""
    sizes: dict[object, int] = {}
    length = cycle(lengths)
    found: dict[tuple[str, int], int] = {}
    sums: list[tuple[tuple[str, int], str]] = []
    totals: list[tuple[str, int]] = []
    for value in _fed(graph):
        for axis, dimension in enumerate(value.shape or ()):
            if isinstance(dimension, int):
                continue
            text = str(dimension.value) if dimension.value is not None else f"{value.name}.{axis}"
            if key is _by_name and not text.replace(".", "_").isidentifier() and _is_sum(text):
                sums.append(((str(value.name), axis), text))
                continue
            which = key(str(value.name), axis, text)
            if which == _TOTAL:
                totals.append((str(value.name), axis))
                continue
            if which not in sizes:
                sizes[which] = batch if axis == 0 else next(length)
            found[str(value.name), axis] = sizes[which]
    for place, text in sums:
        found[place] = _evaluated(text, sizes, lengths[0])
    for place in totals:
        found[place] = sizes.get(_SEQUENCE, lengths[0]) + sizes.get(_CACHED, 0)
    return found


def _is_sum(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True


def _evaluated(text: str, sizes: Mapping[object, int], otherwise: int) -> int:
    """``past_sequence_length + sequence_length`` at the sizes of its names."""
    tree = ast.parse(text, mode="eval").body

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name):
                return sizes.get(name, otherwise)
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.FloorDiv(), right):
                return value(left) // value(right)
        return otherwise

    return value(tree)


def _fed(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that are no initializers."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def _shape(value: ir.Value, sizes: InputSizes) -> tuple[int, ...]:
    return tuple(
        dimension if isinstance(dimension, int) else sizes[str(value.name), axis]
        for axis, dimension in enumerate(value.shape or ())
    )


def _inputs(model: ir.Model, sizes: InputSizes) -> dict[str, torch.Tensor]:
    """Floats without data; ones where integers or truth values are asked for, which every table and mask has."""
    made = {}
    for value in _fed(model.graph):
        shape = _shape(value, sizes)
        if value.dtype is None or value.dtype.name not in _DTYPES:
            raise UnsupportedModel(f"the input {value.name} is of type {value.dtype}; expected numbers")
        dtype = getattr(torch, _DTYPES[value.dtype.name])
        if dtype.is_floating_point:
            made[str(value.name)] = torch.empty(shape, dtype=dtype, device="meta")
        else:
            made[str(value.name)] = torch.ones(shape, dtype=dtype)
    return made
