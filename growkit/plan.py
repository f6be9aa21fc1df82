"""Planning: sizes resolved, the operator built, costs and verdict told before any weight is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import Any
from zlib import crc32

import numpy as np

from growkit.caches import changed
from growkit.learnable import Learnable
from growkit.matrices import scaled
from growkit.methods import Depth, Method, Refinement, SpaceGrowth, chosen, is_tied
from growkit.model import Model
from growkit.operator import Expansion, Fresh, GrowthOperator, unchanged
from growkit.verdict import Verdict, tie_factor, variances, verdict
from growkit_specs import (
    FitSettings,
    InvalidTarget,
    LayerGraph,
    LayerMap,
    Recipe,
    Signature,
    Target,
    evaluate,
    fresh_scale,
    layer_maps,
)
from growkit_specs.layer_graph import norm_key


@dataclass(frozen=True)
class Plan:
    """What a growth will do.

    Attributes:
        source: The source's graph.
        target: The grown model's graph.
        operator: The operator that takes one to the other.
        recipe: The request it answers.
        new_layers: For each stack that deepens, the target layers whose source is used below already.
        trainable: The tensors to train at first, where the method trains what is new alone; empty for all of them.
        training: What the methods' papers say of training on.
    """

    source: LayerGraph
    target: LayerGraph
    operator: GrowthOperator
    recipe: Recipe
    new_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    training: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The method's name."""
        return self.recipe.method

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the function is preserved, and why or why not."""
        return verdict(self.source, self.operator)

    @property
    def preserving(self) -> bool:
        """Whether the grown model computes what the source does."""
        return self.verdict.preserving

    def changes(self) -> list[tuple[str, tuple[int, ...] | None, tuple[int, ...]]]:
        """Every slot's old and new shape: ``(key, source shape, target shape)``, a stack's layers once."""
        old = {tensor.key: tensor.shape for tensor in self.source.tensors(tied=True)}
        new = {tensor.key: tensor.shape for tensor in self.target.tensors(tied=True)}
        return [(key, old.get(key), shape) for key, shape in new.items()]

    def outputs(self) -> list[dict[str, str]]:
        """The outputs that live in a space that grows: ``name``, ``space``, and ``policy``, ``project`` or ``grow``."""
        layered = {name for port in self.source.layer_outputs for name in port.names}
        still = {port.name for port in self.target.outputs if port.space is not None}
        return [
            {"name": port.name, "space": port.space, "policy": "grow" if port.name in still else "project"}
            for port in self.source.outputs
            if port.space and self.operator.expansions[port.space].grows and port.name not in layered
        ]

    def learnable(self, settings: FitSettings) -> Learnable:
        """What a fit would learn of the operator; whether reads are writes is the method's to say, if nobody does."""
        if settings.tied is None:
            settings = settings.model_copy(update={"tied": is_tied(self.method)})
        return Learnable(self.operator, self.source, self.target, settings)

    def to_learn(self) -> dict[str, int]:
        """What it takes to learn the operator as a fit does by itself: ``parameters``, ``bytes``, and ``flops``.

        These are the floating-point operations to make every weight once: two for each multiplication.
        """
        learnable = self.learnable(FitSettings())
        # Blends that are learned have no zeros; of the matrices nothing counts but which entries there are.
        entries = [np.broadcast_to(np.float32(1), shape) for shape in learnable.shapes]
        operator = learnable.operator(entries)
        flops = 2 * sum(operator.multiplications(target) for target in self.target.tensors())
        return {"parameters": learnable.parameters, "bytes": 4 * learnable.parameters, "flops": flops}

    def to_json(self) -> dict[str, Any]:
        """The plan as the command line prints it under ``--json``."""
        return {
            "source": summary(self.source),
            "target": summary(self.target),
            "method": self.method,
            "preserving": self.preserving,
            "reasons": [asdict(reason) for reason in self.verdict.reasons],
            "operator": self.to_learn(),
            "outputs": self.outputs(),
            "kv_cache": changed(self.source, self.target),
            "layers_from": {stack: self.operator.layer_map(stack) for stack in self.source.depths},
            "new_layers": {stack: list(layers) for stack, layers in self.new_layers.items()},
            "trainable": list(self.trainable),
            "training": list(self.training),
            "parameters": [{"slot": key, "source_shape": old, "target_shape": new} for key, old, new in self.changes()],
        }


