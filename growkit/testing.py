"""Property testing: hypothesis strategies for everything that grows, and models that need no framework.

Everything is drawn by construction, nothing is filtered: layouts, structured matrices, small transformers, and the
sizes each of them can grow to. A drawn model runs by :func:`~growkit.reference.reference_forward`, in float64, so that
exactness can be asserted to 1e-10.

    source = memory_model(transformer(norm="layer", depths=(2,)))
    target = growkit.grow(source, hidden="2x")
    growkit.verify(source, target)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

from growkit.adapters import Forward
from growkit.grow import dtype_of
from growkit.matrices import (
    Array,
    Concatenation,
    Dense,
    Identity,
    Kronecker,
    Matrix,
    MeanFill,
    Scaled,
    Selection,
    pad,
)
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.reference import reference_forward
from growkit_specs import (
    Axis,
    Fixed,
    GrowkitError,
    Layer,
    LayerGraph,
    Layout,
    Leaf,
    Parameter,
    Port,
    Product,
    Space,
    Stack,
    Target,
)
from growkit_specs.layer_graph import LayerKind, SpaceKind
from growkit_specs.layout import axis_size, concatenation, product

__all__ = [
    "MemoryAdapter",
    "Transformer",
    "axes",
    "layer_graphs",
    "layouts",
    "matrices",
    "memory_model",
    "random_weights",
    "reference_forward",
    "targets",
    "transformer",
]

SPACES = ("hidden", "ffn", "heads", "head_dim", "vocab")


# --- layouts -------------------------------------------------------------------------------------------------


def axes(spaces: Sequence[str] = SPACES, *, max_leaves: int = 6) -> st.SearchStrategy[Axis]:
    """Axes in their normal form: products and concatenations of ``spaces`` and fixed sizes, nested."""
    leaves: st.SearchStrategy[Axis] = st.sampled_from(spaces).map(Leaf) | st.integers(1, 4).map(Fixed)

    def composed(inner: st.SearchStrategy[Axis]) -> st.SearchStrategy[Axis]:
        parts = st.lists(inner, min_size=2, max_size=3)
        return parts.map(lambda p: product(*p)) | parts.map(lambda p: concatenation(*p))

    return st.recursive(leaves, composed, max_leaves=max_leaves)


def layouts(spaces: Sequence[str] = SPACES) -> st.SearchStrategy[Layout]:
    """Lines of the axis notation: maps in both storage orders, biases, scales and shifts."""
    axis = axes(spaces)

    def some(least: int) -> st.SearchStrategy[tuple[Axis, ...]]:
        return st.lists(axis, min_size=least, max_size=3).map(tuple)

    maps = st.builds(Layout, some(1), st.just("<-"), some(1)) | st.builds(Layout, some(0), st.just("->"), some(1))
    elementwise = st.builds(Layout, st.just(()), st.sampled_from(("*", "+")), st.tuples(axis))
    return maps | elementwise


# --- matrices ------------------------------------------------------------------------------------------------

_FACTORS = st.sampled_from((-2.0, -0.5, 0.0, 0.5, 3.0))


@st.composite
def _selections(draw: st.DrawFn, weights: bool) -> Matrix:
    columns, rows = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    index = draw(st.lists(st.integers(-1, columns - 1), min_size=rows, max_size=rows))
    weight = draw(st.lists(_FACTORS, min_size=rows, max_size=rows)) if weights else None
    return Selection(np.array(index), columns, None if weight is None else np.array(weight))


@st.composite
def _dense(draw: st.DrawFn) -> Matrix:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    return Dense(np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape))


def matrices() -> st.SearchStrategy[Matrix]:
    """Every kind of structured matrix; transposed, scaled, and nested in products and concatenations too."""
    sizes = st.builds(lambda new, old: (new + old, old), st.integers(0, 3), st.integers(1, 4))
    plain = st.one_of(
        st.integers(1, 4).map(Identity),
        sizes.map(lambda size: pad(*size)),
        sizes.map(lambda size: MeanFill(*size)),
        _selections(weights=False),
        _selections(weights=True),
        _dense(),
    )
    leaves = st.builds(lambda matrix, turned: matrix.mT if turned else matrix, plain, st.booleans())

    def composed(inner: st.SearchStrategy[Matrix]) -> st.SearchStrategy[Matrix]:
        parts = st.lists(inner, min_size=1, max_size=2).map(tuple)
        return st.one_of(
            parts.map(Kronecker),
            parts.map(Concatenation),
            st.builds(Scaled, inner, _FACTORS),
            inner.map(lambda matrix: matrix.mT),
        )

    return leaves | st.recursive(leaves, composed, max_leaves=4)


# --- layer graphs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """The features of a small transformer.

    Attributes:
        heads: Attention heads; with ``group``, key-value heads.
        group: Query heads for each key-value head; None for plain multi-head attention.
        head_dim: Entries of a head.
        hidden: Entries of the stream; None where ``head_dim = hidden / heads`` is not the config's to choose.
        ffn: Units of an MLP.
        vocab: Tokens.
        positions: Positions.
        depths: The depth of each stack.
        norm: The kind of all norms.
        offset: What the norms add to their stored scales.
        block: Norms before the branches, after the residual additions, or before two parallel branches.
        branch_norms: Whether what a branch gives is normed before it is added to the stream.
        stem: A bare embedding; one whose norm is the stream; or a narrow one, normed and projected.
        head: What reads the stream at last.
        table_power: The power of ``hidden`` that multiplies what the embedding writes into it.
        head_power: The power of ``hidden`` that multiplies what the ``lm_head`` reads of it.
        final_norm: The name of a pre-norm model's last norm; None leaves it out.
        epsilon: One config key for all norms, one for each norm, or no key: a constant in the code.
        qkv: Separate projections, or how the fused one is laid out.
        gated: Whether the MLP is gated, and whether gate and up are one parameter.
        activation: The MLP's activation.
        learned_positions: Whether there is a table of positions.
        rope: Whether queries and keys are rotated by position; ``head_dim`` has to be even.
        causal: Whether a token sees only those before it.
        scaled_scores: Whether scores are divided by the root of ``head_dim``.
        qk_norm: Whether queries and keys are normalised, head by head.
        biases: Whether linear maps and LayerNorms have one.
        layer_scale: Whether branches are multiplied by a layer scale.
        transposed: The modules that are stored in x out (tables: out x in).
        dtype: The element type.
    """

    heads: int = 2
    group: int | None = None
    head_dim: int = 2
    hidden: int | None = None
    ffn: int = 6
    vocab: int = 7
    positions: int = 5
    depths: tuple[int, ...] = (2,)
    norm: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    block: Literal["pre", "post", "parallel"] = "pre"
    branch_norms: bool = False
    stem: Literal["plain", "normed", "factored"] = "plain"
    head: Literal["untied", "tied", "transform", "pooler", "bare"] = "untied"
    table_power: float = 0.0
    head_power: float = 0.0
    final_norm: str | None = "final_norm"
    epsilon: Literal["shared", "own", "fixed"] = "shared"
    qkv: Literal["separate", "product", "interleaved", "concatenation"] = "separate"
    gated: Literal["no", "separate", "fused"] = "no"
    activation: str = "gelu"
    learned_positions: bool = True
    rope: bool = False
    causal: bool = False
    scaled_scores: bool = True
    qk_norm: bool = False
    biases: bool = True
    layer_scale: bool = False
    transposed: frozenset[str] = frozenset()
    dtype: str = "float64"


MODULES = (
    *("table", "position_table", "projection", "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj"),
    *("up_proj", "gate_up_proj", "down_proj", "transform", "pooler", "classifier", "narrowing", "lm_head"),
)


def transformer(**features: Any) -> LayerGraph:
    """The layer graph of a small transformer.

    Args:
        features: Fields of :class:`Transformer`.
    """
    return _Draft(Transformer(**features)).graph()


class _Draft:
    """Draws up the parts of a transformer from its features ``f``."""

    def __init__(self, features: Transformer) -> None:
        self.f = features
        self.is_grouped = features.group is not None
        self.queries = "(kv_heads group head_dim)" if self.is_grouped else "(heads head_dim)"
        self.keys = "(kv_heads head_dim)" if self.is_grouped else "(heads head_dim)"
        self.last_norm = None if features.block == "post" else features.final_norm

    def graph(self) -> LayerGraph:
        return LayerGraph(
            architecture="memory",
            spaces=tuple(self.spaces()),
            stem=tuple(self.stem()),
            stacks=tuple(self.stack(f"stack{i}", depth) for i, depth in enumerate(self.f.depths)),
            head=tuple(self.head()),
            inputs=(Port(name="ids", kind="tokens", space="vocab"), Port(name="mask", kind="mask")),
            outputs=tuple(self.outputs()),
            attributes=dict(self.follows()),
        )

    def spaces(self) -> Iterator[Space]:
        f = self.f
        sizes: list[tuple[str, int, SpaceKind]] = [
            ("hidden", f.hidden or f.heads * (f.group or 1) * f.head_dim, "residual"),
            ("ffn", f.ffn, "pointwise"),
            ("kv_heads" if self.is_grouped else "heads", f.heads, "scores"),
            ("head_dim", f.head_dim, "scores"),
            ("vocab", f.vocab, "fixed"),
            ("positions", f.positions, "fixed"),
            ("labels", 3, "fixed"),
        ]
        if f.group is not None:
            sizes.append(("group", f.group, "scores"))
        if f.stem == "factored":
            sizes.append(("narrow", 5, "residual"))
        if f.head in ("transform", "pooler"):
            sizes.append((f.head, sizes[0][1], "pointwise"))
        for name, size, kind in sizes:
            yield Space(name=name, size=size, kind=kind)

    def follows(self) -> Iterator[tuple[str, str]]:
        if self.f.hidden is None:
            yield "follows:head_dim", "hidden / heads"
        if self.f.head in ("transform", "pooler"):
            yield f"follows:{self.f.head}", "hidden"

    def outputs(self) -> Iterator[Port]:
        yield Port(name="states", space="hidden", through=self.last_norm)
        if self.f.head == "pooler":
            yield Port(name="pooled", space="pooler")
            yield Port(name="logits", space="labels")
        elif self.f.head != "bare":
            yield Port(name="logits", space="vocab")

    # --- layers ----------------------------------------------------------------------------------------------

    def stem(self) -> Iterator[Layer]:
        space = "narrow" if self.f.stem == "factored" else "hidden"
        tables = [self.weight("table", "vocab", space)]
        if self.f.learned_positions:
            tables.append(self.weight("position_table", "positions", space))
        yield self.layer("embedding", "embedding", tables, {"hidden_power": self.f.table_power})
        if self.f.stem != "plain":
            yield self.norm("embedding_norm", space, "post")
        if self.f.stem == "factored":
            yield self.layer("projection", "linear", self.linear("projection", "narrow", "hidden"))

    def stack(self, name: str, depth: int) -> Stack:
        return Stack(name=name, depth=depth, layers=tuple(self.block(f"{name}.{{layer}}.")))

    def block(self, prefix: str) -> Iterator[Layer]:
        position = "post" if self.f.block == "post" else "pre"
        norms = [self.norm(f"{name}_norm", "hidden", position, prefix) for name in ("attention", "mlp")]
        attention, mlp = list(self.attention(prefix)), self.mlp(prefix)
        if self.f.block == "pre":
            yield from (norms[0], *attention, norms[1], mlp)
        elif self.f.block == "post":
            yield from (*attention, norms[0], mlp, norms[1])
        else:
            yield from (*norms, *attention, mlp)
        for name in ("attention", "mlp") if self.f.branch_norms else ():
            yield self.norm(f"{name}_branch_norm", "hidden", "branch", prefix)

    def attention(self, prefix: str) -> Iterator[Layer]:
        joined = f"({self.queries} + {self.keys} + {self.keys})"
        fused = {
            "product": joined if self.is_grouped else "(3 heads head_dim)",
            "concatenation": joined,
            "interleaved": "(kv_heads (group + 1 + 1) head_dim)" if self.is_grouped else "(heads 3 head_dim)",
        }
        projections = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        if self.f.qkv != "separate":
            projections = {"qkv_proj": fused[self.f.qkv]}
        parameters = [p for name, out in projections.items() for p in self.linear(name, "hidden", out, prefix)]
        parameters += self.linear("o_proj", self.queries, "hidden", prefix)
        scale = None if self.f.scaled_scores else "none"
        yield self.branch(
            "attention", parameters, prefix, {"rope": self.f.rope, "causal": self.f.causal, "scale": scale}
        )
        for name in ("q_norm", "k_norm") if self.f.qk_norm else ():
            yield self.norm(name, "head_dim", "pre", prefix, slot=f"{name}.")

    def mlp(self, prefix: str) -> Layer:
        ups = {
            "no": {"up_proj": "ffn"},
            "separate": {"gate_proj": "ffn", "up_proj": "ffn"},
            "fused": {"gate_up_proj": "(2 ffn)"},
        }[self.f.gated]
        parameters = [p for name, out in ups.items() for p in self.linear(name, "hidden", out, prefix)]
        parameters += self.linear("down_proj", "ffn", "hidden", prefix)
        return self.branch("mlp", parameters, prefix, {"activation": self.f.activation})

    def branch(
        self,
        kind: Literal["attention", "mlp"],
        parameters: list[Parameter],
        prefix: str,
        attributes: Mapping[str, Any],
    ) -> Layer:
        if self.f.layer_scale:
            parameters.append(self.parameter(f"{prefix}{kind}.", "layer_scale", "* hidden"))
        through = None if self.f.block == "post" else f"{kind}_norm"
        layer = self.layer(kind, kind, parameters, attributes, through)
        return layer.model_copy(update={"added_through": f"{kind}_branch_norm"}) if self.f.branch_norms else layer

    def head(self) -> Iterator[Layer]:
        if self.last_norm is not None:
            yield self.norm(self.last_norm, "hidden", "pre", "head.")
        if self.f.head == "transform":
            parameters = self.linear("transform", "hidden", "transform")
            yield self.layer("transform", "mlp", parameters, {"activation": "gelu"}, self.last_norm)
            yield self.norm("transform_norm", "transform", "pre")
            yield self.lm_head("transform", "transform_norm")
        elif self.f.head == "pooler":
            parameters = self.linear("pooler", "hidden", "pooler")
            yield self.layer("pooler", "pool", parameters, {"activation": "tanh"}, self.last_norm)
            yield self.layer("classifier", "head", self.linear("classifier", "pooler", "labels"))
        elif self.f.head == "tied" and self.f.stem == "factored":
            parameters = self.linear("narrowing", "hidden", "narrow")
            yield self.layer("narrowing", "linear", parameters, through=self.last_norm)
            yield self.lm_head("narrow", None)
        elif self.f.head != "bare":
            yield self.lm_head("hidden", self.last_norm)

    def lm_head(self, space: str, through: str | None) -> Layer:
        fits = space == "narrow" or self.f.stem != "factored"  # the table's own space
        parameters = self.linear("lm_head", space, "vocab")
        if self.f.head != "untied" and fits:
            layout = f"{space} -> vocab" if "table" in self.f.transposed else f"vocab <- {space}"
            parameters[0] = self.parameter("", "lm_head.weight", layout, tied_to="table.weight")
        return self.layer("lm_head", "head", parameters, {"hidden_power": self.f.head_power}, through)

    def norm(self, name: str, space: str, position: str, prefix: str = "", slot: str = "") -> Layer:
        prefix = f"{prefix}{name}."
        parameters = [self.parameter(prefix, f"{slot}scale", f"* {space}")]
        if self.f.norm == "layer" and self.f.biases:
            parameters.append(self.parameter(prefix, f"{slot}shift", f"+ {space}"))
        attributes = {"norm": self.f.norm, "position": position, "epsilon": 0.2, "offset": self.f.offset}
        key = {"shared": "norm_eps", "own": f"{name}_eps", "fixed": None}[self.f.epsilon]
        return self.layer(name, "norm", parameters, attributes | ({"epsilon_key": key} if key else {}))

    def layer(
        self,
        name: str,
        kind: LayerKind,
        parameters: Sequence[Parameter],
        attributes: Mapping[str, Any] | None = None,
        through: str | None = None,
    ) -> Layer:
        parsed = [parameter.parsed for parameter in parameters]
        return Layer(
            name=name,
            kind=kind,
            reads=tuple(sorted({space for layout in parsed for space in layout.read_spaces()})),
            writes=tuple(sorted({space for layout in parsed for space in layout.written_spaces()})),
            through=through,
            parameters=tuple(parameters),
            attributes=dict(attributes or {}),
        )

    # --- parameters ------------------------------------------------------------------------------------------

    def linear(self, module: str, into: str, out: str, prefix: str = "") -> list[Parameter]:
        biases = [self.parameter(prefix, f"{module}.bias", f"-> {out}")] if self.f.biases else []
        return [self.weight(module, into, out, prefix), *biases]

    def weight(self, module: str, into: str, out: str, prefix: str = "") -> Parameter:
        is_table = module.endswith("table")
        layout = f"{into} -> {out}" if (module in self.f.transposed) != is_table else f"{out} <- {into}"
        return self.parameter(prefix, f"{module}.weight", layout)

    def parameter(self, prefix: str, slot: str, layout: str, tied_to: str | None = None) -> Parameter:
        return Parameter(name=prefix + slot, slot=slot, layout=layout, dtype=self.f.dtype, tied_to=tied_to)


def layer_graphs(**features: st.SearchStrategy[Any]) -> st.SearchStrategy[LayerGraph]:
    """Small transformers: what :func:`transformer` makes of drawn features.

    Args:
        features: Strategies for single features, in place of the usual ones.
    """
    usual: dict[str, st.SearchStrategy[Any]] = {
        "heads": st.integers(1, 3),
        "group": st.none() | st.integers(1, 3),
        "head_dim": st.sampled_from((2, 4)),
        "hidden": st.none() | st.integers(3, 9),
        "ffn": st.integers(2, 7),
        "vocab": st.integers(3, 9),
        "positions": st.integers(2, 6),
        "depths": st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
        "norm": st.sampled_from(("rms", "layer")),
        "offset": st.sampled_from((0.0, 1.0)),
        "block": st.sampled_from(("pre", "post", "parallel")),
        "branch_norms": st.booleans(),
        "table_power": st.sampled_from((0.0, 0.5)),
        "head_power": st.sampled_from((0.0, -0.5)),
        "stem": st.sampled_from(("plain", "plain", "normed", "factored")),
        "head": st.sampled_from(("untied", "tied", "transform", "pooler", "bare")),
        "final_norm": st.sampled_from(("final_norm", "attention_norm", None)),  # a name is its block's own
        "epsilon": st.sampled_from(("shared", "own", "fixed")),
        "qkv": st.sampled_from(("separate", "product", "interleaved", "concatenation")),
        "gated": st.sampled_from(("no", "separate", "fused")),
        "activation": st.sampled_from(("gelu", "silu", "relu", "gelu_new")),
        "transposed": st.frozensets(st.sampled_from(MODULES)),
    }
    flags = ("learned_positions", "rope", "causal", "scaled_scores", "qk_norm", "biases", "layer_scale")
    return st.builds(transformer, **(usual | dict.fromkeys(flags, st.booleans()) | features))


# --- targets -------------------------------------------------------------------------------------------------


@st.composite
def targets(draw: st.DrawFn, graph: LayerGraph) -> Target:
    """Sizes ``graph`` can grow to: any width, whole groups of heads, every stack deeper in one ratio.

    What follows by itself may be named or not; a whole multiple may be given as a ratio. The simplest doubles
    width and depth.
    """
    old = _named_sizes(graph)
    asked = draw(st.one_of(_hidden_only(graph), _every_head_size(graph)))
    free = {name: _grown(old[name]) for name in ("ffn", "vocab", "positions")}
    asked = asked | draw(st.fixed_dictionaries({}, optional=free))
    asked = asked | draw(st.fixed_dictionaries({"layers": _depths(graph)}) | st.just({}))
    whole = [name for name, size in asked.items() if size % old[name] == 0]
    ratios = draw(st.frozensets(st.sampled_from(whole))) if whole else frozenset()
    return Target.of(**{name: f"{n // old[name]}x" if name in ratios else n for name, n in asked.items()})


def _named_sizes(graph: LayerGraph) -> dict[str, int]:
    grouped = {"heads": graph.sizes["kv_heads"] * graph.sizes["group"]} if "kv_heads" in graph.sizes else {}
    return {**graph.sizes, **grouped, "layers": next(iter(graph.depths.values()))}


def _grown(size: int) -> st.SearchStrategy[int]:
    return st.sampled_from((2 * size, size)) | st.integers(size, 3 * size)


def _depths(graph: LayerGraph) -> st.SearchStrategy[int]:
    """The first stack's depth, such that every other stack can follow in ratio."""
    first, step = next(iter(graph.depths.values())), gcd(*graph.depths.values())
    return _grown(step).map(lambda steps: steps * first // step)


def _hidden_only(graph: LayerGraph) -> st.SearchStrategy[dict[str, int]]:
    """``hidden`` alone, in steps that whole groups of heads of the same head_dim can follow."""
    old = _named_sizes(graph)
    unit = old.get("group", 1)
    step = old["hidden"] * unit // gcd(old["hidden"] * unit, old["heads"])
    step = old["head_dim"] * unit if "follows:head_dim" in graph.attributes else step
    double = st.just(old["hidden"] // step)
    return (double | st.integers(0, 3)).map(lambda steps: {"hidden": old["hidden"] + steps * step})


@st.composite
def _every_head_size(draw: st.DrawFn, graph: LayerGraph) -> dict[str, int]:
    """``hidden`` and every size of the attention."""
    old = _named_sizes(graph)
    drawn: dict[str, int] = {}
    for name in ("heads", "kv_heads", "group"):
        if name in graph.sizes:
            drawn[name] = draw(_grown(old[name]))
    heads = drawn["kv_heads"] * drawn.pop("group") if "group" in drawn else drawn["heads"]
    factors = (1,) if _interleaves_bases(graph) else (1, 2)
    head_dim = old["head_dim"] * draw(st.sampled_from(factors))  # even stays even, as rotary positions need
    is_tied = "follows:head_dim" in graph.attributes
    hidden = heads * head_dim if is_tied else draw(_grown(old["hidden"]))
    return {**drawn, "hidden": hidden, "heads": heads, "head_dim": head_dim}


def _interleaves_bases(graph: LayerGraph) -> bool:
    """Whether queries, keys and values alternate along a fused axis, so that their heads cannot grow apart."""
    fused = [p.parsed.writes[0] for _, layer in graph.walk() for p in layer.parameters if len(p.bases) > 1]
    return any(isinstance(axis, Product) and axis.factors[0] != Fixed(3) for axis in fused)


# --- models without a framework ------------------------------------------------------------------------------


class MemoryAdapter:
    """The adapter of models that are a layer graph and arrays, and nothing else; the reference runs them."""

    name = "memory"

    def matches(self, source: Any) -> bool:
        """Whether ``source`` is such a model."""
        return isinstance(source, Model) and source.adapter.name == self.name

    def read(self, source: Any) -> Model:
        """The model itself."""
        model: Model = source
        return model

    def graph_like(self, source: Any) -> LayerGraph:
        """The model's graph."""
        return self.read(source).graph

    def resized(self, origin: Any, graph: LayerGraph, operator: GrowthOperator) -> Any:
        """The same origin: every size can be expressed."""
        return origin

    def write(
        self,
        model: Model,
        like: Any,
        destination: Path,
        progress: Callable[[int], None],
        check: Callable[[Model], None],
    ) -> None:
        """Refuse: there is no such format.

        Raises:
            GrowkitError: Always.
        """
        raise GrowkitError("a model in memory has no form on disk")

    def build(self, model: Model) -> Any:
        """The model's arrays by name."""
        return dict(model.weights)

    def forward(self, model: Model, device: str = "auto") -> Forward:
        """:func:`~growkit.reference.reference_forward` of the model, whatever the device."""
        held = self.build(model)

        def run(inputs: Mapping[str, Array], weights: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
            return reference_forward(model.graph, held | dict(weights or {}), inputs)

        return run


def random_weights(graph: LayerGraph, seed: int = 0) -> dict[str, Array]:
    """Weights for a graph, by name: normal ones, and scales that act around 1, so that nothing is 0 or 1 by chance."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for tensor in graph.tensors():
        layout = tensor.parameter.parsed
        drawn = rng.standard_normal(tensor.shape)
        if layout.sign == "*":
            drawn = 1 - float(tensor.owner.attributes.get("offset") or 0) + 0.3 * np.tanh(drawn)
        elif tensor.owner.kind != "embedding":
            drawn /= np.sqrt(prod(axis_size(axis, graph.sizes) for axis in layout.reads))
        weights[tensor.name] = drawn.astype(dtype_of(tensor.parameter.dtype))
    return weights


def memory_model(graph: LayerGraph, seed: int = 0) -> Model:
    """A model of ``graph`` with random weights."""
    return Model(graph, random_weights(graph, seed), MemoryAdapter())
