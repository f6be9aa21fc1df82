"""Every architecture file, at drawn sizes, grows to every legal target; no framework, and no example discarded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import growkit
from growkit.methods import method, methods
from growkit.plan import resolve
from growkit.testing import (
    SmallConfig,
    architecture_graphs,
    architecture_names,
    assert_operator_laws,
    memory_model,
    small_configs,
    targets,
)
from growkit_specs import GrowkitError, InvalidTarget, architectures

WIDE, DEEP = ([m.name for m in methods() if way in m.grows] for way in ("width", "depth"))
PAIRS = [(w, d) for w in WIDE for d in DEEP if method(w).anew == method(d).anew]
METHODS = st.just("lossless") | st.sampled_from([f"width={w},depth={d}" for w, d in PAIRS])


every_architecture = pytest.mark.parametrize("name", architecture_names())


@every_architecture
@given(METHODS, st.integers(0, 3), st.data())
def test_every_architecture_grows_to_every_target(name: str, method: str, seed: int, data: st.DataObject) -> None:
    graph = data.draw(architecture_graphs([name]))
    source, target = memory_model(graph, seed), data.draw(targets(graph))
    sizes, depths = resolve(graph, target.requested())
    try:
        plan = growkit.plan(source, target, method=method, seed=seed)
    except InvalidTarget:  # some methods know whole ratios only, and say so
        assert method != "lossless"
        return
    assert (plan.target.sizes, plan.target.depths) == (sizes, depths)
    assert plan.preserving == (not plan.verdict.broken)
    grown = growkit.grow(source, plan)
    for tensor in plan.target.tensors():
        array = grown.weights[tensor.name]
        assert array.shape == tensor.shape, tensor.name
        assert np.isfinite(array).all(), tensor.name


@every_architecture
@settings(max_examples=settings().max_examples // 10)
@given(METHODS, st.data())
def test_the_operators_of_every_architecture_obey_the_laws(name: str, method: str, data: st.DataObject) -> None:
    graph = data.draw(architecture_graphs([name]))
    try:
        operator = growkit.plan(memory_model(graph), data.draw(targets(graph)), method=method).operator
    except InvalidTarget:
        assert method != "lossless"
        return
    assert_operator_laws(operator, graph)


# --- what is drawn -----------------------------------------------------------------------------------------------


@given(small_configs(), st.data())
def test_a_drawn_config_is_legal_and_small(small: SmallConfig, data: st.DataObject) -> None:
    file, graph = architectures()[small.architecture], small.graph()
    assert small.class_name in file.classes
    assert graph.attributes["class"] == small.class_name
    assert graph.sizes.items() <= file.sizes(small.config).items()
    assert graph.parameter_count < 100_000
    assert {tensor.parameter.dtype for tensor in graph.tensors()} == {"float64"}
    resolve(graph, data.draw(targets(graph)).requested())


@every_architecture
def test_each_class_switch_and_size_is_drawn_otherwise_too(name: str) -> None:
    drawn = []

    @settings(max_examples=200)
    @given(small_configs([name]))
    def draw(small: SmallConfig) -> None:
        drawn.append(small)

    draw()
    file, graphs = architectures()[name], [small.graph() for small in drawn]
    assert {small.class_name for small in drawn} == set(file.classes)
    assert len({small.config.get("tie_word_embeddings") for small in drawn}) == 1 + (
        "tie_word_embeddings" in file.config.defaults
    )
    assert len({tuple(graph.depths.values()) for graph in graphs}) > 1
    for space in ("hidden", "ffn", "head_dim"):
        assert len({graph.sizes[space] for graph in graphs}) > 1, space


def test_an_architecture_without_a_tiny_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = architectures()["bert"].model_copy(update={"architecture": "nothing", "tiny": {}})
    monkeypatch.setitem(architectures(), "nothing", bare)
    assert "nothing" not in architecture_names()

    @given(small_configs(["nothing"]))
    def draw(small: SmallConfig) -> None:
        raise AssertionError("drawn")

    with pytest.raises(GrowkitError, match="'nothing' has no tiny config; add 'tiny' to its file"):
        draw()
