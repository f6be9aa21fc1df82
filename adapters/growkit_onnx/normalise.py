"""One form for every exporter's graph: no functions, nothing shared, no fused residuals; and the way back.

What an axis means is inferred from the nodes that read a tensor, so a tensor that two nodes read for different reasons
would tie together what has nothing to do with each other: exporters store equal tensors once, and tied weights are
read as a table here and as a matrix there. :func:`normalise` gives every use its own initializer, which still shares
the data, and :func:`restore` puts together again what is still equal.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir

from growkit_specs import InvalidModel, UnsupportedModel

FUSED = "growkit.fused"
"""The metadata key of nodes that were one: ``"<fusion>:<slot>"``, where ``<fusion>`` may go on with ``.anything``.

A copy of such nodes, in a block that was cloned, is fused like its model. It carries the marks as they are, or all of
them with one more suffix: ``"3:sum"`` or ``"3.clone1:sum"``.
"""

COPY = "growkit.copy"
"""The metadata key of a node that is a copy of another one: the name of that node's output."""

FOLDED = "growkit.folded"
"""The metadata key of a Transpose that was two: the first one's axes, name and output."""

_FEW = 64

LARGEST_CONSTANT = 1
"""Entries up to which a Constant of floats is a number of the computation; beyond, it is a weight."""

_MOVES = {
    *("Constant", "Identity", "Cast", "CastLike", "DequantizeLinear"),
    *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
}
"""Operators that only pass on what is stored: behind one of them a tensor is as shared as in front of it."""

_MICROSOFT = "com.microsoft"

Same = Callable[[ir.Value, ir.Value], bool]


@dataclass(frozen=True)
class Step:
    """One node of what a fused operator stands for.

    Attributes:
        op_type: Its operator.
        inputs: The slots that it reads.
        output: The slot that it makes.
        attributes: Its attributes, without the epsilon, which the fused node gives.
    """

    op_type: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, ir.Attr] = field(default_factory=dict)


@dataclass(frozen=True)
class Fusion:
    """A fused node and the nodes that it was taken apart into.

    Attributes:
        op_type: The fused operator, of the domain com.microsoft.
        inputs: The slots of its inputs, in order.
        outputs: The slots of its outputs, in order; one that no step makes is not read.
        declared: How many of the outputs it had, read or not: more may be read of a clone, and fewer are refused.
        attributes: Its attributes without the epsilon.
        steps: The nodes in its place; the one that makes "output" is the last one, of a fused norm the norm.
    """

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    declared: int
    attributes: tuple[ir.Attr, ...]
    steps: tuple[Step, ...]


@dataclass
class Normalised:
    """What :func:`normalise` did to a model; it refers to the model by names, so that it holds for a copy, too.

    Attributes:
        ties: For every initializer that was shared, the new name of each further use and the name of the first. Who
            adds uses of such a tensor may add theirs.
        fusions: What was taken apart, by the number in the marks of its nodes.
        inputs: The graph's inputs in order, those that are initializers among them.
    """

    ties: dict[str, str] = field(default_factory=dict)
    fusions: dict[str, Fusion] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()


def normalise(model: ir.Model) -> Normalised:
    """Bring a model, in place, into the form that inference reads.

    Model-local functions are inlined; nodes that give what they get (Identity, idle Dropout) are gone; large Constant
    nodes are initializers, and no initializer is an input; every use of an initializer, or of a chain of nodes that
    only move one, has its own copy, which shares the data; norms that are fused with the residual sum before them are
    taken apart, and so are products that are fused with what moves their operands or scales their result. Initializers
    that nothing reads are dropped. No weight is loaded.

    Args:
        model: The model.

    Raises:
        InvalidModel: Where functions call each other in a circle, or are called with too many inputs.
        UnsupportedModel: Where a function was written for another operator set than the model, or returns its input.
    """
    graph = model.graph
    done = Normalised(inputs=tuple(_name(value) for value in graph.inputs))
    names = _Names(graph)
    _inline_functions(model, names)
    _hide_initializers(model)
    _store_constants(graph)
    _split_sequences(graph, model.opset_imports.get("", 1), names)
    _unfuse(graph, model.opset_imports.get("", 1), names, done)
    _drop_passing(graph, done)
    _fold_transposes(graph)
    _copy_shared(graph, names, done)
    _drop_unused(graph)
    return done


def same_data(first: ir.Value, second: ir.Value) -> bool:
    """Whether two initializers are equal bit by bit."""
    a, b = first.const_value, second.const_value
    if a is None or b is None:
        return False
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes())


