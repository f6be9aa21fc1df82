"""Models without a framework: a layer graph and random weights, run by the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from growkit.adapters import BareForward, Forward
from growkit.matrices import Array
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.reference import reference_forward
from growkit.verify import generated_inputs
from growkit.weights import dtype_of
from growkit_specs import GrowkitError, LayerGraph, Signature, UnsupportedFormat
from growkit_specs.layout import axis_size


class MemoryAdapter:
    """The adapter of models that are a layer graph and arrays, and nothing else; the reference runs them."""

    name = "memory"
    suffix = ""

    def matches(self, source: Any) -> bool:
        """Whether ``source`` is such a model."""
        return isinstance(source, Model) and source.adapter.name == self.name

    def read(self, source: Any) -> Model:
        """The model itself."""
        model: Model = source
        return model

    def graph_like(self, source: Any) -> LayerGraph:
        """The model's graph."""
        return self.read(source).graph

    def resized(
        self, origin: Any, graph: LayerGraph, operator: GrowthOperator, signature: Signature
    ) -> tuple[LayerGraph, Any]:
        """The same graph and origin: every size can be expressed."""
        return graph, origin

    def write(
        self,
        model: Model,
        like: Any,
        destination: Path,
        progress: Callable[[int], None],
        check: Callable[[Model], None],
    ) -> None:
        """Refuse: there is no such format.

        Raises:
            UnsupportedFormat: Always.
        """
        raise UnsupportedFormat("a model in memory has no form on disk")

    def build(self, model: Model) -> Any:
        """The model's arrays by name."""
        return dict(model.weights)

    def inputs(self, model: Model, seed: int, forward: Forward) -> Iterator[dict[str, np.ndarray]]:
        """Inputs made from the graph's ports."""
        return generated_inputs(model.graph, seed)

    def bare(
        self,
        model: Model,
        device: str = "auto",
        *,
        dtype: str = "float32",
        checkpointing: float | None = None,
        compiled: bool = False,
    ) -> BareForward:
        """A model in memory cannot be fitted: numpy has no gradients.

        Raises:
            GrowkitError: Always.
        """
        raise GrowkitError("a model in memory cannot be fitted; numpy has no gradients")

    def forward(self, model: Model, device: str = "auto") -> Forward:
        """:func:`~growkit.reference.reference_forward` of the model, whatever the device."""
        held = self.build(model)

        def run(inputs: Mapping[str, Array], weights: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
            return reference_forward(model.graph, held | dict(weights or {}), inputs)

        return run


def random_weights(graph: LayerGraph, seed: int = 0) -> dict[str, Array]:
    """Weights for a graph, by name: normal ones, and scales around 1, so that nothing is 0 or 1 by chance."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for tensor in graph.tensors():
        layout = tensor.parameter.parsed
        drawn = rng.standard_normal(tensor.shape)
        if layout.sign == "*":
            drawn = 1 - float(tensor.owner.attributes.get("offset") or 0) + 0.3 * np.tanh(drawn)
        elif tensor.owner.kind != "embedding":
            drawn /= np.sqrt(prod(axis_size(axis, graph.sizes) for axis in layout.reads))
        weights[tensor.name] = drawn.astype(dtype_of(tensor.parameter.dtype))
    return weights


def memory_model(graph: LayerGraph, seed: int = 0) -> Model:
    """A model of ``graph`` with random weights."""
    return Model(graph, random_weights(graph, seed), MemoryAdapter())
