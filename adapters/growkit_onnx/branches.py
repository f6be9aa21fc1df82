"""Branches of a graph, taken apart: attention, MLPs, embeddings, heads, and the slots that weights fill in them.

Everything is told by what it computes. Attention is where a softmax stands between two products of activations;
queries, keys and values are what these products multiply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from growkit_onnx.facts import Facts
from growkit_onnx.infer import Weight
from growkit_onnx.norms import Norm
from growkit_onnx.numbers import goes_through, made_of, multiplier
from growkit_onnx.rules import CONTRIB, MEASURES, NONLINEAR
from growkit_specs.layer_graph import LayerKind, Scalar
from growkit_specs.layout import Axis, product
from growkit_specs.unification import ONE

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum", "Conv")
_FUSED = {("", "Attention"), (CONTRIB, "Attention"), (CONTRIB, "MultiHeadAttention"), (CONTRIB, "GroupQueryAttention")}
_FINISHING = ("Reshape", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Mul", "Div", "Dropout")


@dataclass
class Slot:
    """One stored weight and the place it has in its layer."""

    stored: ir.Value
    module: str
    kind: str  # weight, bias, scale, shift, or nothing
    position: int
    number: int = 1

    @property
    def name(self) -> str:
        """``q_proj.weight``; ``q_proj_2.weight`` where it is the second one of a layer."""
        module = self.module if self.number == 1 else f"{self.module}_{self.number}"
        return ".".join(filter(None, (module, self.kind)))


@dataclass
class Draft:
    """A layer in the making; ``factor`` is the number its scores, its rows or its input are multiplied by."""

    name: str
    kind: LayerKind
    slots: list[Slot]
    order: int
    through: Norm | None = None
    added_through: Norm | None = None
    norm: Norm | None = None
    attributes: dict[str, Scalar] = field(default_factory=dict)
    factor: float | None = 1.0

    def is_like(self, other: Draft) -> bool:
        """Whether slots of both can be one layer's."""
        mine, its = ((d.name, d.kind, d.attributes, d.through, d.added_through, d.factor) for d in (self, other))
        return mine == its


