"""The verdict: whether a growth keeps the function, and why or why not, told before any weight is touched.

It is not a claim of the method. Each rule of exactness is tested on the operator's own matrices with random probes in
float64, so it holds for every method, and for operators that were learned or loaded. E1 to E10 are
the conditions of docs/explanation/exactness.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from growkit import norms
from growkit.matrices import Matrix
from growkit.operator import Expansion, GrowthOperator
from growkit_specs import Layer, LayerGraph, Stack, Tensor, parse_layout
from growkit_specs.layer_graph import norm_key, slot_key

_PROBES = 4
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Reason:
    """One condition of exactness.

    Attributes:
        condition: What has to hold.
        holds: Whether it does.
        detail: Why, or why not, with the sizes.
    """

    condition: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """Whether the grown model computes what the source does.

    Attributes:
        reasons: Every condition that the growth touches.
    """

    reasons: tuple[Reason, ...]

    @property
    def preserving(self) -> bool:
        """Whether every condition holds."""
        return all(reason.holds for reason in self.reasons)

    @property
    def broken(self) -> tuple[Reason, ...]:
        """The conditions that do not hold."""
        return tuple(reason for reason in self.reasons if not reason.holds)


def verdict(graph: LayerGraph, operator: GrowthOperator) -> Verdict:
    """Test every rule of exactness on an operator.

    Args:
        graph: The source model.
        operator: The operator that grows it.
    """
    return Verdict(tuple(_Examination(graph, operator).reasons()))


class _Examination:
    def __init__(self, graph: LayerGraph, operator: GrowthOperator) -> None:
        self.graph = graph
        self.operator = operator
        self.rng = np.random.default_rng(0)

    def reasons(self) -> Iterator[Reason]:
        for space, size in self.graph.sizes.items():
            expansion = self.operator.expansions[space]
            variants = [
                e for key, e in self.operator.expansions.items() if key.startswith(f"{space}[") and "@" not in key
            ]
            if not any(e.grows for e in (expansion, *variants)):
                continue
            yield from self.rotary_length(space, expansion)
            if not self.is_used(space):
                continue
            target = expansion.write.shape[0]
            change = f"{space} {size} to {target}" if target != size else space
            yield from self.norms(space, expansion, change)
            yield from self.loose_scales(space, expansion, change)
            yield from self.rounding(space, expansion)
            if space == "head_dim":
                yield self.scores(size, target)
            elif self.graph.kinds[space] in ("pointwise", "scores"):
                yield self.pointwise(space, expansion, change)
            if self.graph.is_activated(space):
                yield self.activated(space, expansion, change)
            if self.graph.kinds[space] == "fixed":
                holds = _silent_or_copied(expansion, self.probes(size))
                yield Reason(f"{space}: old entries stay", holds, f"{change}: the new entries come after the old ones")
            else:
                yield self.readers(space, expansion, change)
        yield from self.bases()
        yield from self.ties()
        for stack in self.graph.stacks:
            yield from self.depth(stack)
            yield from self.own_expansions(stack)
        unseen = {f"{stack.name}/{t}" for stack in self.graph.stacks for t in np.flatnonzero(self.silent[stack.name])}
        places = {t.name: f"{t.stack}/{t.layer}" for t in target_tensors(self.graph, self.operator)}
        if any(places.get(name) not in unseen for name in self.operator.residual):
            yield Reason("no residual", False, "the operator adds entries of its own that readers see")

    def is_used(self, space: str) -> bool:
        return any(space in p.parsed.spaces for _, layer in self.graph.walk() for p in layer.parameters)

    def probes(self, size: int) -> np.ndarray:
        """``(probes, size)`` random vectors with a mean of their own."""
        return self.rng.standard_normal((_PROBES, size)) + self.rng.standard_normal((_PROBES, 1))

    # --- the rules -------------------------------------------------------------------------------------------------

    def norms(self, space: str, e: Expansion, change: str) -> Iterator[Reason]:
        """E4, E5: ``norm(B x) = gain * C norm(x)``, and epsilon can follow."""
        layers = self.graph.norms_over(space)
        kinds = {str(layer.attributes.get("norm")) for layer in layers}
        d, D = e.write.shape[1], e.write.shape[0]
        for kind in sorted(kinds):
            own = [layer for layer in layers if str(layer.attributes.get("norm")) == kind]
            written = any(layer.writes_stream for layer in own)
            stays = written or self.graph.kinds[space] != "residual"
            name = f"{'RMSNorm' if kind == 'rms' else 'LayerNorm'} over {space}"
            x = self.probes(d)
            grown = e.write.apply(x, 1)
            with np.errstate(all="ignore"):
                holds = _close(norms.normalised(kind, grown), e.gain * e.seen.apply(norms.normalised(kind, x), 1))
                holds &= _close(norms.mean_square(kind, grown), e.variance * norms.mean_square(kind, x))
                if written:  # the norm's output goes into the stream, where it must be B times the source's
                    scale = self.probes(d)[0]
                    given = norms.grown_scale(e, scale, None, e.rewrite) * norms.normalised(kind, grown)
                    holds &= _close(given, e.write.apply(scale * norms.normalised(kind, x), 1))
            holds &= e.seen.pattern is not None  # scale and shift are elementwise: channels are picked, never mixed
            if stays and not written:
                holds &= _close(e.seen.apply(x, 1), grown)
            where = self.position(space, own)
            needs = "only whole ratios keep it" if stays and kind == "layer" else "this map does not keep it"
            detail = f"{change}, ratio {D / d:g}, norm {where}: " + ("kept" if holds else needs)
            yield Reason(name, bool(holds), detail)
        for key in sorted(
            {str(layer.attributes["epsilon_key"]) for layer in layers if "epsilon_key" in layer.attributes}
        ):
            ratios = self.variances(key)
            if ratios != {1.0}:
                detail = (
                    f"{key} is multiplied by {next(iter(ratios)):.6g}"
                    if len(ratios) == 1
                    else f"{key} serves norms that grow apart"
                )
                yield Reason(f"epsilon over {space}", len(ratios) == 1, detail)

        fixed = [
            layer.name for layer in layers if "epsilon_key" not in layer.attributes and layer.attributes.get("epsilon")
        ]
        if fixed and e.variance != 1:
            yield Reason(
                f"epsilon over {space}", False, f"{', '.join(fixed)}: epsilon is no config key and cannot follow"
            )

    def loose_scales(self, space: str, e: Expansion, change: str) -> Iterator[Reason]:
        """A scale that no writer of its layer can take up works channel by channel: they are picked, never mixed."""
        loose = [
            parameter.name
            for _, layer in self.graph.walk()
            for parameter in layer.parameters
            if parameter.module == "layer_scale"
            and space in parameter.parsed.spaces
            and not any(space in other.parsed.written_spaces() for other in layer.parameters if other is not parameter)
        ]
        if loose:
            detail = f"{change}: {loose[0]} multiplies what several layers wrote, channel by channel"
            yield Reason(f"scale over {space}", e.write.pattern is not None, detail)

    def position(self, space: str, layers: Sequence[Layer]) -> str:
        """Where norms stand, in words; of several places, the one that asks for most."""
        if any(layer.is_post_norm for layer in layers):
            return "after the residual addition"
        if any(layer.is_branch_norm for layer in layers):
            return "after each branch"
        return "before each branch" if self.graph.kinds[space] == "residual" else "inside the head"

    def rotary_length(self, space: str, e: Expansion) -> Iterator[Reason]:
        """Rotary frequencies that are computed from the number of positions (yarn, longrope) change with it."""
        if space == "positions" and self.graph.attributes.get("rope_follows_positions"):
            d, D = e.write.shape[1], e.write.shape[0]
            yield Reason(
                "positions: rotary", False, f"positions {d} to {D}: the rotary frequencies are computed from them"
            )

    def bases(self) -> Iterator[Reason]:
        """E6, E7: queries, keys and values keep their heads together, in every basis and over a whole axis."""
        for key, e in self.operator.expansions.items():
            axis, bracket, basis = key.rstrip("]").partition("[")
            if not bracket or axis == "head_dim" or "@" in key:
                continue
            rest = {other: kept for other, kept in self.operator.expansions.items() if other != key}
            composed = replace(self.operator, expansions=rest)
            parsed = parse_layout(f"-> {axis}").writes[0]
            x = self.probes(e.write.shape[1])
            holds = all(
                _close(getattr(e, side).apply(x, 1), composed.matrix(side, parsed, (basis,)).apply(x, 1))
                for side in ("write", "read")
            )
            detail = (
                "acts as its spaces do" if holds else "heads of one basis are moved or mixed, those of others are not"
            )
            yield Reason(f"{key}: heads", holds, detail)

    def rounding(self, space: str, e: Expansion) -> Iterator[Reason]:
        """Half types keep the function up to the rounding of what was scaled or averaged."""
        powers = {1.0} | {self.operator.power(layer) for _, layer in self.graph.walk() if space == "hidden"}
        halves = {p.dtype for _, layer in self.graph.walk() for p in layer.parameters} & {"float16", "bfloat16"}
        moved = e.write.is_gather and all(np.log2(factor).is_integer() for factor in (e.gain, *powers))
        if halves and not moved and self.graph.norms_over(space):
            scaled = {
                f"norm scales times {1 / e.gain:.6g}": e.gain != 1,
                "the writers' new rows": not e.write.is_gather,
                "layers that are multiplied by a power of hidden": powers != {1.0},
            }
            what = " and ".join(part for part, is_so in scaled.items() if is_so)
            yield Reason(f"rounding over {space}", True, f"{what} are rounded to {', '.join(sorted(halves))}")

    def pointwise(self, space: str, e: Expansion, change: str) -> Reason:
        """E2, E3, E6, E7: behind a nonlinearity, what is read must be a whole copy of a source unit."""
        x = self.probes(e.write.shape[1])
        read = e.read.support
        grown = e.write.apply(x, 1)
        holds = _close(e.write.apply(np.square(x) + x, 1)[:, read], (np.square(grown) + grown)[:, read])
        if e.fresh in ("write", "both"):
            holds &= not (read & ~e.write.support).any()
        detail = (
            "whole units are kept; new ones are silent or share out"
            if holds
            else "units are mixed before their nonlinearity"
        )
        return Reason(f"{space}: units", holds, f"{change}: {detail}")

    def activated(self, space: str, e: Expansion, change: str) -> Reason:
        """E2 for a stream: what is written through an activation must be copies, whatever is read of it later."""
        x = self.probes(e.write.shape[1])
        grown = e.write.apply(x, 1)
        holds = _close(e.write.apply(np.square(x) + x + 1, 1), np.square(grown) + grown + 1)
        detail = "entries are copied" if holds else "new entries are no copies; only whole ratios copy all"
        return Reason(f"{space}: written through an activation", holds, f"{change}: {detail}")

    def scores(self, d: int, D: int) -> Reason:
        """E6, E8: query-key products, and the scale the model divides them by."""
        rotary = any(layer.attributes.get("rope") for _, layer in self.graph.walk())
        normed = bool(self.graph.norms_over("head_dim"))
        if d != D and (rotary or normed):
            why = "rotary frequencies depend on head_dim" if rotary else "the query-key norm sees other entries"
            return Reason("head_dim: attention scores", False, f"head_dim {d} to {D}: {why}")
        q, k = (self.operator.expansions.get(f"head_dim[{b}]", self.operator.expansions["head_dim"]) for b in "qk")
        turned = not (q.write.is_identity and k.write.is_identity)
        x, y = self.probes(d), self.probes(d)
        powers = {layer.score_power for _, layer in self.graph.walk() if layer.kind == "attention"}
        before, after = (x * y).sum(1), (q.write.apply(x, 1) * k.write.apply(y, 1)).sum(1)
        free = ~q.write.support & ~k.write.support
        clash = bool(free.any()) and q.fresh == "write" and k.fresh == "write"
        holds = all(_close(before * d**power, after * D**power) for power in powers or {0.0}) and not clash
        if holds and turned and (rotary or normed):
            return Reason(
                "head_dim: attention scores", False, "head_dim: entries leave their rotary pairs or their norm"
            )
        return Reason(
            "head_dim: attention scores", holds, f"head_dim {d} to {D}: scores are {'kept' if holds else 'changed'}"
        )

    def readers(self, space: str, e: Expansion, change: str) -> Reason:
        """E1: ``A^T C = 1`` through norms, ``A^T B = 1`` elsewhere; in every term, where the map is a sum of them."""
        x = self.probes(e.write.shape[1])
        direct = any(
            space in p.parsed.read_spaces()
            and (p.tied_to is None or p.name in self.operator.untied)
            and layer.through is None
            for _, layer in self.graph.walk()
            for p in layer.parameters
        ) or any(port.space == space and port.through is None for port in self.graph.outputs)
        seen = [e.seen] + ([e.write] if direct else [])
        reads = [e.read, *(read for _, read in e.terms)]
        holds = all(_close(A.mT.apply(matrix.apply(x, 1), 1), x) for matrix in seen for A in reads)
        holds &= not e.terms or _close(sum(B.apply(x, 1) for B, _ in e.terms), e.write.apply(x, 1))
        return Reason(
            f"{space}: readers", holds, f"{change}: what is read {'is' if holds else 'is not'} what was written"
        )

    def ties(self) -> Iterator[Reason]:
        """E9: a tied head reads with the embedding's write matrix: ``factor * B^T C = 1``."""
        for stack, layer in self.graph.walk():
            for parameter in layer.parameters:
                if parameter.tied_to is None or not parameter.parsed.reads:
                    continue
                if parameter.name in self.operator.untied:
                    yield Reason("tied head", True, f"{parameter.name} gets a tensor of its own: no tied one would do")
                    continue
                factor = tie_factor(self.graph, self.operator, parameter.name)
                applied = self.operator.norm_factors.get(norm_key(stack, layer.through), 1.0)
                holds = factor is not None and bool(np.isclose(factor, applied))
                if self.grows(layer) or not holds:
                    detail = (
                        f"stays tied, the norm before it times {applied:.6g}"
                        if holds
                        else "stays tied, and reads something else"
                    )
                    yield Reason("tied head", holds, f"{parameter.name} {detail}")

    def depth(self, stack: Stack) -> Iterator[Reason]:
        """E10: the source's layers in order, each once, and between them blocks that write nothing."""
        L2, L1 = self.operator.depth(stack.name)
        blends = [w for terms in self.slot_blends(stack).values() for w in terms]
        if all(np.array_equal(w, np.eye(L1)) for w in blends):
            return
        if stack.shared and L1 != L2:
            detail = f"{L1} to {L2} layers: they are one block, which runs more often"
            yield Reason(f"{stack.name}: depth", False, detail)
            return
        if np.ndim(self.operator.blend[stack.name]) == 3 and L1 == L2:
            yield Reason(f"{stack.name}: units", False, "new units come from another layer than the old ones")
            return
        silent = self.silent[stack.name]
        awake = np.flatnonzero(~silent)
        change = f"{L1} to {L2} layers" if L1 != L2 else f"{L1} layers"
        in_order = len(awake) == L1 and all(np.array_equal(w[awake], np.eye(L1)) for w in blends)
        detail = (
            "the source's layers in order, identity blocks between"
            if in_order
            else "layers run that the source does not have"
        )
        yield Reason(f"{stack.name}: depth", in_order, f"{change}: {detail}")
        if silent.any() and any(layer.is_post_norm for layer in stack.layers):
            yield Reason(
                f"{stack.name}: identity blocks",
                False,
                f"{change}: a block that writes nothing still normalises the stream after the residual addition",
            )
        bent = next((layer.attributes["bends"] for layer in stack.layers if "bends" in layer.attributes), None)
        if silent.any() and bent is not None:
            detail = f"{change}: a block that writes nothing still passes the stream through {bent}"
            yield Reason(f"{stack.name}: identity blocks", False, detail)

    def own_expansions(self, stack: Stack) -> Iterator[Reason]:
        """Layers with matrices of their own: they matter where the layer writes anything."""
        silent = self.silent[stack.name]
        keys = [key.split(f"@{stack.name}/") for key in self.operator.expansions if f"@{stack.name}/" in key]
        for t, name in sorted((int(t), name) for name, t in keys):
            if not silent[t]:
                yield Reason(f"{stack.name} {t}: {name}", False, f"layer {t} maps {name} in a way of its own")

    # --- what the rules ask of the operator ------------------------------------------------------------------------

    def slot_blends(self, stack: Stack) -> dict[str, np.ndarray]:
        """``w``, ``(R, L2, L1)``, of every slot of a stack; ``R`` is 1 where its terms do not differ."""
        found = {
            key: np.asarray(self.operator.blend.get(key, self.operator.blend[stack.name])) for key, _ in stack.slots()
        }
        return {key: w.reshape(-1, *w.shape[-2:]) for key, w in found.items()}

    @cached_property
    def silent(self) -> dict[str, np.ndarray]:
        """For each stack ``(L2,)`` booleans: the layers of which no branch writes anything into the stream."""
        return {stack.name: self.writes_nothing(stack) for stack in self.graph.stacks}

    def writes_nothing(self, stack: Stack) -> np.ndarray:
        """``(L2,)`` booleans: the layers of which no branch writes anything into the stream.

        Either what a branch writes with is zero, or nothing comes to it: not in its own layer, and not in another one
        that fills the spaces it writes from, as keys and values from another stack do.
        """
        writers = set(self.graph.writer_keys(stack))
        silent = np.ones(self.operator.depth(stack.name)[0], dtype=bool)
        for layer in stack.layers:
            written = {slot_key(stack, layer.name, p.slot): p for p in layer.parameters}
            written = {key: p for key, p in written.items() if key in writers}
            if written:
                inner = {space for p in written.values() for space in p.parsed.read_spaces()}
                feeding = [o for o in stack.layers if any(p.parsed.written_spaces() & inner for p in o.parameters)]
                unheard = [self.unheard(stack, each) for each in (layer, *feeding)]
                silent &= self.zero(stack, sorted(written)) | np.logical_and.reduce(unheard)
        return silent if writers else np.zeros_like(silent)

    def unheard(self, stack: Stack, layer: Layer) -> np.ndarray:
        """``(L2,)`` booleans: where the norm before a layer gives zeros, and no bias of the layer adds to them."""
        norm = next((each for each in stack.layers if each.name == layer.through), None)
        if norm is None or not norm.parameters:
            return np.zeros(self.operator.depth(stack.name)[0], dtype=bool)
        vectors = [p for p in layer.parameters if not p.parsed.reads and p.parsed.sign != "*"]
        slots = [(norm, p) for p in norm.parameters] + [(layer, p) for p in vectors]
        return self.zero(stack, [f"{stack.name}/{each.name}/{p.slot}" for each, p in slots])

    def zero(self, stack: Stack, keys: list[str]) -> np.ndarray:
        """``(L2,)`` booleans: the layers in which every one of these slots is zero."""
        zero = np.ones(self.operator.depth(stack.name)[0], dtype=bool)
        names, blends = {key: parameter.name for key, parameter in stack.slots()}, self.slot_blends(stack)
        for key in keys:
            filled = [names[key].replace("{layer}", str(t)) in self.operator.residual for t in range(len(zero))]
            zero &= (blends[key] == 0).all(axis=(0, 2)) & ~np.asarray(filled)
        return zero

    # --- what the rules ask of the model ---------------------------------------------------------------------------

    def variances(self, epsilon_key: str) -> set[float]:
        return set(variances(self.graph, self.operator, epsilon_key))

    def grows(self, layer: Layer) -> bool:
        return any(self.operator.expansions[space].grows for p in layer.parameters for space in p.parsed.spaces)


