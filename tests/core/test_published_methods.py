"""What each published method's paper says of its matrices, on small models; exactness is told in the methods table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import growkit
from growkit.compare import compare
from growkit.data import token_batch
from growkit.loss import Batch, start_loss
from growkit.methods import Depth, method, methods
from growkit.methods.between import predicted_between, transported
from growkit.testing import memory_model, transformer
from growkit_specs import GrowkitError, InvalidTarget, Recipe, Stack, architectures

STACK4 = Stack(name="stack", depth=4, layers=())


def grown(graph: Any, name: str, **sizes: Any) -> tuple[growkit.Model, growkit.Model]:
    source = memory_model(graph)
    return source, growkit.grow(source, growkit.plan(source, method=name, **sizes))


# --- depth maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "depth", "sources", "silent"),
    [
        ("stack", 8, (0, 1, 2, 3, 0, 1, 2, 3), ()),
        ("stack", 6, (0, 1, 2, 3, 0, 1), ()),
        ("stack:part=front", 6, (0, 1, 0, 1, 2, 3), ()),
        ("stack:part=middle", 6, (0, 1, 2, 1, 2, 3), ()),
        ("stack:part=back", 6, (0, 1, 2, 3, 2, 3), ()),
        ("stack:part=back", 9, (0, 1, 2, 3, 0, 1, 2, 3, 3), ()),
        ("fpi", 6, (0, 1, 2, 3, 2, 3), ()),
        ("gstack", 12, (0, 1, 2, 3) * 3, ()),
        ("interpolate", 8, (0, 0, 1, 1, 2, 2, 3, 3), ()),
        ("mslt", 6, (0, 1, 2, 3, 2, 3), ()),
        ("mslt", 9, (0, 1, 2, 3, 0, 1, 2, 3, 3), ()),
        ("dus", 6, (0, 1, 2, 1, 2, 3), ()),
        ("dus", 8, (0, 1, 2, 3, 0, 1, 2, 3), ()),
        ("midas", 6, (0, 1, 2, 1, 2, 3), ()),
        ("midas", 8, (0, 1, 2, 3, 0, 1, 2, 3), ()),
        ("llama_pro", 6, (0, 1, 1, 2, 3, 3), (2, 5)),
        ("llama_pro", 9, (0, 0, 0, 1, 1, 2, 2, 3, 3), (1, 2, 4, 6, 8)),
        ("lemon", 6, (0, 0, 1, 2, 2, 3), (1, 4)),
        ("opt_deus", 6, (0, 1, 1, 2, 2, 3), (2, 4)),
        ("lesa", 5, (0, 1, 2, 2, 3), ()),
    ],
)
def test_which_layer_comes_from_which(request_: str, depth: int, sources: tuple[int, ...], silent: Any) -> None:
    builder = method(request_).depth
    assert builder is not None
    made = builder(STACK4, depth)
    assert made.sources == sources
    assert tuple(t for t, factor in enumerate(made.writes) if factor == 0) == silent


def test_new_identity_layers_are_among_the_old_ones_or_on_top() -> None:
    builder = method("staged").depth
    assert builder is not None
    assert builder(STACK4, 6).new == {1, 4}
    assert method("staged").depth(STACK4, 6, place="append").new == {4, 5}  # type: ignore[misc]


def test_factors_stand_on_repeated_layers_only() -> None:
    depth = Depth((0, 1, 1, 0)).attenuated(0.5, 0.25)
    assert depth.writes == (1.0, 1.0, 0.5, 0.5)
    assert depth.scores == (1.0, 1.0, 0.25, 0.25)


# --- sums of terms ---------------------------------------------------------------------------------------------------


def test_aki_takes_new_units_from_the_next_layer() -> None:
    source, large = grown(transformer(depths=(2,), ffn=4, biases=True), "width=aki,depth=lossless", hidden="2x")
    e = large.growth.operator.expansions["ffn"]
    index = e.write.index
    for layer, above in ((0, 1), (1, 1)):
        bias = large.weights[f"stack0.{layer}.up_proj.bias"]
        old, next_ = (source.weights[f"stack0.{j}.up_proj.bias"] for j in (layer, above))
        np.testing.assert_allclose(bias[:4], old)
        np.testing.assert_allclose(bias[4:], next_[index[4:]])


def test_aki_of_layers_that_are_one_block_has_no_other_layer_to_take() -> None:
    file = architectures()["albert"]
    source = memory_model(file.graph(file.tiny, None).with_dtypes(lambda key: "float64"))
    plan = growkit.plan(source, hidden="2x", method="aki")
    assert plan.preserving, plan.verdict.broken
    assert growkit.verify(source, growkit.grow(source, plan)).max_rel_diff < 1e-10


def test_staged_puts_two_copies_on_the_diagonal() -> None:
    source, large = grown(transformer(depths=(1,), ffn=4, qkv="separate"), "staged", hidden="2x", ffn="2x")
    name = "stack0.0.up_proj.weight"
    small, wide = source.weights[name], large.weights[name]
    np.testing.assert_array_equal(wide, np.kron(np.eye(2), small))


def test_staged_depth_is_the_identity_layer() -> None:
    source, large = grown(transformer(depths=(2,), biases=True), "staged", layers=3)
    name = "stack0.1.up_proj.weight"
    np.testing.assert_array_equal(large.weights[name], np.eye(*large.weights[name].shape))
    vectors = [n for n in large.weights if n.startswith("stack0.1.") and large.weights[n].ndim == 1]
    assert vectors
    assert all(not large.weights[n].any() for n in vectors)
    assert growkit.verify(source, large).max_rel_diff < 1e-10


def test_hypercloning_noise_is_paired_and_as_loud_as_asked() -> None:
    """10 dB: the noise has a tenth of the power of the readers' own entries, and copies cancel it."""
    graph = transformer(depths=(1,), hidden=64, ffn=200, heads=4, head_dim=16)
    source = memory_model(graph)
    name = "stack0.0.up_proj.weight"
    for request_, decibels in (({}, 10), ({"fresh": "20dB"}, 20)):
        large = growkit.grow(source, growkit.plan(source, hidden="2x", ffn=200, method="hypercloning", **request_))
        clean = np.tile(source.weights[name] / 2, (1, 2))
        noise = large.weights[name] - clean
        np.testing.assert_allclose(noise[:, :64], -noise[:, 64:], atol=1e-12)
        assert 10 * np.log10(clean.var() / noise.var()) == pytest.approx(decibels, abs=0.5)


