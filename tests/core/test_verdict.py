"""The rules of exactness (OPERATORS E1 to E10), each on operators made by hand, in both directions."""

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest

import growkit
from growkit.matrices import Dense, Identity, Matrix, MeanFill, Scaled, Selection, pad
from growkit.operator import Expansion, GrowthOperator, unchanged
from growkit.testing import memory_model, reference_forward, transformer
from growkit.verdict import Reason, Verdict, verdict
from growkit.verify import generated_inputs
from growkit_specs import Layer, LayerGraph, Parameter, Port
from growkit_specs.layer_graph import norm_key

EXACT, DIFFERENT = 1e-10, 1e-6
SPACES = {"heads": 2, "head_dim": 2, "hidden": 6, "ffn": 3}


def graph_of(**features: Any) -> LayerGraph:
    return transformer(**{**SPACES, **features})


def operator_for(
    graph: LayerGraph, expansions: Mapping[str, Expansion], blend: Mapping[str, Any] | None = None, **other: Any
) -> GrowthOperator:
    """An operator that leaves alone what is not named."""
    return GrowthOperator(
        {space: unchanged(size) for space, size in graph.sizes.items()} | dict(expansions),
        {stack: np.eye(depth) for stack, depth in graph.depths.items()} | dict(blend or {}),
        **other,
    )


def difference(graph: LayerGraph, operator: GrowthOperator) -> float:
    """The largest relative difference of the outputs, brought back through the read matrices."""
    source = memory_model(graph)
    target = growkit.grow(source, operator)
    worst = 0.0
    for inputs in generated_inputs(graph, 0):
        expected, grown = (reference_forward(m.graph, dict(m.weights), inputs) for m in (source, target))
        for port in (port for port in graph.outputs if port.name in expected):
            a, b = expected[port.name], grown[port.name]
            b = operator.read_matrix(port.space, port.through).apply(b, b.ndim - 1)
            worst = max(worst, np.abs(a - b).max() / np.abs(a).max())
    return worst


def assert_exact(graph: LayerGraph, operator: GrowthOperator) -> Verdict:
    found = verdict(graph, operator)
    assert found.preserving, found.broken
    assert found.reasons
    assert difference(graph, operator) < EXACT
    return found


def assert_different(graph: LayerGraph, operator: GrowthOperator, *conditions: str) -> Verdict:
    found = verdict(graph, operator)
    assert difference(graph, operator) > DIFFERENT
    assert {reason.condition for reason in found.broken} == set(conditions)
    return found


# --- matrices by hand ----------------------------------------------------------------------------------------


def copies(index: list[int], power: float = 0.0) -> Matrix:
    """A selection, its rows weighted by ``count ** power``."""
    counts = np.bincount(index).astype(float)
    return Selection(np.array(index), len(counts), counts[index] ** power if power else None)


def shared(index: list[int]) -> Expansion:
    """Net2Net: copies, of which readers take their share."""
    return Expansion(copies(index), copies(index, -1), copies(index))


def padded(rows: int, columns: int, **other: Any) -> Expansion:
    return Expansion(pad(rows, columns), pad(rows, columns), pad(rows, columns), **other)