def restore(model: ir.Model, normalised: Normalised, same: Same = same_data) -> None:
    """Undo, in place, what :func:`normalise` did, as far as it still holds.

    Nodes of one fusion that still are what they were become one node again; initializers that were one tensor and are
    equal become one again, and so do the nodes that were copied for their sake. A model that was not changed in
    between gets back the names of all that it shared. Functions stay inlined, nodes that give what they get away.

    Args:
        model: The normalised model, which may have been grown, or a copy of it.
        normalised: What :func:`normalise` returned.
        same: Whether two initializers hold the same data; both have the same origin.
    """
    graph = model.graph
    _unfold_transposes(graph)
    _fuse(graph, normalised.fusions)
    _tie(graph, normalised.ties, same)
    _merge_copies(graph)
    for node in graph:
        node.metadata_props.pop(FUSED, None)
        node.metadata_props.pop(COPY, None)
    _drop_unused(graph)
    _show_initializers(graph, normalised.inputs)


# Names and values


def _name(value: ir.Value) -> str:
    return value.name or ""


class _Names:
    """Names that no value and no node has."""

    def __init__(self, graph: ir.Graph) -> None:
        self.taken: set[str] = set(graph.initializers) | {_name(value) for value in graph.inputs}
        for inner in graph.subgraphs():
            self.taken.update(_name(value) for value in (*inner.inputs, *inner.initializers.values()))
        for node in ir.traversal.RecursiveGraphIterator(graph):
            self.taken.update({node.name or "", *map(_name, node.outputs)})
        self.last: dict[str, int] = defaultdict(lambda: 1)

    def fresh(self, name: str) -> str:
        """The name itself, or with the first number that is free."""
        unique = name
        while unique in self.taken:
            self.last[name] += 1
            unique = f"{name}_{self.last[name]}"
        self.taken.add(unique)
        return unique


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _stand_in(new: ir.Value, old: ir.Value) -> None:
    """`new` takes the place and the name of `old`, among the graph's outputs, too."""
    new.name, new.type = old.name, old.type or new.type
    new.shape = new.shape if old.shape is None else old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _remove(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Remove nodes, and the constants that only they read."""
    nodes = list(nodes)
    read = [value for node in nodes for value in node.inputs if value is not None]
    graph.remove(nodes, safe=True)
    for value in read:
        producer = value.producer()
        if _is_read(value) or value.is_graph_input():
            continue
        if graph.initializers.get(_name(value)) is value:
            graph.initializers.pop(_name(value))
        elif producer is not None and producer.op_type == "Constant" and producer.graph is graph:
            graph.remove(producer, safe=True)


def _drop_unused(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not _is_read(value) and not value.is_graph_input():
            graph.initializers.pop(name)


def _content(attr: ir.Attr) -> Any:
    """What an attribute says, comparable and hashable."""
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()
    return attr.value


# Functions


def _inline_functions(model: ir.Model, names: _Names) -> None:
    _inline_calls(model, ir.traversal.RecursiveGraphIterator(model.graph), names, ())
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    for domain in {domain for domain, _, _ in model.functions} - used - {""}:
        model.opset_imports.pop(domain, None)
    model.functions.clear()


def _inline_calls(
    model: ir.Model, nodes: Iterable[ir.Node], names: _Names, callers: tuple[ir.OperatorIdentifier, ...]
) -> None:
    for call in list(nodes):
        called = call.op_identifier()
        function = model.functions.get(called)
        if function is None:
            continue
        if called in callers:
            raise InvalidModel(f"the function {_spelled(called)} calls itself; expected functions without a circle")
        _check_call(model, call, function)
        _inline_calls(model, _inline(call, function, names), names, (*callers, called))


def _spelled(identifier: ir.OperatorIdentifier) -> str:
    return "::".join(part for part in identifier if part)


def _check_call(model: ir.Model, call: ir.Node, function: ir.Function) -> None:
    """The model takes over the operator sets of a function whose body becomes part of it."""
    name = _spelled(function.identifier())
    if len(call.inputs) > len(function.inputs):
        raise InvalidModel(
            f"{call.name or 'a node'}: expected at most the {len(function.inputs)} inputs of the function {name}, "
            f"got {len(call.inputs)}"
        )
    if len({value for value in function.outputs if not value.is_graph_input()}) != len(function.outputs):
        raise UnsupportedModel(
            f"the function {name} returns an input, or one value twice; expected a value of its own for every output; "
            "put an Identity in front of it"
        )
    domains = {node.domain for node in ir.traversal.RecursiveGraphIterator(function.graph)}
    for domain, version in function.opset_imports.items():
        own = model.opset_imports.setdefault(domain, version)
        if own != version and domain in domains:
            raise UnsupportedModel(
                f"the function {name} is written for version {version} of the operator set '{domain or 'ai.onnx'}', "
                f"expected the model's {own}; convert the model with "
                "onnx.inliner.inline_local_functions(model, convert_version=True)"
            )


def _inline(call: ir.Node, function: ir.Function, names: _Names) -> list[ir.Node]:
    """Put the body of a function in the place of a call of it.

    Returns:
        All nodes of the body, those of its subgraphs included.
    """
    graph, body = call.graph, function.clone().graph
    assert graph is not None
    made = list(ir.traversal.RecursiveGraphIterator(body))
    attributes = {**function.attributes, **call.attributes}
    for node in made:
        _settle_attributes(node, attributes)
        node.metadata_props.update({**call.metadata_props, **node.metadata_props})
    _rename(body, made, call.name or function.name, names)

    for parameter, argument in zip_longest(body.inputs, call.inputs):
        for user, index in parameter.uses():
            user.replace_input_with(index, argument)
    outputs, nodes = list(body.outputs), list(body)
    body.outputs.clear()
    body.remove(nodes)
    graph.insert_before(call, nodes)
    for old, new in zip(call.outputs, outputs, strict=False):
        if old.name:
            _stand_in(new, old)
    graph.remove(call, safe=True)
    return made


def _settle_attributes(node: ir.Node, given: Mapping[str, ir.Attr]) -> None:
    """Replace references to attributes of a function; an attribute that the call leaves out is left out."""
    for name, attr in list(node.attributes.items()):
        if not attr.is_ref():
            continue
        value = given.get(attr.ref_attr_name or "")
        if value is None or value.value is None:
            node.attributes.pop(name)
        else:
            node.attributes[name] = ir.Attr(name, value.type, value.value)


def _rename(body: ir.Graph, nodes: Iterable[ir.Node], prefix: str, names: _Names) -> None:
    """Nodes and values are called by where they are called from: ``call/name``."""
    for node in nodes:
        node.name = names.fresh(f"{prefix}/{node.name or node.op_type}")
    inner = [value for graph in body.subgraphs() for value in (*graph.inputs, *graph.initializers.values())]
    for value in dict.fromkeys([*inner, *(output for node in nodes for output in node.outputs)]):
        if value.name:
            value.name = names.fresh(f"{prefix}/{value.name}")


# Initializers that are inputs, constants that are weights


def _hide_initializers(model: ir.Model) -> None:
    graph = model.graph
    for value in [value for value in graph.inputs if value.is_initializer() and value.uses()]:
        graph.inputs.remove(value)
    model.ir_version = max(model.ir_version, 4)  # before, every initializer had to be an input


def _show_initializers(graph: ir.Graph, names: Sequence[str]) -> None:
    values = {_name(value): value for value in graph.inputs}
    known = {name: values.pop(name, None) or graph.initializers.get(name) for name in names}
    order = [value for value in (*known.values(), *values.values()) if value is not None]
    graph.inputs.clear()
    graph.inputs.extend(order)


def _store_constants(graph: ir.Graph) -> None:
    for node in list(graph):
        tensor = _constant(node)
        if tensor is None or tensor.size <= LARGEST_CONSTANT or not tensor.dtype.is_floating_point():
            continue
        value = node.outputs[0]
        if not value.is_graph_output():
            value.replace_all_uses_with(_initializer(graph, _name(value), tensor))
            graph.remove(node, safe=True)


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    if node.op_type != "Constant" or node.domain != "":
        return None
    if "value_floats" in node.attributes:
        return ir.tensor(np.array(node.attributes["value_floats"].as_floats(), np.float32))
    return node.attributes.get_tensor("value")


# Sequences


def _split_sequences(graph: ir.Graph, opset: int, names: _Names) -> None:
    """Let a SplitToSequence whose parts are taken by number be the Split that it is."""
    for node in list(graph):
        sizes = _part_sizes(node) if node.op_type == "SplitToSequence" and opset >= 13 else None
        takers = node.outputs[0].consumers() if sizes else []
        picks = [_entries(taker.inputs[1]) if taker.op_type == "SequenceAt" else None for taker in takers]
        is_shown = any(taker.outputs[0].is_graph_output() for taker in takers)
        if not sizes or not picks or any(pick is None for pick in picks) or is_shown:
            continue
        axis = {"axis": node.attributes.get_int("axis", 0)}
        told = _initializer(graph, names.fresh(f"{_name(node.outputs[0])}/sizes"), ir.tensor(np.array(sizes, np.int64)))
        split = ir.node("Split", [node.inputs[0], told], axis, num_outputs=len(sizes), name=node.name)
        graph.insert_before(node, split)
        for index, out in enumerate(split.outputs):
            out.name = names.fresh(f"{_name(node.outputs[0])}/{index}")
        for taker, pick in zip(takers, picks, strict=True):
            assert pick is not None
            part, taken = split.outputs[int(pick.reshape(-1)[0])], taker.outputs[0]
            part.type, part.shape = taken.type, taken.shape
            taken.replace_all_uses_with(part)
        _remove(graph, [*takers, node])


def _part_sizes(node: ir.Node) -> list[int] | None:
    """The sizes of the parts of a SplitToSequence; None where they are not known before it runs."""
    told = _entries(node.inputs[1]) if len(node.inputs) > 1 else np.array(1)
    if told is None or told.ndim == 1:
        return None if told is None else [int(size) for size in told]
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    whole = shape[node.attributes.get_int("axis", 0)] if shape is not None else None
    part = int(told)
    return [part] * (whole // part) if isinstance(whole, int) and part > 0 and whole % part == 0 else None


def _entries(value: ir.Value | None) -> np.ndarray | None:
    """The entries of a small stored integer; None where there is none."""
    if value is None:
        return None
    maker = value.producer()
    tensor = value.const_value if maker is None else _constant(maker) if maker.op_type == "Constant" else None
    return tensor.numpy() if tensor is not None and tensor.size <= _FEW else None


# Nodes that only pass on


def _drop_passing(graph: ir.Graph, done: Normalised) -> None:
    for node in list(graph):
        if _only_passes(node) and _pass_on(graph, node, done):
            _remove(graph, [node])


def _only_passes(node: ir.Node) -> bool:
    """Whether a node gives what it gets: a Concat of one value does, and a Dropout outside of training."""
    if node.domain or node.op_type not in ("Identity", "Concat", "Dropout"):
        return False
    if node.op_type == "Concat":
        return len(node.inputs) == 1
    return node.op_type == "Identity" or _is_idle(node)


def _is_idle(dropout: ir.Node) -> bool:
    """Whether a Dropout is not in training, and its mask is not read."""
    training = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    switch = None if training is None else ir.convenience.get_const_tensor(training)
    idle = training is None or (switch is not None and not switch.numpy().any())
    return idle and not any(_is_read(mask) for mask in dropout.outputs[1:])


def _pass_on(graph: ir.Graph, node: ir.Node, done: Normalised) -> bool:
    """Readers of a node's output read its input instead; False where a graph's output needs the node."""
    value, output = node.inputs[0], node.outputs[0]
    if value is None:
        return False
    if output.is_graph_output():
        producer = value.producer()
        if value.is_graph_output() or producer is None or producer.graph is not graph or output not in graph.outputs:
            return False
        _stand_in(value, output)
    elif graph.initializers.get(_name(value)) is value and len(value.uses()) > 1:
        output.replace_all_uses_with(_copied(graph, value, _name(output), done))
    else:
        output.replace_all_uses_with(value)
    return True


# One private copy per use


def _copied(graph: ir.Graph, value: ir.Value, name: str, done: Normalised) -> ir.Value:
    """Another initializer with the same data, and the tie between them."""
    if value.const_value is None:
        raise InvalidModel(f"the initializer {value.name} has no data")
    done.ties[name] = done.ties.get(_name(value), _name(value))
    return _initializer(graph, name, value.const_value)


def _copy_shared(graph: ir.Graph, names: _Names, done: Normalised) -> None:
    moved: set[ir.Value] = set(graph.initializers.values())
    movers: list[ir.Node] = []
    for node in graph:
        if node.op_type in _MOVES and node.domain == "" and all(v is None or v in moved for v in node.inputs):
            moved.update(node.outputs)
            movers.append(node)
    for node in reversed(movers):  # a copy reads what its model reads: one use more in front of it
        for user, index in _further_uses(node.outputs[0]):
            copy = _copied_node(node, names)
            graph.insert_after(node, copy)
            user.replace_input_with(index, copy.outputs[0])
    for value in list(graph.initializers.values()):
        for user, index in _further_uses(value):
            user.replace_input_with(index, _copied(graph, value, names.fresh(_name(value)), done))


def _further_uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The uses of a value after the first one; being an output of the graph comes before all others."""
    return [(use.node, use.idx) for use in value.uses()][0 if value.is_graph_output() else 1 :]


def _copied_node(node: ir.Node, names: _Names) -> ir.Node:
    output = node.outputs[0]
    copy = ir.Node(
        node.domain,
        node.op_type,
        node.inputs,
        node.attributes,
        version=node.version,
        name=names.fresh(node.name or node.op_type),
        doc_string=node.doc_string,
        metadata_props={COPY: _name(output), **node.metadata_props},
    )
    copy.outputs[0].name = names.fresh(_name(output))
    copy.outputs[0].type, copy.outputs[0].shape = output.type, output.shape
    return copy


def _tie(graph: ir.Graph, ties: Mapping[str, str], same: Same) -> None:
    groups: dict[str, list[str]] = {}
    for name, first in ties.items():
        groups.setdefault(first, [first]).append(name)
    for group in groups.values():
        kept: list[ir.Value] = []
        for value in filter(None, map(graph.initializers.get, group)):
            twin = next((other for other in kept if same(other, value)), None)
            if twin is None:
                kept.append(value)
            else:
                value.replace_all_uses_with(twin)
                graph.initializers.pop(_name(value))


def _merge_copies(graph: ir.Graph) -> None:
    """Copied nodes that compute the same become one: the first, so that those behind it are compared after it."""
    copied = {mark for node in graph if (mark := node.metadata_props.get(COPY)) is not None}
    seen: dict[Any, ir.Node] = {}
    for node in list(graph):
        model = node.metadata_props.get(COPY, _name(node.outputs[0]) if node.outputs else "")
        if model not in copied:
            continue
        attributes = frozenset((name, _content(attr)) for name, attr in node.attributes.items())
        first = seen.setdefault((model, node.op_identifier(), tuple(node.inputs), attributes), node)
        if first is not node and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(first.outputs[0])
            _remove(graph, [node])


# Fused operators


def _attributes(**values: Any) -> dict[str, ir.Attr]:
    return {attr.name: attr for attr in ir.convenience.convert_attributes(values)}


def _whole(number: int | list[int], dtype: type = np.int64) -> dict[str, ir.Attr]:
    return _attributes(value=ir.tensor(np.array(number, dtype)))


_LAST_AXIS = _attributes(axis=-1)

Steps = Callable[[ir.Node, Set[str], int], list[Step]]
"""The nodes in the place of a fused node, given the slots that are given or read, and the operator set's version."""


def _skip_steps(norm: str) -> Steps:
    def steps(fused: ir.Node, slots: Set[str], opset: int) -> list[Step]:
        # The bias belongs to the branch: were it added to the sum, the first block would end otherwise than the last.
        bias = [Step("Add", ("branch", "bias"), "biased")] if "bias" in slots else []
        shift = ("beta",) if "beta" in slots else ()
        return [
            *bias,
            Step("Add", ("skip", "biased" if bias else "branch"), "sum"),
            Step(norm, ("sum", "gamma", *shift), "output", _LAST_AXIS),
        ]

    return steps


def _embed_steps(fused: ir.Node, slots: Set[str], opset: int) -> list[Step]:
    third = "segments" in slots
    return [
        *([] if "positions" in slots else _COUNTED),
        Step("Gather", ("word_table", "ids"), "words"),
        Step("Gather", ("position_table", "positions"), "places"),
        Step("Add", ("words", "places"), "placed" if third else "sum"),
        *([Step("Gather", ("segment_table", "segments"), "kinds")] if third else []),
        *([Step("Add", ("placed", "kinds"), "sum")] if third else []),
        Step("LayerNormalization", ("sum", "gamma", "beta"), "output", _LAST_AXIS),
        *(_valid_tokens(opset) if {"mask", "mask_index"} <= slots else []),
    ]


_COUNTED = [
    Step("Shape", ("ids",), "ids_shape"),
    Step("Constant", (), "second", _whole(1)),
    Step("Gather", ("ids_shape", "second"), "length"),
    Step("Constant", (), "from", _whole(0)),
    Step("Constant", (), "by", _whole(1)),
    Step("Range", ("from", "length", "by"), "positions"),
]
"""The positions 0 to S - 1 of ids (B, S); a Gather reads the table by them, as it does by positions that are given."""


def _valid_tokens(opset: int) -> list[Step]:
    """How many tokens of each row the mask keeps: (B,)."""
    axes = [Step("Constant", (), "axes", _whole([1]))] if opset >= 13 else []
    more = {} if axes else _attributes(axes=[1])
    return [
        Step("Constant", (), "valid", _whole(1, np.int32)),
        Step("Equal", ("mask", "valid"), "is_valid"),
        Step("Cast", ("is_valid",), "counted", _attributes(to=int(ir.DataType.INT32))),
        *axes,
        Step("ReduceSum", ("counted", "axes") if axes else ("counted",), "mask_index", _attributes(keepdims=0) | more),
    ]


def _product_steps(fused: ir.Node, slots: Set[str], opset: int) -> list[Step]:
    alpha = fused.attributes.get_float("alpha", 1.0)
    product = "product" if alpha != 1 else "output"
    operands, steps = [], []
    for slot, value in zip("AB", fused.inputs, strict=True):
        turned = fused.attributes.get_int(f"trans{slot}", 0)
        operands.append(f"turned_{slot}" if turned else slot)
        if turned:
            *lead, row, column = range(_rank(value))
            steps.append(Step("Transpose", (slot,), operands[-1], _attributes(perm=[*lead, column, row])))
    steps.append(Step("MatMul", tuple(operands), product))
    if alpha != 1:
        steps.append(Step("Constant", (), "alpha", _attributes(value=ir.tensor(np.array(alpha, np.float32)))))
        steps.append(Step("Mul", (product, "alpha"), "output"))
    return steps


def _is_plain_product(fused: ir.Node) -> bool:
    """Whether what a fused product does to its operands and its result is known: the axes it swaps, the type."""
    attributes = fused.attributes
    if attributes.get_int("transBatchA", 0) or attributes.get_int("transBatchB", 0):
        return False
    ranks = [_rank(v) for v, slot in zip(fused.inputs, "AB", strict=True) if attributes.get_int(f"trans{slot}", 0)]
    return min(ranks, default=2) > 1 and (attributes.get_float("alpha", 1.0) == 1 or _is_of_float32(fused))


def _rank(value: ir.Value | None) -> int:
    """The number of a value's axes as far as the file tells it, or the operator that moves them; 0 where none does."""
    if value is None or value.shape is not None:
        return len(value.shape) if value is not None and value.shape is not None else 0
    maker = value.producer()
    if maker is None or maker.op_type == "Transpose":
        return len(maker.attributes.get_ints("perm", ())) if maker is not None else 0
    return _rank(maker.inputs[0]) if _only_passes(maker) else 0


def _is_of_float32(node: ir.Node) -> bool:
    """Whether all weights of the node's graph are of that type."""
    assert node.graph is not None
    types = {value.dtype for value in node.graph.initializers.values() if value.dtype is not None}
    return {dtype for dtype in types if dtype.is_floating_point()} == {ir.DataType.FLOAT}


@dataclass(frozen=True)
class _Form:
    """How a fused operator is taken apart.

    Attributes:
        inputs: The slots of its inputs.
        outputs: The slots of its outputs.
        steps: The nodes in its place.
        fits: Whether a node can be taken apart; one that cannot stays as it is.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: Steps
    fits: Callable[[ir.Node], bool] = lambda node: True


_NORM_OUTPUTS = ("output", "mean", "inv_std", "sum")
_EPSILON = 1e-12
"""What all fused norms take where no epsilon is given."""

_FORMS = {
    "SkipLayerNormalization": _Form(
        ("branch", "skip", "gamma", "beta", "bias"), _NORM_OUTPUTS, _skip_steps("LayerNormalization")
    ),
    "SkipSimplifiedLayerNormalization": _Form(
        ("branch", "skip", "gamma", "bias"), _NORM_OUTPUTS, _skip_steps("SimplifiedLayerNormalization")
    ),
    "EmbedLayerNormalization": _Form(
        ("ids", "segments", "word_table", "position_table", "segment_table", "gamma", "beta", "mask", "positions"),
        ("output", "mask_index", "sum"),
        _embed_steps,
    ),
    "FusedMatMul": _Form(("A", "B"), ("output",), _product_steps, _is_plain_product),
}


def _unfuse(graph: ir.Graph, opset: int, names: _Names, done: Normalised) -> None:
    made: dict[ir.Value, int] = {}
    for position, node in enumerate(list(graph)):
        form = _FORMS.get(node.op_type) if node.domain == _MICROSOFT else None
        nodes = [node]
        if form is not None and form.fits(node):
            fusion = _fusion(node, form, made, opset)
            if _read_slots(node, form) <= {step.output for step in fusion.steps}:
                key = str(len(done.fusions))
                done.fusions[key] = fusion
                nodes = _take_apart(node, fusion, key, names)
        made.update((output, position) for part in nodes for output in part.outputs)


def _read_slots(node: ir.Node, form: _Form) -> set[str]:
    return {slot for slot, value in zip(form.outputs, node.outputs, strict=False) if _is_read(value)}


def _fusion(node: ir.Node, form: _Form, made: Mapping[ir.Value, int], opset: int) -> Fusion:
    inputs = form.inputs
    if inputs[0] == "branch":
        # A branch is computed from the stream that skips it, hence later; a sum of two embeddings may go either way.
        first, second = (made.get(value, -1) if value is not None else -1 for value in node.inputs[:2])
        inputs = inputs if first >= second else ("skip", "branch", *inputs[2:])
    given = {slot for slot, value in zip(inputs, node.inputs, strict=False) if value is not None}
    attributes = tuple(attr for name, attr in node.attributes.items() if name != "epsilon")
    steps = tuple(form.steps(node, given | _read_slots(node, form), opset))
    return Fusion(node.op_type, inputs, form.outputs, len(node.outputs), attributes, steps)


def _take_apart(fused: ir.Node, fusion: Fusion, key: str, names: _Names) -> list[ir.Node]:
    """The nodes of the steps, in the place of a fused node."""
    graph = fused.graph
    assert graph is not None
    slots = dict(zip_longest(fusion.inputs, fused.inputs))
    epsilon = _attributes(epsilon=fused.attributes.get_float("epsilon", _EPSILON))
    nodes = []
    for step in fusion.steps:
        is_last = step.output == "output"
        is_norm = is_last and step.op_type.endswith("Normalization")
        node = ir.Node(
            "",
            step.op_type,
            [slots[slot] for slot in step.inputs],
            {**step.attributes, **(epsilon if is_norm else {})},
            name=fused.name if is_last else names.fresh(f"{fused.name or fused.op_type}/{step.output}"),
            doc_string=fused.doc_string,
            metadata_props={**fused.metadata_props, FUSED: f"{key}:{step.output}"},
        )
        node.outputs[0].name = names.fresh(f"{_name(fused.outputs[0])}/{step.output}")
        slots[step.output] = node.outputs[0]
        nodes.append(node)
    graph.insert_before(fused, nodes)
    for slot, old in zip(fusion.outputs, fused.outputs, strict=False):
        new = slots.get(slot)
        if new is not None and _is_read(old):
            _stand_in(new, old)
    graph.remove(fused, safe=True)
    return nodes


def _fuse(graph: ir.Graph, fusions: Mapping[str, Fusion]) -> None:
    marked: dict[str, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if FUSED in node.metadata_props:
            marked[node.metadata_props[FUSED]].append(node)
    for mark, nodes in marked.items():
        key, _, slot = mark.partition(":")
        fusion = fusions.get(key.partition(".")[0])
        if fusion is None or slot != "output":
            continue
        for last in nodes:
            match = _Match(fusion, key, marked)
            if match.finds(last):
                _put_together(graph, last, match)
    if marked:
        graph.sort()  # a reader of the sum may have stood between the sum and the norm


class _Match:
    """Whether the nodes of a fusion still are what they were, and which value fills which slot."""

    def __init__(self, fusion: Fusion, key: str, marked: Mapping[str, list[ir.Node]]) -> None:
        self.fusion, self.key, self.marked = fusion, key, marked
        self.steps = {step.output: step for step in fusion.steps}
        self.slots: dict[str, ir.Value | None] = {}

    def nodes(self) -> list[ir.Node]:
        """The nodes of the steps."""
        made = (self.slots[slot] for slot in self.steps)
        return [node for value in made if value is not None and (node := value.producer()) is not None]

    def finds(self, last: ir.Node) -> bool:
        """Follow the steps back from the last one."""
        if not self._binds("output", last.outputs[0]):
            return False
        for slot in self.steps:
            if slot not in self.slots and slot in self.fusion.outputs:  # nothing leads there from the last one
                found = self.marked.get(f"{self.key}:{slot}", [])
                if len(found) != 1 or not self._binds(slot, found[0].outputs[0]):
                    return False
        inner = self.steps.keys() - set(self.fusion.outputs)
        return self.slots.keys() >= self.steps.keys() and not any(self.is_read(slot) for slot in inner)

    def is_read(self, slot: str) -> bool:
        """Whether what fills a slot is read by another node, or is an output of the graph."""
        value, nodes = self.slots.get(slot), self.nodes()
        return value is not None and (value.is_graph_output() or any(user not in nodes for user in value.consumers()))

    def _binds(self, slot: str, value: ir.Value | None) -> bool:
        if slot in self.slots:
            return self.slots[slot] is value
        self.slots[slot] = value
        step = self.steps.get(slot)
        if step is None:
            return True
        node = None if value is None else value.producer()
        return (
            node is not None
            and node.metadata_props.get(FUSED) == f"{self.key}:{slot}"
            and (node.domain, node.op_type, len(node.inputs)) == ("", step.op_type, len(step.inputs))
            and all(
                name in node.attributes and _content(node.attributes[name]) == _content(attr)
                for name, attr in step.attributes.items()
            )
            and all(self._binds(name, value) for name, value in zip(step.inputs, node.inputs, strict=True))
        )


def _put_together(graph: ir.Graph, last: ir.Node, match: _Match) -> None:
    fusion = match.fusion
    read = [slot if match.is_read(slot) else "" for slot in fusion.outputs]
    inputs = [None if slot in match.steps else match.slots.get(slot) for slot in fusion.inputs]
    fused = ir.Node(
        _MICROSOFT,
        fusion.op_type,
        inputs[: _length(inputs)],
        [*fusion.attributes, *(attr for name, attr in last.attributes.items() if name == "epsilon")],
        num_outputs=max(fusion.declared, _length(read)),
        name=last.name,
        doc_string=last.doc_string,
        metadata_props=dict(last.metadata_props),
    )
    for new in fused.outputs:
        new.name = ""
    unread = f"{_name(last.outputs[0])}/{fusion.outputs[len(fused.outputs) - 1]}"  # without a name it is cut off
    fused.outputs[-1].name = _unused(graph, unread, match.nodes())
    graph.insert_before(last, fused)
    for new, slot in zip(fused.outputs, read, strict=False):
        old = match.slots.get(slot)
        if old is not None:
            _stand_in(new, old)
    graph.remove(match.nodes(), safe=True)


def _unused(graph: ir.Graph, name: str, leaving: Iterable[ir.Node]) -> str:
    """The name, or one like it that no value has but those of nodes that are leaving: a clone may hold it."""
    gone = set(leaving)
    taken = {_name(value) for node in graph if node not in gone for value in node.outputs}
    while name in taken:
        name += "_"
    return name


# Transposes in a row


def _fold_transposes(graph: ir.Graph) -> None:
    """Let what a fused product did to an operand be one Transpose with the one before it, as it is elsewhere."""
    for second in list(graph):
        value = second.inputs[0] if second.op_type == "Transpose" and FUSED in second.metadata_props else None
        first = value.producer() if value is not None else None
        if value is None or first is None or first.op_type != "Transpose" or FUSED in first.metadata_props:
            continue
        axes = first.attributes.get_ints("perm", ())
        if not axes or first.graph is not graph:
            continue
        second.metadata_props[FOLDED] = json.dumps([axes, first.name, value.name])
        then = second.attributes.get_ints("perm", ())
        second.attributes["perm"] = ir.AttrInt64s("perm", [axes[i] for i in then])
        second.replace_input_with(0, first.inputs[0])
        graph.remove(second)
        graph.insert_before(first, second)
        if not _is_read(value):
            graph.remove(first, safe=True)


def _unfold_transposes(graph: ir.Graph) -> None:
    folded = [node for node in graph if FOLDED in node.metadata_props]
    names = _Names(graph)
    for second in folded:
        axes, name, output = json.loads(second.metadata_props.pop(FOLDED))
        both = second.attributes.get_ints("perm", ())
        second.attributes["perm"] = ir.AttrInt64s("perm", [axes.index(i) for i in both])
        (given,) = second.inputs
        assert given is not None
        others = (n for n in given.consumers() if n.op_type == "Transpose" and n is not second and n not in folded)
        first = next((n for n in others if list(n.attributes.get_ints("perm", ())) == axes), None)
        if first is None:
            first = ir.node("Transpose", [given], {"perm": axes}, name=names.fresh(name))
            first.outputs[0].name = names.fresh(output)
            graph.insert_before(second, first)
        second.replace_input_with(0, first.outputs[0])


def _length(slots: Sequence[ir.Value | str | None]) -> int:
    """How many there are without the empty ones at the end."""
    return max((i for i, slot in enumerate(slots, 1) if slot), default=0)
