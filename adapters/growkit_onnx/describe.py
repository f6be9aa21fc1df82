"""From inferred axes to a layer graph: stacks of blocks, layers, slots, and names that people use.

What a file calls its tensors is kept where the names follow the layers, and is otherwise made up from the slots.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import onnx_ir as ir

from growkit_onnx.blocks import Block, Blocks, find_stacks
from growkit_onnx.branches import PRODUCTS, Branch, Draft, Slot, components, number
from growkit_onnx.facts import Facts
from growkit_onnx.hazards import freeze_hazards
from growkit_onnx.infer import Scene
from growkit_onnx.inputs import image_attributes, input_port
from growkit_onnx.names import Names
from growkit_onnx.norms import Norm
from growkit_onnx.rules import NONLINEAR, READ
from growkit_onnx.tails import tails
from growkit_specs import Layer, LayerGraph, Layout, Parameter, Port, Space, Stack
from growkit_specs.layer_graph import Scalar, SpaceKind, slot_key
from growkit_specs.layout import Axis, Concatenation, Fixed, Leaf, product, spaces_of
from growkit_specs.unification import ONE


@dataclass(frozen=True)
class Description:
    """A graph in growkit's terms.

    Attributes:
        graph: The layer graph.
        stored: For each tensor of the graph the initializers that hold it, one for every layer that shares it.
        slots: For each slot's key the initializer that fills it, that of the first layer in a stack.
        stacks: The graph's repeated blocks, by the name of their stack.
        norms: For each norm layer's key the norms it stands for, one for each layer of its stack.
        names: The named spaces.
        frozen: For each space that cannot grow, why.
        reads: For each place where the stream is read back, by its node's name, the norm it is read through, or None.
        factors: For each layer's key the number that its scores, rows or input are multiplied by; None for several.
        tails: Where tails begin, and what uses the stream there; only where the stream cannot grow.
    """

    graph: LayerGraph
    stored: Mapping[str, tuple[ir.Value, ...]]
    slots: Mapping[str, ir.Value]
    stacks: Mapping[str, Blocks]
    norms: Mapping[str, tuple[Norm, ...]]
    names: Names
    frozen: Mapping[str, str]
    reads: Mapping[str, str | None]
    factors: Mapping[str, float | None]
    tails: Mapping[ir.Value, Sequence[ir.Node]]


def describe(scene: Scene, ties: Mapping[str, str], where: str) -> Description:
    """The layer graph of a graph whose axes are inferred.

    Args:
        scene: What is known of the axes.
        ties: For each private copy of an initializer the name of the one it was copied from.
        where: What error messages call the model.

    Raises:
        UnsupportedModel: Where there is no residual stream that could grow; what stands in the way is named.
    """
    return _Describer(Facts(scene, ties, where)).description()


class _Describer:
    def __init__(self, facts: Facts) -> None:
        self.facts, self.scene, self.names = facts, facts.scene, facts.names

    def description(self) -> Description:
        stacks = self._named_stacks(find_stacks(self.scene.graph, self.facts.stream.carries))
        for blocks in stacks.values():
            self._unify_blocks(blocks)
        for i, space in enumerate(self.facts.spaces):
            self.names.name(space, "hidden", "residual", f"hidden_{i + 1}")
        inside = {node for blocks in stacks.values() for block in blocks.blocks for node in block.nodes}
        first = {name: self._drafts(blocks.blocks[0].nodes, blocks) for name, blocks in stacks.items()}
        outside = self._drafts([node for node in self.scene.graph if node not in inside], None)
        for name, drafts in [*first.items(), (None, outside)]:
            block = stacks[name].blocks[0] if name is not None else None
            drafts += self._constants(block, [*first.values(), outside], stacks)
        for name, drafts in first.items():
            if drafts and (bend := self._bend(stacks[name].blocks[0])) is not None:
                drafts[-1].attributes["bends"] = f"{bend.op_type} ({bend.name})"
        freeze_hazards(self.facts)
        return _Assembly(self.facts, stacks, first, outside).description()

    def _constants(
        self, block: Block | None, drafts: Iterable[Sequence[Draft]], stacks: Mapping[str, Blocks]
    ) -> list[Draft]:
        """The numbers of a computation that have an entry for each unit of a space that can grow (slopes of heads)."""
        known = {slot.stored for each in drafts for draft in each for slot in draft.slots}
        in_blocks = {value for blocks in stacks.values() for each in blocks.blocks for value in each.weights}
        among = block.weights if block is not None else [v for v in self.facts.readers if v not in in_blocks]
        slots = [
            Slot(value, "constant", "", self.facts.order[self.facts.readers[value]])
            for value in among
            if value in self.facts.readers and value not in known and self._lives_in_named(value)
        ]
        number(slots)
        return [Draft("constants", "embedding", slots, slots[0].position)] if slots else []

    def _lives_in_named(self, value: ir.Value) -> bool:
        named = (space for axis in self.scene.axes(value) for space in spaces_of(self.names.axis(axis)))
        return any(space in self.names.sizes for space in named)

    def _named_stacks(self, found: Sequence[Blocks]) -> dict[str, Blocks]:
        for encoder, decoder in permutations(found) if len(found) == 2 else ():
            if any(self._reads_from(decoder, encoder)):
                return {"encoder": encoder, "decoder": decoder}
        return {"layers" if i == 0 else f"layers_{i + 1}": blocks for i, blocks in enumerate(found)}

    def _reads_from(self, later: Blocks, earlier: Blocks) -> Iterator[bool]:
        """Whether a side value of a stack is made of another stack's end, for each side value."""
        exit_value = earlier.blocks[-1].exit
        for value in later.side:
            seen, todo = set(), [value]
            while todo:
                each = todo.pop()
                if each is exit_value:
                    yield True
                    break
                node = each.producer()
                if node is not None and node not in seen:
                    seen.add(node)
                    todo += [given for given in node.inputs if given is not None]

    def _unify_blocks(self, blocks: Blocks) -> None:
        """Blocks of a stack grow alike."""
        for block in blocks.blocks[1:]:
            for mine, first in zip(block.weights, blocks.blocks[0].weights, strict=True):
                for a, b in zip(self.scene.axes(mine), self.scene.axes(first), strict=True):
                    self.scene.unify(a, b)
        self.facts.spaces = list(dict.fromkeys(self.scene.unifier.resolve(space) for space in self.facts.spaces))
        self.facts.stream.spaces = self.facts.spaces

    def _bend(self, block: Block) -> ir.Node | None:
        """What a block does to the stream even if its weights write nothing; norms apart."""
        own, seen = set(block.nodes), set()
        todo = [block.exit]
        while todo:
            node = todo.pop().producer()
            if node is None or node not in own or node in seen:
                continue
            seen.add(node)
            if node in self.scene.unknown or (node.op_type in NONLINEAR and node not in self.facts.norm_of):
                return node
            if not self.facts.writes(node):
                todo += [value for value in node.inputs if value is not None and self.facts.stream.carries(value)]
        return None

    # --- layers ------------------------------------------------------------------------------------------------------

    def _drafts(self, nodes: Sequence[ir.Node], blocks: Blocks | None) -> list[Draft]:
        """The layers of some operators: norms, and what hangs together between them and the stream."""
        members = set(nodes)
        own = set(blocks.blocks[0].weights) if blocks is not None else set(self.facts.readers)
        drafts = [self._norm_draft(norm) for norm in self.facts.norms if members & set(norm.nodes) and norm.scale]
        for component in components(self.facts, nodes):
            drafts += Branch(self.facts, component, own).drafts()
        return sorted(drafts, key=lambda draft: draft.order)

    def _norm_draft(self, norm: Norm) -> Draft:
        slots = [
            Slot(weight.stored, "", part, self.facts.order[norm.nodes[-1]])
            for part, weight in (("scale", norm.scale), ("shift", norm.shift))
            if weight is not None
        ]
        attributes: dict[str, Scalar] = {"norm": norm.kind, "epsilon": norm.epsilon}
        attributes["position"] = self.facts.position(norm)
        if norm.scale is not None and norm.scale.offset:
            attributes["offset"] = norm.scale.offset
        return Draft("norm", "norm", slots, self.facts.order[norm.nodes[0]], norm=norm, attributes=attributes)


