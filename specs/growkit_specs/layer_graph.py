"""The layer graph: what a transformer is, whatever framework or file it came from.

A model is a stem, one or more stacks of repeated blocks, and a head. Every layer names the spaces it reads and writes,
every parameter carries one line of the axis notation (:mod:`growkit_specs.layout`), and every space that parameters
share exists once. Sizes are in entries, never in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from growkit_specs.layout import Layout, parse_layout

SCHEMA_VERSION: Literal[1] = 1

SpaceKind = Literal["residual", "pointwise", "scores", "linear", "fixed"]
LayerKind = Literal["embedding", "norm", "attention", "mlp", "linear", "head", "pool"]
Scalar = bool | int | float | str | None

LayoutText = Annotated[str, AfterValidator(lambda text: str(parse_layout(text)))]
"""A line of the axis notation, kept in canonical spacing."""


class Spec(BaseModel):
    """Base of every spec: frozen, and refusing what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Space(Spec):
    """A named dimension that several parameters share: the unit of growth.

    Attributes:
        name: Its name in the layouts.
        size: Its number of entries.
        kind: Which maps keep the function. ``residual``: constrained by its norms; ``pointwise``: behind an
            elementwise nonlinearity, so selections only; ``scores``: a query-key dimension; ``linear``: read linearly
            and nothing else; ``fixed``: tokens, positions, labels, pixels.
        frozen: Why it cannot grow where the model came from; None where nothing there says so.
    """

    name: str
    size: int = Field(ge=1)
    kind: SpaceKind
    frozen: str | None = None


class Parameter(Spec):
    """One tensor of the model, or one tensor per layer of a stack.

    Attributes:
        name: The tensor's name where the model came from; in a stack ``{layer}`` stands for the layer's number, unless
            the layers share it.
        slot: The role it fills, in the field's terms: ``q_proj.weight``, ``down_proj.bias``, ``scale``.
        layout: How it is stored and which way it maps.
        dtype: The numpy name of its element type (``float32``, ``bfloat16``, ...).
        tied_to: The name of the parameter that holds the same tensor, where there is one. A tied parameter has no
            tensor of its own.
    """

    name: str
    slot: str
    layout: LayoutText
    dtype: str = "float32"
    tied_to: str | None = None

    @cached_property
    def parsed(self) -> Layout:
        """The layout, parsed."""
        return parse_layout(self.layout)

    @property
    def module(self) -> str:
        """The module the slot belongs to: ``q_proj`` of ``q_proj.weight``."""
        return self.slot.partition(".")[0]

    @property
    def bases(self) -> tuple[str, ...]:
        """The bases of its head axis: size and basis are apart, and q, k and v may each have a basis of their own."""
        return BASES.get(self.module, ())


