"""Growing: a plan or an operator and a model give the larger model, tensor by tensor."""

from __future__ import annotations

from typing import Any

from growkit.model import Growth, LazyWeights, Model
from growkit.operator import GrowthOperator
from growkit.plan import Plan, plan, target_graph
from growkit.weights import Grower, dtype_of
from growkit_specs import GrowkitError, Signature


def grow(model: Model, by: Plan | GrowthOperator | None = None, /, *, dtype: str = "keep", **request: Any) -> Model:
    """The larger model.

    Nothing is computed yet: each tensor is grown when it is asked for, so a checkpoint is never wholly in memory.

    Args:
        model: The source.
        by: A plan, or an operator (fitted, or loaded); None plans with ``request``.
        dtype: The element type of the grown tensors (``float32``, ``float16``, ``bfloat16``); ``keep`` is the source's.
        request: What :func:`growkit.plan` takes; beside an operator ``outputs`` and ``kv_cache``.

    Raises:
        GrowkitError: Where the plan or the operator was made for another model.

    Example:
        >>> large = growkit.grow(model, hidden=768, layers=12)  # doctest: +SKIP
    """
    beside = set(request) - (set(Signature.model_fields) if isinstance(by, GrowthOperator) else set())
    if by is not None and beside:
        raise GrowkitError(f"the plan settles the sizes; got {', '.join(sorted(beside))} beside it")
    if by is None:
        by = plan(model, **request)
    if isinstance(by, Plan):
        if by.source.sizes != model.graph.sizes or by.source.depths != model.graph.depths:
            raise GrowkitError("the plan was made for a model of other sizes")
        operator, graph, recipe, signature = by.operator, by.target, by.recipe, by.recipe.signature
    else:
        operator, graph, recipe = by, target_graph(model.graph, by), None
        signature = Signature.of(**request)
    if dtype != "keep":
        graph = graph.with_dtypes(lambda key: str(dtype_of(dtype)))
    graph, origin = model.adapter.resized(model.origin, graph, operator, signature)
    weights = LazyWeights({tensor.name: tensor for tensor in graph.tensors()}, Grower(model, operator))
    return Model(graph, weights, model.adapter, origin, Growth(operator, recipe))
