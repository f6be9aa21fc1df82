"""Width methods that pad: the source's entries stay what they are, new ones come behind them."""

from __future__ import annotations

import numpy as np

from growkit.matrices import Selection
from growkit.methods.depth import identity_blocks, interpolated, stacked
from growkit.methods.registry import Method, SpaceGrowth, register
from growkit.methods.width import Expansions, filled, selections, silent, tiled
from growkit.operator import Expansion


def _whole_copies(growth: SpaceGrowth) -> int:
    return growth.target // growth.source


def _lossless(growth: SpaceGrowth) -> Expansions:
    """The construction that keeps the function, for each kind of space; nothing is copied where it need not be.

    Only a tile will do where a LayerNorm's output is written on, or where epsilon cannot follow and the stream is seen
    other than through its norms.
    """
    if not growth.is_normed:
        return silent(growth)
    laid_bare = growth.keep_epsilon and (growth.is_written_on or growth.is_read_raw)
    tiles = growth.is_whole and (
        laid_bare
        or growth.is_activated
        or (growth.is_layer_norm and (growth.kind != "residual" or growth.writes_stream))
    )
    return filled(growth, copies=_whole_copies(growth) if tiles else 1)


def _lemon(growth: SpaceGrowth) -> Expansions:
    if not growth.is_normed:
        return selections(growth, tiled(growth))
    return filled(growth, copies=_whole_copies(growth))


def _msg(growth: SpaceGrowth) -> Expansions:
    return filled(growth) if growth.is_normed else silent(growth)


def _zero_pad(growth: SpaceGrowth) -> Expansions:
    return filled(growth, centred=False) if growth.is_normed else silent(growth)


def _nothing(growth: SpaceGrowth) -> Expansions:
    nothing = Selection(np.full(growth.target, -1), growth.source)
    return {growth.space: Expansion(nothing, nothing, nothing, fresh="write")}


_GESMUNDO = "Gesmundo and Maile, 2023, https://arxiv.org/abs/2308.06103"
_LEMON = "Wang et al., LEMON, ICLR 2024, https://arxiv.org/abs/2310.07999"
_PRE_NORM_RMS = "pre-norm RMSNorm: any ratio and depth; head_dim without rotary positions"

LOSSLESS = register(
    Method(
        name="lossless",
        summary="the exact construction for each norm; fresh entries only where the function does not see them",
        exact_when="pre-norm, RMSNorms after the branches too: any ratio and depth; post-norm LayerNorm: whole ratios, "
        "same depth; head_dim without rotary positions",
        paper=f"{_GESMUNDO}; {_LEMON}; Wu et al., LLaMA-Pro, ACL 2024, https://arxiv.org/abs/2401.02415",
        use="keep",
        width=_lossless,
        depth=identity_blocks,
        copies="part",  # made where nothing else keeps the function
    )
)
LEMON = register(
    Method(
        name="lemon",
        summary="copies, then the mean (LayerNorm) or zeros (RMSNorm) in what is left; readers split at random in the "
        "null space; identity blocks",
        exact_when="pre-norm: any ratio and depth; post-norm LayerNorm: whole ratios, same depth; head_dim without "
        "rotary positions",
        paper=_LEMON,
        use="keep",
        width=_lemon,
        depth=identity_blocks,
        copies="part",
        training=("the usual peak learning rate, with a schedule that decays faster",),
    )
)
ZERO_PAD = register(
    Method(
        name="zero_pad",
        summary="zeros behind what is written; what reads them is drawn as at the model's initialisation; identity "
        "blocks",
        exact_when=_PRE_NORM_RMS,
        paper=_GESMUNDO,
        use="keep",
        width=_zero_pad,
        depth=identity_blocks,
        reference="init",
    )
)
FRESH = register(
    Method(
        name="fresh",
        summary="zero_pad, with new entries drawn at the standard deviation of the trained ones, and the stack again "
        "on top",
        exact_when="same depth, pre-norm RMSNorm: any ratio; head_dim without rotary positions",
        paper=_GESMUNDO,
        use="train",
        width=_zero_pad,
        depth=stacked,
        training=("a learning rate at least that of training from scratch",),
    )
)
MSG = register(
    Method(
        name="msg",
        summary="masked structural growth at mask zero: everything new is drawn anew and not seen yet; identity blocks",
        exact_when="pre-norm: any ratio and depth; head_dim without rotary positions (the paper's masked norm is exact "
        "after the addition too; weights alone are not)",
        paper="Yao et al., MSG, ICLR 2024, https://arxiv.org/abs/2305.02869",
        use="keep",
        width=_msg,
        depth=identity_blocks,
        reference="init",
        training=(
            "the paper raises masks on the new entries from 0 to 1 while training; here they are read from the start, "
            "with weights of zero that training moves",
            "optimizer state of the old entries kept, zero for the new ones; learning rate rewound",
        ),
    )
)
RANDOM = register(
    Method(
        name="random",
        summary="nothing of the source: the model's own initialisation, the baseline of training from scratch",
        exact_when="never",
        paper=None,
        use="train",
        width=_nothing,
        depth=interpolated,
        reference="init",
        anew=True,
    )
)