BASES: dict[str, tuple[str, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("v",),
    "qk_proj": ("q", "k"),
    "kv_proj": ("k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "q_norm": ("q",),
    "k_norm": ("k",),
}
"""For each attention module the bases of its head axis; fused modules name one for each segment."""


class Layer(Spec):
    """One functional part of a block: a norm, an attention, an MLP, an embedding, a head.

    Attributes:
        name: Unique within its block, stem or head.
        kind: What it computes.
        reads: The spaces it reads.
        writes: The spaces it writes.
        through: The norm layer it reads its input through, where it does not read the space itself.
        added_through: The norm layer its output goes through before it is added to the stream, where there is one.
        parameters: Its tensors.
        attributes: Facts of the computation: ``norm`` (``rms`` or ``layer``), ``position`` (``pre``: the output goes
            to readers; ``post``: the output is the stream; ``branch``: the output is added to the stream), ``epsilon``,
            ``offset`` (what a norm adds to its stored scale), ``hidden_power`` (the power of the size of ``hidden``
            that multiplies what the layer writes into it, or reads of it), ``activation``,
            ``output_activation`` (what the output goes through before it is written), ``bends`` (what the block passes
            the stream itself through), ``scale`` (what scores are divided by: ``none``, ``head_dim``, or its root where
            nothing is said), ``rope``, ``causal``, ...
    """

    name: str
    kind: LayerKind
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    through: str | None = None
    added_through: str | None = None
    parameters: tuple[Parameter, ...] = ()
    attributes: dict[str, Scalar] = Field(default_factory=dict)

    @property
    def score_power(self) -> float:
        """The power of the size of ``head_dim`` that multiplies the scores of an attention."""
        return {"none": 0.0, "head_dim": -1.0}.get(str(self.attributes.get("scale")), -0.5)

    @property
    def is_post_norm(self) -> bool:
        """Whether this is a norm whose output is the stream itself."""
        return self.kind == "norm" and self.attributes.get("position") == "post"

    @property
    def is_branch_norm(self) -> bool:
        """Whether this is a norm over a branch's output, before that is added to the stream."""
        return self.kind == "norm" and self.attributes.get("position") == "branch"

    @property
    def writes_stream(self) -> bool:
        """Whether this is a norm whose output goes into the stream, not to readers."""
        return self.is_post_norm or self.is_branch_norm

    def parameter(self, slot: str) -> Parameter | None:
        """The parameter that fills ``slot``, if there is one."""
        return next((parameter for parameter in self.parameters if parameter.slot == slot), None)


class Stack(Spec):
    """A block of layers repeated ``depth`` times.

    Attributes:
        name: Its name.
        depth: How often its block runs.
        layers: One block, in the order of computation.
        fixed: Whether it keeps its depth when a target asks for more layers.
        shared: Whether all repetitions are one block with one set of tensors, so that names hold no ``{layer}``.
    """

    name: str
    depth: int = Field(ge=1)
    layers: tuple[Layer, ...]
    fixed: bool = False
    shared: bool = False

    def slots(self) -> Iterator[tuple[str, Parameter]]:
        """Every slot's key and parameter."""
        for layer in self.layers:
            yield from ((slot_key(self, layer.name, parameter.slot), parameter) for parameter in layer.parameters)


class Port(Spec):
    """An input or an output of the model.

    Attributes:
        name: Its name in the framework.
        kind: ``tokens`` (ids below the size of ``space``), ``mask``, ``types`` (ids below the size of ``space``),
            ``positions`` (the numbers of the tokens, from 0), ``image`` (``space`` is empty), or ``values`` for
            outputs, and for inputs of which nothing else is known.
        space: The space of its last axis (outputs), or of its ids (inputs).
        through: The norm whose output this is, where it is one.
    """

    name: str
    kind: Literal["tokens", "mask", "types", "positions", "image", "values"] = "values"
    space: str | None = None
    through: str | None = None


class LayerPort(Spec):
    """An input or an output that every layer of a stack has one of: keys or values that it keeps from call to call.

    Attributes:
        stack: The stack.
        names: Its name in each layer.
        axes: Its axes in the notation; empty where an axis is of no space, such as the batch.
        bases: The bases of its head axis, as :attr:`Parameter.bases`.
    """

    stack: str
    names: tuple[str, ...]
    axes: tuple[str, ...]
    bases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """One concrete tensor of a model.

    Attributes:
        name: The tensor's own name, the layer's number filled in.
        shape: Its stored shape.
        parameter: The parameter it is an instance of.
        owner: The layer it belongs to.
        stack: The name of its stack; None in the stem and the head.
        layer: Its layer's number in the stack, 0 where all layers share it; None in the stem and the head.
        through: The :func:`norm_key` of the norm that its owner reads through, where it reads through one.
    """

    name: str
    shape: tuple[int, ...]
    parameter: Parameter
    owner: Layer
    stack: str | None
    layer: int | None
    through: str | None = None

    @property
    def key(self) -> str:
        """The slot's :func:`slot_key`."""
        return slot_key(self.stack, self.owner.name, self.parameter.slot)

    @property
    def count(self) -> int:
        """Its number of entries."""
        return prod(self.shape)


def norm_key(stack: Stack | str | None, name: str | None) -> str:
    """The name of a norm that no other norm of the model has: its stack and its layer's name."""
    return f"{getattr(stack, 'name', stack) or ''}/{name}"


def slot_key(stack: Stack | str | None, layer: str, slot: str) -> str:
    """The name of a slot that no other slot of the model has: its stack, its layer's name, and its own."""
    return f"{getattr(stack, 'name', stack) or ''}/{layer}/{slot}"


class LayerGraph(Spec):
    """A transformer as a neutral graph of layers.

    Raises:
        pydantic.ValidationError: Where a layout names an unknown space, a name stands twice, a tie or a norm that
            ``through`` names does not exist.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    architecture: str
    spaces: tuple[Space, ...]
    stem: tuple[Layer, ...] = ()
    stacks: tuple[Stack, ...]
    head: tuple[Layer, ...] = ()
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    layer_inputs: tuple[LayerPort, ...] = ()
    layer_outputs: tuple[LayerPort, ...] = ()
    attributes: dict[str, Scalar] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> LayerGraph:
        _refuse_repeats("space", [space.name for space in self.spaces])
        _refuse_repeats("stack", [stack.name for stack in self.stacks])
        held = [(stack, layer, parameter) for stack, layer in self.walk() for parameter in layer.parameters]
        names = [parameter.name for _, _, parameter in held]
        _refuse_repeats("parameter", names)
        _refuse_repeats("slot", [slot_key(stack, layer.name, parameter.slot) for stack, layer, parameter in held])
        for stack, layer in self.walk():
            for parameter in layer.parameters:
                parameter.parsed.shape(self.sizes)
                if parameter.tied_to is not None and parameter.tied_to not in names:
                    raise ValueError(f"{parameter.name} is tied to '{parameter.tied_to}', which is not a parameter")
                if (stack is not None and not stack.shared) != ("{layer}" in parameter.name):
                    raise ValueError(
                        f"{parameter.name}: '{{layer}}' stands in the names of a stack's parameters, and only there; "
                        "not where its layers share them"
                    )
            if layer.kind == "norm" and not layer.parameters:
                raise ValueError(f"the norm '{layer.name}' has no parameter that says which space it is over")
            if layer.through is not None:
                self.norm(layer.through, stack)
            if layer.added_through is not None and not self.norm(layer.added_through, stack).is_branch_norm:
                raise ValueError(
                    f"'{layer.name}' is added through the norm '{layer.added_through}', whose position is not 'branch'"
                )
        for port in self.outputs:
            if port.through is not None:
                self.norm(port.through, None)
        for each in (*self.layer_inputs, *self.layer_outputs):
            if len(each.names) != self.depths.get(each.stack):
                raise ValueError(
                    f"{', '.join(each.names)}: expected one for each of the {self.depths.get(each.stack)} layers of "
                    f"'{each.stack}', got {len(each.names)}"
                )
        return self

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every space."""
        return {space.name: space.size for space in self.spaces}

    @cached_property
    def kinds(self) -> dict[str, SpaceKind]:
        """The kind of every space."""
        return {space.name: space.kind for space in self.spaces}

    @cached_property
    def depths(self) -> dict[str, int]:
        """The depth of every stack."""
        return {stack.name: stack.depth for stack in self.stacks}

    def walk(self) -> Iterator[tuple[Stack | None, Layer]]:
        """Every layer in the order of computation, a stack's layers once, each with its stack."""
        yield from ((None, layer) for layer in self.stem)
        yield from ((stack, layer) for stack in self.stacks for layer in stack.layers)
        yield from ((None, layer) for layer in self.head)

    def norm(self, name: str, stack: Stack | None) -> Layer:
        """The norm layer called ``name``, as seen from inside ``stack`` (None: from the stem or the head).

        A stack sees its own norms first, then those outside of stacks: a decoder reads the encoder's stream through the
        norm that stands after the encoder.
        """
        return self._norm(name, stack)[1]

    def _norm(self, name: str, stack: Stack | None) -> tuple[Stack | None, Layer]:
        for where, layers in ((stack, stack.layers if stack is not None else ()), (None, self.stem + self.head)):
            for layer in layers:
                if layer.name == name and layer.kind == "norm":
                    return where, layer
        raise ValueError(f"no norm layer is called '{name}'")

    def norms_over(self, space: str) -> tuple[Layer, ...]:
        """The norm layers whose scale or shift lives in ``space``."""
        return tuple(
            layer
            for _, layer in self.walk()
            if layer.kind == "norm" and any(space in p.parsed.spaces for p in layer.parameters)
        )

    def is_activated(self, space: str) -> bool:
        """Whether a layer's output goes through an activation before it is written into ``space``."""
        return any(space in layer.writes and layer.attributes.get("output_activation") for _, layer in self.walk())

    def writer_keys(self, stack: Stack) -> list[str]:
        """The keys of a stack's slots that write into the stream: a branch's last map, or the norm after it.

        Where a norm stands after it, its scale and shift are what a silent block keeps at zero. Zeros before the norm
        would do as well, until the first step: then the norm brings what little is written to full strength.
        """
        residual = {space for space, kind in self.kinds.items() if kind == "residual"}
        return [
            slot_key(stack, layer.name, parameter.slot)
            for layer in stack.layers
            for parameter in layer.parameters
            if layer.is_branch_norm or (layer.added_through is None and parameter.parsed.written_spaces() & residual)
        ]

    def tensors(self, *, tied: bool = False) -> Iterator[Tensor]:
        """Every tensor of the model, stacks layer by layer; what layers share once.

        Args:
            tied: Whether tied parameters, which have no tensor of their own, are yielded too.
        """
        for layers, stack, index in self._blocks():
            for owner in layers:
                through = norm_key(self._norm(owner.through, stack)[0], owner.through) if owner.through else None
                for parameter in owner.parameters:
                    if tied or parameter.tied_to is None:
                        name = parameter.name if index is None else parameter.name.replace("{layer}", str(index))
                        shape, where = parameter.parsed.shape(self.sizes), stack.name if stack else None
                        yield Tensor(name, shape, parameter, owner, where, index, through)

    def _blocks(self) -> Iterator[tuple[tuple[Layer, ...], Stack | None, int | None]]:
        yield self.stem, None, None
        for stack in self.stacks:
            for index in range(1 if stack.shared else stack.depth):
                yield stack.layers, stack, index
        yield self.head, None, None

    def layers_of(self, tensor: Tensor) -> tuple[int | None, ...]:
        """The numbers of the layers that use ``tensor``: its own, or every one of a stack whose layers share it."""
        shared = next((stack for stack in self.stacks if stack.name == tensor.stack and stack.shared), None)
        return tuple(range(shared.depth)) if shared else (tensor.layer,)

    @cached_property
    def parameter_count(self) -> int:
        """The number of trained entries; a tied tensor counts once."""
        return sum(tensor.count for tensor in self.tensors())

    def resized(
        self,
        sizes: Mapping[str, int],
        depths: Mapping[str, int],
        *,
        untied: Collection[str] = (),
        epsilons: Mapping[str, float] | None = None,
    ) -> LayerGraph:
        """The same model at other sizes.

        Args:
            sizes: New sizes of spaces; spaces that are not named keep theirs.
            depths: New depths of stacks.
            untied: The names of tied parameters that get a tensor of their own.
            epsilons: New values of norms' epsilons, by the config key that holds them.

        Layer ports of a stack that changes its depth are left out: how new ones are called is the format's to say.
        """

        def adapted(layer: Layer) -> Layer:
            freed = tuple(p.model_copy(update={"tied_to": None}) if p.name in untied else p for p in layer.parameters)
            epsilon = (epsilons or {}).get(str(layer.attributes.get("epsilon_key")))
            attributes = layer.attributes if epsilon is None else {**layer.attributes, "epsilon": epsilon}
            return layer.model_copy(update={"parameters": freed, "attributes": attributes})

        def kept(ports: tuple[LayerPort, ...]) -> tuple[LayerPort, ...]:
            return tuple(port for port in ports if len(port.names) == depths.get(port.stack, len(port.names)))

        return self.model_copy(
            update={
                "spaces": tuple(s.model_copy(update={"size": sizes.get(s.name, s.size)}) for s in self.spaces),
                "stem": tuple(map(adapted, self.stem)),
                "stacks": tuple(
                    s.model_copy(update={"depth": depths.get(s.name, s.depth), "layers": tuple(map(adapted, s.layers))})
                    for s in self.stacks
                ),
                "head": tuple(map(adapted, self.head)),
                "layer_inputs": kept(self.layer_inputs),
                "layer_outputs": kept(self.layer_outputs),
            }
        ).revalidated()

    def with_dtypes(self, dtype_of: Callable[[str], str]) -> LayerGraph:
        """The same graph with the element types that ``dtype_of`` gives for each slot's key."""

        def typed(stack: str, layer: Layer) -> Layer:
            return layer.model_copy(
                update={
                    "parameters": tuple(
                        p.model_copy(update={"dtype": dtype_of(slot_key(stack, layer.name, p.slot))})
                        for p in layer.parameters
                    )
                }
            )

        return self.model_copy(
            update={
                "stem": tuple(typed("", layer) for layer in self.stem),
                "stacks": tuple(
                    s.model_copy(update={"layers": tuple(typed(s.name, layer) for layer in s.layers)})
                    for s in self.stacks
                ),
                "head": tuple(typed("", layer) for layer in self.head),
            }
        ).revalidated()

    def revalidated(self) -> LayerGraph:
        """The same graph, checked anew and with nothing cached."""
        return LayerGraph.model_validate(self.model_dump())


def _refuse_repeats(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"the {what} {', '.join(repeated)} is defined twice")