def test_mupscaling_repeats_in_place() -> None:
    _, large = grown(transformer(depths=(1,), ffn=4), "mupscaling", hidden="2x")
    operator = large.growth.operator
    assert operator.expansions["ffn"].write.index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_orthonormal_reads_as_it_writes() -> None:
    _, large = grown(transformer(depths=(1,), norm="rms", hidden=8, heads=4, head_dim=2), "orthonormal", hidden=12)
    e = large.growth.operator.expansions["hidden"]
    B = e.write.as_matrix()
    np.testing.assert_allclose(B.T @ B, np.eye(8), atol=1e-12)
    assert np.array_equal(B, e.read.as_matrix())


@pytest.mark.parametrize(("hidden", "factor"), [(12, 1 / np.sqrt(2.5)), (16, 1 / 2), (24, 1 / 3)])
def test_sparkling_scales_what_adds_up_coherently(hidden: int, factor: float) -> None:
    _, large = grown(transformer(depths=(1,), hidden=8, heads=4, head_dim=2), "sparkling", hidden=hidden)
    assert set(large.growth.operator.expansions["hidden"].read.weight) == {factor}


# --- layers made of their neighbours ---------------------------------------------------------------------------------


def test_transport_finds_a_permutation() -> None:
    rng = np.random.default_rng(0)
    own = rng.standard_normal((7, 30))
    order = rng.permutation(7)
    other = own[order] + 0.01 * rng.standard_normal((7, 30))
    P = transported(own, other)
    np.testing.assert_allclose(P.sum(axis=1), 1)
    np.testing.assert_allclose(P @ other, own, atol=0.1)


def test_opt_deus_averages_aligned_neighbours() -> None:
    """Where the next layer is this one with its units in another order, the mean of both is this one."""
    source = memory_model(transformer(depths=(2,), ffn=5, gated="separate", qkv="separate"))
    order = np.array([3, 0, 4, 1, 2])
    weights = dict(source.weights)
    for slot in ("gate_proj", "up_proj"):
        weights[f"stack0.1.{slot}.weight"] = weights[f"stack0.0.{slot}.weight"][order]
    source = growkit.Model(source.graph, weights, source.adapter)
    large = growkit.grow(source, growkit.plan(source, layers=3, method="opt_deus"))
    for slot in ("gate_proj", "up_proj"):
        own = weights[f"stack0.0.{slot}.weight"]
        assert np.abs(large.weights[f"stack0.1.{slot}.weight"] - own).max() < 0.1 * np.abs(own).max()
    assert not large.weights["stack0.1.down_proj.weight"].any()


def test_lesa_learns_how_layers_lie_between_their_neighbours() -> None:
    """Every layer is more than the mean of its neighbours by the same amount; so is the one that is predicted."""
    rng = np.random.default_rng(0)
    start, step, bend = rng.standard_normal((3, 8, 300))
    W = np.stack([start + 0.3 * i * step - 0.1 * i * i * bend for i in range(9)])
    pairs = [(3, 4)]
    (mean,), (made,) = (predicted_between(W, pairs, seed=[0], steps=steps) for steps in (0, 1500))
    np.testing.assert_allclose(mean, (W[3] + W[4]) / 2, atol=1e-5)
    learned = made - mean
    assert np.corrcoef(learned.ravel(), bend.ravel())[0, 1] > 0.5


