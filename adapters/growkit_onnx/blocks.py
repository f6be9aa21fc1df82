"""The repeated blocks of a graph, found by their structure, and deepening: the graph with more of them.

The residual stream is followed from where it begins. A value through which all of it passes is a *cut*: what lies
between two neighbouring cuts is a *segment* (half a layer, say), and segments that read the same, over and over, are a
stack of blocks. No name of a node, a weight or an architecture takes part in this; names only follow, afterwards.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise

import onnx_ir as ir

from growkit_specs import GrowkitError

FUSED_MARK = "growkit.fused"

# What these give says how large a value is, not what it holds: the stream doesn't flow through them.
_MEASURES = frozenset({"Shape", "Size"})


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
        read = dict.fromkeys(v for node in self.nodes for v in node.inputs if v is not None and v.is_initializer())
        return tuple(value for value in read if all(use.node in own for use in value.uses()))

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
        for chain in sorted(chains, key=len, reverse=True):
            if len(set(pairwise(chain)) - seen) >= 2:
                seen.update(pairwise(chain))
                yield chain


def _sources(graph: ir.Graph, nodes: Sequence[ir.Node], carries: Callable[[ir.Value], bool]) -> list[ir.Value]:
    """The first values that carry a stream: those that no other such value flows into."""
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    sources = [value for value in inputs if carries(value)]
    live, downstream = set(inputs), set(sources)
    for node in nodes:
        if live.isdisjoint(node.inputs):
            continue
        live.update(node.outputs)
        if node.op_type in _MEASURES:
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
        if not reads or node.op_type in _MEASURES:
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
    """

    entry: ir.Value
    exit: ir.Value
    nodes: tuple[ir.Node, ...]

    def owns(self, value: ir.Value) -> bool:
        """Whether only this part reads the value; who measures it doesn't count."""
        own = set(self.nodes)
        return all(use.node in own or use.node.op_type in _MEASURES for use in value.uses())


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
        if not flow.isdisjoint(node.inputs) and node.op_type not in _MEASURES:
            flow.update(node.outputs)
    for index, (entry, exit) in enumerate(pairwise(cuts)):
        owners.update(dict.fromkeys(_between(entry, exit, flow), index))
    for node in reversed(nodes):
        if node not in owners and not any(value.is_graph_output() for value in node.outputs):
            users = {owners.get(use.node) for value in node.outputs for use in value.uses()}
            if len(users) == 1 and (owner := users.pop()) is not None:
                owners[node] = owner
    members: dict[int, list[ir.Node]] = defaultdict(list)
    for node, owner in sorted(owners.items(), key=lambda item: positions[item[0]]):
        members[owner].append(node)
    return [_Part(entry, exit, tuple(members[i])) for i, (entry, exit) in enumerate(pairwise(cuts))]


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
        if node.op_type not in _MEASURES and any(value in told for value in node.inputs if value is not None):
            told.update((value, None) for value in node.outputs if value not in told)
    return told


def _word(value: ir.Value) -> Hashable:
    tensor = value.const_value
    if value.is_initializer() and tensor is not None:
        return (tensor.dtype, *tensor.shape) if tensor.dtype.is_floating_point() and tensor.size > 1 else None
    return "input" if value.is_graph_input() else None


