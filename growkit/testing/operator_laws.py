"""The laws of growth operators."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from growkit.grow import grow
from growkit.matrices import Matrix
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.plan import target_graph
from growkit.reference import reference_forward
from growkit.testing.law import assert_equal, broken
from growkit.testing.memory import memory_model
from growkit.verdict import verdict
from growkit.verify import generated_inputs, verify
from growkit_specs import GrowkitError, InvalidTarget, Layer, LayerGraph, Port, Tensor
from growkit_specs.layout import axis_size, spaces_of

CAUTIOUS = frozenset({"head_dim: attention scores", "positions: rotary"})
"""Conditions by which a verdict may say no although the outputs agree: it does not look inside a query-key norm, and
the reference knows no rotary frequencies that are computed from the positions."""

LOUD_EPSILON = 0.2
"""The least epsilon of a norm under test, so that what a wrong one changes is not lost in rounding."""


def assert_operator_laws(operator: GrowthOperator, graph: LayerGraph) -> tuple[str, ...]:
    """Hold an operator to the laws of growth, on a model of ``graph`` with random weights in float64.

    - *shapes*: every tensor, and the matrix of each of its axes, has the shape that the target's graph says.
    - *dense form*: each matrix applied along any axis is its ``as_matrix()``, and its transpose is adjoint to it.
    - *untouched*: what keeps its size keeps its entries, bit for bit.
    - *repeatable*: the same operator gives the same weights again, in whatever order tensors are asked for.
    - *saved and loaded*: the loaded operator gives the same weights, bit for bit.
    - *verdict*: where it says that the function is kept, the outputs agree to 1e-10; where it does not, they differ.

    Args:
        operator: The operator.
        graph: The graph of the model it grows.

    Returns:
        The laws that could not be tried, each with its reason: *untouched* for an operator that draws every entry anew,
        *verdict* for a graph that :func:`~growkit.reference.reference_forward` does not understand, and where the
        verdict's only complaint is one it makes out of caution.

    Raises:
        AssertionError: For the first law that is broken; one message with the tensor or output, expected and got.
    """
    graph = _audible(graph)
    source = memory_model(graph)
    try:
        target = target_graph(graph, operator)
    except InvalidTarget as error:
        raise broken("shapes", "the operator", "an operator of this graph", error) from error
    _assert_matrices(operator, graph, target)
    weights = _grown(source, operator, target)
    again = _grown(source, operator, target, backwards=True)
    for name, array in weights.items():
        assert_equal("repeatable", name, array, again[name])
    _assert_saved(source, operator, target, weights)
    return (*_untouched(source, operator, target, weights), *_verdict_is_right(source, operator))


def _audible(graph: LayerGraph) -> LayerGraph:
    """The graph in float64, with epsilons large enough to be heard and an output for every head."""

    def louder(layer: Layer) -> Layer:
        epsilon = layer.attributes.get("epsilon")
        if not isinstance(epsilon, float):
            return layer
        return layer.model_copy(update={"attributes": {**layer.attributes, "epsilon": max(epsilon, LOUD_EPSILON)}})

    update: dict[str, Any] = {part: tuple(map(louder, getattr(graph, part))) for part in ("stem", "head")}
    update["stacks"] = tuple(s.model_copy(update={"layers": tuple(map(louder, s.layers))}) for s in graph.stacks)
    update["outputs"] = (*graph.outputs, *_head_ports(graph))
    return graph.model_copy(update=update).with_dtypes(lambda key: "float64")


def _head_ports(graph: LayerGraph) -> Iterator[Port]:
    """What heads write and no port names, because it does not grow: a classifier's labels."""
    named = {port.space for port in graph.outputs}
    for layer in graph.head:
        for space in layer.writes if layer.kind == "head" else ():
            if graph.kinds[space] == "fixed" and space not in named:
                yield Port(name=layer.name, space=space)


def _grown(
    source: Model, operator: GrowthOperator, target: LayerGraph, *, backwards: bool = False
) -> dict[str, np.ndarray]:
    """Every tensor of the target; each has the shape its layout says."""
    weights = grow(source, operator).weights
    tensors = list(target.tensors())
    grown = {}
    for tensor in reversed(tensors) if backwards else tensors:
        try:
            grown[tensor.name] = np.asarray(weights[tensor.name])
        except (GrowkitError, ValueError, KeyError) as error:
            raise broken("shapes", tensor.name, f"shape {list(tensor.shape)}", error) from error
    return grown


