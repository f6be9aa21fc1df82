"""Depth methods: which source layer each target layer comes from, and which layers start silent."""

from __future__ import annotations

from growkit.methods.registry import Depth, Method, register
from growkit_specs import Stack


def stacked(stack: Stack, depth: int) -> Depth:
    """The whole stack again on top: ``w[t, t mod L1] = 1``."""
    return Depth(tuple(t % stack.depth for t in range(depth)))


def interpolated(stack: Stack, depth: int) -> Depth:
    """Each layer repeated in place: ``w[t, floor(t L1 / L2)] = 1``."""
    return Depth(tuple(t * stack.depth // depth for t in range(depth)))


def identity_blocks(stack: Stack, depth: int) -> Depth:
    """Each layer followed by copies of itself that write nothing: the identity, where the norm comes first."""
    sources = interpolated(stack, depth).sources
    return Depth(sources, tuple(t > 0 and sources[t] == sources[t - 1] for t in range(depth)))


STACK = register(
    Method(
        name="stack",
        summary="the whole stack of layers again on top of itself",
        exact_when="never",
        paper="Gong et al., StackBERT, ICML 2019, https://proceedings.mlr.press/v97/gong19a.html; Du et al., G_stack, "
        "NeurIPS 2024, https://arxiv.org/abs/2405.15319",
        depth=stacked,
    )
)
INTERPOLATE = register(
    Method(
        name="interpolate",
        summary="each layer repeated in place",
        exact_when="never",
        paper="Chang et al., ICLR 2018, https://arxiv.org/abs/1710.10348",
        depth=interpolated,
    )
)