def _read(part: _Part, roots: Sequence[ir.Value] = ()) -> _Reading:
    """Read a part from its exit, then from further roots."""
    told = _told(part)
    places: dict[ir.Value, int] = {}
    words: list[Hashable] = []
    leaves: list[ir.Value] = []

    def say(node: ir.Node) -> Hashable:
        wired: list[int | str] = []
        for value in node.inputs:
            wired.append("none" if value is None else places[value] if value in told else "leaf")
            leaves.extend([value] if value is not None and value not in told else [])
        attributes = sorted((name, _attribute(attribute)) for name, attribute in node.attributes.items())
        return node.domain, node.op_type, node.overload, tuple(attributes), tuple(wired), len(node.outputs)

    pending = [*reversed(roots), part.exit]
    while pending:
        value = pending[-1]
        node = value.producer() if value is not part.entry else None
        waiting = [v for v in node.inputs if v in told and v not in places] if node is not None else []
        if value in places or not waiting:
            pending.pop()
        if value in places:
            continue
        if waiting:
            pending.extend(v for v in reversed(waiting) if v is not None)
            continue
        words.append(told[value] if node is None else say(node))
        for made in node.outputs if node is not None else (value,):
            places[made] = len(places)
    return _Reading((*words, *(places[root] for root in roots)), tuple(places), tuple(leaves))


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

    def search(low: int, high: int) -> Iterator[Blocks]:
        run = _best_run([reading.words for reading in readings[low:high]], sizes[low:high], heads[low:high])
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
    words: Sequence[Hashable], sizes: Sequence[int], heads: Sequence[tuple[bool, bool]]
) -> tuple[int, int, int] | None:
    """The start, period and count of the repetition that covers most weights, by the shortest period.

    Where whole periods can be laid in several ways, one that starts as blocks do wins, then the earliest.
    """
    best: tuple[Hashable, ...] | None = None
    run = None
    for period in range(1, len(words) // 2 + 1):
        for low, high in _equal_stretches(words, period):
            count = (high - low) // period
            for start in range(low, high - count * period + 1):
                covered = sum(sizes[start : start + count * period])
                score = (covered, -period, heads[start], -start)
                if covered and (best is None or score > best):
                    best, run = score, (start, period, count)
    return run


def _equal_stretches(words: Sequence[Hashable], period: int) -> Iterator[tuple[int, int]]:
    """The longest stretches, of at least two periods, in which every word recurs one period later."""
    low = 0
    for position in range(len(words) - period + 1):
        if position == len(words) - period or words[position] != words[position + period]:
            if position - low >= period:
                yield low, position + period
            low = position + 1


def _stack(nodes: Sequence[ir.Node], cuts: Sequence[ir.Value]) -> Iterator[Blocks]:
    """The stack whose blocks lie between the cuts, if they are alike as a whole, too."""
    parts = _parts(nodes, cuts)
    readings = [_read(part) for part in parts]
    if len({reading.words for reading in readings}) > 1:
        return
    parts = _with_shared_roles(parts, readings)
    parts, roots = _with_outputs(nodes, parts)
    readings = [_read(part, own) for part, own in zip(parts, roots, strict=True)]
    roles = _roles(parts, readings)
    blocks = [_block(part, values, own) for part, values, own in zip(parts, zip(*roles, strict=True), roots, strict=True)]
    yield Blocks(tuple(_in_order_of_inputs(blocks)), _side(blocks))


def _with_shared_roles(parts: Sequence[_Part], readings: Sequence[_Reading]) -> list[_Part]:
    """The parts less what only some of them have to themselves: what all have at a place is theirs, or none's."""
    bodies = [set(part.nodes) for part in parts]
    own: list[set[ir.Node]] = [{v.producer() for v in r.values} & body for r, body in zip(readings, bodies, strict=True)]
    for leaves in zip(*(reading.leaves for reading in readings), strict=True):
        if all(leaf.producer() in body for leaf, body in zip(leaves, bodies, strict=True)):
            for leaf, body, mine in zip(leaves, bodies, own, strict=True):
                _add_makers(leaf, body, mine)
    return [replace(part, nodes=tuple(n for n in part.nodes if n in mine)) for part, mine in zip(parts, own, strict=True)]


def _add_makers(value: ir.Value, body: Set[ir.Node], found: set[ir.Node]) -> None:
    """Add the nodes of the body that a value is made by."""
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is not None and node in body and node not in found:
            found.add(node)
            pending.extend(v.producer() for v in node.inputs if v is not None)


def _with_outputs(
    nodes: Sequence[ir.Node], parts: Sequence[_Part]
) -> tuple[list[_Part], list[tuple[ir.Value, ...]]]:
    """The parts with what leads from them to outputs of the graph that all of them have, and these outputs."""
    homes: dict[ir.Value, int | None] = {}
    for index, part in enumerate(parts):
        homes.update((value, index) for node in part.nodes for value in node.outputs)
    for node in nodes:
        reads = {homes[value] for value in node.inputs if value is not None and value in homes}
        if reads and node.op_type not in _MEASURES:
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