def test_lesa_writes_its_layers_at_the_width_asked_for() -> None:
    source = memory_model(transformer(depths=(4,), biases=True))
    plan = growkit.plan(source, hidden="2x", layers=5, method="width=lossless,depth=lesa")
    large = growkit.grow(source, plan)
    assert {large.weights[t.name].shape == t.shape for t in plan.target.tensors()} == {True}
    new = plan.new_layers["stack0"][0]
    assert large.weights[f"stack0.{new}.up_proj.weight"].any()


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_layer_map_takes_the_place_of_the_methods() -> None:
    source = memory_model(transformer(depths=(4,)))
    for asked in ("0,1,2,2,3", "0:3,2:4", "[0, 3], [2, 4]", (0, 1, 2, 2, 3)):
        plan = growkit.plan(source, layers_from=asked)
        assert plan.operator.layer_map("stack0") == [0, 1, 2, 2, 3]
        assert plan.new_layers == {"stack0": (3,)}
        assert not plan.preserving
    silent = growkit.plan(source, layers_from="0:3,2:4", residual_scale=0)
    assert silent.preserving
    assert growkit.verify(source, growkit.grow(source, silent)).max_rel_diff < 1e-10


@pytest.mark.parametrize("qkv", ["separate", "product", "interleaved", "concatenation"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_scores_of_repeated_layers_are_multiplied(qkv: str, qk_norm: bool) -> None:
    """What the query is computed with takes the factor, and nothing else of the layer changes."""
    source = memory_model(transformer(depths=(2,), qkv=qkv, qk_norm=qk_norm, biases=True))
    plain, scaled = (
        growkit.grow(source, growkit.plan(source, layers_from="0,1,1", score_scale=factor)) for factor in (None, 0.5)
    )
    changed = {n for n in plain.weights if not np.array_equal(plain.weights[n], scaled.weights[n])}
    assert changed
    assert all(".2." in name and ("q_" in name or "qkv" in name) for name in changed)
    for name in changed:
        ratio = scaled.weights[name] / plain.weights[name]
        assert set(np.round(ratio.ravel(), 12)) <= {0.5, 1.0}


def test_what_repeated_layers_write_is_multiplied() -> None:
    source = memory_model(transformer(depths=(2,)))
    large = growkit.grow(source, growkit.plan(source, layers_from="0,0,1", residual_scale=0.5))
    down = "down_proj.weight"
    np.testing.assert_array_equal(large.weights[f"stack0.1.{down}"], 0.5 * source.weights[f"stack0.0.{down}"])
    np.testing.assert_array_equal(large.weights[f"stack0.0.{down}"], source.weights[f"stack0.0.{down}"])


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({"layers_from": "0,1,7"}, "layer 7 of stack0 is not there; its layers are 0 to 2"),
        ({"layers_from": "0"}, "names 1 layers for stack0, which has 3; growkit grows"),
        ({"layers_from": "0:3,2:1"}, "the range 2:1 is empty; ranges are half-open"),
        ({"layers_from": "0-3"}, "a layer map is layers or half-open ranges"),
        ({"layers_from": "other=0:3"}, "no stack is called 'other'; stacks are stack0"),
        ({"layers_from": "0:3,2:3", "layers": 5}, "layers_from names 4 layers for stack0, layers=5"),
        ({"fresh": "loud"}, "fresh is 'loud'; expected a factor that is not negative (0.5) or decibels (10dB)"),
        ({"hidden": "1.5x", "method": "hypercloning"}, "nearest: 8 or 16; methods for any ratio: aki, "),
        ({"hidden": "3x", "method": "staged"}, "makes twice a size; got hidden 8 to 24; nearest: 16"),
        ({"head_dim": 8, "method": "staged"}, "doubles whole heads"),
        ({"layers": 4, "method": "gstack"}, "stacks whole models; got 3 to 4 layers; nearest: 3 or 6"),
        ({"layers": 5, "method": "dus"}, "an even number up to 6; got 5; nearest: 6"),
        ({"layers": 9, "method": "opt_deus"}, "at most 5 from 3; got 9 layers"),
        ({"layers": 9, "method": "lesa"}, "at most 5 from 3; got 9 layers"),
        ({"layers": 4, "method": "stack:part=side"}, "the option part is 'side'; expected again, front, middle, back"),
        ({"layers": 4, "method": "stack:half=back"}, "has no option 'half'; its options: part=again"),
        ({"layers": 4, "method": "interpolate:part=back"}, "has no option 'part'; its options: none"),
    ],
)
def test_requests_that_are_refused(request_: dict[str, Any], problem: str) -> None:
    source = memory_model(transformer(depths=(3,), hidden=8, heads=2, head_dim=4))
    with pytest.raises(InvalidTarget) as caught:
        growkit.plan(source, **request_)
    assert problem in str(caught.value)


