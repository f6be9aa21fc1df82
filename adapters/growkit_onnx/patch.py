"""The integers of a grown graph: predicted, executed, and patched only where they differ.

What every axis will measure is known before anything runs. The grown graph is run without data, node by node; where a
node would give another shape, or cut elsewhere, its operand gets a constant of its own: exporters share one constant
between many nodes, and between meanings. Numbers that depend on the inputs stay computed. Scales stay what they are; a
number that the file computes from a size that grows is put down as what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from math import sqrt
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from growkit_onnx.execute import Executor
from growkit_onnx.infer import Scene, same_in_all
from growkit_onnx.names import Names
from growkit_onnx.operation import as_numpy, as_torch
from growkit_onnx.operators import constant
from growkit_onnx.rules import CONTRIB
from growkit_specs import GrowkitError, InvalidTarget
from growkit_specs.layout import Axis, Concatenation, axis_size, product

Patcher = Callable[["Resizing", ir.Node], None]

ON_MISMATCH: dict[tuple[str, str], Patcher] = {}
"""Patchers of operators whose operands say the shape of what they give."""

ALWAYS: dict[tuple[str, str], Patcher] = {}
"""Patchers of operators that may give the right shape and the wrong entries."""


def patches(table: dict[tuple[str, str], Patcher], *names: str, domain: str = "") -> Callable[[Patcher], Patcher]:
    """Registers the patcher of some operators."""

    def registered(function: Patcher) -> Patcher:
        table.update({(domain, name): function for name in names})
        return function

    return registered


class Resizing:
    """A graph on its way to other sizes.

    Args:
        graph: The graph, deepened, its weights those of the target; patched in place.
        scene: The axes of the graph it was made of.
        names: Their names.
        sizes: The target's size of every named space.
        copies: For values of cloned blocks the values of the source they are copies of.
        inputs: The trial inputs of the source's runs.
        grown: The initializers that are weights of the model.
    """

    def __init__(
        self,
        graph: ir.Graph,
        scene: Scene,
        names: Names,
        sizes: Mapping[str, int],
        copies: Mapping[ir.Value, ir.Value],
        inputs: Sequence[Mapping[str, torch.Tensor]],
        grown: frozenset[ir.Value],
    ) -> None:
        self.graph, self.scene, self.names, self.copies = graph, scene, names, copies
        self.opset = scene.opset
        self.count = 0
        self._taken = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
        self._taken.update(str(value.name) for node in graph for value in node.outputs)
        self._sizes = [
            {**sizes, **{leaf: leaf_sizes[r] for leaf, leaf_sizes in scene.unifier.spaces().items()}}
            for r in range(len(scene.runs))
        ]
        self._executor = executor = Executor(graph, device="meta")
        self.runs: list[dict[ir.Value, Any]] = [{} for _ in scene.runs]
        for r, run in enumerate(self.runs):
            for value in graph.initializers.values():
                if value in grown:
                    assert value.const_value is not None
                    run[value] = torch.empty(value.const_value.shape.numpy(), dtype=self._dtype(value), device="meta")
                elif self.source(value) in scene.runs[r] or value not in copies:
                    run[value] = executor.find(value)
            for value in graph.inputs:
                if value.name not in graph.initializers:
                    given = inputs[r][str(self.source(value).name)]
                    shape = self.predicted(value, r)
                    run[value] = given if tuple(given.shape) == shape else given.new_empty(shape)

    def _dtype(self, value: ir.Value) -> torch.dtype:
        return self.scene.runs[0][self.source(value)].dtype

    def patched(self) -> int:
        """Run the graph and patch it on the way.

        Returns:
            The number of patches.

        Raises:
            InvalidTarget: Where a node cannot give what it should at these sizes.
        """
        for node in list(self.graph):
            self._step(node)
        return self.count

    # --- looking up --------------------------------------------------------------------------------------------------

    def source(self, value: ir.Value) -> ir.Value:
        """The value of the source that a value is, or is a copy of."""
        return self.copies.get(value, value)

    def axes(self, value: ir.Value) -> tuple[Axis, ...]:
        """The axes of a value, as inferred for the source."""
        return self.scene.axes(self.source(value))

    def size(self, axis: Axis, run: int = 0) -> int:
        """What an axis measures in the target."""
        return axis_size(self.names.axis(axis), self._sizes[run])

    def predicted(self, value: ir.Value, run: int) -> tuple[int, ...]:
        """The shape of a value in the target."""
        return tuple(self.size(axis, run) for axis in self.axes(value))

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The entries of a value that are the same in every run; None where they are not, or not known."""
        return same_in_all(self.runs, value)

    # --- running -----------------------------------------------------------------------------------------------------

    def _step(self, node: ir.Node) -> None:
        key = (node.domain.replace("ai.onnx", ""), node.op_type)
        if key in ALWAYS:
            ALWAYS[key](self, node)
        given = self._try(node)
        if not self._fits(node, given) and key in ON_MISMATCH:
            ON_MISMATCH[key](self, node)
            given = self._try(node)
        if not self._fits(node, given):
            raise InvalidTarget(self._mismatch(node, given))
        assert given is not None
        for run, outputs in zip(self.runs, given, strict=True):
            run.update((value, t) for value, t in zip(node.outputs, outputs, strict=True) if t is not None)
        for value in node.outputs:
            self._keep_number(node, value)

    def _try(self, node: ir.Node) -> list[tuple[Any, ...]] | None:
        """What a node gives in every run; None where it does not run."""
        try:
            return [self._run(node, r) for r in range(len(self.runs))]
        except (GrowkitError, RuntimeError, ValueError, IndexError):
            return None

    def _run(self, node: ir.Node, r: int) -> tuple[Any, ...]:
        source = self.source(node.outputs[0]).producer()
        if source in self.scene.opaque:  # all it touches is what it was
            return tuple(self.scene.runs[r].get(self.source(value)) for value in node.outputs)
        if node.op_type == "Constant":
            return (self._executor.stored(constant(node), node.name or "a constant"),)
        return self._executor.run(node, [value if value is None else self.runs[r][value] for value in node.inputs])

    def _fits(self, node: ir.Node, given: Sequence[tuple[Any, ...]] | None) -> bool:
        return given is not None and all(
            tensor is None
            or self.source(value) not in self.scene.runs[r]
            or tuple(tensor.shape) == self.predicted(value, r)
            for r, outputs in enumerate(given)
            for value, tensor in zip(node.outputs, outputs, strict=True)
        )

    def _mismatch(self, node: ir.Node, given: Sequence[tuple[Any, ...]] | None) -> str:
        wanted = [list(self.predicted(value, 0)) for value in node.outputs if self.source(value) in self.scene.runs[0]]
        got = [list(tensor.shape) for tensor in given[0] if tensor is not None] if given is not None else "an error"
        return f"{node.op_type} ({node.name}) would give {got} in the larger graph; expected {wanted}"

    def _keep_number(self, node: ir.Node, value: ir.Value) -> None:
        """A float that the file computes from a size is a scale: it stays what it was."""
        source = self.source(value)
        if node.op_type == "Constant" or source not in self.scene.runs[0]:
            return
        before, now = self.scene.constant(source), self.constant(value)
        if before is None or now is None or before.dtype.kind not in "fV" or before.shape != now.shape:
            return
        if before.tobytes() != now.tobytes():
            number = self.initializer(f"{value.name}_before", before)
            value.replace_all_uses_with(number)
            self.count += 1

    # --- patching ----------------------------------------------------------------------------------------------------

    def initializer(self, name: str, entries: Any) -> ir.Value:
        """A new constant, whose value is known in every run."""
        array = np.asarray(entries)
        name = self._free(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor, type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        for run in self.runs:
            run[value] = as_torch(tensor, name)
        return value

    def _free(self, name: str) -> str:
        """A name that nothing has."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def replace_input(self, node: ir.Node, index: int, entries: Any) -> None:
        """Give a node a constant of its own for one input."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self.initializer(f"{node.name}_{index}", entries))
        self.count += 1

    def insert(self, before: ir.Node, op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """A new node before another one, run at once."""
        node = ir.node(op, inputs, attributes or None)
        (out,) = node.outputs
        out.name = node.name = self._free(f"{before.name}_{op.lower()}")
        out.type = inputs[0].type
        self.graph.insert_before(before, node)
        for r, run in enumerate(self.runs):
            (run[out],) = self._run(node, r)
        return out

    def replace_vector(self, node: ir.Node, index: int, wanted: Sequence[Sequence[int]]) -> None:
        """Give a node a shape operand: constants where the sizes are, what was computed where they depend on inputs.

        Args:
            node: The node.
            index: Which of its inputs.
            wanted: The entries in every run.
        """
        old = [[int(e) for e in np.asarray(run[node.inputs[index]]).reshape(-1)] for run in self.runs]  # type: ignore[index]
        found = [_entry(tuple(w[i] for w in wanted), tuple(o[i] for o in old)) for i in range(len(wanted[0]))]
        lost = found.count(None)
        if lost > 1 or (lost and (node.op_type != "Reshape" or -1 in found)):
            raise InvalidTarget(
                f"{node.op_type} ({node.name}): a size that depends on the inputs does not follow the growth"
            )
        entries = [-1 if entry is None else entry for entry in found]  # one size may be what the others leave
        if all(isinstance(entry, int) for entry in entries):
            return self.replace_input(node, index, np.array(entries, dtype=np.int64))
        pieces: list[ir.Value] = []
        operand = node.inputs[index]
        assert operand is not None
        for is_number, run in groupby(enumerate(entries), key=lambda pair: isinstance(pair[1], int)):
            group = list(run)
            if is_number:
                numbers = np.array([entry for _, entry in group], dtype=np.int64)
                pieces.append(self.initializer(f"{node.name}_sizes", numbers))
                continue
            for i, ratio in group:
                assert isinstance(ratio, Fraction)
                at = self.initializer(f"{node.name}_axis", np.array([i], dtype=np.int64))
                piece = self.insert(node, "Gather", [operand, at], axis=0)
                for op, by in (("Mul", ratio.numerator), ("Div", ratio.denominator)):
                    if by != 1:
                        factor = self.initializer(f"{node.name}_factor", np.array([by], dtype=np.int64))
                        piece = self.insert(node, op, [piece, factor])
                pieces.append(piece)
        joined = self.insert(node, "Concat", pieces, axis=0) if len(pieces) > 1 else pieces[0]
        node.replace_input_with(index, joined)
        self.count += 1
        return None

    def moved(self, axis: Axis, offset: int) -> int:
        """Where what stands at ``offset`` of an axis stands in the target.

        Raises:
            InvalidTarget: Where that is inside of a space that grows.
        """
        unifier = self.scene.unifier
        if offset == 0 or self.size(axis) == unifier.sizes(axis)[0]:
            return offset
        if offset >= unifier.sizes(axis)[0]:
            return offset - unifier.sizes(axis)[0] + self.size(axis)
        factors = unifier.factors(axis)
        if len(factors) > 1:
            tail = product(*factors[1:])
            lead, rest = divmod(offset, unifier.sizes(tail)[0])
            if rest == 0:
                return self.moved(factors[0], lead) * self.size(tail)
        elif isinstance(factors[0], Concatenation):
            before, done = 0, 0
            for segment in factors[0].segments:
                size = unifier.sizes(segment)[0]
                if offset <= before + size:
                    return done + self.moved(segment, offset - before)
                before, done = before + size, done + self.size(segment)
        raise InvalidTarget(f"a cut at {offset} goes through a space that grows")


def _entry(wanted: tuple[int, ...], old: tuple[int, ...]) -> int | Fraction | None:
    """One entry of a shape in every run: a number, or what it was times a fraction; None where it is neither."""
    if len(set(wanted)) == 1:
        return wanted[0]
    if set(old) in ({0}, {-1}, {1}):  # the size of the input's own axis
        return old[0]
    ratios = {Fraction(w, o) if o else None for w, o in zip(wanted, old, strict=True)}
    return ratios.pop() if len(ratios) == 1 else None


# --- shapes as operands --------------------------------------------------------------------------------------------


@patches(ON_MISMATCH, "Reshape", "Expand")
def _shape(at: Resizing, node: ir.Node) -> None:
    at.replace_vector(node, 1, [at.predicted(node.outputs[0], r) for r in range(len(at.runs))])


@patches(ON_MISMATCH, "ConstantOfShape")
def _filled(at: Resizing, node: ir.Node) -> None:
    at.replace_vector(node, 0, [at.predicted(node.outputs[0], r) for r in range(len(at.runs))])


@patches(ON_MISMATCH, "Tile")
def _tile(at: Resizing, node: ir.Node) -> None:
    assert node.inputs[0] is not None
    shapes = [(at.predicted(node.outputs[0], r), at.predicted(node.inputs[0], r)) for r in range(len(at.runs))]
    at.replace_vector(node, 1, [[o // i for o, i in zip(out, given, strict=True)] for out, given in shapes])


@patches(ON_MISMATCH, "Split")
def _split(at: Resizing, node: ir.Node) -> None:
    axis = node.attributes.get_int("axis", 0)
    sizes = [at.predicted(out, 0)[axis] for out in node.outputs]
    node.attributes.pop("num_outputs", None)
    if at.opset >= 13:
        at.replace_input(node, 1, np.array(sizes, dtype=np.int64))
    else:
        node.attributes["split"] = ir.AttrInt64s("split", sizes)
        at.count += 1


# --- cuts ----------------------------------------------------------------------------------------------------------


@patches(ALWAYS, "Slice")
def _slice(at: Resizing, node: ir.Node) -> None:
    source = at.source(node.outputs[0]).producer()
    assert source is not None
    assert node.inputs[0] is not None
    cuts = at.scene.slices(source)
    axes = at.axes(node.inputs[0])
    given = at.scene.axes(at.source(node.outputs[0]))
    starts, ends = {}, {}
    for axis, (start, step) in cuts.items():
        unifier = at.scene.unifier
        if (
            0 in unifier.sizes(given[axis])
            or start is None
            or step < 0
            or unifier.is_dynamic(axes[axis])
            or at.size(axes[axis]) == unifier.sizes(axes[axis])[0]
        ):
            continue
        if step > 1:
            starts[axis], ends[axis] = start, at.size(axes[axis])
            continue
        starts[axis] = at.moved(axes[axis], start)
        ends[axis] = at.moved(axes[axis], start + unifier.sizes(given[axis])[0])
    if starts:
        _cut(at, node, list(cuts), starts, ends)


def _cut(at: Resizing, node: ir.Node, order: Sequence[int], starts: Mapping[int, int], ends: Mapping[int, int]) -> None:
    """Let a Slice start and end elsewhere, if it does not yet."""
    assert node.inputs[0] is not None
    sizes = at.predicted(node.inputs[0], 0)
    for index, name, wanted in ((1, "starts", starts), (2, "ends", ends)):
        told = node.attributes.get_ints(name, None) if len(node.inputs) == 1 else at.constant(node.inputs[index])
        if told is None:
            raise InvalidTarget(f"Slice ({node.name}) cuts a space that grows where the inputs say")
        entries = [int(entry) for entry in told]
        effective = [e + sizes[axis] if e < 0 else min(e, sizes[axis]) for e, axis in zip(entries, order, strict=True)]
        new = [wanted.get(axis, entry) for axis, entry in zip(order, entries, strict=True)]
        if all(e == wanted.get(axis, e) for e, axis in zip(effective, order, strict=True)):
            continue
        if len(node.inputs) == 1:
            node.attributes[name] = ir.AttrInt64s(name, new)
            at.count += 1
        else:
            at.replace_input(node, index, np.array(new, dtype=told.dtype if isinstance(told, np.ndarray) else np.int64))


@patches(ALWAYS, "Gather", "GatherND")
def _gather(at: Resizing, node: ir.Node) -> None:
    data, indices = node.inputs
    assert data is not None
    assert indices is not None
    axis = at.axes(data)[node.attributes.get_int("axis" if node.op_type == "Gather" else "batch_dims", 0)]
    chosen = at.constant(indices)
    if chosen is None or chosen.size != 1 or at.scene.is_weight(at.source(data)) or at.scene.unifier.is_dynamic(axis):
        return
    if at.scene.is_only_measured(at.source(node.outputs[0])):
        return
    old = int(chosen.reshape(-1)[0])
    size = at.scene.unifier.sizes(axis)[0]
    new = at.moved(axis, old % size)
    if new % at.size(axis) != old % at.size(axis):
        at.replace_input(node, 1, np.full_like(chosen, new))


@patches(ALWAYS, "Div")
def _quotient(at: Resizing, node: ir.Node) -> None:
    """A size divided by a number of heads: where that leaves a rest now, the number grew as the size did."""
    dividend, divisor = node.inputs
    by = at.constant(divisor)
    if dividend is None or by is None or by.size != 1 or by.dtype.kind != "i" or at.runs[0][dividend].is_meta:
        return
    before = [as_numpy(run[at.source(dividend)]).reshape(-1) for run in at.scene.runs]
    now = [as_numpy(run[dividend]).reshape(-1) for run in at.runs]
    number = int(by.reshape(-1)[0])
    if any(each.size != 1 for each in before) or not number or not any(int(n[0]) % number for n in now):
        return
    ratios = {Fraction(int(n[0]), int(b[0])) if b[0] else None for n, b in zip(now, before, strict=True)}
    ratio = ratios.pop()
    if (
        not ratios
        and ratio is not None
        and (number * ratio).denominator == 1
        and not any(b[0] % number for b in before)
    ):
        at.replace_input(node, 1, np.full_like(by, int(number * ratio)))


# --- attributes ----------------------------------------------------------------------------------------------------


@patches(ALWAYS, "Attention")
@patches(ALWAYS, "Attention", "MultiHeadAttention", "GroupQueryAttention", domain=CONTRIB)
def _heads(at: Resizing, node: ir.Node) -> None:
    source = at.source(node.outputs[0]).producer()
    found = next((each for each in at.scene.attentions if each.node is source), None)
    if found is None:
        return
    counts = {"num_heads": found.heads, "q_num_heads": found.heads, "kv_num_heads": found.kv_heads}
    for name, axis in counts.items():
        if name in node.attributes and node.attributes.get_int(name) != at.size(axis):
            node.attributes[name] = ir.AttrInt64(name, at.size(axis))
            at.count += 1
    head_dim = at.scene.unifier.sizes(found.scores)[0]
    if at.size(found.scores) != head_dim and not node.attributes.get_float("scale", 0.0):
        node.attributes["scale"] = ir.AttrFloat32("scale", 1 / sqrt(head_dim))
        at.count += 1
    if "qkv_hidden_sizes" in node.attributes:
        heads = at.size(found.heads)
        sizes = [heads * at.size(dim) for dim in (found.scores, found.scores, found.values)]
        if tuple(node.attributes.get_ints("qkv_hidden_sizes", ())) != tuple(sizes):
            node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", sizes)
            at.count += 1


@patches(ALWAYS, "RotaryEmbedding")
@patches(ALWAYS, "RotaryEmbedding", domain=CONTRIB)
def _rotary(at: Resizing, node: ir.Node) -> None:
    count = node.attributes.get_int("num_heads", 0)
    assert node.inputs[0] is not None
    if not count or len(at.axes(node.inputs[0])) == 4:
        return
    heads, _ = at.scene.unifier.split_product(at.axes(node.inputs[0])[-1], (count,) * len(at.runs))
    if at.size(heads) != count:
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", at.size(heads))
        at.count += 1
