"""The repeated blocks of a graph, found by their structure, and deepening: the graph with more of them.

The residual stream is followed from where it begins. A value through which all of it passes is a *cut*: what lies
between two neighbouring cuts is a *segment* (half a layer, say), and segments that read the same, over and over, are a
stack of blocks. No name of a node, a weight or an architecture takes part in this; names only follow, afterwards.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableSequence, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, pairwise
from typing import Any

import onnx_ir as ir

from growkit_onnx.rules import MEASURES
from growkit_specs import GrowkitError

FUSED = "growkit.fused"  # the metadata key of what was one node; a copy carries the same mark

# Their inputs may come in any order.
_COMMUTATIVE = frozenset({"Add", "Mul"})

# Attributes that optimisers write out or leave out, whatever the block, and that say nothing of its structure.
_IMPLIED = frozenset({"stash_type", "allowzero"})


@dataclass(frozen=True)
class Block:
    """One block of a stack.

    What stands at the same place of ``weights``, ``inputs`` or ``outputs`` plays the same role in every block.

    Attributes:
        nodes: Its nodes, each after those that it reads.
        entry: The stream that enters.
        exit: The stream that leaves: the next block's entry.
        weights: Its own floating point initializers.
        inputs: The graph's inputs that it alone reads, such as its cached keys and values.
        outputs: The graph's outputs that every block of the stack makes one of.
    """

    nodes: tuple[ir.Node, ...]
    entry: ir.Value
    exit: ir.Value
    weights: tuple[ir.Value, ...]
    inputs: tuple[ir.Value, ...] = ()
    outputs: tuple[ir.Value, ...] = ()

    @property
    def initializers(self) -> tuple[ir.Value, ...]:
        """Every initializer that only this block reads, whatever its type."""
        own = set(self.nodes)
        read = (v for node in self.nodes for v in node.inputs if v is not None and v.is_initializer())
        return tuple(dict.fromkeys([*self.weights, *(v for v in read if all(use.node in own for use in v.uses()))]))

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """Every value that is the block's own: inputs, initializers, and what its nodes make."""
        return *self.inputs, *self.initializers, *(value for node in self.nodes for value in node.outputs)


@dataclass(frozen=True)
class Blocks:
    """One stack: blocks in a row, each of which reads what the one before it gives.

    Attributes:
        blocks: At least two blocks, first to last.
        side: What the blocks read besides the stream and their own values: masks, rotations, encoder states, sizes.
    """

    blocks: tuple[Block, ...]
    side: tuple[ir.Value, ...]


def find_stacks(graph: ir.Graph, carries: Callable[[ir.Value], bool]) -> tuple[Blocks, ...]:
    """Find the stacks of repeated blocks.

    Blocks are alike if they have the same operators and attributes, wired in the same way, over weights of the same
    shapes. What a block reads from outside doesn't tell blocks apart: layers that alternate between two masks are one
    stack. What several blocks read belongs to none of them, and a block that differs stays outside.

    Args:
        graph: The graph, its functions inlined and every initializer read once.
        carries: Whether a value lives in the residual stream's space.

    Returns:
        The stacks in the order of their first nodes. A block that isn't repeated isn't found.
    """
    nodes = tuple(graph)
    found = [stack for chain in _chains(graph, nodes, carries) for stack in _stacks_of(nodes, chain)]
    found.sort(key=_size, reverse=True)
    taken: set[ir.Node] = set()
    chosen = []
    for stack in found:
        own = {node for block in stack.blocks for node in block.nodes}
        if taken.isdisjoint(own):
            taken |= own
            chosen.append(stack)
    order = {node: position for position, node in enumerate(nodes)}
    return tuple(sorted(chosen, key=lambda stack: order[stack.blocks[0].nodes[0]]))


def _size(stack: Blocks) -> int:
    return sum(_elements(weight) for block in stack.blocks for weight in block.weights)


