"""From inferred axes to a layer graph: blocks, layers, slots, and names that people use.

Everything is classified by what it computes. Attention is where a softmax stands between two products of activations;
queries, keys and values are what these products multiply. A norm is told by its equation and by whose basis its output
has. What a file calls its tensors is kept where the names follow the layers, and is otherwise made up from the slots.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations

import onnx_ir as ir

from growkit_onnx.blocks import Block, Blocks, find_stacks
from growkit_onnx.infer import Scene, Weight
from growkit_onnx.norms import Norm, find_norms
from growkit_onnx.rules import CONTRIB, NONLINEAR
from growkit_onnx.stream import Stream, residual_spaces
from growkit_specs import Layer, LayerGraph, Layout, Parameter, Port, Space, Stack, UnsupportedModel
from growkit_specs.layer_graph import LayerKind, SpaceKind
from growkit_specs.layout import Axis, Concatenation, Fixed, Leaf, concatenation, product, spaces_of
from growkit_specs.unification import ONE

Factors = tuple[Axis, ...]

_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "Einsum", "Conv")
_FUSED = {("", "Attention"), (CONTRIB, "Attention"), (CONTRIB, "MultiHeadAttention"), (CONTRIB, "GroupQueryAttention")}


class Names:
    """The named spaces of a graph, and every axis in terms of them."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.kinds: dict[str, SpaceKind] = {}
        self.sizes: dict[str, int] = {}
        self._named: dict[Factors, str] = {}
        self._longest = 1

    def name(self, axis: Axis, name: str, kind: SpaceKind, otherwise: str | None = None) -> str | None:
        """Call an axis ``name``; a space of another size has that name already, or is called ``otherwise``.

        Returns:
            What it is called; None where it is no space (size 1, or dynamic).
        """
        factors = self.scene.unifier.factors(axis)
        sizes = self.scene.sizes(axis)
        if axis == ONE or factors == (ONE,) or len(set(sizes)) > 1:
            return None
        if factors in self._named:
            return self._named[factors]
        candidates = [name, *([otherwise] if otherwise else []), *(f"{otherwise or name}_{i}" for i in range(2, 1000))]
        chosen = next(each for each in candidates if self.sizes.get(each, sizes[0]) == sizes[0])
        self._named[factors] = chosen
        self._longest = max(self._longest, len(factors))
        self.kinds.setdefault(chosen, kind)
        self.sizes[chosen] = sizes[0]
        return chosen

    def axis(self, axis: Axis) -> Axis:
        """An axis in named spaces; what has no name is a fixed size, what is dynamic stays an unknown leaf."""
        factors = self.scene.unifier.factors(axis)
        found: list[Axis] = []
        at = 0
        while at < len(factors):
            for length in range(min(self._longest, len(factors) - at), 0, -1):
                name = self._named.get(factors[at : at + length])
                if name is not None:
                    found.append(Leaf(name))
                    at += length
                    break
            else:
                found.append(self._unnamed(factors[at]))
                at += 1
        return product(*found)

    def _unnamed(self, factor: Axis) -> Axis:
        if isinstance(factor, Concatenation):
            segments = [self.axis(segment) for segment in factor.segments]
            segments = [Fixed(1) if segment == ONE else segment for segment in segments]
            if all(isinstance(segment, Fixed) for segment in segments):
                return Fixed(sum(segment.size for segment in segments if isinstance(segment, Fixed)))
            if all(segment == segments[0] for segment in segments):
                return product(Fixed(len(segments)), segments[0])
            return concatenation(*segments)
        if isinstance(factor, Leaf) and not self.scene.is_dynamic(factor):
            return Fixed(self.scene.sizes(factor)[0])
        return factor

    def leaves(self, name: str) -> Iterator[Factors]:
        """The factors that are called ``name``."""
        return (factors for factors, each in self._named.items() if each == name)

    def frozen(self, name: str) -> str | None:
        """Why the space cannot grow; None where it can."""
        reasons = (self.scene.unifier.frozen(product(*factors)) for factors in self.leaves(name))
        return next((reason for reason in reasons if reason), None)


@dataclass
class Slot:
    """One stored weight and the place it has in its layer."""

    stored: ir.Value
    module: str
    kind: str  # weight, bias, scale, shift, or nothing
    position: int

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.module, self.kind)))


