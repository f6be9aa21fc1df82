"""Width methods that copy units: which entry is copied where, and how readers share out their weights."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np

from growkit.matrices import Matrix, Selection
from growkit.methods.depth import identity_layers, identity_matrices, stacked_back
from growkit.methods.registry import Method, SpaceGrowth, register
from growkit.methods.width import Expansions, behind_norms, drawn, repeated, selections, tiled
from growkit_specs import InvalidTarget


def _rows(matrix: Selection, rows: np.ndarray) -> Matrix:
    """``matrix`` with every row zero but those where ``rows``, ``(D,)`` booleans, holds."""
    return Selection(np.where(rows, matrix.index, -1), matrix.columns, matrix.weight)


def _drawn(growth: SpaceGrowth) -> Expansions:
    return selections(growth, drawn(growth))


def _tiled(growth: SpaceGrowth) -> Expansions:
    return selections(growth, tiled(growth))


def _repeated(growth: SpaceGrowth) -> Expansions:
    return selections(growth, repeated(growth))


def _aki(growth: SpaceGrowth) -> Expansions:
    """FPI in two terms: the old units, and the new ones, which the blend takes from the next layer."""
    expansions = _drawn(growth)
    expansion = expansions[growth.space]
    if growth.space == "head_dim":  # its entries are no units
        return expansions
    assert isinstance(expansion.write, Selection)
    old = np.arange(growth.target) < growth.source
    terms = tuple((_rows(expansion.write, rows), expansion.read) for rows in (old, ~old))
    return {growth.space: replace(expansion, terms=terms)}


def _staged(growth: SpaceGrowth) -> Expansions:
    """Two copies side by side that do not see each other: ``I_2 (x) W``, a sum of two terms."""
    if growth.space in ("group", "head_dim"):
        raise InvalidTarget(
            f"the method 'staged' doubles whole heads; got {growth.space} {growth.source} to {growth.target}; ask for "
            "twice the heads and kv_heads, or take lossless, lemon or fpi"
        )
    (expansion,) = selections(growth, tiled(growth)).values()
    assert isinstance(expansion.write, Selection)
    halves = [np.arange(growth.target) // growth.source == half for half in (0, 1)]
    terms = tuple((_rows(expansion.write, half),) * 2 for half in halves)
    return {growth.space: replace(expansion, fresh=None, terms=terms)}


def _orthonormal(growth: SpaceGrowth) -> Expansions:
    """Copies scaled to orthonormal columns in the stream, where RMSNorm then keeps any ratio; plain ones elsewhere.

    ``B = A = S diag(c^-1/2)``, and the mean square falls by ``d/D``. (E4)
    """
    if not growth.is_normed:
        return selections(growth, tiled(growth))
    copy = Selection(tiled(growth), growth.source)
    B = Selection(copy.index, growth.source, 1 / np.sqrt(copy.counts[copy.index]))
    return behind_norms(growth, B, B, B, gain=sqrt(growth.ratio))


def _sparkling(growth: SpaceGrowth) -> Expansions:
    """Copies whose readers keep the root mean square of what they give, copies adding up coherently."""
    added = growth.ratio - 1
    return selections(growth, tiled(growth), 1 / sqrt(1 + 3 * added) if added <= 1 else 1 / (1 + added))


_BERT2BERT = "Chen et al., bert2BERT, ACL 2022, https://arxiv.org/abs/2110.07143"
_EQUAL_COUNTS = "every grown norm sees equal numbers of copies: whole ratios; head_dim without rotary positions"

NET2NET = register(
    Method(
        name="net2net",
        summary="copy drawn units and share out what reads them, with a little paired noise",
        exact_when=_EQUAL_COUNTS,
        paper=f"Chen et al., Net2Net, ICLR 2016, https://arxiv.org/abs/1511.05641; {_BERT2BERT}",
        use="keep",
        width=_drawn,
        copies="part",
        fresh=0.05,
    )
)
FPI = register(
    Method(
        name="fpi",
        summary="copy drawn units and share out what reads them (function-preserving initialisation), no noise; stack",
        exact_when=f"same depth, and {_EQUAL_COUNTS}",
        paper=_BERT2BERT,
        use="train",
        width=_drawn,
        depth=stacked_back,
        copies="stay",
        fresh=0.0,
        training=("copies get equal gradients and stay copies; noise parts them: --fresh 0.05, which is net2net",),
    )
)
AKI = register(
    Method(
        name="aki",
        summary="as fpi, and new units come from the next layer (advanced knowledge initialisation), with a little "
        "paired noise for copies that this leaves alike; with depth=interpolate it is AKI-Pro",
        exact_when="never, but in a stack of one layer",
        paper=f"{_BERT2BERT}; AquilaMoE, AKI-Pro, 2024, https://arxiv.org/abs/2408.06567",
        use="train",
        width=_aki,
        depth=stacked_back,
        copies="part",
        next_layer=True,
        fresh=0.05,  # the last layer has no next one, and of three copies two come from the same one
    )
)
HYPERCLONING = register(
    Method(
        name="hypercloning",
        summary="the whole space again and again, readers shared out, with paired noise of 10 dB below them (--fresh "
        "sets it: 20dB)",
        exact_when="always: LayerNorm and RMSNorm, before or after the addition; head_dim without rotary positions",
        paper="Samragh et al., HyperCloning, 2024, https://arxiv.org/abs/2409.12903",
        use="keep",
        width=_tiled,
        ratios="whole",
        copies="part",
        fresh=10 ** (-10 / 20),
    )
)
MUPSCALING = register(
    Method(
        name="mupscaling",
        summary="each unit repeated in place, readers shared out, with a little paired noise; the optimizer's state "
        "and rates follow",
        exact_when="always: LayerNorm and RMSNorm, before or after the addition; head_dim without rotary positions",
        paper="muP upscaling, ICML 2026, https://arxiv.org/abs/2602.10545",
        use="train",
        width=_repeated,
        ratios="whole",
        copies="part",
        fresh=0.05,
        training=(
            "k is the width ratio; matrices whose inputs and outputs both grew, AdamW: learning rate / k, epsilon / k, "
            "weight decay * k",
            "optimizer state grown like the weights: exp_avg / k, exp_avg_sq / k^2",
            "attention scores scaled by 1/head_dim, as muP has it, where the source was trained so",
        ),
    )
)
SPARKLING = register(
    Method(
        name="sparkling",
        summary="copies whose readers keep the root mean square of what they give",
        exact_when="whole ratios; head_dim without rotary positions",
        paper="SPARKLING, ICML 2026, https://arxiv.org/abs/2602.02472",
        use="train",
        width=_sparkling,
        copies="stay",
        fresh=0.0,
        training=(
            "asymmetric reset: optimizer state kept for the old entries and zero for the new ones parts the copies",
            "learning rate warmed up again to 1.3 times over 250 steps; the peak from before growing is kept",
        ),
    )
)
STAGED = register(
    Method(
        name="staged",
        summary="two copies side by side on the diagonal, new layers that are the identity",
        exact_when="always in width; in depth where the norm comes first and nothing reads another stack",
        paper="Shen et al., Staged Training, ICML 2022, https://arxiv.org/abs/2203.06211",
        use="train",
        width=_staged,
        depth=identity_layers,
        refine=identity_matrices,
        ratios="double",
        copies="stay",
        fresh=0.0,
        training=(
            "the halves get equal gradients and stay copies of each other; only dropout parts them",
            "optimizer state on the same diagonal: exp_avg / 2, exp_avg_sq / 4; the final norm's as it is",
            "learning rate warmed up again over 150 to 200 steps",
        ),
    )
)
ORTHONORMAL = register(
    Method(
        name="orthonormal",
        summary="copies scaled by count^-1/2: the stream's matrix has orthonormal columns and reads as it writes",
        exact_when="pre-norm or post-norm RMSNorm: any ratio; LayerNorm: whole ratios before the branch; head_dim "
        "without rotary positions",
        paper=None,
        use="keep",
        width=_orthonormal,
        copies="part",
        fresh=0.05,
    )
)
