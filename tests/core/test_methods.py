"""Methods on drawn models: exact wherever the verdict says so, and the verdict says why wherever they are not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import growkit
from growkit.methods import method as method_called
from growkit.methods import methods, register
from growkit.plan import resolve
from growkit.testing import layer_graphs, memory_model, reference_forward, targets, transformer
from growkit.verify import generated_inputs
from growkit_specs import GrowkitError, InvalidTarget, LayerGraph, Target

EXACT, DIFFERENT = 1e-10, 1e-6
THOROUGH = settings(max_examples=4 * settings().max_examples)
METHODS = (
    "lossless",
    "width=net2net,depth=lossless",
    "width=lossless,depth=stack",
    "width=net2net,depth=interpolate",
    "random",
)


def difference(source: growkit.Model, target: growkit.Model) -> float:
    """The largest difference of any output on any generated input, relative to the output's largest entry.

    Written without `growkit.verify`: an output in a space that grew is brought back by the read matrix.
    """
    return max(differences(source, target))


def differences(source: growkit.Model, target: growkit.Model) -> Iterator[float]:
    operator, weights = target.growth.operator, dict(target.weights)
    for inputs in generated_inputs(source.graph, 0):
        expected = reference_forward(source.graph, source.weights, inputs)
        grown = reference_forward(target.graph, weights, inputs)
        assert expected.keys() == grown.keys()
        for port in source.graph.outputs:
            if port.name in expected:
                a, b = expected[port.name], grown[port.name]
                read = operator.read_matrix(port.space, port.through)
                b = read.apply(b, b.ndim - 1)
                yield np.abs(a - b).max() / np.abs(a).max()


@dataclass(frozen=True)
class Growth:
    """A drawn growth: from what, to what, how."""

    source: growkit.Model
    plan: growkit.Plan


@st.composite
def growths(draw: st.DrawFn, graphs: st.SearchStrategy[LayerGraph], methods: tuple[str, ...] = METHODS) -> Growth:
    graph = draw(graphs)
    source = memory_model(graph, draw(st.integers(0, 3)))
    plan = growkit.plan(
        source,
        draw(targets(graph)),
        method=draw(st.sampled_from(methods)),
        seed=draw(st.integers(0, 3)),
        fresh=draw(st.sampled_from((None, 0.0, 2.0))),  # louder, each block multiplies what rounding tells copies apart
    )
    return Growth(source, plan)


# --- exactness -----------------------------------------------------------------------------------------------


def assert_the_verdict_is_right(growth: Growth) -> None:
    """Preserving and exact; or not preserving, with a broken condition, and different."""
    verdict = growth.plan.verdict
    found = difference(growth.source, growkit.grow(growth.source, growth.plan))
    if verdict.preserving:
        assert found < EXACT, f"promised exact: {[reason.condition for reason in verdict.reasons]}"
        return
    assert verdict.broken
    assert all(reason.detail for reason in verdict.broken)
    if not is_cautious(growth):
        assert found > DIFFERENT, f"promised different: {[reason.condition for reason in verdict.broken]}"


def is_cautious(growth: Growth) -> bool:
    """Where the verdict may say no although the outputs agree: it does not look inside a query-key norm."""
    return {reason.condition for reason in growth.plan.verdict.broken} <= {"head_dim: attention scores"}


@THOROUGH
@given(growths(layer_graphs()))
def test_the_verdict_is_right_in_both_directions(growth: Growth) -> None:
    assert_the_verdict_is_right(growth)


PRE_NORM: dict[str, st.SearchStrategy[Any]] = {
    # Without one the stream is read as it is too, and where epsilon cannot follow no pad serves both.
    "final_norm": st.sampled_from(("final_norm", "attention_norm")),
    "block": st.sampled_from(("pre", "parallel")),
    "branch_norms": st.just(False),
    "stem": st.just("plain"),
    "head": st.sampled_from(("untied", "tied", "pooler", "bare")),
    "qk_norm": st.just(False),
    "rope": st.just(False),
}
SANDWICHED = PRE_NORM | {"branch_norms": st.just(True), "norm": st.just("rms")}


@THOROUGH
@given(growths(layer_graphs(**PRE_NORM) | layer_graphs(**SANDWICHED), ("lossless",)))
def test_lossless_keeps_every_pre_norm_model_at_any_size(growth: Growth) -> None:
    """Any ratio and depth, RMSNorm and LayerNorm, RMSNorm after branches, tied or not, head_dim too: `exact_when`."""
    assert growth.plan.preserving, growth.plan.verdict.broken
    assert_the_verdict_is_right(growth)


@given(
    layer_graphs(epsilon=st.sampled_from(("shared", "own")), rope=st.just(False), qk_norm=st.just(False)),
    st.integers(1, 3),
    st.sampled_from(("lossless", "net2net")),
)
def test_whole_ratios_keep_every_model(graph: LayerGraph, factor: int, method: str) -> None:
    """Tiles: what post-norm models and net2net can do, where one epsilon does not serve spaces that differ."""
    source = memory_model(graph)
    plan = growkit.plan(source, hidden=f"{factor}x", method=method)
    assert_the_verdict_is_right(Growth(source, plan))
    if len({layer.parameters[0].parsed.spaces for layer in norms(graph)}) == 1:
        assert plan.preserving, plan.verdict.broken


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("head", ["untied", "tied", "pooler", "bare"])
def test_lossless_leaves_an_epsilon_that_other_norms_share(norm: str, head: str) -> None:
    """Query-key norms do not grow with the stream, and one config key serves both (OPERATORS E4b)."""
    source = memory_model(transformer(hidden=8, qk_norm=True, norm=norm, head=head, epsilon="shared"))
    plan = growkit.plan(source, hidden=12, heads=3)
    assert plan.preserving, plan.verdict.broken
    assert {layer.attributes["epsilon"] for layer in norms(plan.target)} == {0.2}
    assert_the_verdict_is_right(Growth(source, plan))


@pytest.mark.parametrize("method", ["lossless", "net2net"])
@pytest.mark.parametrize("features", [{}, {"group": 2}, {"qkv": "product"}, {"qkv": "concatenation", "group": 2}])
def test_heads_of_any_number_and_width(features: dict[str, Any], method: str) -> None:
    """Attention has no norm of its own: any number of heads, and any head_dim without rotary positions."""
    source = memory_model(transformer(hidden=8, **features))
    sizes = {"heads": 6, "kv_heads": 3} if "group" in features else {"heads": 5}
    plan = growkit.plan(source, hidden="2x", head_dim=3, ffn=7, **sizes, method=method)
    assert plan.preserving, plan.verdict.broken
    assert_the_verdict_is_right(Growth(source, plan))


def norms(graph: LayerGraph) -> list[Any]:
    return [layer for _, layer in graph.walk() if layer.kind == "norm"]


@pytest.mark.parametrize("block", ["pre", "parallel"])
@pytest.mark.parametrize("method", ["stack", "interpolate"])
def test_layers_that_are_run_twice_change_the_function(block: str, method: str) -> None:
    source = memory_model(transformer(block=block, depths=(2, 1)))
    plan = growkit.plan(source, layers="2x", method=method)
    assert [reason.condition for reason in plan.verdict.broken] == ["stack0: depth", "stack1: depth"]
    assert difference(source, growkit.grow(source, plan)) > DIFFERENT


@given(layer_graphs(), st.data())
def test_random_keeps_nothing_of_the_source(graph: LayerGraph, data: st.DataObject) -> None:
    sizes = data.draw(targets(graph))
    target, other = (
        growkit.grow(memory_model(graph, seed), target=sizes, method="random", seed=7).weights for seed in (0, 1)
    )
    signs = {
        tensor.name: tensor.parameter.parsed for tensor in growkit.plan(memory_model(graph), sizes).target.tensors()
    }
    offset = norms(graph)[0].attributes["offset"]
    for name, array in target.items():
        assert np.array_equal(array, other[name]), name
        if not signs[name].reads:
            one = 1.0 if "layer_scale" in name else 1.0 - offset
            assert set(array.ravel()) == {one if signs[name].sign == "*" else 0.0}, name
    drawn = np.concatenate([array.ravel() for name, array in target.items() if signs[name].reads])
    assert drawn.std() == pytest.approx(0.02, rel=0.5)


def test_symmetry_is_broken_where_the_function_does_not_see_it() -> None:
    """Copies that stay copies would be trained alike for ever (OPERATORS E12)."""
    source = memory_model(transformer())
    for method in ("lossless", "net2net"):
        up = growkit.grow(source, hidden="2x", method=method).weights["stack0.0.up_proj.weight"]
        assert len(np.unique(up.round(12), axis=0)) == len(up), method
        assert len(np.unique(up.round(12), axis=1).T) == up.shape[1], method


@given(growths(layer_graphs()))
def test_a_seed_gives_the_same_model_again(growth: Growth) -> None:
    first, second = (growkit.grow(growth.source, growth.plan) for _ in range(2))
    again = growkit.plan(
        growth.source,
        growth.plan.recipe.target,
        **{name: getattr(growth.plan.recipe, name) for name in ("method", "seed", "fresh")},
    )
    third = growkit.grow(growth.source, again)
    for name in reversed(list(first.weights)):
        assert np.array_equal(first.weights[name], second.weights[name]), name
        assert np.array_equal(first.weights[name], third.weights[name]), name


@given(growths(layer_graphs()))
def test_verify_sees_what_the_plan_promised(growth: Growth) -> None:
    report = growkit.verify(growth.source, growkit.grow(growth.source, growth.plan))
    if growth.plan.preserving or not is_cautious(growth):
        assert report.preserved == growth.plan.preserving
    assert {output.name for output in report.outputs} <= {port.name for port in growth.source.graph.outputs}


# --- what is still open --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "sizes", "method"),
    [
        pytest.param(
            {"epsilon": "fixed"},
            {"hidden": "2x"},
            "lossless",
            id="epsilon is a constant",
        ),
        pytest.param(
            {"head": "tied", "final_norm": "attention_norm"},
            {"hidden": "2x"},
            "net2net",
            id="two blocks' norms share a name",
        ),
        pytest.param(
            {"head": "tied", "final_norm": None, "qk_norm": True},
            {"hidden": "2x"},
            "lossless",
            id="an untied head reads the stream itself",
        ),
        pytest.param(
            {"head": "bare", "final_norm": None, "qk_norm": True},
            {"hidden": "2x"},
            "lossless",
            id="an output is the stream itself",
        ),
    ],
)
def test_what_the_property_tests_leave_out(features: dict[str, Any], sizes: dict[str, Any], method: str) -> None:
    source = memory_model(transformer(**features))
    assert_the_verdict_is_right(Growth(source, growkit.plan(source, method=method, **sizes)))


@pytest.mark.parametrize(
    ("features", "sizes"),
    [
        pytest.param(
            {"head": "transform", "norm": "layer"},
            {"hidden": "2x"},
            id="a head with a norm of its own",
        ),
        pytest.param(
            {"scaled_scores": False, "hidden": 8},
            {"head_dim": "2x"},
            id="scores that are not scaled",
        ),
        pytest.param(
            {"block": "post", "epsilon": "fixed"},
            {"hidden": "2x"},
            id="a post-norm epsilon that is a constant",
        ),
        pytest.param(
            {"final_norm": None, "epsilon": "fixed"},
            {"hidden": "2x"},
            id="an epsilon that is a constant and a head without a norm",
        ),
    ],
)
def test_what_lossless_could_keep(features: dict[str, Any], sizes: dict[str, Any]) -> None:
    source = memory_model(transformer(**features))
    plan = growkit.plan(source, **sizes)
    assert plan.preserving, plan.verdict.broken
    assert_the_verdict_is_right(Growth(source, plan))


def test_wider_heads_of_interleaved_queries_keys_and_values() -> None:
    source = memory_model(transformer(qkv="interleaved"))
    assert_the_verdict_is_right(Growth(source, growkit.plan(source, hidden="2x", head_dim="2x")))


# --- plans ---------------------------------------------------------------------------------------------------


@given(growths(layer_graphs()))
def test_a_plan_tells_what_growing_gives(growth: Growth) -> None:
    plan, target = growth.plan, growkit.grow(growth.source, growth.plan)
    arrays = dict(target.weights)
    told = plan.to_json()
    assert target.graph == plan.target
    assert told["target"]["parameters"] == sum(array.size for array in arrays.values())
    assert told["target"]["bytes"] == target.bytes == sum(array.nbytes for array in arrays.values())
    assert told["source"]["bytes"] == growth.source.bytes
    assert (told["target"]["spaces"], told["target"]["stacks"]) == (target.graph.sizes, target.graph.depths)
    for tensor in target.graph.tensors():
        assert arrays[tensor.name].shape == tensor.shape
        assert arrays[tensor.name].dtype == np.dtype(tensor.parameter.dtype)
    shapes = {key: shape for key, _, shape in plan.changes()}
    assert shapes == {tensor.key: tensor.shape for tensor in target.graph.tensors(tied=True)}


@given(growths(layer_graphs()))
def test_a_plan_gives_every_size_that_was_asked(growth: Growth) -> None:
    old, new = growth.source.graph, growth.plan.target
    sizes, depths = resolve(old, growth.plan.recipe.target.requested())
    assert (new.sizes, new.depths) == (sizes, depths)
    named = {**sizes, "layers": next(iter(depths.values()))}
    named["heads"] = named.get("heads") or named["kv_heads"] * named["group"]
    before = {**old.sizes, "layers": next(iter(old.depths.values()))}
    before["heads"] = before.get("heads") or before["kv_heads"] * before["group"]
    for name, size in growth.plan.recipe.target.requested().items():
        assert named[name] == (before[name] * int(size[:-1]) if isinstance(size, str) else size)
    assert all(size >= before[name] for name, size in named.items())


@given(st.data())
def test_a_plan_like_another_model_has_its_sizes(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs())
    source = memory_model(graph)
    large = growkit.plan(source, data.draw(targets(graph))).target
    assert growkit.plan(source, like=large).target.sizes == large.sizes
    assert growkit.plan(source, like=large).target.depths == large.depths


def test_what_is_not_named_follows() -> None:
    source = transformer(heads=2, group=2, hidden=8, ffn=6, head="pooler")
    sizes, depths = resolve(source, {"hidden": "1.5x"})
    expected = {"hidden": 12, "heads": 6, "kv_heads": 3, "group": 2, "head_dim": 2, "ffn": 9, "pooler": 12}
    assert sizes == {**source.sizes, **{name: size for name, size in expected.items() if name in sizes}}
    assert depths == source.depths


@pytest.mark.parametrize(
    ("features", "sizes", "problem"),
    [
        ({}, {"hidden": 3}, "hidden=3 is smaller than the source's 4; growkit grows, it does not prune"),
        ({}, {"layers": "0.5x"}, "layers=1 is smaller than the source's 2"),
        ({}, {"kv_heads": 4}, "this model has no size 'kv_heads'; its sizes are hidden, heads, head_dim, ffn, layers"),
        ({}, {"hidden": 7}, "hidden=7 is not divisible by head_dim 2; nearest hidden: 6 or 8"),
        ({}, {"hidden": 10, "heads": 4}, "hidden=10 is not divisible by heads=4; nearest hidden: 8 or 12"),
        (
            {},
            {"hidden": 12, "heads": 4, "head_dim": 4},
            "head_dim=4: in this architecture head_dim = hidden / heads = 3",
        ),
        ({"hidden": 6}, {"hidden": 8}, "heads would follow to 2.66667, not a whole number; nearest hidden: 6 or 9"),
        (
            {"hidden": 8, "group": 3},
            {"hidden": 10},
            "heads would follow to 7.5, not a whole number of groups of 3; nearest hidden: 8 or 12; or name heads too",
        ),
        ({"ffn": 5}, {"ffn": "1.5x"}, "ffn=1.5x of 5 is 7.5, not whole; nearest: 7 or 8"),
        ({"hidden": 5}, {"hidden": "1.5x"}, "hidden=1.5x of 5 is 7.5, not whole; nearest: 5 or 10"),
        ({"depths": (3,)}, {"layers": "1.5x"}, "layers=1.5x of 3 is 4.5, not whole; nearest: 4 or 5"),
        ({"depths": (2, 3)}, {"layers": 3}, "layers: stack1 would have 4.5 layers, expected a whole number"),
        ({"group": 2, "hidden": 8}, {"heads": 7, "kv_heads": 3}, "heads=7 is not a whole number of groups: 3 kv_heads"),
        ({"group": 2, "hidden": 8}, {"heads": 7, "kv_heads": 3}, "nearest heads: 6 or 9"),
        ({"group": 2}, {"heads": 8, "kv_heads": 8, "hidden": 16}, "group would shrink from 2 to 1"),
        ({"head": "pooler"}, {"pooler": 8}, "unknown size 'pooler'; sizes are hidden, heads"),
        ({}, {"width": 8}, "unknown size 'width'"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_nearest_that_can(
    features: dict[str, Any], sizes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidTarget) as caught:
        growkit.plan(memory_model(transformer(**features)), **sizes)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@given(layer_graphs(group=st.none(), depths=st.integers(1, 3).map(lambda depth: (depth,))), st.data())
def test_the_nearest_sizes_that_are_named_can_be(graph: LayerGraph, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(("hidden", "ffn", "layers")))
    ratio = data.draw(st.sampled_from(("1.1x", "1.25x", "1.5x", "1.75x", "2.5x")))
    old = {**graph.sizes, "layers": graph.depths["stack0"]}[name]
    size = data.draw(st.just(ratio) | st.integers(old, 3 * old))
    nearest = re.search(r"nearest(?: hidden)?: (\d+) or (\d+)", refusal(graph, {name: size}) or "nearest: 0 or 0")
    assert nearest, refusal(graph, {name: size})
    low, high = map(int, nearest.groups())
    if high:
        asked = old * float(size[:-1]) if isinstance(size, str) else size
        assert old <= low < asked < high
        assert refusal(graph, {name: low}) is None
        assert refusal(graph, {name: high}) is None


def refusal(graph: LayerGraph, sizes: dict[str, Any]) -> str | None:
    """Why sizes are refused; None where they are not."""
    try:
        resolve(graph, sizes)
    except InvalidTarget as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("features", "sizes"),
    [
        ({}, {"heads": 3}),
        ({}, {"heads": "2x"}),
        ({}, {"head_dim": 3}),
        ({}, {"head_dim": "2x"}),
        ({"group": 2}, {"hidden": 9}),
        ({"group": 2}, {"hidden": 19}),
        ({"group": 2}, {"kv_heads": 3}),
    ],
)
def test_a_size_that_needs_another_says_which(features: dict[str, Any], sizes: dict[str, Any]) -> None:
    graph = transformer(**features)
    nearest = re.search(r"hidden: (\d+) or (\d+)", refusal(graph, sizes) or "")
    assert nearest, refusal(graph, sizes)
    assert [refusal(graph, {**sizes, "hidden": int(hidden)}) for hidden in nearest.groups()] == [None, None]


# --- the registry --------------------------------------------------------------------------------------------


def test_every_method_says_what_it_grows_and_when_it_is_exact() -> None:
    listed = methods()
    assert [m.name for m in listed] == sorted(m.name for m in listed)
    assert {"lossless", "net2net", "stack", "interpolate", "random"} <= {m.name for m in listed}
    for m in listed:
        assert m.grows
        assert m.summary
        assert m.exact_when
        assert m.paper is None or "https://" in m.paper


@pytest.mark.parametrize(
    ("method", "sizes", "problem"),
    [
        ("lossles", {}, "unknown method 'lossles'; methods are aki, dus, fpi, "),
        ("net2net", {"layers": "2x"}, "the method 'net2net' does not grow depth; for depth: lossless, "),
        ("net2net", {"layers": "2x"}, "combine them: --method depth=lossless,width=net2net"),
        ("stack", {"hidden": "2x"}, "the method 'stack' does not grow width; for width: lossless, "),
        ("width=net2net,depth=", {}, "does not parse; expected NAME or width=NAME,depth=NAME"),
        ("width=net2net,height=stack", {}, "does not parse; expected NAME or width=NAME,depth=NAME"),
        ("width=net3net", {"hidden": "2x"}, "unknown method 'net3net'"),
    ],
)
def test_methods_that_are_refused(method: str, sizes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidTarget, match=re.escape(problem)):
        growkit.plan(memory_model(transformer()), Target.of(**sizes), method=method)


def test_the_combination_that_is_proposed_works() -> None:
    source = memory_model(transformer())
    with pytest.raises(InvalidTarget) as caught:
        growkit.plan(source, layers="2x", method="net2net")
    proposed = str(caught.value).rpartition(" ")[2]
    assert growkit.plan(source, layers="2x", method=proposed).preserving


def test_a_name_is_registered_once() -> None:
    with pytest.raises(GrowkitError, match="a method called 'lossless' is already registered"):
        register(method_called("lossless"))
