"""Random small transformers: each grows and computes what it did, or is refused in one line; no third outcome."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import Phase, event, example, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import growkit
from growkit import Model
from growkit_specs import GrowkitError
from tests.adapters.onnx.drawn import Blueprint, blueprints

EXACT = 2e-5  # relative to the largest output
GROWTHS = {"hidden": ("1.5x", "2x"), "ffn": ("1.5x",), "heads": ("2x",), "kv_heads": ("2x",), "layers": ("2x",)}
FEWER = settings().max_examples * 3 // 10
PHASES = set(Phase) - {Phase.explain}  # which takes longer than all else


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def growths() -> st.SearchStrategy[dict[str, str]]:
    """One size or a few."""
    sizes = {name: st.sampled_from(factors) for name, factors in GROWTHS.items()}
    return st.one_of(
        *(st.fixed_dictionaries({name: size}) for name, size in sizes.items()),
        st.fixed_dictionaries({}, optional=sizes),
    )


def sizes_of(model: Model) -> dict[str, int]:
    depths = {"layers": sum(model.graph.depths.values())} if model.graph.depths else {}
    grouped = (
        {"heads": model.graph.sizes["kv_heads"] * model.graph.sizes["group"]} if "group" in model.graph.sizes else {}
    )
    return {**model.graph.sizes, **grouped, **depths}


def read(blueprint: Blueprint, proto: onnx.ModelProto) -> Model | None:
    """The model; None where it is refused, and may be."""
    try:
        return growkit.read(proto)
    except GrowkitError as error:
        assert str(error).isprintable()  # noqa: PT017 - some are refused
        if blueprint.is_ordinary:
            raise
        event("the file is refused")
        return None


def assert_same_function(blueprint: Blueprint, source: onnx.ModelProto, grown: onnx.ModelProto) -> None:
    """At sizes that the axes weren't inferred with."""
    before, after = session(source), session(grown)
    for batch, sequence in ((3, 9), (1, 4)):
        inputs = blueprint.inputs(batch, sequence, seed=sequence)
        for expected, got in zip(before.run(None, inputs), after.run(None, inputs), strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=0, atol=EXACT * max(float(np.abs(expected).max()), 1e-3))


@settings(max_examples=settings().max_examples // 2, phases=PHASES)
@given(blueprint=blueprints(), growth=growths())
@example(Blueprint(heads=1), {"hidden": "2x"})  # a single head is no axis
@example(Blueprint(heads=1, group=2), {"heads": "2x"})  # nor is a single head of keys, repeated
@example(Blueprint(blocks=1), {"hidden": "1.5x"})  # no stack
@example(Blueprint(layer_scale=True, noise=("expand",)), {"hidden": "2x"})  # a scale that no layer takes up
@example(Blueprint(layer_scale=True, kind="rms", noise=("slices",)), {"hidden": "2x"})
def test_growth_keeps_the_function_or_is_refused(blueprint: Blueprint, growth: dict[str, str]) -> None:
    proto = blueprint.model()
    stored = proto.SerializeToString()
    model = read(blueprint, proto)
    if model is None:
        return
    before = sizes_of(model)
    asked = {name: size for name, size in growth.items() if name in before}
    if asked.get("kv_heads"):
        asked.pop("heads", None)
    try:
        plan = growkit.plan(model, **asked)
        grown = growkit.grow(model, plan)
        result = grown.to_onnx()
    except GrowkitError as error:
        assert str(error).isprintable()  # noqa: PT017 - some are refused
        event("the growth is refused")
        return
    event(f"preserving: {plan.preserving}")
    assert proto.SerializeToString() == stored
    after = sizes_of(growkit.read(result))
    for name, factor in asked.items():
        assert after[name] == before[name] * float(factor.removesuffix("x"))
    if plan.preserving and blueprint.unknown != "custom":
        assert_same_function(blueprint, proto, result)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("repeat", ["Expand", "Tile", "heads"])
def test_groups_of_queries_grow_however_their_keys_are_repeated(repeat: str, kv_heads: int) -> None:
    blueprint = Blueprint(heads=kv_heads, group=2, repeat=repeat)
    model = growkit.read(blueprint.model())
    for asked in ({"heads": 8 * kv_heads}, {"kv_heads": 4} if kv_heads > 1 else {"head_dim": 6}):
        plan = growkit.plan(model, **asked)
        assert plan.preserving
        assert_same_function(blueprint, blueprint.model(), growkit.grow(model, plan).to_onnx())


@settings(max_examples=FEWER, phases=PHASES)
@given(blueprint=blueprints())
@example(Blueprint(layer_scale=True, noise=("transpose", "flatten")))  # shaped as something that is also measured
def test_growing_nothing_changes_nothing(blueprint: Blueprint) -> None:
    proto = blueprint.model()
    model = read(blueprint, proto)
    if model is None:
        return
    same = growkit.grow(model, growkit.plan(model))
    surgery = same.origin.surgery()
    surgery.resize()
    assert surgery.patches == 0
    read_by_nodes = {name for node in proto.graph.node for name in node.input}
    before = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer if each.name in read_by_nodes}
    after = {each.name: numpy_helper.to_array(each) for each in same.to_onnx().graph.initializer}
    assert set(after) == set(before)
    for name, array in before.items():
        assert (after[name].shape, after[name].tobytes()) == (array.shape, array.tobytes())