def variances(graph: LayerGraph, operator: GrowthOperator, epsilon_key: str) -> list[float]:
    """The variance ratios of the norms that share an epsilon key; several different ones cannot all be followed."""
    return [
        operator.expansions[space].variance
        for _, layer in graph.walk()
        if layer.kind == "norm" and layer.attributes.get("epsilon_key") == epsilon_key
        for space in layer.parameters[0].parsed.spaces
    ]


def tie_factor(graph: LayerGraph, operator: GrowthOperator, name: str) -> float | None:
    """The factor that a norm's output needs for the tied head ``name`` to read what it read: ``1 / (B^T C)``.

    Returns:
        The factor, or None where ``B^T C`` is no multiple of the identity, so that no tied head would do.
    """
    tensors = {t.name: t for t in graph.tensors(tied=True)}
    head = tensors[name]
    table = tensors[str(head.parameter.tied_to)]
    seen = operator.axis_matrix(head, head.parameter.parsed.roles.index("read"), "seen")
    write = operator.axis_matrix(table, table.parameter.parsed.roles.index("write"))
    x = np.random.default_rng(0).standard_normal(seen.shape[1])
    if write.shape != seen.shape:
        return None
    back = write.mT.apply(seen.apply(x))
    ratio = float(back @ x / (x @ x))
    if ratio == 0 or not _close(back, ratio * x):
        return None
    return 1.0 if head.owner.through is None and np.isclose(ratio, 1) else 1 / ratio if head.owner.through else None


def target_tensors(graph: LayerGraph, operator: GrowthOperator) -> Iterator[Tensor]:
    """The tensors of what an operator makes of a model; only their names and places count here."""
    return graph.resized({}, {name: operator.depth(name)[0] for name in graph.depths}).tensors()


def _silent_or_copied(e: Expansion, x: np.ndarray) -> bool:
    return _close(e.read.mT.apply(e.write.apply(x, 1), 1), x) and _is_prefix(e.write)


def _is_prefix(matrix: Matrix) -> bool:
    """Whether the first ``d`` rows are the identity."""
    d = matrix.shape[1]
    x = np.arange(1.0, d + 1)
    return _close(matrix.apply(x)[:d], x)


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(a)) and np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE))
