"""Depth methods: which source layer each target layer comes from, and which layers start silent."""

from __future__ import annotations

from dataclasses import replace

from growkit.matrices import Matrix, pad
from growkit.methods.registry import Depth, Method, Refinement, refusal, register
from growkit.operator import GrowthOperator
from growkit_specs import InvalidTarget, Stack

PARTS = ("again", "front", "middle", "back")


def stacked(stack: Stack, depth: int, part: str = "again") -> Depth:
    """The whole stack on top of itself, as often as it goes, then a part of it.

    Args:
        stack: The stack.
        depth: Its new depth.
        part: What fills the rest: the stack ``again``, ``w[t, t mod L1] = 1``; or the layers at its ``front``, in its
            ``middle`` or at its ``back``, each run of them right behind the layers it repeats (partial stacking).

    Raises:
        InvalidTarget: For another part.
    """
    if part not in PARTS:
        raise InvalidTarget(f"the option part is '{part}'; expected {', '.join(PARTS)}")
    L1 = stack.depth
    rest = depth % L1
    if part == "again" or rest == 0:
        return Depth(tuple(t % L1 for t in range(depth)))
    start = {"front": 0, "middle": (L1 - rest) // 2, "back": L1 - rest}[part]
    whole = [t % L1 for t in range(depth - rest)]
    behind = len(whole) - L1 + start + rest
    return Depth((*whole[:behind], *range(start, start + rest), *whole[behind:]))


def stacked_back(stack: Stack, depth: int) -> Depth:
    """The whole stack on top of itself, and what is left from its back: bert2BERT's."""
    return stacked(stack, depth, part="back")


def interpolated(stack: Stack, depth: int) -> Depth:
    """Each layer repeated in place: ``w[t, floor(t L1 / L2)] = 1``."""
    return Depth(tuple(t * stack.depth // depth for t in range(depth)))


def identity_blocks(stack: Stack, depth: int) -> Depth:
    """Each layer followed by copies of itself that write nothing: the identity, where the norm comes first."""
    return interpolated(stack, depth).attenuated(0.0, None)


def identity_layers(stack: Stack, depth: int, place: str = "alternate") -> Depth:
    """New layers of which every vector is zero and every matrix the identity, so that nothing passes their norms.

    Args:
        stack: The stack.
        depth: Its new depth.
        place: ``alternate``: among the source's layers; ``append``: on top of them.

    Raises:
        InvalidTarget: For another place.
    """
    if place not in ("alternate", "append"):
        raise InvalidTarget(f"the option place is '{place}'; expected alternate or append")
    L1 = stack.depth
    mixed = interpolated(stack, depth)
    map_ = mixed if place == "alternate" else Depth((*range(L1), *[L1 - 1] * (depth - L1)))
    return replace(map_, new=frozenset(map_.repeats))


def identity_matrices(refinement: Refinement) -> GrowthOperator:
    """Every matrix of the new layers the identity, as far as its shape goes (staged training)."""
    residual: dict[str, Matrix] = {}
    for tensor in refinement.target.tensors():
        depth = refinement.depths.get(str(tensor.stack))
        if depth is not None and tensor.layer in depth.new and len(tensor.shape) == 2:
            rows, columns = tensor.shape
            residual[tensor.name] = pad(rows, columns) if rows >= columns else pad(columns, rows).mT
    return replace(refinement.operator, residual={**refinement.operator.residual, **residual})


def _whole_stacks(stack: Stack, depth: int) -> Depth:
    if depth % stack.depth:
        L1, times = stack.depth, depth // stack.depth
        raise refusal(
            "gstack", f"stacks whole models; got {L1} to {depth} layers; nearest: {times * L1} or {(times + 1) * L1}"
        )
    return stacked(stack, depth)


def _top_copied(stack: Stack, depth: int) -> Depth:
    """The top layers copied on top, at most doubling the stack each time."""
    sources = list(range(stack.depth))
    while len(sources) < depth:
        added = min(depth - len(sources), len(sources))
        sources += sources[len(sources) - added :]
    return Depth(tuple(sources))


def _up_scaled(stack: Stack, depth: int) -> Depth:
    """One copy without its last ``m`` layers, then one without its first ``m``: ``L2 = 2 (L1 - m)``."""
    L1 = stack.depth
    m, odd = divmod(2 * L1 - depth, 2)
    if odd or m < 0:
        near = depth + 1 if m > 0 else 2 * L1
        raise refusal("dus", f"makes 2 (L1 - m) layers, an even number up to {2 * L1}; got {depth}; nearest: {near}")
    return Depth((*range(L1 - m), *range(m, L1)))


def _block_expanded(stack: Stack, depth: int) -> Depth:
    """Groups of layers, each followed by a silent copy of its last."""
    L1, added = stack.depth, depth - stack.depth
    groups = min(added, L1)
    ends = [-(-(g + 1) * L1 // groups) - 1 for g in range(groups)]
    extra = {end: added // groups + (g < added % groups) for g, end in enumerate(ends)}
    sources = [j for layer in range(L1) for j in [layer] * (1 + extra.get(layer, 0))]
    return Depth(tuple(sources)).attenuated(0.0, None)


def _middle_repeated(stack: Stack, depth: int) -> Depth:
    """The middle block once more behind itself, at most doubling the stack each time."""
    sources = list(range(stack.depth))
    while len(sources) < depth:
        block = min(depth - len(sources), len(sources))
        start = (len(sources) - block) // 2
        sources[start + block : start + block] = sources[start : start + block]
    return Depth(tuple(sources))


_STACKBERT = "Gong et al., StackBERT, ICML 2019, https://proceedings.mlr.press/v97/gong19a.html"
_GSTACK = "Du et al., G_stack, NeurIPS 2024, https://arxiv.org/abs/2405.15319"

STACK = register(
    Method(
        name="stack",
        summary="the whole stack of layers again on top of itself; part=front, middle or back repeats that part in "
        "place (partial stacking)",
        exact_when="never",
        paper=f"{_STACKBERT}; {_GSTACK}",
        use="train",
        depth=stacked,
        options={"part": "again"},
    )
)
GSTACK = register(
    Method(
        name="gstack",
        summary="the whole model several times, in one shot",
        exact_when="never",
        paper=_GSTACK,
        use="train",
        depth=_whole_stacks,
        training=(
            "a fresh optimizer and one schedule from the start; 2 to 4 times the depth, 4 is the paper's choice",
            "tokens d to train the small model on: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, for N parameters "
            "and C FLOPs of the large one",
        ),
    )
)
INTERPOLATE = register(
    Method(
        name="interpolate",
        summary="each layer repeated in place",
        exact_when="never",
        paper="Chang et al., ICLR 2018, https://arxiv.org/abs/1710.10348",
        use="train",
        depth=interpolated,
    )
)
MSLT = register(
    Method(
        name="mslt",
        summary="the top layers copied on top of the stack, and trained alone at first",
        exact_when="never",
        paper="Yang et al., MSLT, 2020, https://arxiv.org/abs/2011.13635",
        use="train",
        depth=_top_copied,
        trains_new=True,
        training=("train the new layers alone, the layers below only run forward; then all of them for a short while",),
    )
)
DUS = register(
    Method(
        name="dus",
        summary="two copies of the stack, the first without its last layers, the second without its first",
        exact_when="never",
        paper="Kim et al., SOLAR, NAACL 2024, https://arxiv.org/abs/2312.15166",
        use="train",
        depth=_up_scaled,
    )
)
LLAMA_PRO = register(
    Method(
        name="llama_pro",
        summary="after each group of layers a copy of its last that writes nothing yet, and is trained alone",
        exact_when="the norm comes first",
        paper="Wu et al., LLaMA-Pro, ACL 2024, https://arxiv.org/abs/2401.02415",
        use="keep",
        depth=_block_expanded,
        trains_new=True,
        training=("train the new layers alone",),
    )
)
MIDAS = register(
    Method(
        name="midas",
        summary="the middle block of the stack once more behind itself",
        exact_when="never",
        paper="Saunshi et al., MIDAS, NeurIPS 2024, https://arxiv.org/abs/2409.19044",
        use="train",
        depth=_middle_repeated,
        training=("grow in several stages, the length of stage i proportional to a power of i",),
    )
)
