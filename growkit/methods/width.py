"""Width methods: how the matrices of a space are made when it grows from ``d`` to ``D`` entries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from growkit.matrices import Selection, pad, scaled
from growkit.methods.depth import interpolated
from growkit.methods.registry import Method, SpaceGrowth, register
from growkit.operator import Expansion


def unused(growth: SpaceGrowth) -> Mapping[str, Expansion]:
    """New entries that nothing uses yet: new tokens and positions, whatever the method."""
    matrix = pad(growth.target, growth.source)
    return {growth.space: Expansion(matrix, matrix, matrix, fresh="both")}


def selections(growth: SpaceGrowth, index: np.ndarray) -> Mapping[str, Expansion]:
    """Copies: entry ``i`` of the target is entry ``index[i]`` of the source, and readers share out their weights.

        B = S,   A = S diag(1/c),   C = S          (FPI; c counts the copies of an entry)

    On ``head_dim`` the query takes the share instead, so that a score is the sum it was.

    Args:
        growth: The space.
        index: ``(D,)`` source entries.
    """
    copy = Selection(index, growth.source)
    share = Selection(index, growth.source, 1.0 / copy.counts[index])
    expansion = Expansion(write=copy, read=share, seen=copy, fresh="read")
    if growth.space != "head_dim":
        return {growth.space: expansion}
    return {
        growth.space: expansion,
        "head_dim[q]": Expansion(write=scaled(share, growth.score_gain), read=share, seen=copy),
        "head_dim[k]": Expansion(write=copy, read=share, seen=copy),
    }


def _net2net(growth: SpaceGrowth) -> Mapping[str, Expansion]:
    if growth.kind == "fixed":
        return unused(growth)
    # The first d entries are themselves, the rest are drawn; in rounds without replacement, so that a whole ratio
    # gives equal counts, which is when a norm keeps what it did.
    rounds = -(-growth.target // growth.source) - 1
    drawn = [growth.rng.permutation(growth.source) for _ in range(rounds)]
    return selections(growth, np.concatenate([np.arange(growth.source), *drawn])[: growth.target])


def _nothing(growth: SpaceGrowth) -> Mapping[str, Expansion]:
    nothing = Selection(np.full(growth.target, -1), growth.source)
    return {growth.space: Expansion(nothing, nothing, nothing, fresh="write")}


NET2NET = register(
    Method(
        name="net2net",
        summary="copy units and share out what reads them (FPI), with a little paired noise",
        exact_when="every grown norm sees equal numbers of copies: whole ratios; head_dim without rotary positions",
        paper="Chen et al., Net2Net, ICLR 2016, https://arxiv.org/abs/1511.05641; Chen et al., bert2BERT, ACL 2022, "
        "https://arxiv.org/abs/2110.07143",
        width=_net2net,
        fresh=0.05,
    )
)

RANDOM = register(
    Method(
        name="random",
        summary="nothing of the source: the model's own initialisation, the baseline of training from scratch",
        exact_when="never",
        paper=None,
        width=_nothing,
        depth=interpolated,
        reference="init",
    )
)