def _assert_matrices(operator: GrowthOperator, graph: LayerGraph, target: LayerGraph) -> None:
    """Shapes and dense forms of every space's matrices, and of the matrix of every axis."""
    for key, expansion in operator.expansions.items():
        for side in ("write", "read", "seen"):
            _assert_dense(getattr(expansion, side), f"the {side} matrix of {key}")
    for tensor in target.tensors(tied=True):
        for index, axis in enumerate(tensor.parameter.parsed.axes):
            where = f"{tensor.name}, axis {index} '{axis}'"
            matrix = operator.axis_matrix(tensor, index)
            expected = (axis_size(axis, target.sizes), axis_size(axis, graph.sizes))
            if matrix.shape != expected:
                raise broken("shapes", where, f"a matrix of shape {expected}", matrix.shape)
            _assert_dense(matrix, where)


def _assert_dense(matrix: Matrix, where: str) -> None:
    law, tight = "dense form", 1e-12
    rng = np.random.default_rng(0)
    rows, columns = matrix.shape
    dense = matrix.as_matrix()
    if dense.shape != matrix.shape:
        raise broken(law, where, f"as_matrix() of shape {matrix.shape}", dense.shape)
    for axis in range(3):
        shape = [2, 3, 2]
        shape[axis] = columns
        x = rng.standard_normal(shape)
        expected = np.moveaxis(np.tensordot(dense, x, (1, axis)), 0, axis)
        assert_equal(law, f"{where}, applied along axis {axis}", expected, matrix.apply(x, axis), tight)
    x, y = rng.standard_normal(columns), rng.standard_normal(rows)
    through, back = matrix.apply(x) @ y, x @ matrix.mT.apply(y)
    if not np.isclose(through, back, rtol=1e-10, atol=1e-10):
        raise broken(law, f"the transpose of {where}", f"y^T M x = {through}", f"x^T (M^T y) = {back}")
    assert_equal(law, f"the support of {where}", (dense != 0).any(1), matrix.support)


def _assert_saved(
    source: Model, operator: GrowthOperator, target: LayerGraph, weights: Mapping[str, np.ndarray]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "operator.safetensors"
        operator.save(path)
        loaded = operator.load(path)
    for name, array in _grown(source, loaded, target).items():
        assert_equal("saved and loaded", name, weights[name], array)


def _untouched(
    source: Model, operator: GrowthOperator, target: LayerGraph, weights: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """What keeps its size: the axis has the identity, and a tensor that one source layer alone makes is that one."""
    law = "untouched"
    if operator.fresh.anew:
        yield f"{law}: the operator draws every entry anew"
        return
    kept = {space for space, size in source.graph.sizes.items() if target.sizes[space] == size}
    names = {(tensor.key, tensor.layer): tensor.name for tensor in source.graph.tensors()}
    for tensor in target.tensors():
        axes = tensor.parameter.parsed.axes
        for index, axis in enumerate(axes):
            if set(spaces_of(axis)) <= kept:
                dense = operator.axis_matrix(tensor, index).as_matrix()
                where = f"{tensor.name}, axis {index} '{axis}', which keeps its size"
                assert_equal(law, where, np.eye(len(dense)), dense, 1e-15)
        origin = names.get((tensor.key, _only_source(operator, tensor)))
        is_kept = all(set(spaces_of(axis)) <= kept for axis in axes) and tensor.name not in operator.residual
        if is_kept and origin is not None:
            assert_equal(law, tensor.name, source.weights[origin], weights[tensor.name])


def _only_source(operator: GrowthOperator, tensor: Tensor) -> int | None:
    """The layer that alone makes up the tensor's; -1, which no layer is, where there are several or none."""
    if tensor.layer is None:
        return None
    rows = np.asarray(operator.blend_of(tensor))[..., tensor.layer, :]  # one for each term of the sum
    is_one = rows.ndim == 1 and np.count_nonzero(rows) == 1 and rows.max() == 1
    return int(rows.argmax()) if is_one else -1


def _verdict_is_right(source: Model, operator: GrowthOperator) -> Iterator[str]:
    law = "verdict"
    try:
        given = next(generated_inputs(source.graph, 0))
        understood = reference_forward(source.graph, source.weights, given)
    except GrowkitError as error:
        yield f"{law}: {error}"
        return
    if not understood:
        yield f"{law}: the reference gives none of the graph's outputs"
        return
    found = verdict(source.graph, operator)
    report = verify(source, grow(source, operator))
    worst = max(report.outputs, key=lambda output: output.max_rel_diff)
    got = f"a relative difference of {worst.max_rel_diff:.3g}"
    unkept = {reason.condition for reason in found.broken}
    if found.preserving and not report.preserved:
        raise broken(law, f"output {worst.name}", f"the same, as every condition holds, to {report.rtol:g}", got)
    if unkept and report.preserved:
        if not unkept <= CAUTIOUS:
            raise broken(law, f"output {worst.name}", f"a difference, as not kept is {', '.join(sorted(unkept))}", got)
        yield f"{law}: it says no to '{', '.join(sorted(unkept))}' out of caution, and the outputs agree"
