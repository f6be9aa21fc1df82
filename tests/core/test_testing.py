"""What `growkit.testing` gives to others: valid by construction, and models that need no framework."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import growkit
from growkit.plan import resolve
from growkit.testing import (
    MODULES,
    MemoryAdapter,
    layer_graphs,
    memory_model,
    random_weights,
    reference_forward,
    spaces,
    targets,
    transformer,
)
from growkit.verify import generated_inputs
from growkit_specs import GrowkitError, LayerGraph, Space, parse_layout
from growkit_specs.layer_graph import SpaceKind


@given(layer_graphs(), st.data())
def test_every_target_that_is_drawn_can_be(graph: LayerGraph, data: st.DataObject) -> None:
    sizes, depths = resolve(graph, data.draw(targets(graph)).requested())
    assert all(sizes[space] >= size for space, size in graph.sizes.items())
    assert all(depths[stack] >= depth for stack, depth in graph.depths.items())


@given(layer_graphs())
def test_every_graph_that_is_drawn_runs(graph: LayerGraph) -> None:
    weights = random_weights(graph)
    for inputs in generated_inputs(graph, 0):
        outputs = reference_forward(graph, weights, inputs)
        assert {port.name for port in graph.outputs} == set(outputs)
        for port in graph.outputs:
            assert outputs[port.name].dtype == np.float64
            assert outputs[port.name].shape[-1] == graph.sizes[port.space]
            assert np.isfinite(outputs[port.name]).all()


@given(layer_graphs(), st.data())
def test_every_weight_matters_to_some_output(graph: LayerGraph, data: st.DataObject) -> None:
    """Else a tensor that is grown wrongly would go unnoticed."""
    weights = random_weights(graph)
    name = data.draw(st.sampled_from(sorted(weights)))
    changed = weights | {name: weights[name] + np.random.default_rng(0).standard_normal(weights[name].shape)}
    inputs = list(generated_inputs(graph, 0))
    before, after = ([reference_forward(graph, w, i) for i in inputs] for w in (weights, changed))
    is_key_bias = name.endswith(("k_proj.bias", "qkv_proj.bias"))  # it shifts all scores of a query alike
    if not is_key_bias:
        assert any(not np.array_equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a), name


@given(spaces())
def test_spaces_are_of_every_kind(space: Space) -> None:
    assert space.kind in get_args(SpaceKind)
    assert parse_layout(f"* {space.name}").spaces == (space.name,)


def test_the_reference_says_what_it_does_not_understand() -> None:
    graph = transformer(head="pooler")
    kept = tuple(layer for layer in graph.head if layer.name != "pooler")
    headless = graph.model_copy(update={"head": kept}).revalidated()
    with pytest.raises(GrowkitError, match="does not understand this graph: nothing gives 'pooler'"):
        reference_forward(headless, random_weights(headless), next(generated_inputs(headless, 0)))
    untold = LayerGraph.model_validate_json(graph.model_dump_json().replace("positions", "buckets"))
    with pytest.raises(GrowkitError, match="does not understand 'embedding': no input says which buckets"):
        reference_forward(untold, random_weights(untold), next(generated_inputs(untold, 0)))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_weights_fill_a_graph(seed: int) -> None:
    graph = transformer(head="tied", norm="layer", layer_scale=True, dtype="float32")
    weights = random_weights(graph, seed)
    assert list(weights) == [tensor.name for tensor in graph.tensors()]
    for tensor in graph.tensors():
        assert weights[tensor.name].shape == tensor.shape
        assert weights[tensor.name].dtype == np.float32
        assert not np.isin(weights[tensor.name], (0, 1)).any()
    assert not np.array_equal(weights["table.weight"], random_weights(graph, seed + 1)["table.weight"])


def test_every_module_can_be_stored_both_ways() -> None:
    for features in (
        {"head": "pooler"},
        {"head": "transform", "gated": "fused", "qkv": "product"},
        {"stem": "factored"},
    ):
        plain, turned = transformer(**features), transformer(**features, transposed=frozenset(MODULES))
        for a, b in zip(plain.tensors(), turned.tensors(), strict=True):
            assert b.shape == a.shape[::-1]


def test_models_in_memory_go_nowhere(tmp_path: Path) -> None:
    source = memory_model(transformer())
    assert source.adapter.matches(source)
    assert not source.adapter.matches("small/")
    assert source.adapter.read(source) is source
    assert source.adapter.graph_like(source) is source.graph
    with pytest.raises(GrowkitError, match="a model in memory has no form on disk"):
        growkit.write(source, tmp_path / "large")
    with pytest.raises(GrowkitError, match="was read by the adapter 'memory'"):
        source.to_torch()


def test_the_forward_takes_other_weights() -> None:
    source = memory_model(transformer())
    inputs = next(generated_inputs(source.graph, 0))
    forward = MemoryAdapter().forward(source)
    silent = {"lm_head.weight": 0 * source.weights["lm_head.weight"], "lm_head.bias": np.ones(7)}
    assert np.array_equal(forward(inputs, silent)["logits"], np.ones_like(forward(inputs)["logits"]))