def summary(graph: LayerGraph) -> dict[str, Any]:
    """Sizes, depths, parameters, bytes and FLOPs per token of a graph."""
    from growkit.weights import dtype_of

    return {
        "spaces": graph.sizes,
        "stacks": graph.depths,
        "parameters": graph.parameter_count,
        "bytes": sum(t.count * dtype_of(t.parameter.dtype).itemsize for t in graph.tensors()),
        "flops_per_token": flops_per_token(graph),
    }


def flops_per_token(graph: LayerGraph) -> int:
    """Forward FLOPs per token of the matrix products with weights: two for each entry; attention scores not counted."""
    return sum(
        2 * t.count * len(graph.layers_of(t))
        for t in graph.tensors(tied=True)
        if t.parameter.parsed.reads and t.owner.kind != "embedding"
    )


def plan(
    model: Model,
    target: Target | None = None,
    *,
    method: str = "lossless",
    seed: int = 0,
    fresh: float | str | None = None,
    like: LayerGraph | None = None,
    layers_from: str | LayerMap | Mapping[str, str | LayerMap] | None = None,
    residual_scale: float | None = None,
    score_scale: float | None = None,
    outputs: str | None = None,
    kv_cache: str | None = None,
    **sizes: Any,
) -> Plan:
    """Plan a growth.

    Args:
        model: The source.
        target: The sizes asked for; or name them as keywords: ``hidden=768, layers="2x"``.
        method: A method's name, or ``width=NAME,depth=NAME``; options stand behind a name, ``stack:part=back``.
        seed: The seed of the fresh entries and of methods that draw.
        fresh: The scale of fresh entries, as a multiple of the standard deviation that the method refers to, or in
            decibels below it (``"10dB"``); None takes the method's own.
        like: A graph whose sizes to grow to; ``sizes`` given beside it come first.
        layers_from: An explicit layer map in place of the depth method's: source layers, ``"0,1,2,2,3"``, or half-open
            ranges of them, ``"0:4,2:6"``; by stack where there are several.
        residual_scale: A factor on what repeated layers write into the stream; 0 makes them the identity where the
            norm comes first.
        score_scale: A factor on the attention scores of repeated layers.
        outputs: What becomes of outputs that live in a space that grows: ``project`` brings them back to their size,
            ``grow`` leaves them; None takes the format's way (ONNX projects, torch grows).
        kv_cache: What becomes of cached keys and values among the inputs: ``grow`` lets them, ``refuse`` does not.
        sizes: ``hidden heads kv_heads head_dim ffn layers vocab positions``, absolute (``768``) or relative
            (``"1.5x"``). What is not named follows: head_dim stays, heads and ffn follow hidden in ratio.

    Raises:
        InvalidTarget: Where the sizes cannot be, with the nearest that can; or the method cannot, with others that can.
    """
    source = model.graph
    signature = Signature.of(outputs, kv_cache)
    target = target or Target.of(**sizes)
    maps = layer_maps(layers_from, source.depths)
    request = {**(_sizes_of(like, source) if like else {}), **target.requested()}
    new_sizes, new_depths = resolve(source, request)
    if "layers" in request and any(len(m) != new_depths[name] for name, m in maps.items()):
        name = next(name for name, m in maps.items() if len(m) != new_depths[name])
        raise InvalidTarget(f"layers_from names {len(maps[name])} layers for {name}, layers={request['layers']}")
    widens = any(new_sizes[space] > size for space, size in source.sizes.items())
    deepens = any(new_depths[name] > depth and name not in maps for name, depth in source.depths.items())
    wide, deep = chosen(method, widens=widens, deepens=deepens)
    depths = _depths(source, new_depths, maps, deep, residual_scale, score_scale)
    init_std = float(source.attributes.get("initializer_range") or 0.02)
    scale = wide.fresh if fresh is None else fresh_scale(fresh)
    operator = GrowthOperator(
        expansions=_expansions(source, new_sizes, wide, seed),
        blend=_blend(source, depths, next_layer=widens and wide.next_layer),
        fresh=Fresh(seed, scale, wide.reference, init_std, wide.anew),
    )
    operator = _with_ties(source, _with_scores(source, operator, depths))
    if deepens and deep.refine is not None:
        apart = {stack.name for stack in source.stacks if not stack.shared} - set(maps)
        deepened = {name: depth for name, depth in depths.items() if name in apart}
        operator = deep.refine(Refinement(model, operator, target_graph(source, operator), deepened))
    recipe = Recipe(
        source=str(getattr(model.origin, "path", None) or source.attributes.get("class") or source.architecture),
        target=Target.of(**request),
        method=method,
        seed=seed,
        fresh=fresh,
        layers_from=maps or None,
        residual_scale=residual_scale,
        score_scale=score_scale,
        outputs=signature.outputs,
        kv_cache=signature.kv_cache,
    )
    grown, _ = model.adapter.resized(model.origin, target_graph(source, operator), operator, signature)
    new_layers = {name: depth.repeats for name, depth in depths.items()}
    alone = [t.name for t in grown.tensors() if t.layer in new_layers.get(str(t.stack), ())] if deep.trains_new else []
    used = [m for m, grows in ((wide, widens), (deep, deepens)) if grows]
    training = tuple(dict.fromkeys(rule for m in used for rule in m.training))
    return Plan(source, grown, operator, recipe, new_layers, tuple(alone) if deepens else (), training)