@dataclass
class Draft:
    """A layer in the making."""

    name: str
    kind: LayerKind
    slots: list[Slot]
    order: int
    through: Norm | None = None
    added_through: Norm | None = None
    norm: Norm | None = None
    attributes: dict[str, bool | int | float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a stored weight stands: the stack (None: stem or head), the layer's number in it, and the slot's key."""

    stack: str | None
    layer: int | None


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
    """

    graph: LayerGraph
    stored: Mapping[str, tuple[ir.Value, ...]]
    slots: Mapping[str, ir.Value]
    stacks: Mapping[str, Blocks]
    norms: Mapping[str, tuple[Norm, ...]]
    names: Names
    frozen: Mapping[str, str]


def describe(scene: Scene, ties: Mapping[str, str], where: str) -> Description:
    """The layer graph of a graph whose axes are inferred.

    Args:
        scene: What is known of the axes.
        ties: For each private copy of an initializer the name of the one it was copied from.
        where: What error messages call the model.

    Raises:
        UnsupportedModel: Where there is no residual stream that could grow; what stands in the way is named.
    """
    return _Describer(scene, ties, where).description()


class _Describer:
    def __init__(self, scene: Scene, ties: Mapping[str, str], where: str) -> None:
        self.scene = scene
        self.ties = ties
        self.where = where
        self.names = Names(scene)
        self._unify_measured()
        self.norms = list(find_norms(scene))
        self.spaces = residual_spaces(scene)
        if not self.spaces:
            raise UnsupportedModel(
                f"{where}: no residual stream found: no space is written by several weights and read by several"
                f"{self._obstacle()}; growkit grows transformers"
            )
        self.stream = Stream(scene, self.spaces, self.norms)
        self.norm_of = {node: norm for norm in self.norms for node in norm.nodes}
        self.order = {node: i for i, node in enumerate(scene.graph)}
        self.readers: dict[ir.Value, ir.Node] = {}
        self.weights_of: dict[ir.Node, list[tuple[ir.Value, Weight]]] = {}
        for node in scene.graph:
            for value in node.inputs:
                if value is not None and scene.is_weight(value) and not scene.is_weight(node.outputs[0]):
                    weight = scene.weight(value)
                    self.weights_of.setdefault(node, []).append((value, weight))
                    self.readers[weight.stored] = node

    def _unify_measured(self) -> None:
        """A copy of a table that is only asked for its size is what the copy that is read is."""
        read: dict[str, ir.Value] = {}
        measured: list[ir.Value] = []
        for stored in self.scene.parts:
            node = next(iter(stored.consumers()), None)
            if node is not None and self.scene.is_only_measured(node.outputs[0]):
                measured.append(stored)
            else:
                read.setdefault(self.origin(stored), stored)
        for stored in measured:
            for a, b in zip(self.scene.axes(stored), self.scene.axes(read.get(self.origin(stored), stored)), strict=True):
                self.scene.unify(a, b)

    def origin(self, stored: ir.Value) -> str:
        """The name of the initializer that a stored weight is, or is a private copy of."""
        return self.ties.get(str(stored.name), str(stored.name))

    def _obstacle(self) -> str:
        reasons = Counter(self.scene.unifier._frozen.values())
        unknown = [reason for reason in reasons if reason.startswith("the operator")]
        return f"; {unknown[0]} is not understood" if unknown else ""

    # --- the whole ---------------------------------------------------------------------------------------------------

    def description(self) -> Description:
        stacks = self._named_stacks(find_stacks(self.scene.graph, self.stream.carries))
        for blocks in stacks.values():
            self._unify_blocks(blocks)
        for i, space in enumerate(self.spaces):
            self.names.name(space, "hidden", "residual", f"hidden_{i + 1}")
        inside = {node for blocks in stacks.values() for block in blocks.blocks for node in block.nodes}
        first = {name: self._drafts(blocks.blocks[0].nodes, blocks) for name, blocks in stacks.items()}
        outside = self._drafts([node for node in self.scene.graph if node not in inside], None)
        for name, drafts in [*first.items(), (None, outside)]:
            block = stacks[name].blocks[0] if name is not None else None
            drafts += self._constants(block, [*first.values(), outside], stacks)
        return _Assembly(self, stacks, first, outside).description()

    def _constants(
        self, block: Block | None, drafts: Iterable[Sequence[Draft]], stacks: Mapping[str, Blocks]
    ) -> list[Draft]:
        """The numbers of a computation that have an entry for each unit of a space that can grow (slopes of heads)."""
        known = {slot.stored for each in drafts for draft in each for slot in draft.slots}
        in_blocks = {value for blocks in stacks.values() for each in blocks.blocks for value in each.weights}
        among = block.weights if block is not None else [v for v in self.readers if v not in in_blocks]
        slots = [
            Slot(value, "constant", "", self.order[self.readers[value]])
            for value in among
            if value in self.readers and value not in known and self._lives_in_named(value)
        ]
        _number(slots)
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
        self.spaces = list(dict.fromkeys(self.scene.unifier.resolve(space) for space in self.spaces))
        self.stream.spaces = self.spaces

    # --- layers ------------------------------------------------------------------------------------------------------

    def _drafts(self, nodes: Sequence[ir.Node], blocks: Blocks | None) -> list[Draft]:
        """The layers of some operators: norms, and what hangs together between them and the stream."""
        members = set(nodes)
        drafts = [self._norm_draft(norm) for norm in self.norms if members & set(norm.nodes) and norm.scale]
        for component in self._components(nodes, members):
            drafts += _Branch(self, component, members).drafts()
        return sorted(drafts, key=lambda draft: draft.order)

    def _norm_draft(self, norm: Norm) -> Draft:
        slots = [
            Slot(weight.stored, "", part, self.order[norm.nodes[-1]])
            for part, weight in (("scale", norm.scale), ("shift", norm.shift))
            if weight is not None
        ]
        attributes: dict[str, bool | int | float | str | None] = {"norm": norm.kind, "epsilon": norm.epsilon}
        attributes["position"] = self.position(norm)
        if norm.scale is not None and norm.scale.offset:
            attributes["offset"] = norm.scale.offset
        return Draft("norm", "norm", slots, self.order[norm.nodes[0]], norm=norm, attributes=attributes)

    def position(self, norm: Norm) -> str:
        """``pre`` where readers see the output, ``post`` where it is the stream, ``branch`` where it is added to it."""
        if not self.stream.carries(norm.output) or self.basis(norm.output) not in self.main:
            return "pre"
        adders = [node for node in norm.output.consumers() if node.op_type == "Add"]
        for adder in adders:
            other = next((v for v in adder.inputs if v is not norm.output), None)
            if other is not None and self.stream.carries(other) and not self._descends(other, norm.output):
                return "branch"
        return "post"

    def _descends(self, value: ir.Value, ancestor: ir.Value) -> bool:
        seen, todo = set(), [value]
        while todo:
            each = todo.pop()
            if each is ancestor:
                return True
            node = each.producer()
            if node is not None and node not in seen and self.order[node] >= self._order_of(ancestor):
                seen.add(node)
                todo += [given for given in node.inputs if given is not None]
        return False

    def _order_of(self, value: ir.Value) -> int:
        node = value.producer()
        return self.order[node] if node is not None else -1

    def basis(self, value: ir.Value) -> ir.Value:
        return self.stream.basis(value)

    @cached_property
    def main(self) -> set[ir.Value]:
        """The bases of the streams themselves: those in which two of the stream's values are added."""
        return {
            self.basis(node.outputs[0])
            for node in self.scene.graph
            if node.op_type == "Add"
            and node not in self.norm_of
            and all(value is not None and self.stream.carries(value) for value in node.inputs)
        }

    # --- what hangs together -----------------------------------------------------------------------------------------

    def _components(self, nodes: Sequence[ir.Node], members: set[ir.Node]) -> list[list[ir.Node]]:
        """The operators that stored weights feed, and what is between them, apart from the stream and its norms."""
        parent: dict[ir.Node, ir.Node] = {}

        def root(node: ir.Node) -> ir.Node:
            while parent.get(node, node) is not node:
                node = parent[node]
            return node

        stream_norms = {n for norm in self.norms if self.stream.carries(norm.source) for n in norm.nodes}
        for node in nodes:
            if node in stream_norms:
                continue
            for value in node.inputs:
                maker = value.producer() if value is not None else None
                if value is None or maker is None or maker not in members or maker in stream_norms:
                    continue
                if not self._is_float(value):
                    continue
                if not self.stream.carries(value) or self._ends_branch(node, value):
                    parent[root(node)] = root(maker)
        found: dict[ir.Node, list[ir.Node]] = {}
        for node in nodes:
            if node not in stream_norms:
                found.setdefault(root(node), []).append(node)
        return [group for group in found.values() if any(node in self.weights_of for node in group)]

    def _is_float(self, value: ir.Value) -> bool:
        return value in self.scene.runs[0] and self.scene.runs[0][value].dtype.is_floating_point

    def _ends_branch(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether ``node`` only finishes what a branch writes: its bias, its layer scale, or a move of its entries."""
        if node in self.weights_of and node.op_type in ("Add", "Mul"):
            return True
        carrying = [given for given in node.inputs if given is not None and self.stream.carries(given)]
        alone = len(carrying) == 1 and len(value.consumers()) == 1
        return alone and not any(self.weights_of.get(node, ())) and node.op_type in _FINISHING


_FINISHING = frozenset("Reshape Cast Transpose Squeeze Unsqueeze Identity Mul Div Dropout".split())


class _Branch:
    """One component of operators, taken apart into layers and slots."""

    def __init__(self, describer: _Describer, nodes: list[ir.Node], members: set[ir.Node]) -> None:
        self.d = describer
        self.scene = describer.scene
        self.nodes = nodes
        self.inside = set(nodes)
        self.members = members
        self.labels: dict[ir.Value, set[str]] = {}
        self.is_attention = False
        self.repeated: set[str] = set()

    def drafts(self) -> list[Draft]:
        self._find_attention()
        weights = [
            (node, weight)
            for node in self.nodes
            for _, weight in self.d.weights_of.get(node, ())
            if node not in self.d.norm_of and self._matters(weight)
        ]
        if not weights:
            return []
        groups: dict[Norm | None, list[tuple[ir.Node, Weight]]] = {}
        own = [self._read_through(node) for node, _ in weights if self._reads_stream(node)]
        writes = any(self._writes_stream(node) for node, _ in weights)
        main = self._main_norm(own, weights)
        for node, weight in weights:
            norm = self._read_through(node) if self._reads_stream(node) else self._bias_norm(node, main)
            groups.setdefault(norm, []).append((node, weight))
        if main not in groups:
            groups.setdefault(main, [])
        ordered = sorted(groups.items(), key=lambda item: item[0] is not main)
        kind, name = self._kind(weights, writes)
        drafts = []
        for i, (norm, members) in enumerate(ordered):
            if members:
                title = name if i == 0 else f"{name}_memory"
                drafts.append(self._draft(title, kind, norm, members))
        return drafts

    def _matters(self, weight: Weight) -> bool:
        """Whether a weight is trained, and not one of the numbers a computation needs."""
        sides = [axis for axis in self.scene.axes(weight.stored) if axis != ONE]
        return len(sides) > 1 or (bool(sides) and self._touches_stream)

    @cached_property
    def _touches_stream(self) -> bool:
        carries = self.d.stream.carries
        return any(v is not None and carries(v) for node in self.nodes for v in (*node.inputs, *node.outputs))

    # --- attention ---------------------------------------------------------------------------------------------------

    def _find_attention(self) -> None:
        for node in self.nodes:
            if (node.domain.replace("ai.onnx", ""), node.op_type) in _FUSED:
                self._fused_attention(node)
            elif node.op_type == "Softmax":
                self._spelled_out_attention(node)

    def _fused_attention(self, node: ir.Node) -> None:
        found = next((each for each in self.scene.attentions if each.node is node), None)
        if found is None:
            return
        if (node.domain, node.op_type) != (CONTRIB, "Attention"):
            for label, value in zip("qkv", node.inputs, strict=False):
                self._label(value, label)
        for _, weight in self.d.weights_of.get(node, ()):
            self.labels.setdefault(weight.stored, set()).update("qkv")
        factors = self.scene.unifier.factors
        own = set(factors(found.kv_heads))
        self.repeated |= {leaf for f in factors(found.heads) if f not in own for leaf in self.scene.unifier.leaves(f)}
        self._name_heads([found.heads], found.scores, found.values)

    def _spelled_out_attention(self, softmax: ir.Node) -> None:
        scores = self._scores(softmax)
        values = self._values(softmax)
        if scores is None or values is None:
            return
        q, k = (value for value in scores.inputs[:2] if value is not None)
        self._label(q, "q")
        self._label(k, "k")
        self._label(values, "v")
        contracted = self.scene.axes(q)[-1] if scores.op_type != "Einsum" else self._contracted(scores)
        self._name_heads(self.scene.axes(softmax.outputs[0])[:-2], contracted, self.scene.axes(values)[-1])

    def _scores(self, softmax: ir.Node) -> ir.Node | None:
        """The product of two activations that a softmax is over."""
        todo, seen = [softmax.inputs[0]], set()
        while todo:
            value = todo.pop()
            node = value.producer() if value is not None else None
            if node is None or node in seen or node not in self.inside:
                continue
            seen.add(node)
            if node.op_type in ("MatMul", "Einsum", "FusedMatMul"):
                if not any(self.scene.is_weight(given) for given in node.inputs):
                    return node
                continue
            todo += [given for given in node.inputs if given is not None and self._same_shape(given, softmax)]
        return None

    def _same_shape(self, value: ir.Value, softmax: ir.Node) -> bool:
        """Whether a value may be the scores on their way: as many entries as the softmax has."""
        run = self.scene.runs[1]
        return value in run and run[value].numel() == run[softmax.outputs[0]].numel()

    def _values(self, softmax: ir.Node) -> ir.Value | None:
        todo, seen = [softmax.outputs[0]], set()
        while todo:
            value = todo.pop()
            for node in value.consumers():
                if node in seen or node not in self.inside:
                    continue
                seen.add(node)
                if node.op_type in ("MatMul", "Einsum", "FusedMatMul"):
                    others = [given for given in node.inputs if given is not None and given is not value]
                    return others[0] if others else None
                todo += [out for out in node.outputs if self._same_shape(out, softmax)]
        return None

    def _contracted(self, node: ir.Node) -> Axis:
        terms, out = node.attributes.get_string("equation", "").replace(" ", "").split("->")
        first, second = terms.split(",")
        letter = next(letter for letter in first if letter in second and letter not in out)
        assert node.inputs[0] is not None
        return self.scene.axes(node.inputs[0])[first.index(letter)]

    def _name_heads(self, lead: Sequence[Axis], scores: Axis, values: Axis) -> None:
        """Name the head axes: of what stands before a score's rows and columns, what queries are made with.

        Keys may have been repeated, for a group of queries each.
        """
        self.is_attention = True
        names = self.d.names
        factors = [f for axis in lead for f in self.scene.unifier.factors(axis) if f != ONE]
        heads = self._made_with(factors, "q")
        kv_heads = [factor for factor in heads if not self.repeated.issuperset(self.scene.unifier.leaves(factor))]
        group = [factor for factor in heads if factor not in kv_heads]
        if kv_heads and group:
            names.name(product(*kv_heads), "kv_heads", "scores")
            names.name(product(*group), "group", "scores")
        elif heads:
            names.name(product(*heads), "heads", "scores")
        names.name(scores, "head_dim", "scores")
        names.name(values, "head_dim", "scores", "v_head_dim")

    def _made_with(self, factors: Sequence[Axis], label: str) -> list[Axis]:
        """The factors that the weights behind a label write."""
        written = {
            leaf
            for stored, labels in self.labels.items()
            if label in labels
            for axis in self.scene.axes(stored)
            for leaf in self.scene.unifier.leaves(axis)
        }
        return [factor for factor in factors if written.issuperset(self.scene.unifier.leaves(factor))]

    def _leaves(self, value: ir.Value | None) -> set[str]:
        axes = self.scene.axes(value) if value is not None else ()
        return {leaf for axis in axes for leaf in self.scene.unifier.leaves(axis)}

    def _label(self, value: ir.Value | None, label: str) -> None:
        """Mark the weights that a value is made of, back to the nearest projection."""
        todo, seen = [value], set()
        while todo:
            each = todo.pop()
            node = each.producer() if each is not None else None
            if node is None or node in seen or node not in self.inside:
                continue
            seen.add(node)
            if label == "k" and node.op_type in ("Expand", "Tile"):
                self.repeated |= self._leaves(node.outputs[0]) - self._leaves(node.inputs[0])
            projects = False
            for _, weight in self.d.weights_of.get(node, ()):
                self.labels.setdefault(weight.stored, set()).add(label)
                projects |= "read" in set().union(*self.scene.parts.get(weight.stored, {0: set()}).values())
            if not projects:
                todo += [g for g in node.inputs if g is not None and not self.scene.is_weight(g) and self.d._is_float(g)]

    # --- reading and writing -----------------------------------------------------------------------------------------

    def _stream_inputs(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and self.d.stream.carries(value)]

    def _reads_stream(self, node: ir.Node) -> bool:
        return node.op_type not in ("Add", "Mul", "Gather", "Concat") and bool(self._stream_inputs(node))

    def _writes_stream(self, node: ir.Node) -> bool:
        return any(self.d.stream.carries(out) for out in node.outputs)

    def _read_through(self, node: ir.Node) -> Norm | None:
        """The norm through which an operator reads the stream."""
        basis = self.d.basis(self._stream_inputs(node)[0])
        if basis in self.d.main:
            return None
        return next(
            (n for n in self.d.norms if self.d.stream.carries(n.output) and self.d.basis(n.output) is basis), None
        )

    def _main_norm(self, own: Sequence[Norm | None], weights: Sequence[tuple[ir.Node, Weight]]) -> Norm | None:
        """The norm that the branch's first weights, its queries, are read through."""
        if not own:
            return None
        for node, weight in weights:
            if "q" in self.labels.get(weight.stored, ()) and self._reads_stream(node):
                return self._read_through(node)
        return own[0]

    def _bias_norm(self, node: ir.Node, main: Norm | None) -> Norm | None:
        """The norm of the layer to which a weight belongs that reads nothing itself."""
        for _, weight in self.d.weights_of.get(node, ()):
            labels = self.labels.get(weight.stored)
            if labels:
                for other in self.nodes:
                    for _, projection in self.d.weights_of.get(other, ()):
                        if self.labels.get(projection.stored) == labels and self._reads_stream(other):
                            return self._read_through(other)
        return main

    # --- names -------------------------------------------------------------------------------------------------------

    def _kind(self, weights: Sequence[tuple[ir.Node, Weight]], writes: bool) -> tuple[LayerKind, str]:
        if self.is_attention:
            return "attention", "attention"
        reads = any(self._reads_stream(node) for node, _ in weights)
        if writes and not reads:
            return "embedding", "embedding"
        if writes:
            return "mlp", "mlp"
        if any(out.is_graph_output() for node in self.nodes for out in node.outputs) and not self._activation():
            return "head", "head"
        return ("pool", "pooler") if self._activation() == "Tanh" else ("linear", "linear")

    def _activation(self) -> str | None:
        found = [node.op_type for node in self.nodes if node.op_type in NONLINEAR and node not in self.d.norm_of]
        return next((op for op in found if op not in ("Pow", "Sqrt", "Min", "Max", "Clip", "Cos", "Sin")), None)

    def _draft(self, name: str, kind: LayerKind, norm: Norm | None, members: list[tuple[ir.Node, Weight]]) -> Draft:
        attributes: dict[str, bool | int | float | str | None] = {}
        if kind == "attention":
            attributes["scale"] = "none"  # scores are scaled by a number in the file, which stays what it is
        elif self._activation():
            attributes["activation"] = self._activation()
        slots: list[Slot] = []
        for node, weight in members:
            slots.append(self._slot(node, weight, kind))
        self._tell_gates_apart(slots)
        _number(slots)
        draft = Draft(name, kind, slots, min(self.d.order[node] for node, _ in members), norm, attributes=attributes)
        draft.added_through = self._branch_norm(members)
        if (bend := self._bend(members)) is not None:
            attributes["output_activation"] = bend
        return draft

    def _bend(self, members: Sequence[tuple[ir.Node, Weight]]) -> str | None:
        """The activation that what is written goes through before it is the stream."""
        for node, _ in members:
            for out in node.outputs:
                if self.d.stream.carries(out) and self.d.basis(out) not in self.d.main:
                    for bending in self.d.stream.bent.get(self.d.basis(out), ()):
                        if self.d.stream.carries(bending.outputs[0]):
                            return bending.op_type
        return None

    def _branch_norm(self, members: Sequence[tuple[ir.Node, Weight]]) -> Norm | None:
        """The norm that what is written goes through before it is added."""
        for node, _ in members:
            for out in node.outputs:
                if self.d.stream.carries(out):
                    basis = self.d.basis(out)
                    for norm in self.d.norms:
                        if self.d.stream.carries(norm.source) and self.d.basis(norm.source) is basis:
                            if basis not in self.d.main and self.d.position(norm) == "branch":
                                return norm
        return None

    def _slot(self, node: ir.Node, weight: Weight, kind: LayerKind) -> Slot:
        parts = set().union(*self.scene.parts.get(weight.stored, {0: {"write"}}).values())
        ending = "weight" if "read" in parts else "bias"
        labels = "".join(sorted(self.labels.get(weight.stored, ()), key="qkv".index))
        at = self.d.order[node]
        if "scale" in parts and self._writes_stream(node):
            return Slot(weight.stored, "layer_scale", "", at)
        if labels:
            return Slot(weight.stored, f"{labels}_proj", ending, at)
        if node.op_type == "Gather":
            return Slot(weight.stored, self._table(node, weight), "weight", at)
        if kind == "attention":
            module = "o_proj" if self._writes_stream(node) else "inner_proj"
        elif kind == "mlp":
            module = "down_proj" if self._writes_stream(node) else "up_proj"
        elif kind == "embedding":
            module = "patch_embedding" if node.op_type == "Conv" else "embedding"
            if ending == "bias" and node.op_type != "Conv":
                module = self._added(node)
        else:
            module = {"head": "head", "pool": "pooler"}.get(kind, "linear")
        return Slot(weight.stored, module, ending, at)

    def _added(self, node: ir.Node) -> str:
        return "cls_token" if node.op_type == "Concat" else "position_embeddings"

    def _table(self, node: ir.Node, weight: Weight) -> str:
        """What a table is called: by the input that holds its indices."""
        source = node.inputs[1]
        name = ""
        while source is not None and (maker := source.producer()) is not None:
            if maker.op_type not in ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape"):
                break
            source = maker.inputs[0]
        if source is not None and source.is_graph_input():
            name = str(source.name).lower()
        if not self._writes_stream(node) and not self._is_stream_sized(node):
            return "relative_bias"
        told = str(weight.stored.name).lower()
        if any(word in text for text in (name, told) for word in ("type", "segment")):
            return "token_type_embeddings"
        if "position" in name or not name:
            return "position_embeddings"
        return "word_embeddings"

    def _is_stream_sized(self, node: ir.Node) -> bool:
        """Whether a table's rows are vectors that a factorised embedding maps into the stream."""
        resolve = self.scene.unifier.resolve
        rows = resolve(self.scene.axes(node.outputs[0])[-1])
        return any(
            rows == resolve(self.scene.axes(weight.stored)[i])
            for weights in self.d.weights_of.values()
            for _, weight in weights
            for i, parts in self.scene.parts.get(weight.stored, {}).items()
            if parts == {"read"} and i < len(self.scene.axes(weight.stored))
        )

    def _tell_gates_apart(self, slots: list[Slot]) -> None:
        """Of two maps into the same units, the one that goes through the activation is the gate."""
        ups = [slot for slot in slots if slot.module == "up_proj" and slot.kind == "weight"]
        if len(ups) != 2:
            return
        gates = [slot for slot in ups if self._is_activated(self.d.readers[slot.stored])]
        if len(gates) == 1:
            after = {slot.stored for slot in slots if slot.kind == "bias" and self._follows(slot, gates[0])}
            for slot in slots:
                if slot is gates[0] or slot.stored in after:
                    slot.module = "gate_proj"

    def _follows(self, bias: Slot, weight: Slot) -> bool:
        reader = self.d.readers[weight.stored]
        return self.d.readers[bias.stored] is reader or self.d.readers[bias.stored] in reader.outputs[0].consumers()

    def _is_activated(self, node: ir.Node) -> bool:
        todo = list(node.outputs)
        for _ in range(4):
            users = [user for value in todo for user in value.consumers() if user in self.inside]
            if any(user.op_type in NONLINEAR for user in users):
                return True
            todo = [out for user in users for out in user.outputs if user.op_type in ("Add", "Reshape", "Cast")]
        return False


def _number(slots: list[Slot]) -> None:
    """Slots of one name are told apart by numbers."""
    seen: Counter[str] = Counter()
    for slot in sorted(slots, key=lambda slot: slot.position):
        seen[slot.name] += 1
        if seen[slot.name] > 1:
            slot.module = f"{slot.module}_{seen[slot.name]}"


class _Assembly:
    """Drafts of layers become the layer graph."""

    def __init__(
        self,
        describer: _Describer,
        stacks: Mapping[str, Blocks],
        first: Mapping[str, list[Draft]],
        outside: list[Draft],
    ) -> None:
        self.d = describer
        self.scene, self.names = describer.scene, describer.names
        self.stacks, self.first, self.outside = stacks, first, outside
        self.stored: dict[str, tuple[ir.Value, ...]] = {}
        self.slots: dict[str, ir.Value] = {}
        self.by_origin: dict[str, list[Parameter]] = {}
        self.norms: dict[str, tuple[Norm, ...]] = {}
        self.norm_names: dict[int, str] = {}
        self.taken: set[str] = set()

    def description(self) -> Description:
        self._name_inner_spaces()
        groups = [*self.first.items(), (None, self.outside)]
        for _, drafts in groups:
            self._name_layers(drafts)
        ends = [self.d.order[b.blocks[-1].nodes[-1]] for b in self.stacks.values()]
        begins = [self.d.order[b.blocks[0].nodes[0]] for b in self.stacks.values()]
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
        )
        frozen = {name: why for name in self.names.sizes if (why := self._frozen(name)) is not None}
        return Description(graph, self.stored, self.slots, self.stacks, self.norms, self.names, frozen)

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
        value = self.d.readers[slot.stored].outputs[0]
        for _ in range(12):
            if value.is_graph_output():
                return True
            users = value.consumers()
            if not users or users[0].op_type in _PRODUCTS:
                return False
            value = users[0].outputs[0]
        return False

    def _inner_name(
        self, stack: str | None, draft: Draft, slot: Slot, role: str, axis: Axis
    ) -> tuple[str, SpaceKind]:
        if slot.module.startswith("word_embeddings") and role == "read":
            return "vocab", "fixed"
        if slot.module.startswith("token_type") and role == "read":
            return "token_types", "fixed"
        if slot.module.startswith("position") and role == "read" and slot.kind == "weight":
            return "positions", "fixed"
        if slot.module.startswith("relative") and role == "read":
            return "buckets", "fixed"
        if slot.module.startswith("word_embeddings") and role == "write":
            return "embedding", "residual"
        if draft.kind == "mlp" and stack is not None:
            return "ffn", "pointwise"
        if stack is None and role == "write" and self._is_output(slot):
            by_token = len(self.scene.axes(self.d.readers[slot.stored].outputs[0])) > 2
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
        names = sorted(used, key=lambda n: (order.index(n) if n in order else len(order), list(self.names.sizes).index(n)))
        return tuple(Space(name=n, size=self.names.sizes[n], kind=self.names.kinds[n]) for n in names)

    def _frozen(self, name: str) -> str | None:
        if (why := self.names.frozen(name)) is not None:
            return why
        if self.names.kinds[name] == "fixed":
            return "the file's inputs and outputs have that size"
        return None

    # --- layers ------------------------------------------------------------------------------------------------------

    def _name_layers(self, drafts: list[Draft]) -> None:
        """Layers of one name are told apart; norms are called by what they stand before or behind."""
        seen: Counter[str] = Counter()
        for draft in drafts:
            if draft.norm is None:
                if draft.name == "attention" and any(d.name == "attention_memory" and d.order > draft.order - 1 for d in drafts):
                    pass
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
        if not self.d.stream.carries(norm.output):
            labels = self._labels_behind(norm)
            return f"{labels}_norm" if labels else "inner_norm"
        if draft.attributes["position"] == "pre":
            reader = next((d for d in drafts if d.through is norm and d.norm is None), None)
            if reader is not None and drafts is not self.outside:
                return f"{reader.name}_norm"
            return "final_norm" if drafts is self.outside else "norm"
        before = [d for d in drafts if d.norm is None and d.order < draft.order]
        suffix = "_output_norm" if draft.attributes["position"] == "branch" else "_norm"
        return f"{before[-1].name}{suffix}" if before else "norm"

    def _labels_behind(self, norm: Norm) -> str:
        for drafts in (*self.first.values(), self.outside):
            for draft in drafts:
                for slot in draft.slots:
                    if draft.norm is None and slot.module in ("q_proj", "k_proj", "v_proj") and slot.kind == "weight":
                        reader = self.d.readers[slot.stored]
                        if self.d._descends(norm.source, reader.outputs[0]):
                            return slot.module[0]
        return ""

    def _layers(self, drafts: Sequence[Draft]) -> tuple[Layer, ...]:
        made = (self._layer(draft, None) for draft in drafts)
        return tuple(layer for layer in made if layer.parameters)

    def _layer(self, draft: Draft, stack: str | None) -> Layer:
        made = (self._parameter(slot, draft, stack) for slot in draft.slots)
        parameters = tuple(parameter for parameter in made if parameter is not None)
        attributes = dict(draft.attributes)
        if draft.norm is not None:
            key = f"{stack}/{draft.name}" if stack else draft.name
            attributes["epsilon_key"] = f"epsilon of {key}"
            self.norms[f"{stack or ''}/{draft.name}"] = tuple(self._norm_at(draft.norm, stack, i) for i in self._range(stack))
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
        return next(each for each in self.d.norms if each.scale is not None and each.scale.stored is scale)

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
        self.slots[f"{stack or ''}/{draft.name}/{slot_name}"] = slot.stored
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
            self.by_origin.setdefault(self.d.origin(slot.stored), []).append(parameter)
        return parameter

    def _twin(self, slot: Slot, layout: Layout, stack: str | None) -> Parameter | None:
        """The matrix outside of stacks that was the same tensor in the file, and whose axes are the same."""
        if stack is not None or len(layout.axes) < 2:
            return None
        same = self.by_origin.get(self.d.origin(slot.stored), ())
        return next((parameter for parameter in same if parameter.parsed.axes == layout.axes), None)

    def _norm_module(self, draft: Draft) -> str:
        """Norms over heads name the basis they stand in."""
        inner = draft.norm is not None and not self.d.stream.carries(draft.norm.output)
        return draft.name if inner else ""

    def _layout(self, slot: Slot, draft: Draft) -> Layout:
        """The layout line of a stored weight."""
        axes = tuple(Fixed(1) if (named := self.names.axis(axis)) == ONE else named for axis in self.scene.axes(slot.stored))
        if slot.kind in ("scale", "shift") or slot.module == "layer_scale":
            return Layout((), "+" if slot.kind == "shift" else "*", (product(*(a for a in axes if a != Fixed(1))),))
        parts = self.scene.parts.get(slot.stored, {})
        reads = [parts.get(i) == {"read"} for i in range(len(axes))]
        if not any(reads):
            lead = next((i for i, axis in enumerate(axes) if not isinstance(axis, Fixed)), 0)
            return Layout(axes[:lead], "->", axes[lead:])
        split = reads.index(not reads[0]) if not reads[0] in reads[1:] or True else 0
        if len(set(reads)) == 1 or reads != [reads[0]] * split + [not reads[0]] * (len(reads) - split):
            raise UnsupportedModel(
                f"{self.d.where}: the weight {slot.stored.name} reads and writes over axes that lie between each other"
            )
        return Layout(axes[:split], "->" if reads[0] else "<-", axes[split:])

    def _tensor_name(self, values: Sequence[ir.Value], stack: str | None, layer: str, slot: str, shared: bool) -> str:
        names = [self.d.origin(value) for value in values]
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
            [self.d.origin(value) for value in block.weights if len(value.shape or ()) > 1]
            for block in blocks.blocks
        ]
        return bool(originals[0]) and all(each == originals[0] for each in originals)

    # --- inputs and outputs ------------------------------------------------------------------------------------------

    def _inputs(self) -> Iterator[Port]:
        for value in self.scene.graph.inputs:
            if value.name not in self.scene.graph.initializers:
                yield Port(name=str(value.name))

    def _outputs(self) -> Iterator[Port]:
        for value in self.scene.graph.outputs:
            axes = self.scene.axes(value) if value in self.scene.runs[0] else ()
            last = self.names.axis(axes[-1]) if axes else ONE
            space = last.space if isinstance(last, Leaf) and last.space in self.names.sizes else None
            norm = None
            if space is not None and self.d.stream.carries(value) and self.d.basis(value) not in self.d.main:
                basis = self.d.basis(value)
                norm = next((n for n in self.d.norms if self.d.stream.carries(n.output) and self.d.basis(n.output) is basis), None)
            yield Port(name=str(value.name), space=space, through=self.norm_names.get(id(norm)) if norm else None)


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
