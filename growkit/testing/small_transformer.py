"""A small transformer drawn up from its features: every kind of norm, block, stem, head and fused projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from growkit_specs import Layer, LayerGraph, Parameter, Port, Space, Stack
from growkit_specs.layer_graph import LayerKind, SpaceKind


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