def _elements(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0


# --- the stream, and the values through which all of it passes -------------------------------------------------------


def _chains(
    graph: ir.Graph, nodes: Sequence[ir.Node], carries: Callable[[ir.Value], bool]
) -> Iterator[tuple[ir.Value, ...]]:
    """The cuts from each source of the stream to each output of the graph; chains that add no two segments are left."""
    seen: set[tuple[ir.Value, ir.Value]] = set()
    for source in _sources(graph, nodes, carries):
        above = _dominators(nodes, source)
        chains = [tuple(filter(carries, _path(above, output))) for output in graph.outputs if output in above]
        for cuts in sorted(chains, key=len, reverse=True):
            if len(set(pairwise(cuts)) - seen) >= 2:
                seen.update(pairwise(cuts))
                yield cuts


def _sources(graph: ir.Graph, nodes: Sequence[ir.Node], carries: Callable[[ir.Value], bool]) -> list[ir.Value]:
    """The first values that carry a stream: those that no other such value flows into."""
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    sources = [value for value in inputs if carries(value)]
    live, downstream = set(inputs), set(sources)
    for node in nodes:
        if live.isdisjoint(node.inputs):
            continue
        live.update(node.outputs)
        if node.op_type in MEASURES:
            continue
        if downstream.isdisjoint(node.inputs):
            sources.extend(begun := [value for value in node.outputs if carries(value)])
            downstream.update(begun)
        else:
            downstream.update(node.outputs)
    return sources


def _dominators(nodes: Sequence[ir.Node], source: ir.Value) -> dict[ir.Value, ir.Value | None]:
    """For every value that the source flows into, the last value that all of that flow passes through before it."""
    above: dict[ir.Value, ir.Value | None] = {source: None}
    depth = {source: 0}

    def meet(a: ir.Value, b: ir.Value) -> ir.Value:
        while a is not b:
            deeper = a if depth[a] > depth[b] else b
            higher = above[deeper]
            assert higher is not None, "the source lies above every value"
            a, b = higher, b if deeper is a else a
        return a

    for node in nodes:
        reads = [value for value in node.inputs if value is not None and value in above]
        if not reads or node.op_type in MEASURES:
            continue
        last = reads[0]
        for value in reads[1:]:
            last = meet(last, value)
        for output in node.outputs:
            above[output], depth[output] = last, depth[last] + 1
    return above


def _path(above: Mapping[ir.Value, ir.Value | None], value: ir.Value) -> list[ir.Value]:
    path = []
    step: ir.Value | None = value
    while step is not None:
        path.append(step)
        step = above[step]
    return path[::-1]


# --- what a part of the graph says, in words that don't depend on where it stands ------------------------------------


@dataclass(frozen=True)
class _Part:
    """Nodes between two cuts, with all that only they make use of.

    Attributes:
        entry: The cut before.
        exit: The cut after.
        nodes: The nodes, each after those that it reads.
        gauges: The nodes of the whole graph that only measure.
    """

    entry: ir.Value
    exit: ir.Value
    nodes: tuple[ir.Node, ...]
    gauges: Set[ir.Node]

    def owns(self, value: ir.Value) -> bool:
        """Whether only this part reads the value; who measures it doesn't count."""
        own = set(self.nodes)
        return all(use.node in own or use.node in self.gauges for use in value.uses())


@dataclass(frozen=True)
class _Reading:
    """A part, read from its exit backwards.

    Attributes:
        words: Equal for parts that are built alike.
        values: The values that words stand for, in the words' order.
        leaves: What was read from elsewhere, or from what holds no weight, in the order of reading.
    """

    words: tuple[Hashable, ...]
    values: tuple[ir.Value, ...]
    leaves: tuple[ir.Value, ...]


def _parts(nodes: Sequence[ir.Node], cuts: Sequence[ir.Value]) -> list[_Part]:
    """The parts between neighbouring cuts."""
    positions = {node: position for position, node in enumerate(nodes)}
    owners: dict[ir.Node, int] = {}
    if (stem := cuts[0].producer()) is not None:
        owners[stem] = -1  # what leads up to the first cut belongs to none of the parts
    flow = {cuts[0]}
    for node in nodes:
        if not flow.isdisjoint(node.inputs) and node.op_type not in MEASURES:
            flow.update(node.outputs)
    for index, (entry, exit) in enumerate(pairwise(cuts)):
        owners.update(dict.fromkeys(_between(entry, exit, flow), index))
    gauges = _gauges(nodes)
    for node in reversed(nodes):
        if node not in owners and not any(value.is_graph_output() for value in node.outputs):
            users = [use.node for value in node.outputs for use in value.uses()]
            serves = {owners.get(user) for user in users if user not in gauges} or set(map(owners.get, users))
            if len(serves) == 1 and (owner := serves.pop()) is not None:
                owners[node] = owner
    members: dict[int, list[ir.Node]] = defaultdict(list)
    for node, owner in sorted(owners.items(), key=lambda item: positions[item[0]]):
        members[owner].append(node)
    return [_Part(entry, exit, tuple(members[i]), gauges) for i, (entry, exit) in enumerate(pairwise(cuts))]


def _gauges(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """The nodes that measure a value, or make one that is only measured."""
    gauges: set[ir.Node] = set()
    for node in reversed(nodes):
        users = [use.node for value in node.outputs for use in value.uses()]
        shown = any(value.is_graph_output() for value in node.outputs)
        if node.op_type in MEASURES or (users and not shown and gauges.issuperset(users)):
            gauges.add(node)
    return gauges


def _between(entry: ir.Value, exit: ir.Value, flow: Set[ir.Value]) -> set[ir.Node]:
    """The nodes through which the stream flows from the entry to the exit."""
    found: set[ir.Node] = set()
    pending = [exit]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value is not entry and node is not None and node not in found:
            found.add(node)
            pending.extend(v for v in node.inputs if v is not None and v in flow)
    return found


def _told(part: _Part) -> dict[ir.Value, Hashable]:
    """The values that words stand for, with a word for those that no node makes: entry, weights and graph inputs.

    What has nothing of these in it (shapes to reshape to, scales, masks) is left to be a leaf: exporters and
    optimisers compute it in one way here and in another there, once for all blocks or in each.
    """
    told: dict[ir.Value, Hashable] = {part.entry: "entry"}
    for node in part.nodes:
        for value in node.inputs:
            if value is not None and value not in told and (word := _word(value)) and part.owns(value):
                told[value] = word
        if node.op_type not in MEASURES and any(value in told for value in node.inputs if value is not None):
            told.update((value, None) for value in node.outputs if value not in told)
    return told


def _word(value: ir.Value) -> Hashable:
    tensor = value.const_value
    if value.is_initializer() and tensor is not None:
        return (tensor.dtype, *tensor.shape) if tensor.dtype.is_floating_point() and tensor.size > 1 else None
    return "input" if value.is_graph_input() else None


def _read(part: _Part, roots: Sequence[ir.Value] = ()) -> _Reading:
    """Read a part from its exit, then from further roots."""
    reader = _Reader(part)
    ends = [reader.read(root) for root in (part.exit, *roots)]
    return _Reading((*reader.words, *ends), tuple(reader.places), tuple(reader.leaves))


class _Reader:
    """Reads a part backwards, each value once: its inputs in order, then itself."""

    def __init__(self, part: _Part) -> None:
        self.entry = part.entry
        self.told = _told(part)
        self.places: dict[ir.Value, int] = {}
        self.words: list[Hashable] = []
        self.leaves: list[ir.Value] = []

    def read(self, root: ir.Value) -> int:
        """Read what leads to a value; returns the place of its word."""
        root = self._seen(root)
        pending = [root]
        while pending:
            value = pending[-1]
            node = value.producer() if value is not self.entry else None
            inputs, attributes = self._wiring(node) if node is not None else ((), {})
            waiting = [v for v in inputs if v is not None and v in self.told and v not in self.places]
            if waiting and value not in self.places:
                pending.extend(reversed(waiting))
                continue
            pending.pop()
            if value not in self.places:
                self.words.append(self.told[value] if node is None else self._word(node, inputs, attributes))
                for made in node.outputs if node is not None else (value,):
                    self.places[made] = len(self.places)
        return self.places[root]

    def _word(self, node: ir.Node, inputs: Sequence[ir.Value | None], attributes: Mapping[str, str]) -> Hashable:
        self.leaves += [value for value in inputs if value is not None and value not in self.told]
        wires = ["none" if v is None else self.places[v] if v in self.told else "leaf" for v in inputs]
        if node.op_type in _COMMUTATIVE:
            wires.sort(key=str)
        told = tuple(sorted(attributes.items()))
        return node.domain, node.op_type, node.overload, told, tuple(wires), len(node.outputs)

    def _seen(self, value: ir.Value) -> ir.Value:
        """The value behind one that is only passed on: exporters join lists that have a single tensor in them."""
        while value is not self.entry and (node := value.producer()) is not None:
            if node.op_type != "Concat" or len(node.inputs) != 1 or node.inputs[0] is None:
                break
            value = node.inputs[0]
        return value

    def _wiring(self, node: ir.Node) -> tuple[tuple[ir.Value | None, ...], dict[str, str]]:
        """A node's inputs and attributes, transpositions in a row being one: optimisers merge some and not others."""
        inputs = tuple(self._seen(value) if value is not None else None for value in node.inputs)
        if node.op_type in _COMMUTATIVE:  # a bias may be added to a product, or a product to a bias
            inputs = tuple(sorted(inputs, key=lambda value: value is None or value.producer() is None))
        attributes = {name: _attribute(a) for name, a in node.attributes.items() if name not in _IMPLIED}
        if (order := _transposed(node)) is None:
            return inputs, attributes
        value = inputs[0]
        while value is not None and value is not self.entry and (inner := _transposed(value.producer())) is not None:
            order = [inner[axis] for axis in order]
            node = value.producer() or node
            value = self._seen(node.inputs[0]) if node.inputs[0] is not None else None
        return (value,), {"perm": str(order)}


def _transposed(node: ir.Node | None) -> list[int] | None:
    """The order in which a transposition puts the axes, if the node is one."""
    attribute = node.attributes.get("perm") if node is not None and node.op_type == "Transpose" else None
    return list(attribute.as_ints()) if attribute is not None else None


def _attribute(attribute: ir.Attr) -> str:
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return f"{value.dtype} {value.shape}"
    return f"{attribute.type} {value}"


# --- repetition ------------------------------------------------------------------------------------------------------


def _stacks_of(nodes: Sequence[ir.Node], chain: Sequence[ir.Value]) -> Iterator[Blocks]:
    """The stacks among the segments of a chain: the largest, then what lies before and behind it."""
    parts = _parts(nodes, chain)
    readings = [_read(part) for part in parts]
    sizes = [sum(map(_elements, reading.values)) for reading in readings]
    heads = [_is_head(part) for part in parts]
    for index in reversed(range(len(parts) - 1)):
        if not sizes[index]:  # a cast, say: it comes before what it prepares
            heads[index] = heads[index + 1]

    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(reading.words, len(numbers)) for reading in readings]

    def search(low: int, high: int) -> Iterator[Blocks]:
        run = _best_run(kinds[low:high], sizes[low:high], heads[low:high])
        if run is None:
            return
        start, period, count = run[0] + low, run[1], run[2]
        stop = start + period * count
        yield from search(low, start)
        yield from _stack(nodes, chain[start : stop + 1 : period])
        yield from search(stop, high)

    yield from search(0, len(parts))


def _is_head(part: _Part) -> tuple[bool, bool]:
    """How much a segment looks like the beginning of a block: attention comes first, and a block is a detour."""
    attends = any(node.op_type == "Softmax" or "Attention" in node.op_type for node in part.nodes)
    own = set(part.nodes)
    return attends, len({use.node for use in part.entry.uses() if use.node in own}) > 1


def _best_run(
    kinds: Sequence[int], sizes: Sequence[int], heads: Sequence[tuple[bool, bool]]
) -> tuple[int, int, int] | None:
    """The start, period and count of the repetition that covers most weights, by the shortest period.

    Where whole periods can be laid in several ways, one that starts as blocks do wins, then the earliest.
    """
    best: tuple[Hashable, ...] | None = None
    run = None
    for period in range(1, len(kinds) // 2 + 1):
        for low, high in _equal_stretches(kinds, period):
            count = (high - low) // period
            for start in range(low, high - count * period + 1):
                covered = sum(sizes[start : start + count * period])
                score = (covered, -period, heads[start], -start)
                if covered and (best is None or score > best):
                    best, run = score, (start, period, count)
    return run


def _equal_stretches(kinds: Sequence[int], period: int) -> Iterator[tuple[int, int]]:
    """The longest stretches, of at least two periods, in which every kind recurs one period later."""
    low = 0
    for position in range(len(kinds) - period + 1):
        if position == len(kinds) - period or kinds[position] != kinds[position + period]:
            if position - low >= period:
                yield low, position + period
            low = position + 1


def _stack(nodes: Sequence[ir.Node], cuts: Sequence[ir.Value]) -> Iterator[Blocks]:
    """The stack whose blocks lie between the cuts, if they are alike as a whole, too."""
    parts = _parts(nodes, cuts)
    readings = [_read(part) for part in parts]
    if not _are_alike(readings):
        return
    parts = _with_shared_roles(parts, readings)
    parts, roots = _with_outputs(nodes, parts)
    readings = [_read(part, own) for part, own in zip(parts, roots, strict=True)]
    if not _are_alike(readings):
        return
    roles = _roles(parts, readings)
    blocks = [
        _block(part, values, own) for part, values, own in zip(parts, zip(*roles, strict=True), roots, strict=True)
    ]
    yield Blocks(tuple(_in_order_of_inputs(blocks)), _side(blocks))


def _are_alike(readings: Sequence[_Reading]) -> bool:
    return all(reading.words == readings[0].words for reading in readings)


def _with_shared_roles(parts: Sequence[_Part], readings: Sequence[_Reading]) -> list[_Part]:
    """The parts less what only some of them have to themselves: what all have at a place is theirs, or none's."""
    bodies = [set(part.nodes) for part in parts]
    own: list[set[ir.Node]] = [set() for _ in parts]
    for part, mine in zip(parts, own, strict=True):
        told = _told(part)
        _add_makers(part.exit, {node for node in part.nodes if not told.keys().isdisjoint(node.outputs)}, mine)
    for leaves in zip(*(reading.leaves for reading in readings), strict=True):
        if all(leaf.producer() in body for leaf, body in zip(leaves, bodies, strict=True)):
            for leaf, body, mine in zip(leaves, bodies, own, strict=True):
                _add_makers(leaf, body, mine)
    return [
        replace(part, nodes=tuple(n for n in part.nodes if n in mine)) for part, mine in zip(parts, own, strict=True)
    ]


def _add_makers(value: ir.Value, body: Set[ir.Node], found: set[ir.Node]) -> None:
    """Add the nodes of the body that a value is made by."""
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is not None and node in body and node not in found:
            found.add(node)
            pending.extend(v.producer() for v in node.inputs if v is not None)


def _with_outputs(nodes: Sequence[ir.Node], parts: Sequence[_Part]) -> tuple[list[_Part], list[tuple[ir.Value, ...]]]:
    """The parts with what leads from them to outputs of the graph that all of them have, and these outputs."""
    homes: dict[ir.Value, int | None] = {}
    for index, part in enumerate(parts):
        homes.update((value, index) for node in part.nodes for value in node.outputs)
    for node in nodes:
        reads = {homes[value] for value in node.inputs if value is not None and value in homes}
        if reads and node.op_type not in MEASURES:
            home = reads.pop() if len(reads) == 1 else None
            for value in node.outputs:
                homes.setdefault(value, home)
    graph = nodes[0].graph
    found: list[dict[Hashable, list[tuple[_Part, ir.Value]]]] = [defaultdict(list) for _ in parts]
    for output in graph.outputs if graph is not None else ():
        if (home := homes.get(output)) is not None:
            longer = _reaching(parts[home], output, {v for v, index in homes.items() if index == home}, nodes)
            found[home][_read(longer, (output,)).words].append((longer, output))
    shared = [words for words in found[0] if len({len(of.get(words, ())) for of in found}) == 1]
    ends = [[end for words in shared for end in of[words]] for of in found]
    longest = [
        _merged(part, [longer for longer, _ in own], nodes) if own else part
        for part, own in zip(parts, ends, strict=True)
    ]
    return longest, [tuple(output for _, output in own) for own in ends]


def _reaching(part: _Part, output: ir.Value, values: Set[ir.Value], nodes: Sequence[ir.Node]) -> _Part:
    found = set(part.nodes)
    _add_makers(output, {node for node in nodes if not values.isdisjoint(node.outputs)}, found)
    return replace(part, nodes=tuple(node for node in nodes if node in found))


def _merged(part: _Part, parts: Iterable[_Part], nodes: Sequence[ir.Node]) -> _Part:
    found = {node for longer in parts for node in longer.nodes}
    return replace(part, nodes=tuple(node for node in nodes if node in found))


def _roles(parts: Sequence[_Part], readings: Sequence[_Reading]) -> list[tuple[ir.Value, ...]]:
    """What corresponds to what: one tuple per role, with a value of each part."""
    told = zip(*(reading.values for reading in readings), strict=True)
    leaves = zip(*(reading.leaves for reading in readings), strict=True)
    own = (row for row in leaves if all(v.is_initializer() and p.owns(v) for v, p in zip(row, parts, strict=True)))
    return list(dict.fromkeys([*told, *own]))


def _block(part: _Part, values: Sequence[ir.Value], outputs: tuple[ir.Value, ...]) -> Block:
    return Block(
        nodes=part.nodes,
        entry=part.entry,
        exit=part.exit,
        weights=tuple(v for v in values if v.const_value is not None and _is_float_initializer(v)),
        inputs=tuple(v for v in values if v is not part.entry and v.is_graph_input() and not v.is_initializer()),
        outputs=outputs,
    )


def _is_float_initializer(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and value.const_value.dtype.is_floating_point()


def _in_order_of_inputs(blocks: Sequence[Block]) -> Iterator[Block]:
    """The blocks with their inputs and outputs in the order in which the graph has the first block's."""
    graph = blocks[0].nodes[0].graph
    if graph is None:
        yield from blocks
        return
    inputs = _order(blocks[0].inputs, graph.inputs)
    outputs = _order(blocks[0].outputs, graph.outputs)
    for block in blocks:
        yield replace(
            block, inputs=tuple(block.inputs[i] for i in inputs), outputs=tuple(block.outputs[i] for i in outputs)
        )


def _order(values: Sequence[ir.Value], among: Iterable[ir.Value]) -> list[int]:
    positions = {value: position for position, value in enumerate(among)}
    return sorted(range(len(values)), key=lambda index: positions[values[index]])


def _side(blocks: Sequence[Block]) -> tuple[ir.Value, ...]:
    side: dict[ir.Value, None] = {}
    for block in blocks:
        own = {block.entry, *block.values}
        side.update((v, None) for node in block.nodes for v in node.inputs if v is not None and v not in own)
    return tuple(side)


# --- deepening -------------------------------------------------------------------------------------------------------


def deepen(graph: ir.Graph, stack: Blocks, sources: Sequence[int]) -> tuple[Blocks, Mapping[ir.Value, ir.Value]]:
    """Give a stack other blocks, in place: block t becomes a copy of today's block ``sources[t]``.

    The first copy of a block is the block itself; further ones have nodes, initializers, graph inputs and graph
    outputs of their own, and read the same side values. Today's blocks that aren't named are dropped. Names and
    metadata that count the layers go on counting: ``layers.2.mlp`` of the block that comes fourth is
    ``layers.3.mlp``. Other names of copies get a suffix.

    Args:
        graph: The graph.
        stack: A stack of it.
        sources: For each block of the new stack, the number of today's block that it copies.

    Returns:
        The new stack, and for each value that its blocks own the value that it is a copy of: itself where it was kept.

    Raises:
        GrowkitError: If there are no sources, or one that isn't a block of the stack, or if blocks change their order
            although one computes what others read.
    """
    _check(stack, sources)
    known = range(len(stack.blocks))
    if list(sources) == list(known):
        return stack, {value: value for block in stack.blocks for value in block.values}
    numbers = _numbers(stack)
    copies: list[_Copy] = []
    for target, source in enumerate(sources):
        make = _kept if source not in sources[:target] else _cloned
        copies.append(make(stack.blocks[source], source, target))
    _insert(graph, copies)
    blocks = _rewire(graph, stack, copies)
    _show(graph.inputs, [b.inputs for b in stack.blocks], [b.inputs for b in blocks])
    _show(graph.outputs, [b.outputs for b in stack.blocks], [b.outputs for b in blocks])
    _drop(graph, [block for index, block in enumerate(stack.blocks) if index not in sources])
    graph.sort()
    _rename(graph, copies, numbers)
    return replace(stack, blocks=blocks), {new: old for copy in copies for old, new in copy.values.items()}


def _check(stack: Blocks, sources: Sequence[int]) -> None:
    known = range(len(stack.blocks))
    if not sources or not set(known).issuperset(sources):
        raise GrowkitError(
            f"blocks {list(sources)} of a stack of {len(known)} asked for: expected at least one, each of them "
            f"from 0 to {known[-1]}; choose among the blocks that there are"
        )
    kept = list(dict.fromkeys(sources))
    if kept != sorted(kept) and (shared := _made_inside(stack)):
        raise GrowkitError(
            f"blocks {list(sources)} asked for: expected blocks in their order, because others read {shared[0].name}, "
            f"which one of them computes; keep the first copy of each block behind those before it"
        )


def _made_inside(stack: Blocks) -> list[ir.Value]:
    """The side values that are computed from what a block makes, such as the sizes that all take from the first."""
    own = {value for block in stack.blocks for node in block.nodes for value in node.outputs}
    found = []
    for side in stack.side:
        seen, pending = {side}, [side]
        while pending:
            node = pending.pop().producer()
            more = [v for v in node.inputs if v is not None and v not in seen] if node is not None else []
            seen.update(more)
            pending.extend(more)
        if not seen.isdisjoint(own):
            found.append(side)
    return found


@dataclass(frozen=True)
class _Copy:
    """A block of the new stack.

    Attributes:
        block: The block, which still reads what its source reads.
        values: The source's own values, each with its copy.
        nodes: The source's nodes, each with its copy.
        source: The number of its source.
        target: Its own number.
        kept: Whether it is its source.
    """

    block: Block
    values: Mapping[ir.Value, ir.Value]
    nodes: Mapping[ir.Node, ir.Node]
    source: int
    target: int
    kept: bool


def _kept(block: Block, source: int, target: int) -> _Copy:
    values, nodes = {value: value for value in block.values}, {node: node for node in block.nodes}
    return _Copy(block, values, nodes, source, target, kept=True)


def _cloned(block: Block, source: int, target: int) -> _Copy:
    values = {value: _clone_value(value) for value in (*block.inputs, *block.initializers)}
    nodes: dict[ir.Node, ir.Node] = {}
    for node in block.nodes:
        outputs = [_clone_value(value) for value in node.outputs]
        values.update(zip(node.outputs, outputs, strict=True))
        nodes[node] = ir.Node(
            node.domain,
            node.op_type,
            [values.get(value, value) if value is not None else None for value in node.inputs],
            tuple(node.attributes.values()),
            overload=node.overload,
            outputs=outputs,
            version=node.version,
            name=node.name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        nodes[node].meta.update(node.meta)
    clone = Block(
        nodes=tuple(nodes.values()),
        entry=block.entry,
        exit=values[block.exit],
        weights=tuple(values[value] for value in block.weights),
        inputs=tuple(values[value] for value in block.inputs),
        outputs=tuple(values[value] for value in block.outputs),
    )
    return _Copy(clone, values, nodes, source, target, kept=False)


def _clone_value(value: ir.Value) -> ir.Value:
    clone = ir.Value(
        name=value.name,
        type=value.type,
        shape=value.shape.copy() if value.shape is not None else None,
        doc_string=value.doc_string,
        metadata_props=dict(value.metadata_props),
        const_value=_share(value.const_value) if value.is_initializer() and value.const_value is not None else None,
    )
    clone.meta.update(value.meta)
    return clone


def _share(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same data under a name of its own: to rename a value renames its tensor."""
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _insert(graph: ir.Graph, copies: Sequence[_Copy]) -> None:
    """Put every new block behind the one before it."""
    names = {value.name for value in _all_values(graph)}
    for before, copy in pairwise(copies):
        if copy.kept:
            continue
        graph.insert_after(before.block.nodes[-1], copy.block.nodes)
        for old, new in copy.values.items():
            if old.is_initializer():
                new.name = _fresh(old.name or "weight", names)
                graph.register_initializer(new)


def _rewire(graph: ir.Graph, stack: Blocks, copies: Sequence[_Copy]) -> tuple[Block, ...]:
    """Let every block, and what comes after the stack, read what the block before gives."""
    old, new = stack.blocks[-1].exit, copies[-1].block.exit
    inside = {node for block in stack.blocks for node in block.nodes}
    inside.update(node for copy in copies for node in copy.block.nodes)
    after = [use for use in old.uses() if use.node not in inside]
    blocks = []
    stream = stack.blocks[0].entry
    for copy in copies:
        for node in copy.block.nodes:
            _replace(node, copy.block.entry, stream)
        blocks.append(replace(copy.block, entry=stream))
        stream = copy.block.exit
    for use in after:
        use.node.replace_input_with(use.idx, new)
    if old not in stack.blocks[-1].outputs:
        for index, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[index] = new
                old.name, new.name = new.name, old.name
                new.type, new.shape = old.type, old.shape.copy() if old.shape is not None else None
    return tuple(blocks)


def _replace(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for index, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(index, new)


def _show(
    shown: MutableSequence[ir.Value], old: Sequence[Sequence[ir.Value]], new: Sequence[Sequence[ir.Value]]
) -> None:
    """Put the new blocks' values among the graph's inputs or outputs where the old ones' are, in the same order.

    That is one block's after the other's, or one role's after the other's.
    """
    places = {value: (block, role) for block, values in enumerate(old) for role, value in enumerate(values)}
    standing = [places[value] for value in shown if value in places]
    groups = [[value for values in new for value in values]]
    if standing != sorted(standing):
        groups = [list(values) for values in zip(*new, strict=True)]
    result: list[ir.Value] = []
    put: set[int] = set()
    for value in shown:
        group = places[value][1] if value in places and len(groups) > 1 else 0
        if value not in places:
            result.append(value)
        elif group not in put:
            put.add(group)
            result.extend(groups[group])
    shown.clear()
    shown.extend(result)


def _drop(graph: ir.Graph, blocks: Sequence[Block]) -> None:
    """Remove what no one reads of blocks that are no longer in the stack."""
    for block in reversed(blocks):
        initializers = block.initializers
        for node in reversed(block.nodes):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                graph.remove(node, safe=True)
        for value in initializers:
            if not value.uses() and value.name is not None:
                del graph.initializers[value.name]


# --- names -----------------------------------------------------------------------------------------------------------

_COUNTED = re.compile(r"([A-Za-z_]*[^A-Za-z0-9]?)(\d+)")


@dataclass(frozen=True)
class _Numbers:
    """How the names of a stack count its layers.

    Attributes:
        words: What stands before the number: ``layers.``.
        first: The first block's number.
        step: How many numbers there are for a block.
    """

    words: frozenset[str]
    first: int
    step: int

    def renumbered(self, text: str, source: int, target: int) -> str:
        """The text about one block, made one about another."""

        def number(match: re.Match[str]) -> str:
            word, count = match[1], int(match[2])
            if word in self.words and 0 <= count - self.first - self.step * source < self.step:
                return f"{word}{count + self.step * (target - source)}"
            return match[0]

        return _COUNTED.sub(number, text)


def _numbers(stack: Blocks) -> _Numbers:
    """What most names that differ from block to block count by.

    A layer's number stands inside of a name. What ends a name may be any counter, and is listened to only where the
    graph's inputs and outputs are named.
    """
    words: dict[tuple[int, int], set[str]] = defaultdict(set)
    votes: Counter[tuple[int, int]] = Counter()
    for names, shown in _corresponding_names(stack):
        for matches in _aligned(names):
            inner = all(match.end() < len(match.string) for match in matches)
            first, second, *_ = counts = [int(match[2]) for match in matches]
            step = second - first
            if step > 0 and counts == [first + step * index for index in range(len(counts))] and (inner or shown):
                words[first, step].add(matches[0][1])
                votes[first, step] += 1 + inner
    if not votes:
        return _Numbers(frozenset(), 0, 1)
    first, step = max(votes, key=lambda key: (votes[key], -key[1], -key[0]))
    near = {key: said for key, said in words.items() if key[1] == step and abs(key[0] - first) < step}
    return _Numbers(frozenset().union(*near.values()), min(key[0] for key in near), step)


def _corresponding_names(stack: Blocks) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The names of what corresponds from block to block, and whether the graph shows them to its users."""
    for role, shown in (("weights", False), ("inputs", True), ("outputs", True), ("nodes", False)):
        things = [getattr(block, role) for block in stack.blocks]
        if len(set(map(len, things))) == 1:  # sizes may take more nodes to compute in one block than in another
            yield from ((tuple(thing.name or "" for thing in row), shown) for row in zip(*things, strict=True))


def _aligned(names: Sequence[str]) -> Iterator[tuple[re.Match[str], ...]]:
    """The numbers that stand at the same place of every name, after the same word."""
    for matches in zip(*map(_COUNTED.finditer, names), strict=False):
        if len({match[1] for match in matches}) == 1:
            yield matches


def _rename(graph: ir.Graph, copies: Sequence[_Copy], numbers: _Numbers) -> None:
    """Name what belongs to the new blocks, and let its metadata speak of its new place."""
    copies = sorted(copies, key=lambda copy: not copy.kept)  # who was there first keeps a name that doesn't count
    per_block = {value for copy in copies for value in copy.block.outputs}
    shown = {value: value.name or "" for value in graph.outputs if value not in per_block}
    values, nodes = dict(shown), {}
    for copy in copies:
        moved = partial(numbers.renumbered, source=copy.source, target=copy.target)
        for old, new in copy.values.items():
            values.setdefault(new, moved(old.name or ""))
        for before, after in copy.nodes.items():
            nodes[after] = moved(before.name or "")
        things: list[ir.Value | ir.Node] = [*copy.values.values(), *copy.nodes.values()]
        for properties in (thing.metadata_props for thing in things):
            properties.update({key: moved(text) for key, text in properties.items() if key != FUSED})
    _name(values, {value.name for value in _all_values(graph) if value not in values})
    _name(nodes, {node.name for node in graph if node not in nodes})


def _name(wanted: Mapping[Any, str], taken: set[str | None]) -> None:
    """Give things the names they want, or these with a suffix; what wants none stays without."""
    names = [(thing, _fresh(name, taken)) for thing, name in wanted.items() if name]
    for index, (thing, _) in enumerate(names):
        thing.name = f"growkit.{index}"  # the new name may still be another's old one
    for thing, name in names:
        thing.name = name


def _fresh(wanted: str, taken: set[str | None]) -> str:
    """The name, or the name with the first suffix that makes it a new one; it is taken from now on."""
    suffixes = (f"_copy{number}" for number in count(1))
    name = next(name for name in chain([wanted], map(wanted.__add__, suffixes)) if name not in taken)
    taken.add(name)
    return name


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