def target_graph(source: LayerGraph, operator: GrowthOperator) -> LayerGraph:
    """The graph of what an operator makes of ``source``.

    Raises:
        InvalidTarget: Where the operator was made for other sizes.
    """
    for space, size in source.sizes.items():
        if space not in operator.expansions or operator.expansions[space].write.shape[1] != size:
            raise InvalidTarget(f"the operator does not grow a model whose {space} is {size}")
    for stack, depth in source.depths.items():
        if stack not in operator.blend or operator.depth(stack)[1] != depth:
            raise InvalidTarget(f"the operator does not grow a model with {depth} layers in {stack}")
    epsilons = {}
    for _, layer in source.walk():
        key = str(layer.attributes.get("epsilon_key"))
        ratios = variances(source, operator, key)
        if ratios and ratios[0] != 1 and len(set(ratios)) == 1:
            epsilons[key] = float(layer.attributes["epsilon"] or 0) * ratios[0]
    return source.resized(
        {space: operator.expansions[space].write.shape[0] for space in source.sizes},
        {stack: operator.depth(stack)[0] for stack in source.depths},
        untied=operator.untied,
        epsilons=epsilons,
    )


def _expansions(source: LayerGraph, sizes: Mapping[str, int], method: Method, seed: int) -> dict[str, Expansion]:
    expansions = {space: unchanged(size) for space, size in source.sizes.items()}
    for space, size in source.sizes.items():
        if sizes[space] > size or method.anew:
            # A space that is another one by another name is drawn as that one is, so that what ties them stays.
            drawn_as = str(source.attributes.get(f"follows:{space}") or space)
            rng = np.random.default_rng([seed, crc32((drawn_as if drawn_as in source.sizes else space).encode())])
            growth = SpaceGrowth(source, space, size, sizes[space], rng, _keeps_epsilon(source, sizes, space), sizes)
            expansions.update(method.widened(growth))
    return expansions


def _keeps_epsilon(source: LayerGraph, sizes: Mapping[str, int], space: str) -> bool:
    """Whether epsilon cannot follow: norms that share its config key see another variance, or it is no config key."""
    keys = {layer.attributes.get("epsilon_key") for layer in source.norms_over(space)}
    if None in keys:
        return True
    sharing = {
        other
        for _, layer in source.walk()
        if layer.kind == "norm" and layer.attributes.get("epsilon_key") in keys
        for other in layer.parameters[0].parsed.spaces
    }
    return len({_variance_ratio(source, sizes, other) for other in sharing}) > 1