def dense(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def inverted(B: np.ndarray) -> Expansion:
    """A dense write matrix, and a read matrix with ``A^T B = 1``."""
    return Expansion(Dense(B), Dense(np.linalg.pinv(B).T), Dense(B))


# --- E1: linear spaces ---------------------------------------------------------------------------------------


def linear_graph() -> LayerGraph:
    """A narrow embedding that is projected, with no norm between: a space that is read linearly and nothing else."""
    graph = graph_of(stem="factored")
    stem = tuple(layer for layer in graph.stem if layer.kind != "norm")
    spaces = tuple(s.model_copy(update={"kind": "linear"}) if s.name == "narrow" else s for s in graph.spaces)
    return graph.model_copy(update={"stem": stem, "spaces": spaces}).revalidated()


def test_e1_what_is_read_linearly_may_be_mixed_where_readers_undo_it() -> None:
    assert_exact(linear_graph(), operator_for(linear_graph(), {"narrow": inverted(dense(7, 5))}))


def test_e1_readers_that_do_not_undo_it() -> None:
    expansion = Expansion(Dense(dense(7, 5)), Dense(dense(7, 5, 1)), Dense(dense(7, 5)))
    assert_different(linear_graph(), operator_for(linear_graph(), {"narrow": expansion}), "narrow: readers")


# --- E2, E3: units behind an activation ----------------------------------------------------------------------

GATED = ("no", "separate", "fused")


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("index", [[0, 1, 2, 0], [0, 1, 2, 0, 1, 2], [2, 2, 0, 1, 2]])
def test_e2_e3_copies_of_units_shared_out(gated: str, index: list[int]) -> None:
    graph = graph_of(gated=gated)
    assert_exact(graph, operator_for(graph, {"ffn": shared(index)}))


@pytest.mark.parametrize("gated", GATED)
def test_e2_units_that_nobody_reads_may_be_anything(gated: str) -> None:
    graph = graph_of(gated=gated)
    write = Dense(np.vstack([np.eye(3), dense(2, 3)]))
    assert_exact(graph, operator_for(graph, {"ffn": Expansion(write, pad(5, 3), write)}))


@pytest.mark.parametrize("gated", GATED)
def test_e2_new_units_that_are_read(gated: str) -> None:
    graph = graph_of(gated=gated)
    expansion = padded(5, 3, fresh="write")
    read = Dense(np.vstack([np.eye(3), dense(2, 3)]))
    assert_different(graph, operator_for(graph, {"ffn": replace(expansion, read=read)}), "ffn: units")


@pytest.mark.parametrize("gated", GATED)
def test_e2_scaled_copies(gated: str) -> None:
    graph = graph_of(gated=gated)
    index, weight = np.array([0, 1, 2]), np.array([1, 2.0, 1])
    expansion = Expansion(Selection(index, 3, weight), Selection(index, 3, 1 / weight), Selection(index, 3, weight))
    assert_different(graph, operator_for(graph, {"ffn": expansion}), "ffn: units")


def test_e2_mixed_units() -> None:
    graph = graph_of()
    assert_different(graph, operator_for(graph, {"ffn": inverted(dense(5, 3))}), "ffn: units")


# --- E4: RMSNorm ---------------------------------------------------------------------------------------------

HEADS = ("untied", "tied", "pooler", "bare")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, 5, 1, 3], [0, 1, 2, 3, 4, 5] * 2, [0, 0, 0, 1, 2, 3, 4, 5]])
def test_e4_copies_over_the_root_of_their_count_keep_rmsnorm_at_any_ratio(head: str, index: list[int]) -> None:
    graph, ratio = graph_of(head=head), 6 / len(index)
    copy = copies(index, -0.5)
    expansion = Expansion(copy, copy, copy, gain=sqrt(1 / ratio), variance=ratio)
    found = assert_exact(graph, operator_for(graph, {"hidden": expansion}))
    assert "RMSNorm over hidden" in {reason.condition for reason in found.reasons}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("block", ["pre", "parallel"])
def test_e4_zeros_keep_rmsnorm_where_scale_and_epsilon_follow(head: str, block: str) -> None:
    graph = graph_of(head=head, block=block)
    assert_exact(graph, operator_for(graph, {"hidden": padded(8, 6, gain=sqrt(8 / 6), variance=6 / 8)}))


@pytest.mark.parametrize("wrong", [{}, {"gain": sqrt(8 / 6)}, {"variance": 6 / 8}, {"gain": 8 / 6, "variance": 6 / 8}])
def test_e4_zeros_where_scale_or_epsilon_do_not_follow(wrong: dict[str, float]) -> None:
    graph = graph_of()
    assert_different(graph, operator_for(graph, {"hidden": padded(8, 6, **wrong)}), "RMSNorm over hidden")


def test_e4_plain_copies_in_equal_numbers_only() -> None:
    graph = graph_of()
    assert_exact(graph, operator_for(graph, {"hidden": shared([*range(6)] * 2)}))
    assert_different(graph, operator_for(graph, {"hidden": shared([*range(6), 0, 1])}), "RMSNorm over hidden")


def test_e4_post_norm_bears_copies_only() -> None:
    graph = graph_of(block="post")
    assert_exact(graph, operator_for(graph, {"hidden": shared([*range(6)] * 2)}))
    zeros = padded(12, 6, gain=sqrt(2), variance=0.5)
    assert_exact(graph, operator_for(graph, {"hidden": zeros}))  # zeros stay zeros under RMSNorm
    assert_different(graph, operator_for(graph, {"hidden": shared([*range(6), 0])}), "RMSNorm over hidden")


