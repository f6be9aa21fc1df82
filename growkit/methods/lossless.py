"""``lossless``: for each space the construction that keeps the function, and lets the new capacity be used.

The stream is padded where its norm bears it; new heads and MLP units are drawn freely and read with zeros; new blocks
write zeros. Nothing is copied where it need not be: copies move together under training
(docs/explanation/exactness.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np

from growkit.matrices import MeanFill, pad, scaled
from growkit.methods.depth import identity_blocks
from growkit.methods.registry import Method, SpaceGrowth, register
from growkit.methods.width import selections, unused
from growkit.operator import Expansion


def _lossless(growth: SpaceGrowth) -> Mapping[str, Expansion]:
    if growth.kind == "fixed":
        return unused(growth)
    if growth.kind == "residual" or growth.norms:
        return _normed(growth)
    if growth.space == "head_dim":
        return _head_dim(growth)
    padded = pad(growth.target, growth.source)
    return {growth.space: Expansion(padded, padded, padded, fresh="write")}


def _normed(growth: SpaceGrowth) -> Mapping[str, Expansion]:
    """A space under norms: padded with zeros (RMSNorm) or the mean (LayerNorm), tiled where the norm's output stays.

    A pad multiplies the norm's mean square by ``d/D``, and so what it gives by ``sqrt(D/d)``. The scale takes that
    back, and epsilon follows; or, where epsilon must stay, everything written is multiplied by ``sqrt(D/d)``.
    """
    d, D = growth.source, growth.target
    inside = growth.kind != "residual"
    if growth.is_layer_norm and (inside or growth.writes_stream):
        return selections(growth, np.arange(D) % d)
    padded = pad(D, d)
    write = MeanFill(D, d) if growth.is_layer_norm else padded
    if growth.keep_epsilon and not inside and not growth.is_post_norm:  # readers of a post-norm stream see its scale
        kept = Expansion(scaled(write, sqrt(D / d)), padded, padded, gain=sqrt(D / d), fresh="read")
        return {growth.space: kept}
    return {growth.space: Expansion(write, padded, padded, gain=sqrt(D / d), variance=d / D, fresh="read")}


def _head_dim(growth: SpaceGrowth) -> Mapping[str, Expansion]:
    """A wider head: keys get zeros, so new query rows are free; the query takes back the smaller score scale."""
    padded = pad(growth.target, growth.source)
    return {
        "head_dim": Expansion(padded, padded, padded, fresh="write"),
        "head_dim[q]": Expansion(scaled(padded, growth.score_gain), padded, padded, fresh="write"),
        "head_dim[k]": Expansion(padded, padded, padded),
    }


LOSSLESS = register(
    Method(
        name="lossless",
        summary="the exact construction for each norm; fresh entries only where the function does not see them",
        exact_when="pre-norm, RMSNorms after the branches too: any ratio and depth; post-norm LayerNorm: whole ratios, "
        "same depth; head_dim without rotary positions",
        paper="Gesmundo and Maile, 2023, https://arxiv.org/abs/2308.06103; Wang et al., LEMON, ICLR 2024, "
        "https://arxiv.org/abs/2310.07999; Wu et al., LLaMA-Pro, ACL 2024, https://arxiv.org/abs/2401.02415",
        width=_lossless,
        depth=identity_blocks,
    )
)