def test_every_refusal_names_methods_that_can() -> None:
    source = memory_model(transformer(depths=(3,), hidden=8, heads=2, head_dim=4))
    with pytest.raises(InvalidTarget) as caught:
        growkit.plan(source, hidden="1.5x", method="mupscaling")
    for name in str(caught.value).rpartition(": ")[2].split(", "):
        growkit.plan(source, hidden="1.5x", method=name)


def test_a_recipe_keeps_the_whole_request(tmp_path: Path) -> None:
    source = memory_model(transformer(depths=(3,)))
    plan = growkit.plan(
        source, hidden="2x", method="width=hypercloning", layers_from="0:3,1:3", score_scale=0.5, fresh="12dB"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(plan.recipe.to_yaml())
    told = Recipe.load(path)
    assert told == plan.recipe
    again = growkit.plan(
        source,
        told.target,
        method=told.method,
        fresh=told.fresh,
        layers_from=told.layers_from,
        score_scale=told.score_scale,
    )
    assert again.to_json() == plan.to_json()


def test_the_plan_names_what_to_train_first() -> None:
    source = memory_model(transformer(depths=(4,)))
    plan = growkit.plan(source, layers=6, method="llama_pro")
    assert plan.new_layers == {"stack0": (2, 5)}
    assert {name.split(".")[1] for name in plan.trainable} == {"2", "5"}
    assert growkit.plan(source, layers=6, method="stack").trainable == ()
    assert any("exp_avg" in rule for rule in growkit.plan(source, hidden="2x", method="mupscaling").training)


# --- methods side by side --------------------------------------------------------------------------------------------


def test_methods_are_compared_with_what_they_cannot_do_told() -> None:
    source = memory_model(transformer(depths=(3,), hidden=8, heads=2, head_dim=4))
    found = {candidate.method: candidate for candidate in compare(source, hidden="1.5x", layers=4)}
    assert {name.rpartition("=")[2] for name in found} | {n.split(",")[0].partition("=")[2] for n in found} >= {
        m.name for m in methods() if "," not in m.name and len(m.grows) == 1
    }
    assert found["lossless"].preserving
    assert found["width=lossless,depth=stack"].broken
    assert found["width=hypercloning,depth=lossless"].refused
    assert found["width=lossless,depth=llama_pro"].trained_parameters < found["lossless"].trained_parameters
    for name, candidate in found.items():
        if candidate.refused is None:
            assert candidate.preserving == growkit.plan(source, hidden="1.5x", layers=4, method=name).preserving


class Loud:
    """An adapter whose model always says the same logits."""

    name = "loud"

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def forward(self, model: growkit.Model, device: str = "auto") -> Any:
        return lambda inputs, weights=None: {"logits": self.logits}


def test_the_loss_is_the_cross_entropy_of_what_counts() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    source = growkit.Model(memory_model(transformer()).graph, {}, Loud(logits + 7.0))  # type: ignore[arg-type]
    assert start_loss(source, Batch({}, np.array([[1, 2]]))) == pytest.approx(-(np.log(0.25) + np.log(0.8)) / 2)
    assert start_loss(source, Batch({}, np.array([[1, -100]]))) == pytest.approx(-np.log(0.25))
    with pytest.raises(GrowkitError, match="labels: shape"):
        start_loss(source, Batch({}, np.array([1])))


def test_an_exact_start_has_the_sources_loss() -> None:
    source = memory_model(transformer(depths=(2,), causal=True, head="untied", vocab=7, positions=6))
    batch = token_batch(source, np.arange(60) % 7)
    losses = {
        name: start_loss(growkit.grow(source, hidden="2x", layers=3, method=name), batch)
        for name in ("lossless", "fresh")
    }
    assert losses["lossless"] == pytest.approx(start_loss(source, batch), rel=1e-9)
    assert losses["fresh"] != pytest.approx(losses["lossless"], rel=1e-3)


@pytest.mark.parametrize(
    ("features", "tokens", "problem"),
    [
        ({"head": "bare"}, [0] * 60, "has no logits over its vocabulary"),
        ({"head": "untied", "causal": True}, [0], "expected at least one sequence"),
        ({"head": "untied", "causal": True}, [99] * 60, "holds the token 99; expected ids below"),
    ],
)
def test_data_that_gives_no_loss(features: dict[str, Any], tokens: list[int], problem: str) -> None:
    with pytest.raises(GrowkitError, match=problem):
        token_batch(memory_model(transformer(**features)), np.array(tokens))
