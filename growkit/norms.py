"""What happens to a norm's scale, shift and epsilon, and to layer scale, when their space grows.

A norm sees ``B x`` and gives ``gain * C norm(x)``, with its variance multiplied by ``variance``; so

    scale'   = pattern(C) scale / gain        (elementwise parameters are picked, never mixed: ``B scale`` is wrong)
    shift'   = C shift
    epsilon' = variance * epsilon

The output of a norm after a branch or after the residual addition goes into the stream, which must be ``B`` times the
source's: where ``B = s C`` its scale takes ``s`` too, and its shift is ``B shift``. A norm that adds an ``offset`` to
its stored scale (Gemma's ``1 + scale``) computes with the sum, so it is the sum that grows.

Entries of the scale that nothing passes through yet are free; they take the mean of the trained ones, so that the new
channels are read at the strength of the old ones from the first step. (E4, E4b, E4c and E5 of
docs/explanation/exactness.md.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from growkit.matrices import Array, Matrix, namespace

if TYPE_CHECKING:
    from growkit.operator import Expansion


def grown_scale(expansion: Expansion, scale: Array, fill: float | None, factor: float, *, offset: float = 0.0) -> Array:
    """A norm's stored scale, ``(d,)`` to ``(D,)``.

    Args:
        expansion: How the norm's space grows.
        scale: The trained scale, as it is stored.
        fill: The value of free entries, the offset included; None takes the mean of the trained ones.
        factor: A factor on the norm's whole output.
        offset: What the norm adds to the stored scale.
    """
    pattern, factor = expansion.seen.pattern, factor / expansion.gain
    if pattern is None:  # a learned, dense C: LiGO's published rule
        return expansion.seen.apply(scale + offset) * factor - offset
    # (scale + offset) * factor - offset, such that a factor of 1 leaves every bit alone
    return _picked(pattern, scale, fill if fill is None else fill - offset) * factor + offset * (factor - 1)


def grown_layer_scale(expansion: Expansion, scale: Array, fill: float | None) -> Array:
    """A layer scale, ``(d,)`` to ``(D,)``: picked where the writer's rows are, free elsewhere.

    Where the write matrix mixes channels (mean-fill) the new entries are free too, since the writer's new rows are
    folded with the source's layer scale and divided by the grown one.
    """
    pattern = expansion.write.pattern or expansion.seen.pattern
    if pattern is None:
        return expansion.write.apply(scale)
    typical = namespace(scale).mean(abs(scale))  # never near zero, where the writer's rows are divided by it
    return _picked(pattern, scale, typical + (typical == 0) if fill is None else fill)


def _picked(pattern: Matrix, scale: Array, fill: Array | float | None) -> Array:
    xp = namespace(scale)
    picked = pattern.apply(scale)
    used = xp.asarray(pattern.support, device=scale.device)
    return xp.where(used, picked, xp.zeros_like(picked) + (xp.mean(scale) if fill is None else fill))


def mean_square(norm: str, x: np.ndarray) -> np.ndarray:
    """What a norm divides by, squared: the mean square (``rms``) or the variance (``layer``) over the last axis."""
    squares: np.ndarray = np.mean(np.square(x), -1) if norm == "rms" else np.var(x, -1)
    return squares


def normalised(norm: str, x: np.ndarray) -> np.ndarray:
    """``x`` normalised over its last axis by a norm without scale, shift and epsilon."""
    centred: np.ndarray = x if norm == "rms" else x - x.mean(-1, keepdims=True)
    centred = centred / np.sqrt(mean_square(norm, x))[..., None]
    return centred