def _variance_ratio(source: LayerGraph, sizes: Mapping[str, int], space: str) -> Fraction:
    """What padding multiplies a norm's variance by; a LayerNorm whose output is written on is tiled, and keeps it."""
    layers = source.norms_over(space)
    stays = source.kinds[space] != "residual" or any(layer.writes_stream for layer in layers)
    if stays and any(layer.attributes.get("norm") == "layer" for layer in layers):
        return Fraction(1)
    return Fraction(source.sizes[space], sizes[space])


def _depths(
    source: LayerGraph,
    depths: Mapping[str, int],
    maps: Mapping[str, LayerMap],
    method: Method,
    residual_scale: float | None,
    score_scale: float | None,
) -> dict[str, Depth]:
    """How each stack that deepens does: by the map that was asked for, or by the method's."""
    deepened: dict[str, Depth] = {}
    for stack in source.stacks:
        if stack.name in maps:
            deepened[stack.name] = Depth(maps[stack.name])
        elif depths[stack.name] > stack.depth:
            assert method.depth is not None
            deepened[stack.name] = method.depth(stack, depths[stack.name])
    return {name: depth.attenuated(residual_scale, score_scale) for name, depth in deepened.items()}


def _blend(source: LayerGraph, depths: Mapping[str, Depth], *, next_layer: bool) -> dict[str, np.ndarray]:
    """``w`` of every stack, and of the slots where it differs.

    Args:
        source: The source.
        depths: How its stacks deepen.
        next_layer: Whether the sum's second term takes the layer above the one that the first takes (AKI); of layers
            that are one block, that is the same.
    """
    blend: dict[str, np.ndarray] = {}
    for stack in source.stacks:
        L1 = stack.depth
        depth = depths.get(stack.name) or Depth(tuple(range(L1)))
        above = np.eye(L1)[[j if stack.shared else min(j + 1, L1 - 1) for j in range(L1)]]
        w, writers = (
            np.stack([each, each @ above]) if next_layer else each
            for each in (depth.blend(L1), depth.writers_blend(L1))
        )
        blend[stack.name] = replace(depth, new=frozenset()).blend(L1) if depth.new else w
        if depth.new:
            blend |= dict.fromkeys((key for key, _ in stack.slots()), w)
        if not np.array_equal(w, writers):
            blend |= dict.fromkeys(source.writer_keys(stack), writers)
    return blend


def _with_scores(source: LayerGraph, operator: GrowthOperator, depths: Mapping[str, Depth]) -> GrowthOperator:
    """Scores of single layers multiplied by a factor: the query takes it, or the norm it goes through."""
    expansions = dict(operator.expansions)
    for name, depth in depths.items():
        for t, factor in enumerate(depth.scores):
            if factor != 1:
                e = operator.expansion("head_dim", ("q",))
                normed = bool(source.norms_over("head_dim"))
                by = {"gain": e.gain / factor} if normed else {"write": scaled(e.write, factor)}
                expansions[f"head_dim[q]@{name}/{t}"] = replace(e, **by)
    return replace(operator, expansions=expansions)


def _with_ties(source: LayerGraph, operator: GrowthOperator) -> GrowthOperator:
    """Tied heads: the factor their norm needs, or a tensor of their own where no factor would do."""
    factors: dict[str, float] = {}
    untied: list[str] = []
    for stack, layer in source.walk():
        for parameter in layer.parameters:
            if parameter.tied_to is None or not parameter.parsed.reads:
                continue
            factor = tie_factor(source, operator, parameter.name)
            if factor is None and not operator.fresh.anew:
                untied.append(parameter.name)
            elif factor is not None and not np.isclose(factor, 1, rtol=1e-12):
                factors[norm_key(stack, layer.through)] = factor
    if untied:  # a config ties all or nothing
        untied = [p.name for _, layer in source.walk() for p in layer.parameters if p.tied_to is not None]
    return replace(operator, norm_factors={} if untied else factors, untied=tuple(untied))


# --- sizes ---------------------------------------------------------------------------------------------------------