def components(facts: Facts, nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """The operators that stored weights feed, and what is between them, apart from the stream and its norms."""
    members = set(nodes)
    parent: dict[ir.Node, ir.Node] = {}

    def root(node: ir.Node) -> ir.Node:
        while parent.get(node, node) is not node:
            node = parent[node]
        return node

    stream_norms = {n for norm in facts.norms if facts.stream.carries(norm.source) for n in norm.nodes}
    for node in nodes:
        if node in stream_norms:
            continue
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            if value is None or maker is None or maker not in members or maker in stream_norms:
                continue
            if not facts.is_float(value):
                continue
            if not facts.stream.carries(value) or _ends_branch(facts, node, value):
                parent[root(node)] = root(maker)
    found: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        if node not in stream_norms:
            found.setdefault(root(node), []).append(node)
    return [group for group in found.values() if any(node in facts.weights_of for node in group)]


def _ends_branch(facts: Facts, node: ir.Node, value: ir.Value) -> bool:
    """Whether ``node`` only finishes what a branch writes: its bias, its layer scale, or a move of its entries."""
    if node in facts.weights_of and node.op_type in ("Add", "Mul"):
        return True
    carrying = [given for given in node.inputs if given is not None and facts.stream.carries(given)]
    users = [user for user in value.consumers() if user.op_type not in MEASURES]
    alone = len(carrying) == 1 and len(users) == 1
    return alone and not any(facts.weights_of.get(node, ())) and node.op_type in _FINISHING


class Branch:
    """What hangs together between the stream and the stream, taken apart into layers and slots.

    Args:
        facts: What is known of the graph.
        nodes: The operators.
        own: The stored weights that may fill slots; others belong elsewhere.
    """

    def __init__(self, facts: Facts, nodes: list[ir.Node], own: Set[ir.Value]) -> None:
        self.facts, self.scene, self.names = facts, facts.scene, facts.names
        self.nodes = nodes
        self.inside = set(nodes)
        self.own = own
        self.labels: dict[ir.Value, set[str]] = {}
        self.is_attention = False
        self.repeated: set[str] = set()
        self.score_factors: set[float] = set()

    def drafts(self) -> list[Draft]:
        """Its layers; keys and values that are read through another norm than queries are a layer of their own."""
        self._find_attention()
        weights = [
            (node, weight)
            for node in self.nodes
            for _, weight in self.facts.weights_of.get(node, ())
            if node not in self.facts.norm_of and self._matters(weight) and weight.stored in self.own
        ]
        if not weights:
            return []
        groups: dict[tuple[Norm | None, float], list[tuple[ir.Node, Weight]]] = {}
        own = [self._read_through(node) for node, _ in weights if self._reads_stream(node)]
        writes = any(self._writes_stream(node) for node, _ in weights)
        main = self._main_norm(own, weights)
        kind, name = self._kind(weights, writes)
        for node, weight in weights:
            norm = self._read_through(node) if self._reads_stream(node) else self._bias_norm(node, main)
            groups.setdefault((norm, self._factor(node, kind)), []).append((node, weight))
        own_keys = any(norm is main and self._is_labelled(w, "k") for (norm, _), g in groups.items() for _, w in g)
        if self.is_attention and len(groups) > 1 and not own_keys:
            name = "cross_attention"
        return [
            self._draft(name if norm is main else f"{name}_memory", kind, norm, members, factor)
            for (norm, factor), members in sorted(groups.items(), key=lambda item: item[0][0] is not main)
        ]

    def _factor(self, node: ir.Node, kind: LayerKind) -> float:
        """The number that multiplies what an embedding's weight writes, or what a head's reads."""
        if kind == "embedding":
            return goes_through(self.scene, node.outputs[0])
        if kind == "head" and self._reads_stream(node):
            norms = self.facts.norm_of
            carries = self.facts.stream.carries
            return made_of(self.scene, self._stream_inputs(node)[0], lambda n: n in norms, carries) or 1.0
        return 1.0

    def _is_labelled(self, weight: Weight, label: str) -> bool:
        return label in self.labels.get(weight.stored, ())

    def _matters(self, weight: Weight) -> bool:
        """Whether a weight is trained, and not one of the numbers a computation needs (of rotations, say)."""
        if weight.stored not in self.scene.parts and self.facts.readers[weight.stored] not in self.scene.unknown:
            return False
        sides = [axis for axis in self.scene.axes(weight.stored) if axis != ONE]
        return len(sides) > 1 or (bool(sides) and self._touches_stream)

    @cached_property
    def _touches_stream(self) -> bool:
        carries = self.facts.stream.carries
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
            q, k, v = (*node.inputs, None, None)[:3]
            parts = {"qkv": q} if k is None else {"q": q, "kv": k} if v is None else {"q": q, "k": k, "v": v}
            for labels, value in parts.items():
                for label in labels:
                    self._label(value, label)
        for _, weight in self.facts.weights_of.get(node, ()):
            self.labels.setdefault(weight.stored, set()).update("qkv")
        factors = self.scene.unifier.factors
        own = set(factors(found.kv_heads))
        self.repeated |= {leaf for f in factors(found.heads) if f not in own for leaf in self.scene.unifier.leaves(f)}
        self._name_heads([found.heads], found.scores, found.values)
        factor = node.attributes.get_float("scale", 0.0) or self.scene.sizes(found.scores)[0] ** -0.5
        self._note_scores(factor, node.inputs[:2] if (node.domain, node.op_type) != (CONTRIB, "Attention") else ())

    def _spelled_out_attention(self, softmax: ir.Node) -> None:
        scores = self._scores(softmax)
        values = self._values(softmax)
        if scores is None or values is None:
            return
        q, k = (value for value in scores.inputs[:2] if value is not None)
        behind = made_of(
            self.scene, softmax.inputs[0], lambda node: node is scores, lambda v: self._same_shape(v, softmax)
        )
        self._note_scores((behind or 1.0) * multiplier(self.scene, scores, q), (q, k))
        self._label(q, "q")
        self._label(k, "k")
        self._label(values, "v")
        contracted = self.scene.axes(q)[-1] if scores.op_type != "Einsum" else self._contracted(scores)
        self._name_heads(self.scene.axes(softmax.outputs[0])[:-2], contracted, self.scene.axes(values)[-1])

    def _note_scores(self, factor: float, made: Sequence[ir.Value | None]) -> None:
        """Note the number that scores are multiplied by, theirs and those of queries and keys since their maps."""
        for value in made:
            factor *= made_of(self.scene, value, self._begins, lambda v: v.producer() in self.inside) or 1.0
        self.score_factors.add(float(f"{abs(factor):.6g}"))

    def _begins(self, node: ir.Node) -> bool:
        """Whether a node makes queries or keys: a map, or a norm, before which numbers make no difference."""
        weights = self.facts.weights_of.get(node, ())
        parts = (self.scene.parts.get(weight.stored, {}).values() for _, weight in weights)
        return node in self.facts.norm_of or any("read" in part for each in parts for part in each)

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
        names = self.names
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
            for _, weight in self.facts.weights_of.get(node, ()):
                self.labels.setdefault(weight.stored, set()).add(label)
                projects |= "read" in set().union(*self.scene.parts.get(weight.stored, {0: set()}).values())
            if not projects:
                todo += [
                    g for g in node.inputs if g is not None and not self.scene.is_weight(g) and self.facts.is_float(g)
                ]

    # --- reading and writing -----------------------------------------------------------------------------------------

    def _stream_inputs(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and self.facts.stream.carries(value)]

    def _reads_stream(self, node: ir.Node) -> bool:
        return node.op_type not in ("Add", "Mul", "Gather", "Concat") and bool(self._stream_inputs(node))

    def _writes_stream(self, node: ir.Node) -> bool:
        return any(self.facts.stream.carries(out) for out in node.outputs)

    def _read_through(self, node: ir.Node) -> Norm | None:
        """The norm through which an operator reads the stream."""
        return self.facts.norm_before(self._stream_inputs(node)[0])

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
        for _, weight in self.facts.weights_of.get(node, ()):
            labels = self.labels.get(weight.stored)
            if labels:
                for other in self.nodes:
                    for _, projection in self.facts.weights_of.get(other, ()):
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
        found = [node.op_type for node in self.nodes if node.op_type in NONLINEAR and node not in self.facts.norm_of]
        return next((op for op in found if op not in ("Pow", "Sqrt", "Min", "Max", "Clip", "Cos", "Sin")), None)

    def _draft(
        self, name: str, kind: LayerKind, norm: Norm | None, members: list[tuple[ir.Node, Weight]], factor: float
    ) -> Draft:
        attributes: dict[str, Scalar] = {}
        if kind == "attention":
            attributes["scale"] = "none"  # scores are scaled by a number in the file, which stays what it is
        elif self._activation():
            attributes["activation"] = self._activation()
        slots: list[Slot] = []
        for node, weight in members:
            slots.append(self._slot(node, weight, kind))
        self._tell_gates_apart(slots)
        number(slots)
        draft = Draft(
            name, kind, slots, min(self.facts.order[node] for node, _ in members), norm, attributes=attributes
        )
        draft.factor = factor
        if kind == "attention":
            draft.factor = next(iter(self.score_factors)) if len(self.score_factors) == 1 else None
        draft.added_through = self._branch_norm(members)
        if (bend := self._bend(members)) is not None:
            attributes["output_activation"] = bend
        return draft

    def _bend(self, members: Sequence[tuple[ir.Node, Weight]]) -> str | None:
        """The activation that what is written goes through before it is the stream."""
        for node, _ in members:
            for out in node.outputs:
                if self.facts.stream.carries(out) and self.facts.basis(out) not in self.facts.main:
                    for bending in self.facts.stream.bent.get(self.facts.basis(out), ()):
                        if self.facts.stream.carries(bending.outputs[0]):
                            return bending.op_type
        return None

    def _branch_norm(self, members: Sequence[tuple[ir.Node, Weight]]) -> Norm | None:
        """The norm that what is written goes through before it is added."""
        carries, basis = self.facts.stream.carries, self.facts.basis
        written = {basis(out) for node, _ in members for out in node.outputs if carries(out)} - self.facts.main
        return next(
            (
                norm
                for norm in self.facts.norms
                if carries(norm.source) and basis(norm.source) in written and self.facts.position(norm) == "branch"
            ),
            None,
        )

    def _slot(self, node: ir.Node, weight: Weight, kind: LayerKind) -> Slot:
        parts = set().union(*self.scene.parts.get(weight.stored, {0: {"write"}}).values())
        ending = "weight" if "read" in parts else "bias"
        labels = "".join(sorted(self.labels.get(weight.stored, ()), key="qkv".index))
        at = self.facts.order[node]
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
            if ending == "bias" and len([axis for axis in self.scene.axes(weight.stored) if axis != ONE]) > 1:
                return Slot(weight.stored, "position_embeddings", "", at)
            if node.op_type == "Concat":
                return Slot(weight.stored, "cls_token", "", at)
        else:
            module = {"head": "head", "pool": "pooler"}.get(kind, "linear")
        return Slot(weight.stored, module, ending, at)

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
            return "relative_attention_bias"
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
            for weights in self.facts.weights_of.values()
            for _, weight in weights
            for i, parts in self.scene.parts.get(weight.stored, {}).items()
            if parts == {"read"} and i < len(self.scene.axes(weight.stored))
        )

    def _tell_gates_apart(self, slots: list[Slot]) -> None:
        """Of two maps into the same units, the one that goes through the activation is the gate."""
        ups = [slot for slot in slots if slot.module == "up_proj" and slot.kind == "weight"]
        if len(ups) != 2:
            return
        gates = [slot for slot in ups if self._is_activated(self.facts.readers[slot.stored])]
        if len(gates) == 1:
            after = {slot.stored for slot in slots if slot.kind == "bias" and self._follows(slot, gates[0])}
            for slot in slots:
                if slot is gates[0] or slot.stored in after:
                    slot.module = "gate_proj"

    def _follows(self, bias: Slot, weight: Slot) -> bool:
        reader = self.facts.readers[weight.stored]
        return (
            self.facts.readers[bias.stored] is reader
            or self.facts.readers[bias.stored] in reader.outputs[0].consumers()
        )

    def _is_activated(self, node: ir.Node) -> bool:
        todo = list(node.outputs)
        for _ in range(4):
            users = [user for value in todo for user in value.consumers() if user in self.inside]
            if any(user.op_type in NONLINEAR for user in users):
                return True
            todo = [out for user in users for out in user.outputs if user.op_type in ("Add", "Reshape", "Cast")]
        return False


def number(slots: list[Slot]) -> None:
    """Slots of one name are told apart by numbers."""
    seen: Counter[tuple[str, str]] = Counter()
    for slot in sorted(slots, key=lambda slot: slot.position):
        seen[slot.module, slot.kind] += 1
        slot.number = seen[slot.module, slot.kind]
