"""LiGO's published operator as it stands before it is learned: dense, tied, and random."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from growkit.matrices import Dense, Identity, Matrix, RowBlocks, pad
from growkit.methods.depth import stacked
from growkit.methods.registry import Method, Refinement, SpaceGrowth, register
from growkit.methods.width import Expansions
from growkit.operator import Expansion, GrowthOperator
from growkit_specs.layout import spaces_of

NOISE = 0.03
"""Blends begin with entries up to this large beside the layer that is stacked."""


def _widened(rng: np.random.Generator, d: int, D: int) -> Expansion:
    """``B = A = C = [I; E]``: each new entry a mean of all old ones, with random weights that sum to 1."""
    E = rng.random((D - d, d))
    B: Matrix = RowBlocks((Identity(d), Dense(E / E.sum(axis=1, keepdims=True)))) if d < D else Identity(d)
    return Expansion(write=B, read=B, seen=B)


def _ligo(growth: SpaceGrowth) -> Expansions:
    """One dense matrix for each space; queries, keys and values have one each, which mixes the entries of all heads."""
    head_axes = {
        (axis, basis)
        for tensor in growth.graph.tensors(tied=True)
        for axis in tensor.parameter.parsed.axes
        for basis in tensor.parameter.bases
        if growth.kind != "residual" and growth.space in spaces_of(axis) and len(tensor.parameter.bases) == 1
    }
    if not head_axes:
        return {growth.space: _widened(growth.rng, growth.source, growth.target)}
    sizes = growth.graph.sizes
    whole = {
        f"{axis}[{basis}]": _widened(
            growth.rng,
            prod(sizes[space] for space in spaces_of(axis)),
            prod(growth.sizes[space] for space in spaces_of(axis)),
        )
        for axis, basis in sorted(head_axes, key=str)
    }
    padded = pad(growth.target, growth.source)  # says the sizes; no axis of heads is without a whole matrix
    return {growth.space: Expansion(padded, padded, padded), **whole}


def _blended(refinement: Refinement) -> GrowthOperator:
    """Each slot's blend: the stacked layer, a little of every other, in sum 1."""
    operator = refinement.operator
    blend = dict(operator.blend)
    for stack in refinement.target.stacks:
        if stack.name in refinement.depths:
            for key, _ in stack.slots():
                w = np.asarray(operator.blend[stack.name])
                rng = np.random.default_rng([operator.fresh.seed, len(blend)])
                noisy = np.where(w == 1, 1.0, NOISE * rng.random(w.shape))
                blend[key] = noisy / noisy.sum(axis=1, keepdims=True)
    return replace(operator, blend=blend)


LIGO_PAPER = register(
    Method(
        name="ligo-paper",
        summary="the published operator before it is learned: new entries are random means of old ones, reads are "
        "writes, norms grow by B; layers stacked, with a little of the others",
        exact_when="never",
        paper="Wang et al., LiGO, ICLR 2023, https://arxiv.org/abs/2303.00980",
        use="train",
        width=_ligo,
        depth=stacked,
        refine=_blended,
        fresh=0.0,
        tied=True,
        training=("made to be learned: growkit fit --init ligo-paper",),
    )
)