class _Assembly:
    """Drafts of layers become the layer graph."""

    def __init__(
        self,
        facts: Facts,
        stacks: Mapping[str, Blocks],
        first: Mapping[str, list[Draft]],
        outside: list[Draft],
    ) -> None:
        self.facts = facts
        self.scene, self.names = facts.scene, facts.names
        self.stacks, self.first, self.outside = stacks, first, outside
        self.stored: dict[str, tuple[ir.Value, ...]] = {}
        self.slots: dict[str, ir.Value] = {}
        self.by_origin: dict[str, list[Parameter]] = {}
        self.norms: dict[str, tuple[Norm, ...]] = {}
        self.norm_names: dict[int, str] = {}
        self.factors: dict[str, float | None] = {}
        self.taken: set[str] = set()

    def description(self) -> Description:
        self._gather_embeddings()
        self._name_inner_spaces()
        self._name_heads()
        groups = [*self.first.items(), (None, self.outside)]
        for _, drafts in groups:
            self._name_layers(drafts)
        ends = [self.facts.order[b.blocks[-1].nodes[-1]] for b in self.stacks.values()]
        begins = [self.facts.order[b.blocks[0].nodes[0]] for b in self.stacks.values()]
        last = max(ends, default=-1)
        start = min(begins, default=0)
        stem = [d for d in self.outside if d.order < start or (d.kind == "embedding" and d.order < last)]
        head = [d for d in self.outside if d not in stem]
        graph = LayerGraph(
            architecture="onnx",
            stem=self._layers(stem),
            stacks=tuple(
                Stack(
                    name=name,
                    depth=len(blocks.blocks),
                    layers=tuple(self._layer(d, name) for d in self.first[name]),
                    shared=self._is_shared(blocks),
                )
                for name, blocks in self.stacks.items()
            ),
            head=self._layers(head),
            spaces=self._spaces(),
            inputs=tuple(self._inputs()),
            outputs=tuple(self._outputs()),
            attributes=image_attributes(self.scene.graph),
        )
        frozen = {name: why for name in self.names.sizes if (why := self._frozen(name)) is not None}
        streams = {space.name for space in graph.spaces if space.kind == "residual"}
        found = tails(self.facts) if streams & set(frozen) else {}
        return Description(
            graph,
            self.stored,
            self.slots,
            self.stacks,
            self.norms,
            self.names,
            frozen,
            dict(self._reads()),
            self.factors,
            found,
        )

    def _reads(self) -> Iterator[tuple[str, str | None]]:
        """The places where the stream is read back, and the norms it is read through there."""
        for node in self.scene.graph:
            if READ in node.metadata_props and node.inputs[0] is not None:
                yield str(node.name), self._through(node.inputs[0])

    def _through(self, value: ir.Value) -> str | None:
        """The name of the norm whose output a value of the stream is; None where it is the stream itself."""
        norm = self.facts.norm_before(value) if self.facts.stream.carries(value) else None
        return self.norm_names.get(id(norm)) if norm is not None else None

    # --- tables, and maps to the vocabulary --------------------------------------------------------------------------

    def _gather_embeddings(self) -> None:
        """All that is added up before a stack is one layer, apart from tables that are multiplied by other numbers.

        A table that a stack reads from beside is called so.
        """
        gathered: list[Draft] = []
        for draft in list(self.outside):
            made = [self.facts.readers[slot.stored].outputs[0] for slot in draft.slots]
            if draft.name == "embedding":
                draft.name = "decoder_embedding" if self._stack_above(made, "decoder") else "embedding"
                if (first := next((each for each in gathered if each.is_like(draft)), None)) is None:
                    gathered.append(draft)
                    continue
                first.slots += draft.slots
                number(first.slots)
                self.outside.remove(draft)
            elif draft.slots and all(slot.module.startswith("relative") for slot in draft.slots):
                named = next((name for name in ("encoder", "decoder") if self._stack_beside(made, name)), "")
                draft.name = f"{named}_positions" if named else "positions"

    def _stack_above(self, made: Sequence[ir.Value], name: str) -> bool:
        """Whether a stack's stream begins with any of these values."""
        stack = self.stacks.get(name)
        return stack is not None and any(self.facts.descends(stack.blocks[0].entry, value) for value in made)

    def _stack_beside(self, made: Sequence[ir.Value], name: str) -> bool:
        """Whether a stack's blocks read any of these values beside the stream."""
        side = self.stacks[name].side if name in self.stacks else ()
        return any(self.facts.descends(given, value) for given in side for value in made)

    def _name_heads(self) -> None:
        """A head that writes the vocabulary is what people call a language model's."""
        for draft in self.outside:
            for slot in draft.slots:
                writes = {space for axis in self.scene.axes(slot.stored) for space in spaces_of(self.names.axis(axis))}
                if slot.module == "head" and "vocab" in writes:
                    slot.module = draft.name = "lm_head"

    # --- spaces ------------------------------------------------------------------------------------------------------

    def _name_inner_spaces(self) -> None:
        """The spaces between a layer's own weights, and those of tables."""
        for stack, drafts in [*self.first.items(), (None, self.outside)]:
            for draft in drafts:
                for slot in draft.slots:
                    self._name_axes(stack, draft, slot)

    def _name_axes(self, stack: str | None, draft: Draft, slot: Slot) -> None:
        parts = self.scene.parts.get(slot.stored, {})
        for i, axis in enumerate(self.scene.axes(slot.stored)):
            role = "read" if parts.get(i) == {"read"} else "write"
            for factor in self.scene.unifier.factors(axis):
                segments = factor.segments if isinstance(factor, Concatenation) else (factor,)
                for segment in segments:
                    if self._is_open(segment):
                        name, kind = self._inner_name(stack, draft, slot, role, segment)
                        if name:
                            self.names.name(segment, name, kind)

    def _is_open(self, segment: Axis) -> bool:
        return isinstance(segment, Leaf) and isinstance(self.names.axis(segment), Fixed)

    def _is_output(self, slot: Slot) -> bool:
        """Whether what a weight writes is an output of the model, or becomes one entry by entry."""
        value = self.facts.readers[slot.stored].outputs[0]
        for _ in range(12):
            if value.is_graph_output():
                return True
            users = value.consumers()
            if not users or users[0].op_type in PRODUCTS:
                return False
            value = users[0].outputs[0]
        return False

    def _inner_name(self, stack: str | None, draft: Draft, slot: Slot, role: str, axis: Axis) -> tuple[str, SpaceKind]:
        if slot.module == "word_embeddings" and role == "read":
            return "vocab", "fixed"
        if slot.module.startswith("token_type") and role == "read":
            return "token_types", "fixed"
        if slot.module.startswith("position") and role == "read" and slot.kind == "weight":
            return "positions", "fixed"
        if slot.module.startswith("relative") and role == "read":
            return "buckets", "fixed"
        if slot.module == "word_embeddings" and role == "write":
            return "embedding", "residual"
        if draft.kind == "mlp" and (stack is not None or not self.stacks):
            return "ffn", "pointwise"
        if stack is None and role == "write" and self._is_output(slot):
            by_token = len(self.scene.axes(self.facts.readers[slot.stored].outputs[0])) > 2
            if by_token and self.scene.sizes(axis)[0] == self.names.sizes.get("vocab"):
                return "vocab", "fixed"
            if draft.kind != "pool":
                return "labels", "fixed"
        if draft.kind == "pool" and role == "write":
            return "pooled", "pointwise"
        if draft.kind == "mlp" or (draft.kind == "linear" and role == "write"):
            return "transform", "pointwise"
        return "", "fixed"

    def _spaces(self) -> tuple[Space, ...]:
        used = {
            space
            for drafts in (*self.first.values(), self.outside)
            for draft in drafts
            for slot in draft.slots
            for space in self._layout(slot, draft).spaces
        }
        order = ("hidden", "ffn", "heads", "kv_heads", "group", "head_dim")
        names = sorted(
            used, key=lambda n: (order.index(n) if n in order else len(order), list(self.names.sizes).index(n))
        )
        return tuple(Space(name=n, size=self.names.sizes[n], kind=self.names.kinds[n]) for n in names)

    def _frozen(self, name: str) -> str | None:
        if (why := self.names.frozen(name)) is not None:
            return why
        if name == "head_dim" and self.names.is_divided(name):
            return "rotary positions turn its entries in pairs"
        if self.names.kinds[name] == "fixed":
            is_output = any(port.space == name for port in self._outputs())
            return "an output has its size" if is_output else "it counts a table's rows, which are looked up by number"
        return None

    # --- layers ------------------------------------------------------------------------------------------------------

    def _name_layers(self, drafts: list[Draft]) -> None:
        """Layers of one name are told apart; norms are called by what they stand before or behind."""
        seen: Counter[str] = Counter()
        for draft in drafts:
            if draft.norm is None:
                seen[draft.name] += 1
                if seen[draft.name] > 1:
                    draft.name = f"{draft.name}_{seen[draft.name]}"
        for draft in drafts:
            if draft.norm is not None:
                draft.name = self._norm_name(draft, drafts)
        counts: Counter[str] = Counter()
        for draft in drafts:
            counts[draft.name] += 1
            if counts[draft.name] > 1:
                draft.name = f"{draft.name}_{counts[draft.name]}"
            if draft.norm is not None:
                self.norm_names[id(draft.norm)] = draft.name

    def _norm_name(self, draft: Draft, drafts: list[Draft]) -> str:
        norm = draft.norm
        assert norm is not None
        if not self.facts.stream.carries(norm.output):
            labels = self._labels_behind(norm, drafts)
            return f"{labels}_norm" if labels else "inner_norm"
        if draft.attributes["position"] == "pre":
            reader = next((d for d in drafts if d.through is norm and d.norm is None), None)
            if reader is not None and drafts is not self.outside:
                return f"{reader.name}_norm"
            if drafts is not self.outside:
                return "norm"
            return "encoder_norm" if self._ends_encoder(norm) else "final_norm"
        before = [d for d in drafts if d.norm is None and d.order < draft.order and not d.name.endswith("_memory")]
        suffix = "_output_norm" if draft.attributes["position"] == "branch" else "_norm"
        return f"{before[-1].name}{suffix}" if before else "norm"

    def _ends_encoder(self, norm: Norm) -> bool:
        """Whether a norm stands behind the encoder, and not behind the decoder."""
        behind = {
            name for name, stack in self.stacks.items() if self.facts.descends(norm.source, stack.blocks[-1].exit)
        }
        return "decoder" in self.stacks and behind == {"encoder"}

    def _labels_behind(self, norm: Norm, drafts: Sequence[Draft]) -> str:
        for draft in drafts:
            for slot in draft.slots:
                if draft.norm is None and slot.module in ("q_proj", "k_proj", "v_proj") and slot.kind == "weight":
                    reader = self.facts.readers[slot.stored]
                    if self.facts.descends(norm.source, reader.outputs[0]):
                        return slot.module[0]
        return ""

    def _layers(self, drafts: Sequence[Draft]) -> tuple[Layer, ...]:
        made = (self._layer(draft, None) for draft in drafts)
        return tuple(layer for layer in made if layer.parameters)

    def _layer(self, draft: Draft, stack: str | None) -> Layer:
        made = (self._parameter(slot, draft, stack) for slot in draft.slots)
        parameters = tuple(parameter for parameter in made if parameter is not None)
        attributes = dict(draft.attributes)
        self.factors[f"{stack or ''}/{draft.name}"] = draft.factor
        if draft.norm is not None:
            key = f"{stack}/{draft.name}" if stack else draft.name
            attributes["epsilon_key"] = f"epsilon of {key}"
            self.norms[f"{stack or ''}/{draft.name}"] = tuple(
                self._norm_at(draft.norm, stack, i) for i in self._range(stack)
            )
        return Layer(
            name=draft.name,
            kind=draft.kind,
            reads=tuple(dict.fromkeys(s for p in parameters for s in p.parsed.read_spaces())),
            writes=tuple(dict.fromkeys(s for p in parameters for s in p.parsed.written_spaces())),
            through=self.norm_names.get(id(draft.through)) if draft.through is not None else None,
            added_through=self.norm_names.get(id(draft.added_through)) if draft.added_through is not None else None,
            parameters=parameters,
            attributes=attributes,
        )

    def _range(self, stack: str | None) -> range:
        return range(len(self.stacks[stack].blocks)) if stack is not None else range(1)

    def _norm_at(self, norm: Norm, stack: str | None, layer: int) -> Norm:
        """The norm of another layer that stands where ``norm`` stands in the first."""
        if stack is None or layer == 0 or norm.scale is None:
            return norm
        scale = self._in_layer(norm.scale.stored, stack, layer)
        return next(each for each in self.facts.norms if each.scale is not None and each.scale.stored is scale)

    def _in_layer(self, stored: ir.Value, stack: str, layer: int) -> ir.Value:
        blocks = self.stacks[stack].blocks
        return blocks[layer].weights[blocks[0].weights.index(stored)]

    # --- parameters --------------------------------------------------------------------------------------------------

    def _parameter(self, slot: Slot, draft: Draft, stack: str | None) -> Parameter | None:
        """The parameter of a slot; None where it is another use of one that is there."""
        layout = self._layout(slot, draft)
        twin = self._twin(slot, layout, stack)
        if twin is not None and twin.parsed == layout:
            self.stored[twin.name] += (slot.stored,)
            return None
        values = (
            [slot.stored]
            if stack is None
            else [self._in_layer(slot.stored, stack, i) for i in range(len(self.stacks[stack].blocks))]
        )
        module = self._norm_module(draft)
        slot_name = f"{module}.{slot.kind}" if module else slot.name
        shared = stack is not None and self._is_shared(self.stacks[stack])
        name = self._tensor_name(values, stack, draft.name, slot_name, shared)
        if stack is None or shared:
            self.stored[name] = tuple(values)
        else:
            self.stored |= {name.replace("{layer}", str(i)): (value,) for i, value in enumerate(values)}
        self.slots[slot_key(stack, draft.name, slot_name)] = slot.stored
        dtype = slot.stored.dtype
        assert dtype is not None
        parameter = Parameter(
            name=name,
            slot=slot_name,
            layout=str(layout),
            dtype=dtype.numpy().name,
            tied_to=twin.name if twin is not None else None,
        )
        if stack is None and twin is None:
            self.by_origin.setdefault(self.facts.origin(slot.stored), []).append(parameter)
        return parameter

    def _twin(self, slot: Slot, layout: Layout, stack: str | None) -> Parameter | None:
        """The matrix outside of stacks that was the same tensor in the file, and whose axes are the same."""
        if stack is not None or len(layout.axes) < 2:
            return None
        same = self.by_origin.get(self.facts.origin(slot.stored), ())
        return next((parameter for parameter in same if parameter.parsed.axes == layout.axes), None)

    def _norm_module(self, draft: Draft) -> str:
        """Norms over heads name the basis they stand in."""
        inner = draft.norm is not None and not self.facts.stream.carries(draft.norm.output)
        return draft.name if inner else ""

    def _layout(self, slot: Slot, draft: Draft) -> Layout:
        """The layout line of a stored weight."""
        axes = tuple(
            Fixed(1) if (named := self.names.axis(axis)) == ONE else named for axis in self.scene.axes(slot.stored)
        )
        if slot.kind in ("scale", "shift") or slot.module == "layer_scale":
            return Layout((), "+" if slot.kind == "shift" else "*", (product(*(a for a in axes if a != Fixed(1))),))
        parts = self.scene.parts.get(slot.stored, {})
        reads = [parts.get(i) == {"read"} for i in range(len(axes))]
        if not any(reads):
            lead = next((i for i, axis in enumerate(axes) if not isinstance(axis, Fixed)), 0)
            return Layout(axes[:lead], "->", axes[lead:])
        if all(reads):
            return Layout(axes, "->", (Fixed(1),))
        split = reads.index(not reads[0])
        return Layout(axes[:split], "->" if reads[0] else "<-", axes[split:])

    def _tensor_name(self, values: Sequence[ir.Value], stack: str | None, layer: str, slot: str, shared: bool) -> str:
        names = [self.facts.origin(value) for value in values]
        if stack is None or shared:
            pattern = names[0] if not _is_anonymous(names[0]) else f"{layer}.{slot}"
        else:
            pattern = _pattern(names) or f"{stack}.{{layer}}.{layer}.{slot}"
        while pattern in self.taken:
            pattern += "'"
        self.taken.add(pattern)
        return pattern

    def _is_shared(self, blocks: Blocks) -> bool:
        """Whether all blocks of a stack are one block with one set of tensors."""
        if len(blocks.blocks) < 2:
            return False
        originals = [
            [self.facts.origin(value) for value in block.weights if len(value.shape or ()) > 1]
            for block in blocks.blocks
        ]
        return bool(originals[0]) and all(each == originals[0] for each in originals)

    # --- inputs and outputs ------------------------------------------------------------------------------------------

    def _inputs(self) -> Iterator[Port]:
        for value in self.scene.graph.inputs:
            if value.name not in self.scene.graph.initializers:
                yield input_port(value, self.scene, self.names)

    def _outputs(self) -> Iterator[Port]:
        for value in self.scene.graph.outputs:
            axes = self.scene.axes(value) if value in self.scene.runs[0] else ()
            last = self.names.axis(axes[-1]) if axes else ONE
            space = last.space if isinstance(last, Leaf) and last.space in self.names.sizes else None
            yield Port(name=str(value.name), space=space, through=self._through(value))


def _is_anonymous(name: str) -> bool:
    return "::" in name or re.fullmatch(r"(val|permute|t|_?tensor|const\w*|constant\w*)?_?\d+", name) is not None


def _pattern(names: Sequence[str]) -> str | None:
    """The names of a weight in every layer as one name with ``{layer}`` in it; None where they follow no number."""
    if len(names) < 2:
        pieces = re.split(r"(\d+)", names[0])
        return None if len(pieces) < 3 or _is_anonymous(names[0]) else "".join([*pieces[:1], "{layer}", *pieces[2:]])
    split = [re.split(r"(\d+)", name) for name in names]
    if len({len(pieces) for pieces in split}) != 1:
        return None
    for at in range(1, len(split[0]), 2):
        if all(pieces[at] == str(i) for i, pieces in enumerate(split)):
            rest = {tuple(pieces[:at] + pieces[at + 1 :]) for pieces in split}
            if len(rest) == 1:
                return "".join([*split[0][:at], "{layer}", *split[0][at + 1 :]])
    return None
