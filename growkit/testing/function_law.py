"""The law of grown models: they compute what their source does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from growkit.adapters import adapters, read
from growkit.caches import brought_back, fed
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.testing.law import broken
from growkit.verify import compared, tolerance
from growkit_specs import GrowkitError, LayerGraph

Function = Callable[[Any], Any]
"""A model as a function of its inputs: it gives an array, several, or a mapping of them by name."""


def assert_preserves_function(
    source: Any,
    target: Any,
    *,
    rtol: float | None = None,
    inputs: st.SearchStrategy[Any] | Iterable[Any] | None = None,
    operator: GrowthOperator | None = None,
) -> None:
    """Assert that two models compute the same.

    An output that lives in a grown space is compared through the operator's read matrix.

    Args:
        source: The smaller model: a :class:`~growkit.model.Model`, what :func:`growkit.adapters.read` takes (a
            directory, a module), or a function of its inputs that gives one array, several, or a mapping by name.
        target: The larger one, likewise.
        rtol: The largest difference that counts as the same, over the largest entry of the source's output; None takes
            :data:`~growkit.verify.TOLERANCES` of the coarsest element type: of the weights, or of what functions give.
        inputs: What both are called with: a hypothesis strategy, or an iterable. None generates them from the layer
            graph of whichever is a model.
        operator: The growth operator; None takes the one that stands beside ``target``, where there is one.

    Raises:
        AssertionError: Naming the output, the relative difference that was expected, and the one that was got.
        TypeError: Where both are functions and no inputs are given.
    """
    assert_preserved("function preserved", Runnable(source), Runnable(target), rtol, inputs, operator)


class Runnable:
    """Either side of the comparison: what runs, and what is known of it."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, Model) and not _is_function(model):
            model = read(model)
        self.model: Model | None = None
        self.graph: LayerGraph | None = None
        self.operator: GrowthOperator | None = None
        self.dtypes: set[str] = set()
        self.run: Function = model
        if isinstance(model, Model):
            self.model = model
            self.graph = model.graph
            self.operator = model.growth.operator if model.growth else None
            self.dtypes = {tensor.parameter.dtype for tensor in model.graph.tensors()}
            self.run = model.adapter.forward(model)

    def __call__(self, inputs: Any) -> dict[str, np.ndarray]:
        """The outputs by name."""
        found = self.run(inputs)
        if isinstance(found, (tuple, list)):
            found = {str(i): value for i, value in enumerate(found)}
        elif not isinstance(found, Mapping):
            found = {"output": found}
        return {name: _as_numpy(value) for name, value in found.items()}


def _is_function(model: Any) -> bool:
    """Whether ``model`` is a plain function; a module of torch can be called too, and is read."""
    return callable(model) and not any(adapter.matches(model) for adapter in adapters().values())


def _as_numpy(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def assert_preserved(
    law: str,
    source: Runnable,
    target: Runnable,
    rtol: float | None = None,
    inputs: st.SearchStrategy[Any] | Iterable[Any] | None = None,
    operator: GrowthOperator | None = None,
) -> None:
    """Raise where one output differs by more than ``rtol``; the arguments are :func:`assert_preserves_function`'s."""
    graph, operator = source.graph or target.graph, operator or target.operator
    if inputs is None:
        one = source if source.model is not None else target
        if one.model is None:
            raise TypeError("two functions say nothing of their inputs; expected inputs=, a strategy or an iterable")
        inputs = one.model.adapter.inputs(one.model, 0, one.run)

    def compare(given: Any) -> None:
        a = source(given)
        if source.graph is not None and target.graph is not None:  # caches of keys and values may differ
            b = brought_back(
                source.graph, target.graph, operator, target(fed(source.graph, target.graph, operator, given))
            )
        else:
            b = target(given)
        types = source.dtypes | target.dtypes or {str(value.dtype) for value in (*a.values(), *b.values())}
        rounding = max(getattr(side.run, "rounding", 0.0) for side in (source, target))
        _assert_agree(law, graph, operator, a, b, max(tolerance(types), rounding) if rtol is None else rtol)

    _for_each(law, inputs, compare)


def _assert_agree(
    law: str,
    graph: LayerGraph | None,
    operator: GrowthOperator | None,
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    rtol: float,
) -> None:
    lost = sorted(set(a) - set(b))
    if lost or not a:
        raise broken(law, f"output {lost[0]}" if lost else "the outputs", "an output of both", "none of the target")
    try:
        reports = list(compared(graph, operator, a, b))
    except GrowkitError as error:
        raise broken(law, "the outputs' shapes", "ones that can be compared", error) from error
    for report in reports:
        if not report.max_rel_diff <= rtol:
            where = f"output {report.name}, {' x '.join(map(str, report.shape))}"
            raise broken(law, where, f"a relative difference of at most {rtol:g}", f"{report.max_rel_diff:.3g}")


def _for_each(law: str, inputs: st.SearchStrategy[Any] | Iterable[Any], compare: Callable[[Any], None]) -> None:
    if isinstance(inputs, st.SearchStrategy):
        quiet = settings(database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        quiet(given(inputs)(compare))()
        return
    count = 0
    for one in inputs:
        compare(one)
        count += 1
    if not count:
        raise broken(law, "the inputs", "at least one", "none")
