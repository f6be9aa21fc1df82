"""The constructions that width methods are made of: copies, silent units, and fills that a norm turns into zeros."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np

from growkit.matrices import Matrix, MeanFill, Selection, pad, scaled
from growkit.methods.registry import SpaceGrowth
from growkit.operator import Expansion

Expansions = Mapping[str, Expansion]


# --- which entry is copied where: ``g``, ``(D,)`` source entries -----------------------------------------------------


def tiled(growth: SpaceGrowth) -> np.ndarray:
    """The whole space again and again: ``g(i) = i mod d``."""
    index: np.ndarray = np.arange(growth.target) % growth.source
    return index


def repeated(growth: SpaceGrowth) -> np.ndarray:
    """Each entry repeated in place: ``g(i) = floor(i d / D)``."""
    index: np.ndarray = np.arange(growth.target) * growth.source // growth.target
    return index


def drawn(growth: SpaceGrowth) -> np.ndarray:
    """The first ``d`` entries are themselves, the rest are drawn.

    In rounds without replacement, so that a whole ratio gives equal counts, which is when a norm keeps what it did.
    """
    rounds = -(-growth.target // growth.source) - 1
    picks = [growth.rng.permutation(growth.source) for _ in range(rounds)]
    return np.concatenate([np.arange(growth.source), *picks])[: growth.target]


# --- expansions ------------------------------------------------------------------------------------------------------


def selections(growth: SpaceGrowth, index: np.ndarray, share: np.ndarray | float | None = None) -> Expansions:
    """Copies: entry ``i`` of the target is entry ``index[i]`` of the source, and readers share out their weights.

        B = S,   A = S diag(1/c),   C = S          (FPI; c counts the copies of an entry)

    On ``head_dim`` the query takes the share instead, so that a score is the sum it was.

    Args:
        growth: The space.
        index: ``(D,)`` source entries.
        share: ``(D,)`` what a reader's weights are multiplied by; None shares out evenly, ``1/c``.
    """
    copy = Selection(index, growth.source)
    shares = 1.0 / copy.counts[index] if share is None else np.broadcast_to(share, index.shape)
    shared = Selection(index, growth.source, shares)
    expansion = Expansion(write=copy, read=shared, seen=copy, fresh="read")
    if growth.space != "head_dim":
        return {growth.space: expansion}
    return {
        growth.space: expansion,
        "head_dim[q]": Expansion(write=scaled(shared, growth.score_gain), read=shared, seen=copy),
        "head_dim[k]": Expansion(write=copy, read=shared, seen=copy),
    }


def silent(growth: SpaceGrowth) -> Expansions:
    """New heads and units, drawn freely and read with zeros; a wider head gets zero keys, so its queries are free."""
    padded = pad(growth.target, growth.source)
    new = Expansion(padded, padded, padded, fresh="write")
    if growth.space != "head_dim":
        return {growth.space: new}
    return {
        "head_dim": new,
        "head_dim[q]": Expansion(scaled(padded, growth.score_gain), padded, padded, fresh="write"),
        "head_dim[k]": Expansion(padded, padded, padded),
    }


def behind_norms(growth: SpaceGrowth, write: Matrix, read: Matrix, seen: Matrix, gain: float) -> Expansions:
    """A space whose norms give ``gain`` times what readers are to see, and have ``gain^2`` times less to divide by.

    The norms' scale takes the gain back, and epsilon follows; or, where epsilon must stay, everything written is
    multiplied by the gain, which keeps the mean square. (E4, E4b)
    """
    if growth.keep_epsilon and not growth.is_written_on:
        return {growth.space: Expansion(scaled(write, gain), read, seen, gain=gain, fresh="read")}
    return {growth.space: Expansion(write, read, seen, gain=gain, variance=1 / gain**2, fresh="read")}


def filled(growth: SpaceGrowth, *, copies: int = 1, centred: bool = True) -> Expansions:
    """A space under norms: ``copies`` of it, then zeros (RMSNorm) or the mean (LayerNorm) in what is left.

    Both are what a norm turns into zeros, so readers see the copies only, and may hold anything for the rest. (E4, E5)

    Args:
        growth: The space.
        copies: ``n``, at most ``floor(D/d)``.
        centred: Whether the mean is filled in for a LayerNorm; else zeros are.
    """
    d, D = growth.source, growth.target
    index = np.where(np.arange(D) < copies * d, np.arange(D) % d, -1)
    shown = Selection(index, d)
    read = Selection(index, d, np.full(D, 1 / copies)) if copies > 1 else shown
    mean = growth.is_layer_norm and centred and copies * d < D
    write: Matrix = MeanFill(D, d, copies) if mean else shown
    return behind_norms(growth, write, read, shown, gain=sqrt(D / (copies * d)))
