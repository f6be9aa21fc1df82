"""Hypothesis strategies: layouts, spaces, structured matrices, small transformers, and the sizes they can grow to."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, get_args

import numpy as np
from hypothesis import strategies as st

from growkit.matrices import (
    Composition,
    Concatenation,
    Dense,
    Identity,
    Interleaved,
    Kronecker,
    Matrix,
    MeanFill,
    RowBlocks,
    Scaled,
    Selection,
    pad,
)
from growkit.testing.small_transformer import MODULES, transformer
from growkit_specs import Axis, Fixed, LayerGraph, Layout, Leaf, Space, Target
from growkit_specs.layer_graph import SpaceKind
from growkit_specs.layout import concatenation, product

SPACES = ("hidden", "ffn", "heads", "head_dim", "vocab")


# --- layouts -------------------------------------------------------------------------------------------------


def axes(spaces: Sequence[str] = SPACES, *, max_leaves: int = 6) -> st.SearchStrategy[Axis]:
    """Axes in their normal form: products and concatenations of ``spaces`` and fixed sizes, nested."""
    leaves: st.SearchStrategy[Axis] = st.sampled_from(spaces).map(Leaf) | st.integers(1, 4).map(Fixed)

    def composed(inner: st.SearchStrategy[Axis]) -> st.SearchStrategy[Axis]:
        parts = st.lists(inner, min_size=2, max_size=3)
        return parts.map(lambda p: product(*p)) | parts.map(lambda p: concatenation(*p))

    return st.recursive(leaves, composed, max_leaves=max_leaves)


def layouts(spaces: Sequence[str] = SPACES) -> st.SearchStrategy[Layout]:
    """Lines of the axis notation: maps in both storage orders, biases, scales and shifts."""
    axis = axes(spaces)

    def some(least: int) -> st.SearchStrategy[tuple[Axis, ...]]:
        return st.lists(axis, min_size=least, max_size=3).map(tuple)

    maps = st.builds(Layout, some(1), st.just("<-"), some(1)) | st.builds(Layout, some(0), st.just("->"), some(1))
    elementwise = st.builds(Layout, st.just(()), st.sampled_from(("*", "+")), st.tuples(axis))
    return maps | elementwise


# --- matrices ------------------------------------------------------------------------------------------------

_NEW = st.integers(0, 2)
_FACTORS = st.sampled_from((-2.0, -0.5, 0.0, 0.5, 3.0))


@st.composite
def _selections(draw: st.DrawFn, weights: bool) -> Matrix:
    columns, rows = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    index = draw(st.lists(st.integers(-1, columns - 1), min_size=rows, max_size=rows))
    weight = draw(st.lists(_FACTORS, min_size=rows, max_size=rows)) if weights else None
    return Selection(np.array(index), columns, None if weight is None else np.array(weight))


@st.composite
def _dense(draw: st.DrawFn) -> Matrix:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    return Dense(np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape))


def matrices() -> st.SearchStrategy[Matrix]:
    """Every kind of structured matrix; transposed, scaled, and nested in products and concatenations too."""
    sizes = st.builds(lambda new, old: (new + old, old), st.integers(0, 3), st.integers(1, 4))
    plain = st.one_of(
        st.integers(1, 4).map(Identity),
        sizes.map(lambda size: pad(*size)),
        st.builds(_mean_fill, _NEW, st.integers(1, 3), st.integers(1, 2)),
        _selections(weights=False),
        _selections(weights=True),
        _dense(),
    )
    leaves = st.builds(lambda matrix, turned: matrix.mT if turned else matrix, plain, st.booleans())
    few = st.builds(pad, st.just(2), st.integers(1, 2))
    joined = st.builds(_interleaved, few, st.lists(few, min_size=1, max_size=3)) | st.builds(_padded, leaves, _NEW)

    def composed(inner: st.SearchStrategy[Matrix]) -> st.SearchStrategy[Matrix]:
        parts = st.lists(inner, min_size=1, max_size=2).map(tuple)
        return st.one_of(
            parts.map(Kronecker),
            parts.map(Concatenation),
            st.builds(Scaled, inner, _FACTORS),
            inner.map(lambda matrix: matrix.mT),
        )

    stacked = st.builds(_stacked, leaves, st.lists(st.integers(1, 2), min_size=1, max_size=2))
    return (
        leaves | joined | stacked | stacked.map(lambda matrix: matrix.mT) | st.recursive(leaves, composed, max_leaves=4)
    )


def _mean_fill(new: int, old: int, copies: int) -> MeanFill:
    return MeanFill(copies * old + new, old, copies)


def _stacked(matrix: Matrix, new: Sequence[int]) -> RowBlocks:
    """``[M; C; ...]``, each ``C`` dense."""
    columns = matrix.shape[1]
    below = (Dense(np.random.default_rng(rows).standard_normal((rows, columns))) for rows in new)
    return RowBlocks((matrix, *below))


def _padded(matrix: Matrix, new: int) -> Composition:
    rows = matrix.shape[0]
    return Composition(pad(rows + new, rows), matrix)


def _interleaved(outer: Matrix, inner: Sequence[Matrix]) -> Interleaved:
    """Segments that share their runs: ``(outer inner[0])``, ``(outer inner[1])``, ... in turns."""
    return Interleaved(tuple(Kronecker((outer, each)) for each in inner), outer.shape)


# --- spaces --------------------------------------------------------------------------------------------------


def spaces(names: Sequence[str] = SPACES) -> st.SearchStrategy[Space]:
    """Spaces of every kind, with 1 to 12 entries."""
    kinds = st.sampled_from(get_args(SpaceKind))
    return st.builds(Space, name=st.sampled_from(names), size=st.integers(1, 12), kind=kinds)


# --- layer graphs --------------------------------------------------------------------------------------------


def layer_graphs(**features: st.SearchStrategy[Any]) -> st.SearchStrategy[LayerGraph]:
    """Small transformers: what :func:`transformer` makes of drawn features.

    Args:
        features: Strategies for single features, in place of the usual ones.
    """
    usual: dict[str, st.SearchStrategy[Any]] = {
        "heads": st.integers(1, 3),
        "group": st.none() | st.integers(1, 3),
        "head_dim": st.sampled_from((4, 6)),  # over two entries a LayerNorm is a sign, and rounding is all there is
        "hidden": st.none() | st.integers(3, 9),
        "ffn": st.integers(2, 7),
        "vocab": st.integers(3, 9),
        "positions": st.integers(2, 6),
        "depths": st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
        "norm": st.sampled_from(("rms", "layer")),
        "offset": st.sampled_from((0.0, 1.0)),
        "block": st.sampled_from(("pre", "post", "parallel")),
        "branch_norms": st.booleans(),
        "table_power": st.sampled_from((0.0, 0.5)),
        "head_power": st.sampled_from((0.0, -0.5)),
        "stem": st.sampled_from(("plain", "plain", "normed", "factored")),
        "head": st.sampled_from(("untied", "tied", "transform", "pooler", "bare")),
        "final_norm": st.sampled_from(("final_norm", "attention_norm", None)),  # a name is its block's own
        "epsilon": st.sampled_from(("shared", "own", "fixed")),
        "qkv": st.sampled_from(("separate", "product", "interleaved", "concatenation")),
        "gated": st.sampled_from(("no", "separate", "fused")),
        "activation": st.sampled_from(("gelu", "silu", "relu", "gelu_new")),
        "transposed": st.frozensets(st.sampled_from(MODULES)),
    }
    flags = ("learned_positions", "rope", "causal", "scaled_scores", "qk_norm", "biases", "layer_scale")
    return st.builds(transformer, **(usual | dict.fromkeys(flags, st.booleans()) | features))


# --- targets -------------------------------------------------------------------------------------------------


@st.composite
def targets(draw: st.DrawFn, graph: LayerGraph) -> Target:
    """Sizes ``graph`` can grow to: any width, whole groups of heads, every stack deeper in one ratio.

    What follows by itself may be named or not; a whole multiple may be given as a ratio. The simplest doubles
    width and depth.
    """
    old = _named_sizes(graph)
    asked = draw(st.one_of(_hidden_only(graph), _every_head_size(graph)))
    own = (name for name in ("ffn", "vocab", "positions") if name in old and f"follows:{name}" not in graph.attributes)
    free = {name: _grown(old[name]) for name in own}
    asked = asked | draw(st.fixed_dictionaries({}, optional=free))
    asked = asked | draw(st.fixed_dictionaries({"layers": _depths(graph)}) | st.just({}))
    whole = [name for name, size in asked.items() if size % old[name] == 0]
    ratios = draw(st.frozensets(st.sampled_from(whole))) if whole else frozenset()
    return Target.of(**{name: f"{n // old[name]}x" if name in ratios else n for name, n in asked.items()})


def _named_sizes(graph: LayerGraph) -> dict[str, int]:
    grouped = {"heads": graph.sizes["kv_heads"] * graph.sizes["group"]} if "kv_heads" in graph.sizes else {}
    return {**graph.sizes, **grouped, "layers": next(iter(graph.depths.values()))}


def _grown(size: int) -> st.SearchStrategy[int]:
    return st.sampled_from((2 * size, size)) | st.integers(size, 3 * size)


def _depths(graph: LayerGraph) -> st.SearchStrategy[int]:
    """The first stack's depth, such that every other stack can follow in ratio."""
    first, step = next(iter(graph.depths.values())), gcd(*graph.depths.values())
    return _grown(step).map(lambda steps: steps * first // step)


def _hidden_only(graph: LayerGraph) -> st.SearchStrategy[dict[str, int]]:
    """``hidden`` alone, in steps that whole groups of heads of the same head_dim can follow."""
    old = _named_sizes(graph)
    unit = old.get("group", 1)
    step = old["hidden"] * unit // gcd(old["hidden"] * unit, old["heads"])
    step = old["head_dim"] * unit if "follows:head_dim" in graph.attributes else step
    double = st.just(old["hidden"] // step)
    return (double | st.integers(0, 3)).map(lambda steps: {"hidden": old["hidden"] + steps * step})


@st.composite
def _every_head_size(draw: st.DrawFn, graph: LayerGraph) -> dict[str, int]:
    """``hidden`` and every size of the attention."""
    old = _named_sizes(graph)
    drawn: dict[str, int] = {}
    for name in ("heads", "kv_heads", "group"):
        if name in graph.sizes:
            drawn[name] = draw(_grown(old[name]))
    heads = drawn["kv_heads"] * drawn.pop("group") if "group" in drawn else drawn["heads"]
    head_dim = old["head_dim"] * draw(st.sampled_from((1, 2)))  # even stays even, as rotary positions need
    is_tied = "follows:head_dim" in graph.attributes
    hidden = heads * head_dim if is_tied else draw(_grown(old["hidden"]))
    return {**drawn, "hidden": hidden, "heads": heads, "head_dim": head_dim}