def test_e4b_the_stream_may_be_scaled_so_that_epsilon_stays() -> None:
    graph, factor = graph_of(), sqrt(8 / 6)
    expansion = Expansion(Scaled(pad(8, 6), factor), pad(8, 6), pad(8, 6), gain=factor)
    found = assert_exact(graph, operator_for(graph, {"hidden": expansion}))
    assert not any(reason.condition.startswith("epsilon") for reason in found.reasons)


def test_e4b_an_epsilon_that_serves_norms_that_grow_apart() -> None:
    graph = graph_of(qk_norm=True)
    operator = operator_for(graph, {"hidden": padded(8, 6, gain=sqrt(8 / 6), variance=6 / 8)})
    found = assert_different(graph, operator, "epsilon over hidden")
    assert found.broken[0].detail == "norm_eps serves norms that grow apart"


def test_e4b_a_scaled_stream_that_is_read_without_a_norm() -> None:
    graph, factor = graph_of(final_norm=None), sqrt(8 / 6)
    expansion = Expansion(Scaled(pad(8, 6), factor), pad(8, 6), pad(8, 6), gain=factor)
    assert_different(graph, operator_for(graph, {"hidden": expansion}), "hidden: readers")


# --- E4c: norms after branches, offsets of scales, powers of hidden -------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("block", ["pre", "parallel", "post"])
def test_e4c_a_norm_after_a_branch_gives_what_is_written(block: str, offset: float) -> None:
    graph = graph_of(block=block, branch_norms=True, offset=offset)
    found = assert_exact(graph, operator_for(graph, {"hidden": padded(8, 6, gain=sqrt(8 / 6), variance=6 / 8)}))
    where = "after the residual addition" if block == "post" else "after each branch"
    assert any(where in reason.detail for reason in found.reasons)
    copy = copies([*range(6), 1, 3], -0.5)
    turned = Expansion(copy, copy, copy, gain=sqrt(8 / 6), variance=6 / 8)
    assert_exact(graph, operator_for(graph, {"hidden": turned}))
    assert_different(graph, operator_for(graph, {"hidden": shared([*range(6), 0])}), "RMSNorm over hidden")


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_e4c_a_scaled_stream_takes_scaled_branches(norm: str, offset: float) -> None:
    """B = s C: what a branch's norm gives is added to a stream that is s times what readers see."""
    graph, factor = graph_of(branch_norms=True, offset=offset, norm=norm), sqrt(2)
    kept = Expansion(Scaled(pad(12, 6), factor), pad(12, 6), pad(12, 6), gain=factor)
    if norm == "rms":
        assert_exact(graph, operator_for(graph, {"hidden": kept}))
    tile = shared([*range(6)] * 2)
    larger = replace(tile, write=Scaled(tile.write, 3.0), variance=9.0)
    assert_exact(graph, operator_for(graph, {"hidden": larger}))


def test_e4c_a_mean_fill_is_not_what_a_branch_norm_gives() -> None:
    graph = graph_of(norm="layer", branch_norms=True)
    expansion = Expansion(MeanFill(8, 6), pad(8, 6), pad(8, 6), gain=sqrt(8 / 6), variance=6 / 8)
    found = assert_different(graph, operator_for(graph, {"hidden": expansion}), "LayerNorm over hidden")
    assert "after each branch: only whole ratios keep it" in found.broken[0].detail


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("powers", [(0.5, 0.0), (0.0, -0.5), (0.5, -0.5), (1.0, 0.25)])
def test_e9_a_tied_head_between_powers_of_hidden(head: str, powers: tuple[float, float]) -> None:
    """The table is multiplied by hidden^p, what the head reads by hidden^q; one factor serves a table for both."""
    table, read = powers
    graph = graph_of(head=head, table_power=table, head_power=read)
    zeros = padded(12, 6, gain=sqrt(2), variance=0.5)
    factors = {norm_key(None, "final_norm"): 2.0 ** (table - read)} if head == "tied" else {}
    assert_exact(graph, operator_for(graph, {"hidden": zeros}, norm_factors=factors))
    if head == "tied":
        assert_different(graph, operator_for(graph, {"hidden": zeros}), "tied head")