def _sizes_of(like: LayerGraph, source: LayerGraph) -> dict[str, int | str]:
    sizes = {**like.sizes, **({"layers": next(iter(like.depths.values()))} if like.depths else {})}
    if "kv_heads" in sizes:
        sizes["heads"] = sizes["kv_heads"] * sizes["group"]
    names = [
        name for name in Target.model_fields if name in sizes and (name in source.sizes or name in ("heads", "layers"))
    ]
    return {name: sizes[name] for name in names}


def resolve(source: LayerGraph, request: Mapping[str, int | str]) -> tuple[dict[str, int], dict[str, int]]:
    """Every space's and stack's new size.

    Args:
        source: The source's graph.
        request: The sizes that were named.

    Raises:
        InvalidTarget: For a size the model does not have, that is smaller than the source's, or that cannot be; the
            nearest that can is named.
    """
    return _Resolution(source, request).sizes_and_depths()


class _Resolution:
    def __init__(self, source: LayerGraph, request: Mapping[str, int | str]) -> None:
        self.source = source
        self.old = dict(source.sizes)
        self.is_grouped = "kv_heads" in self.old
        if self.is_grouped:
            self.old["heads"] = self.old["kv_heads"] * self.old["group"]
        if source.depths:
            self.old["layers"] = next(iter(source.depths.values()))
        self.follows = {
            key.removeprefix("follows:"): str(rule)
            for key, rule in source.attributes.items()
            if key.startswith("follows:")
        }
        self.asked = {name: self.absolute(name, size) for name, size in request.items()}

    def absolute(self, name: str, size: int | str) -> int:
        """A requested size as a number of entries."""
        if name not in self.old:
            names = [n for n in Target.model_fields if n in self.old]
            raise InvalidTarget(f"this model has no size '{name}'; its sizes are {', '.join(names)}")
        old = self.old[name]
        if isinstance(size, str):
            exact = Fraction(size.removesuffix("x")) * old
            if exact.denominator != 1:
                low, high = self.around(exact, self.hidden_step if name == "hidden" else Fraction(1))
                raise InvalidTarget(f"{name}={size} of {old} is {float(exact):g}, not whole; nearest: {low} or {high}")
            size = int(exact)
        if size < old:
            raise InvalidTarget(f"{name}={size} is smaller than the source's {old}; growkit grows, it does not prune")
        return size

    def sizes_and_depths(self) -> tuple[dict[str, int], dict[str, int]]:
        new = {name: self.asked.get(name, size) for name, size in self.old.items()}
        ratio = Fraction(new["hidden"], self.old["hidden"]) if "hidden" in new else Fraction(1)
        self.resolve_heads(new, ratio)
        if "ffn" in new and "ffn" not in self.asked:
            new["ffn"] = ceil(self.old["ffn"] * ratio)
        for name, rule in self.follows.items():
            if name != "head_dim":
                value = evaluate(rule, new)
                if name in self.asked and self.asked[name] != value:
                    raise InvalidTarget(f"{name}={self.asked[name]}: in this architecture {name} = {rule} = {value:g}")
                new[name] = int(value)
        smaller = [name for name in self.old if new[name] < self.old[name]]
        if smaller:
            name = smaller[0]
            raise InvalidTarget(
                f"{name} would shrink from {self.old[name]} to {new[name]}; ask for a larger hidden, heads or kv_heads"
            )
        if "kv_heads" in self.asked and new["group"] != self.old["group"] and "heads" not in self.asked:
            raise InvalidTarget("kv_heads does not divide heads as before; name heads too")
        depth_ratio = Fraction(new["layers"], self.old["layers"]) if self.source.depths else Fraction(1)
        depths = {
            stack.name: stack.depth if stack.fixed else self.depth(stack.name, stack.depth, depth_ratio)
            for stack in self.source.stacks
        }
        return {name: new[name] for name in self.source.sizes}, depths

    def depth(self, name: str, depth: int, ratio: Fraction) -> int:
        deeper = depth * ratio
        if deeper.denominator != 1:
            raise InvalidTarget(f"layers: {name} would have {float(deeper):g} layers, expected a whole number")
        return int(deeper)

    def resolve_heads(self, new: dict[str, int], ratio: Fraction) -> None:
        """head_dim stays, heads follow hidden in ratio, groups stay, unless they are named."""
        if "head_dim" not in new or "heads" not in new:  # a single head is no axis
            return
        asked = self.asked
        if self.follows.get("head_dim") is not None:  # head_dim = hidden / heads is not the config's to choose
            self.share_hidden(new)
        elif "heads" not in asked:
            if "kv_heads" in asked:
                new["heads"] = new["kv_heads"] * new["group"]
            else:
                heads = self.old["heads"] * ratio
                unit = self.old["group"] if self.is_grouped else 1
                if heads.denominator != 1 or heads.numerator % unit:
                    low, high = self.around(new["hidden"], self.hidden_step)
                    raise InvalidTarget(
                        f"hidden={new['hidden']}: heads would follow to {float(heads):g}, not a whole number"
                        f"{f' of groups of {unit}' if unit > 1 else ''}; nearest hidden: {low} or "
                        f"{high}; or name heads too"
                    )
                new["heads"] = int(heads)
        if self.is_grouped:
            self.resolve_groups(new)

    def resolve_groups(self, new: dict[str, int]) -> None:
        heads, kv_heads, group = new["heads"], new["kv_heads"], self.old["group"]
        if "kv_heads" not in self.asked and heads % group == 0:
            new["kv_heads"], new["group"] = heads // group, group
        elif heads % kv_heads == 0:
            new["group"] = heads // kv_heads
        else:
            if "heads" in self.asked:
                low, high = self.around(heads, Fraction(kv_heads if "kv_heads" in self.asked else group))
                near = f"nearest heads: {low} or {high}"
            else:
                low, high = self.around(new["hidden"], Fraction(new["head_dim"] * group))
                near = f"nearest hidden: {low} or {high}"
            raise InvalidTarget(f"heads={heads} is not a whole number of groups: {kv_heads} kv_heads; {near}")

    def share_hidden(self, new: dict[str, int]) -> None:
        """Heads and head_dim where their product is hidden: what is named settles the rest."""
        hidden, head_dim = new["hidden"], new["head_dim"]
        if "heads" in self.asked or "kv_heads" in self.asked:
            heads = self.asked.get("heads") or new["kv_heads"] * new["group"]
            self.refuse_unless_shared(hidden, heads, least=heads * self.old["head_dim"], why=f"heads={heads}")
            new["heads"], new["head_dim"] = heads, hidden // heads
            if self.asked.get("head_dim", new["head_dim"]) != new["head_dim"]:
                raise InvalidTarget(
                    f"head_dim={head_dim}: in this architecture head_dim = hidden / heads = {new['head_dim']}"
                )
        else:
            step, least = head_dim * self.old.get("group", 1), head_dim * self.old["heads"]
            self.refuse_unless_shared(hidden, head_dim, least=least, why=f"head_dim {head_dim}", step=step)
            new["heads"] = hidden // head_dim

    def refuse_unless_shared(self, hidden: int, unit: int, *, least: int, why: str, step: int | None = None) -> None:
        if hidden % unit == 0 and hidden >= least:
            return
        step = step or unit
        low, high = self.around(hidden, Fraction(step))
        low = max(low, -(-least // step) * step)
        problem = "is not divisible by" if hidden % unit else "is too small for"
        raise InvalidTarget(f"hidden={hidden} {problem} {why}; nearest hidden: {low} or {max(high, low + step)}")

    @property
    def hidden_step(self) -> Fraction:
        """The step in which hidden can grow while heads follow it in whole groups."""
        if "heads" not in self.old:
            return Fraction(1)
        return Fraction(self.old["hidden"] * self.old.get("group", 1), self.old["heads"])

    @staticmethod
    def around(size: int | Fraction, step: Fraction) -> tuple[int, int]:
        """The nearest whole multiples of ``step`` below and above ``size``."""
        below, above = int(size // step), ceil(size / step)
        while (step * below).denominator != 1:
            below -= 1
        while (step * above).denominator != 1:
            above += 1
        return int(step * below), int(step * above)