def test_e4b_a_scaled_stream_cancels_the_root_of_hidden() -> None:
    graph, factor = graph_of(head="tied", table_power=0.5), sqrt(8 / 6)
    expansion = Expansion(Scaled(pad(8, 6), factor), pad(8, 6), pad(8, 6), gain=factor)
    operator = operator_for(graph, {"hidden": expansion})
    assert_exact(graph, operator)
    source, target = memory_model(graph), growkit.grow(memory_model(graph), operator)
    np.testing.assert_allclose(target.weights["table.weight"][:, :6], source.weights["table.weight"], rtol=1e-15)


@pytest.mark.parametrize(("size", "told"), [(12, True), (24, False)])
def test_half_types_round_what_a_power_of_hidden_scales(size: int, told: bool) -> None:
    graph = graph_of(table_power=0.5, dtype="bfloat16")
    reasons = verdict(graph, operator_for(graph, {"hidden": shared([*range(6)] * (size // 6))})).reasons
    details = [reason.detail for reason in reasons if reason.condition == "rounding over hidden"]
    assert details == ["layers that are multiplied by a power of hidden are rounded to bfloat16"] * told


def test_norm_scales_with_an_offset_keep_every_bit_where_nothing_changes() -> None:
    graph = graph_of(offset=1.0)
    source = memory_model(graph)
    target = growkit.grow(source, operator_for(graph, {"ffn": padded(5, 3, fresh="write")}))
    for name in ("stack0.0.attention_norm.scale", "head.final_norm.scale"):
        assert np.array_equal(source.weights[name], target.weights[name])


# --- E5: LayerNorm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["pre", "post", "parallel"])
def test_e5_layernorm_bears_whole_tiles(block: str) -> None:
    graph = graph_of(norm="layer", block=block)
    assert_exact(graph, operator_for(graph, {"hidden": shared([*range(6)] * 3)}))
    broken = assert_different(
        graph, operator_for(graph, {"hidden": shared([*range(6), 0, 1])}), "LayerNorm over hidden"
    )
    assert "hidden 6 to 8, ratio 1.33333" in broken.broken[0].detail


def test_e5_the_mean_in_new_channels_keeps_layernorm_before_the_branches() -> None:
    expansion = Expansion(MeanFill(8, 6), pad(8, 6), pad(8, 6), gain=sqrt(8 / 6), variance=6 / 8)
    for block in ("pre", "parallel"):
        graph = graph_of(norm="layer", block=block, layer_scale=block == "pre")
        assert_exact(graph, operator_for(graph, {"hidden": expansion}))
    graph = graph_of(norm="layer", block="post")
    found = assert_different(graph, operator_for(graph, {"hidden": expansion}), "LayerNorm over hidden")
    assert "after the residual addition: only whole ratios keep it" in found.broken[0].detail


def test_e5_zeros_move_the_mean() -> None:
    graph = graph_of(norm="layer")
    expansion = padded(8, 6, gain=sqrt(8 / 6), variance=6 / 8)
    assert_different(graph, operator_for(graph, {"hidden": expansion}), "LayerNorm over hidden")


# --- E6, E7, E8: heads ---------------------------------------------------------------------------------------

QKV = ("separate", "product", "concatenation")


@pytest.mark.parametrize("qkv", [*QKV, "interleaved"])
def test_e6_copies_of_whole_heads_and_silent_heads(qkv: str) -> None:
    graph = graph_of(qkv=qkv, rope=True, causal=True)
    assert_exact(graph, operator_for(graph, {"heads": shared([0, 1, 1])}))
    assert_exact(graph, operator_for(graph, {"heads": padded(5, 2, fresh="write")}))


def test_e6_mixed_heads() -> None:
    graph = graph_of()
    assert_different(graph, operator_for(graph, {"heads": inverted(dense(3, 2))}), "heads: units")


def wider_heads(factor: float) -> dict[str, Expansion]:
    query = Expansion(Scaled(pad(3, 2), factor), pad(3, 2), pad(3, 2))
    return {"head_dim": padded(3, 2), "head_dim[q]": query, "head_dim[k]": padded(3, 2)}


@pytest.mark.parametrize("qkv", QKV)
def test_e6_wider_heads_where_the_query_takes_back_the_score_scale(qkv: str) -> None:
    graph = graph_of(qkv=qkv)
    assert_exact(graph, operator_for(graph, wider_heads(sqrt(3 / 2))))
    assert_different(graph, operator_for(graph, wider_heads(1.0)), "head_dim: attention scores")
    unscaled = graph_of(qkv=qkv, scaled_scores=False)
    assert_exact(unscaled, operator_for(unscaled, wider_heads(1.0)))
    assert_different(unscaled, operator_for(unscaled, wider_heads(sqrt(3 / 2))), "head_dim: attention scores")


def test_e6_new_entries_of_queries_and_keys_that_meet() -> None:
    graph = graph_of()
    expansions = wider_heads(sqrt(3 / 2))
    for key in ("head_dim[q]", "head_dim[k]"):
        expansions[key] = replace(expansions[key], fresh="write")
    assert_different(graph, operator_for(graph, expansions), "head_dim: attention scores")


def test_e6_wider_heads_with_rotary_positions() -> None:
    graph = graph_of(rope=True)
    expansions = {key: replace(e, write=pad(4, 2), read=pad(4, 2), seen=pad(4, 2)) for key, e in wider_heads(1).items()}
    expansions["head_dim[q]"] = replace(expansions["head_dim[q]"], write=Scaled(pad(4, 2), sqrt(2)))
    found = assert_different(graph, operator_for(graph, expansions), "head_dim: attention scores")
    assert "rotary frequencies depend on head_dim" in found.broken[0].detail


def test_e6_rotary_positions_pair_the_entries_of_a_head() -> None:
    graph = graph_of(head_dim=4, rope=True)
    swapped = Selection(np.array([1, 0, 2, 3]), 4)
    operator = operator_for(graph, {"head_dim": Expansion(swapped, swapped, swapped)})
    assert difference(graph, operator) > DIFFERENT
    assert not verdict(graph, operator).preserving


@pytest.mark.parametrize("qkv", [*QKV, "interleaved"])
def test_e7_whole_groups_and_larger_groups(qkv: str) -> None:
    graph = graph_of(group=2, qkv=qkv)
    assert_exact(graph, operator_for(graph, {"kv_heads": shared([0, 1, 0])}))
    assert_exact(graph, operator_for(graph, {"group": shared([0, 1, 0])}))
    assert_exact(graph, operator_for(graph, {"kv_heads": padded(3, 2, fresh="write"), "group": shared([0, 1, 1])}))


def test_e7_query_heads_that_leave_their_group() -> None:
    graph = graph_of(group=2)
    order = [0, 2, 1, 3]  # heads 1 and 2 trade groups; o_proj reads them where they are now
    heads = Selection(np.array([2 * head + entry for head in order for entry in range(2)]), 8)
    axis = "(kv_heads group head_dim)"
    operator = operator_for(graph, {f"{axis}[{basis}]": Expansion(heads, heads, heads) for basis in "qv"})
    assert difference(graph, operator) > DIFFERENT
    assert not verdict(graph, operator).preserving


def test_e6_bases_that_do_not_fit_each_other() -> None:
    graph = graph_of()
    swapped = Selection(np.array([1, 0]), 2)
    operator = operator_for(graph, {"heads[q]": Expansion(swapped, swapped, swapped)})
    assert difference(graph, operator) > DIFFERENT
    assert not verdict(graph, operator).preserving


def test_e8_a_query_key_norm_does_not_mind_more_heads() -> None:
    graph = graph_of(qk_norm=True)
    assert_exact(graph, operator_for(graph, {"heads": shared([0, 1, 0])}))


# --- E9: tied heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [frozenset(), frozenset({"table"})])
@pytest.mark.parametrize("head", ["tied", "transform"])
def test_e9_copies_are_read_more_than_once(head: str, transposed: frozenset[str]) -> None:
    graph = graph_of(head=head, norm="layer", transposed=transposed)
    tile = shared([*range(6)] * 2)
    spaces = {"hidden": tile, "transform": tile} if head == "transform" else {"hidden": tile}
    norm = "transform_norm" if head == "transform" else "final_norm"
    found = assert_exact(graph, operator_for(graph, spaces, norm_factors={norm_key(None, norm): 0.5}))
    assert any("the norm before it times 0.5" in reason.detail for reason in found.reasons)
    assert_exact(graph, operator_for(graph, spaces, untied=("lm_head.weight",)))
    assert_different(graph, operator_for(graph, spaces), "tied head")
    assert_different(graph, operator_for(graph, spaces, norm_factors={norm_key(None, norm): 0.25}), "tied head")


def test_e9_other_readers_of_the_norm_before_a_tied_head() -> None:
    """The factor that the tied head needs stands on the norm's output; whoever else reads it takes it back."""
    graph = graph_of(head="tied")
    weight = Parameter(name="score.weight", slot="score.weight", layout="labels <- hidden", dtype="float64")
    score = Layer(name="score", kind="head", through="final_norm", parameters=(weight,))
    ports = (*graph.outputs, Port(name="scores", space="labels"))
    graph = graph.model_copy(update={"head": (*graph.head, score), "outputs": ports}).revalidated()
    spaces = {"hidden": replace(shared([*range(6)] * 2), fresh="read")}
    assert_exact(graph, operator_for(graph, spaces, norm_factors={norm_key(None, "final_norm"): 0.5}))


def test_e9_bases_of_table_and_head_that_differ() -> None:
    graph = graph_of(head="transform", norm="layer")
    turned = shared([*range(6), *reversed(range(6))])
    spaces = {"hidden": shared([*range(6)] * 2), "transform": turned}
    assert_different(
        graph, operator_for(graph, spaces, norm_factors={norm_key(None, "transform_norm"): 0.5}), "tied head"
    )
    assert_exact(graph, operator_for(graph, spaces, untied=("lm_head.weight",)))


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_old_tokens_and_positions_stay(head: str) -> None:
    graph = graph_of(head=head)
    assert_exact(
        graph, operator_for(graph, {"vocab": padded(9, 7, fresh="both"), "positions": padded(8, 5, fresh="both")})
    )
    swapped = Selection(np.array([1, 0, 2, 3, 4, 5, 6]), 7)
    operator = operator_for(graph, {"vocab": Expansion(swapped, swapped, swapped)})
    found = verdict(graph, operator)
    assert "vocab: old entries stay" in {reason.condition for reason in found.broken}
    assert difference(graph, operator) > DIFFERENT


# --- E10: depth ----------------------------------------------------------------------------------------------


def deepened(graph: LayerGraph, sources: list[int], silent: list[bool], *, forget: str = "") -> dict[str, np.ndarray]:
    """The blend of a stack whose layers come from ``sources``; what silent ones write is zero, but for ``forget``."""
    blend = {"stack0": np.eye(graph.depths["stack0"])[sources]}
    for key in graph.writer_keys(graph.stacks[0]):
        if not key.endswith(forget) or not forget:
            blend[key] = blend["stack0"] * ~np.array(silent)[:, None]
    return blend


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("block", ["pre", "parallel"])
@pytest.mark.parametrize(
    ("sources", "silent"),
    [
        ([0, 0, 1], [False, True, False]),
        ([0, 1, 0], [False, False, True]),
        ([1, 0, 1], [True, False, False]),
        ([0, 0, 0, 1, 1, 1], [False, True, True, True, False, True]),
    ],
)
def test_e10_blocks_that_write_nothing(block: str, layer_scale: bool, sources: list[int], silent: list[bool]) -> None:
    graph = graph_of(block=block, layer_scale=layer_scale)
    assert_exact(graph, operator_for(graph, {}, deepened(graph, sources, silent)))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_e10_a_norm_after_a_branch_is_what_falls_silent(norm: str, offset: float) -> None:
    """Its scale and shift; the branch before it stays whole, so that its norm has something to divide by."""
    graph = graph_of(branch_norms=True, norm=norm, offset=offset)
    operator = operator_for(graph, {}, deepened(graph, [0, 0, 1], [False, True, False]))
    assert_exact(graph, operator)
    grown = growkit.grow(memory_model(graph), operator).weights
    assert np.array_equal(grown["stack0.1.attention_branch_norm.scale"], np.full(6, -offset))
    assert grown["stack0.1.o_proj.weight"].any()


@pytest.mark.parametrize("forget", ["o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"])
def test_e10_a_block_that_still_writes_something(forget: str) -> None:
    graph = graph_of()
    blend = deepened(graph, [0, 0, 1], [False, True, False], forget=forget)
    assert_different(graph, operator_for(graph, {}, blend), "stack0: depth")


@pytest.mark.parametrize("sources", [[0, 0, 1], [0, 1, 1], [1, 0], [0, 0], [0, 1, 0, 1]])
def test_e10_layers_that_run_twice_or_out_of_order(sources: list[int]) -> None:
    graph = graph_of()
    blend = deepened(graph, sources, [False] * len(sources))
    assert_different(graph, operator_for(graph, {}, blend), "stack0: depth")


def test_e10_a_slot_that_takes_other_layers() -> None:
    graph = graph_of()
    blend = deepened(graph, [0, 0, 1], [False, True, False])
    blend["stack0/mlp/up_proj.weight"] = np.eye(2)[[1, 0, 0]]
    assert_different(graph, operator_for(graph, {}, blend), "stack0: depth")


def test_e10_layers_that_are_averaged() -> None:
    graph = graph_of()
    blend = {"stack0": np.array([[1, 0], [0.5, 0.5], [0, 1]])}
    assert_different(graph, operator_for(graph, {}, blend), "stack0: depth")


def test_e10_a_silent_block_under_post_norm() -> None:
    graph = graph_of(block="post")
    blend = deepened(graph, [0, 0, 1], [False, True, False])
    found = assert_different(graph, operator_for(graph, {}, blend), "stack0: identity blocks")
    assert "still normalises the stream" in found.broken[0].detail


def test_e10_every_stack_counts() -> None:
    graph = graph_of(depths=(2, 1))
    blend = deepened(graph, [0, 0, 1], [False, True, False]) | {"stack1": np.ones((2, 1))}
    assert_different(graph, operator_for(graph, {}, blend), "stack1: depth")


def test_e10_a_slot_that_loses_its_layers() -> None:
    graph = graph_of()
    operator = operator_for(graph, {}, {"stack0/mlp/down_proj.weight": np.zeros((2, 2))})
    assert difference(graph, operator) > DIFFERENT
    assert not verdict(graph, operator).preserving


# --- what else a learned or loaded operator may hold ---------------------------------------------------------


def test_a_stream_that_is_turned() -> None:
    """RMSNorm bears every orthonormal B, but its scale is elementwise (E4: one entry in each row)."""
    graph = graph_of()
    turned = Dense(np.linalg.qr(dense(8, 6))[0])
    expansion = Expansion(turned, turned, turned, gain=sqrt(8 / 6), variance=6 / 8)
    operator = operator_for(graph, {"hidden": expansion})
    assert difference(graph, operator) > DIFFERENT
    assert not verdict(graph, operator).preserving


@pytest.mark.parametrize("other", [{"gain": 2.0}, {"seen": Selection(np.array([1, 0, 2, 3, 4, 5]), 6)}])
def test_a_norm_that_changes_in_place(other: dict[str, Any]) -> None:
    graph = graph_of()
    operator = operator_for(graph, {"hidden": replace(Expansion(Identity(6), Identity(6), Identity(6)), **other)})
    assert difference(graph, operator) > DIFFERENT
    assert not verdict(graph, operator).preserving


def test_learned_entries_are_not_promised() -> None:
    graph = graph_of()
    operator = operator_for(graph, {}, residual={"lm_head.weight": np.ones((7, 6))})
    assert_different(graph, operator, "no residual")


def test_an_operator_that_changes_nothing_has_nothing_to_tell() -> None:
    graph = graph_of(head="tied")
    assert verdict(graph, operator_for(graph, {})) == Verdict(())
    assert Verdict(()).preserving


def test_a_verdict_is_as_good_as_its_reasons() -> None:
    good, bad = Reason("norm", True, "kept"), Reason("depth", False, "layers run twice")
    assert Verdict((good,)).preserving
    assert not Verdict((good, bad)).preserving
    assert Verdict((good, bad)).broken == (bad,)


def test_spaces_that_no_parameter_uses_do_not_matter() -> None:
    graph = graph_of(learned_positions=False)
    assert verdict(graph, operator_for(graph, {"positions": padded(9, 5, fresh="both")})).reasons == ()
