"""Blocks are found whatever they are made of, and a deepened graph is the one that would have been built that deep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from growkit_onnx.blocks import FUSED, Blocks, deepen, find_stacks
from growkit_onnx.normalise import normalise
from growkit_specs import GrowkitError
from tests.adapters.onnx.families import FAMILIES
from tests.adapters.onnx.zoo import FILES, GROWS, NOWHERE, File, inputs, make

HIDDEN, FFN, VOCAB, TOKENS, PAST = 8, 12, 11, 5, 3
DEEPER = ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 2], [1, 0, 2, 1], [2])


@dataclass
class Builder:
    """A graph in the making; a weight's values follow from its seed alone, so that copies have equal weights."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    stream: set[str] = field(default_factory=set)
    scope: str = "stem"
    seed: str = "stem"

    def op(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{self.scope}.{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}_node", **attributes))
        if op in ("Add", "LayerNormalization", "Gather"):
            self.stream.add(output)
        return output

    def weight(self, name: str, *shape: int) -> str:
        rng = np.random.default_rng(list(f"{self.seed}.{name}".encode()))
        self.weights[f"{self.scope}.{name}"] = rng.normal(size=shape, scale=0.5).astype(np.float32)
        return f"{self.scope}.{name}"

    def whole(self, name: str, *values: int) -> str:
        self.weights[f"{self.scope}.{name}"] = np.array(values, np.int64)
        return f"{self.scope}.{name}"

    def input(self, name: str, dtype: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def show(self, name: str, *shape: int | str) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def norm(self, x: str, name: str) -> str:
        return self.op(
            "LayerNormalization", x, self.weight(f"{name}.weight", HIDDEN), self.weight(f"{name}.bias", HIDDEN)
        )

    def linear(self, x: str, name: str, *shape: int) -> str:
        return self.op("MatMul", x, self.weight(name, *shape))

    def model(self) -> onnx.ModelProto:
        initializers = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@dataclass(frozen=True)
class Branch:
    """What is added to the stream: "mlp", "gate" or "attention"; normed before, after, or not at all."""

    kind: str = "mlp"
    norm: str = "pre"
    ffn: int = FFN


@dataclass(frozen=True)
class Net:
    """A residual network: layer t has the weights of layer ``sources[t]``."""

    layer: tuple[Branch, ...] = (Branch("attention"), Branch())
    sources: tuple[int, ...] = (0, 1, 2)
    parallel: bool = False
    stem_norm: bool = False
    masks: int = 0  # layers take turns to read one of these
    bias: bool = False  # all layers read a bias that hangs on the size of the first one's queries
    cache: str = ""  # keys and values go in and out, "layer" by layer or one "role" after the other
    crossed: bool = False  # an encoder stands before it
    names: str = "layers.{}"

    def build(self) -> tuple[onnx.ModelProto, set[str]]:
        b = Builder()
        states = self._tower(b, replace(self, crossed=False, cache="", masks=0, bias=False, names="encoder.{}"))
        exit = self._stack(b, "ids", states if self.crossed else "")
        b.scope = b.seed = "head"
        b.op("MatMul", b.norm(exit, "norm"), b.weight("weight", HIDDEN, VOCAB), output="logits")
        b.outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", VOCAB]))
        if self.cache == "role":
            b.inputs.sort(key=lambda value: value.name.rpartition(".")[2] if "past" in value.name else "")
            b.outputs.sort(key=lambda value: value.name.rpartition(".")[2] if "present" in value.name else "")
        return b.model(), b.stream

    def _tower(self, b: Builder, net: "Net") -> str:
        return net._stack(b, "encoder_ids", "") if self.crossed else ""

    def _stack(self, b: Builder, ids: str, states: str) -> str:
        b.scope = b.seed = f"{ids}.stem"
        x = b.op("Gather", b.weight("embedding", VOCAB, HIDDEN), b.input(ids, TensorProto.INT64, "B", "T"))
        masks = self._masks(b) if self.masks else []
        if self.bias:
            b.weights["bias"] = np.arange(TOKENS, dtype=np.float32)
        if self.stem_norm:
            x = b.norm(x, "norm")
        shared: list[str] = []
        for target, source in enumerate(self.sources):
            b.scope = self.names.format(target)
            b.seed = f"{ids}.{source}"
            mask = masks[source % self.masks] if masks else ""
            entry = x
            for index, branch in enumerate(self.layer):
                read = b.norm(entry if self.parallel else x, f"{index}.norm") if branch.norm == "pre" else x
                given = self._branch(b, branch, read, f"{index}", (mask, target, states, shared))
                x = b.op("Add", x, given)
                if branch.norm == "post":
                    x = b.norm(x, f"{index}.norm")
        return x

    def _masks(self, b: Builder) -> list[str]:
        ids = b.op("Cast", b.input("mask_ids", TensorProto.INT64, "B", "T"), to=TensorProto.FLOAT)
        rows = b.op("Unsqueeze", ids, b.whole("axes", 1))
        return [b.op("Mul", rows, b.weight(f"scale{i}"), output=f"mask{i}") for i in range(self.masks)]

    def _branch(self, b: Builder, branch: Branch, x: str, name: str, around: tuple[str, int, str, list[str]]) -> str:
        if branch.kind == "attention":
            return self._attention(b, x, name, around)
        up = b.linear(x, f"{name}.up", HIDDEN, branch.ffn)
        if branch.kind == "gate":
            up = b.op("Mul", b.op("Sigmoid", b.linear(x, f"{name}.gate", HIDDEN, branch.ffn)), up)
        return b.linear(b.op("Relu", up), f"{name}.down", branch.ffn, HIDDEN)

    def _attention(self, b: Builder, x: str, name: str, around: tuple[str, int, str, list[str]]) -> str:
        mask, target, states, shared = around
        query, key, value = (
            b.linear(read, f"{name}.{role}", HIDDEN, HIDDEN)
            for role, read in (("query", x), ("key", states or x), ("value", states or x))
        )
        if self.cache:
            key, value = (self._cached(b, made, target, role) for role, made in (("key", key), ("value", value)))
        scores = b.op("MatMul", query, b.op("Transpose", key, perm=[0, 2, 1]))
        if self.bias and not shared:
            size = b.op("Gather", b.op("Shape", query), b.whole("index", 1), axis=0)
            table = b.op("Slice", "bias", b.whole("start", 0), size)
            shared.append(table)
        for added in (mask, *shared):
            scores = b.op("Sum", scores, added) if added else scores
        return b.linear(b.op("MatMul", b.op("Softmax", scores, axis=-1), value), f"{name}.out", HIDDEN, HIDDEN)

    def _cached(self, b: Builder, made: str, target: int, role: str) -> str:
        past = b.input(f"past.{target}.{role}", TensorProto.FLOAT, "B", PAST, HIDDEN)
        b.show(f"present.{target}.{role}", "B", "P", HIDDEN)
        return b.op("Concat", past, made, axis=1, output=f"present.{target}.{role}")


def found(net: Net) -> tuple[ir.Model, tuple[Blocks, ...]]:
    proto, stream = net.build()
    model = ir.from_proto(proto)
    return model, find_stacks(model.graph, lambda value: value.name in stream)


def run(model: onnx.ModelProto | ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Inputs, each drawn from the layer's number in its name alone."""
    rng = np.random.default_rng(0)
    return {
        value.name: rng.normal(size=(2, PAST, HIDDEN)).astype(np.float32)
        if "past" in value.name
        else rng.integers(0, VOCAB, (2, TOKENS))
        for value in model.graph.input
    }


def interface(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    return [value.name for value in model.graph.input], [value.name for value in model.graph.output]


POST = (Branch("attention", "post"), Branch(norm="post"))
NETS = {
    "pre-norm": Net(),
    "post-norm behind a norm": Net(POST, stem_norm=True),
    "parallel": Net(parallel=True),
    "alternate masks": Net(masks=2),
    "shared bias": Net(bias=True),
    "cache, layer by layer": Net(cache="layer"),
    "cache, role by role": Net(cache="role"),
    "encoder and decoder": Net((Branch("attention"), Branch("gate")), crossed=True),
    "numbers in other words": Net(names="model/block_{}/part"),
}


@pytest.mark.parametrize(
    ("net", "sources"),
    [
        pytest.param(net, sources, id=f"{name}-{sources}")
        for name, net in NETS.items()
        for sources in DEEPER
        if not (net.bias and sources == [1, 0, 2, 1])  # refused, see below
    ],
)
def test_a_deepened_graph_is_the_one_built_so_deep(net: Net, sources: list[int]) -> None:
    model, stacks = found(net)
    assert [len(stack.blocks) for stack in stacks] == [3] * (1 + net.crossed)
    for stack in stacks:
        new, origins = deepen(model.graph, stack, sources)
        assert len(new.blocks) == len(sources)
        assert {value for block in new.blocks for value in block.values} == origins.keys()
        assert len({value for block in new.blocks for value in block.values}) == sum(len(b.values) for b in new.blocks)
        for block, source in zip(new.blocks, sources, strict=True):
            assert [origins[weight] for weight in block.weights] == list(stack.blocks[source].weights)
    expected, _ = replace(net, sources=tuple(sources)).build()
    result = ir.to_proto(model)
    assert interface(result) == interface(expected)
    names = {tensor.name for tensor in result.graph.initializer}
    wanted = {tensor.name for tensor in expected.graph.initializer}
    assert names >= wanted if net.bias else names == wanted  # a dropped block may still be measured by others
    feeds = feeds_of(expected)
    for got, want in zip(run(result, feeds), run(expected, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_the_same_blocks_are_the_same_bytes(net: Net) -> None:
    model, stacks = found(net)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    for stack in stacks:
        new, origins = deepen(model.graph, stack, range(3))
        assert new == stack
        assert all(new is old for new, old in origins.items())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_what_blocks_read_and_give() -> None:
    _, [stack] = found(Net(masks=2, cache="layer"))
    assert {value.name for value in stack.side} == {"mask0", "mask1"}
    for index, block in enumerate(stack.blocks):
        assert [value.name for value in block.inputs] == [f"past.{index}.key", f"past.{index}.value"]
        assert [value.name for value in block.outputs] == [f"present.{index}.key", f"present.{index}.value"]
        roles = [(weight.name or "").removeprefix(f"layers.{index}.") for weight in block.weights]
        assert sorted(roles) == sorted((w.name or "").removeprefix("layers.0.") for w in stack.blocks[0].weights)
        assert roles == [(w.name or "").removeprefix("layers.0.") for w in stack.blocks[0].weights]
    assert [block.entry for block in stack.blocks[1:]] == [block.exit for block in stack.blocks[:-1]]


def test_what_the_first_block_computes_for_all_belongs_to_none() -> None:
    _, [stack] = found(Net(bias=True))
    assert {len(block.nodes) for block in stack.blocks} == {len(stack.blocks[1].nodes)}
    assert "bias" not in {value.name for block in stack.blocks for value in block.values}


@pytest.mark.parametrize(
    ("bias", "sources", "message"),
    [
        (False, [], r"blocks \[\] of a stack of 3 asked for: expected at least one, each of them from 0 to 2"),
        (False, [0, 3], r"blocks \[0, 3\] of a stack of 3 asked for: .*choose among the blocks"),
        (True, [1, 0, 2], r"blocks \[1, 0, 2\] asked for: expected blocks in their order, .*keep the first copy"),
    ],
)
def test_what_cannot_be_had_is_refused(bias: bool, sources: list[int], message: str) -> None:
    model, [stack] = found(Net(bias=bias))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(GrowkitError, match=message):
        deepen(model.graph, stack, sources)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_names_and_metadata_count_on_and_marks_stay() -> None:
    model, [stack] = found(Net())
    for index, block in enumerate(stack.blocks):
        block.nodes[0].metadata_props.update({"namespace": f"net/layers.{index}/x", FUSED: f"{index}:sum"})
        block.nodes[1].name = f"counter_{index + 7}"
        block.nodes[2].name = "same"
    new, _ = deepen(model.graph, stack, [0, 1, 1, 2])
    properties = [block.nodes[0].metadata_props for block in new.blocks]
    assert [each["namespace"] for each in properties] == [f"net/layers.{index}/x" for index in range(4)]
    assert [each[FUSED] for each in properties] == ["0:sum", "1:sum", "1:sum", "2:sum"]
    assert [block.nodes[1].name for block in new.blocks] == ["counter_7", "counter_8", "counter_8_copy1", "counter_9"]
    assert len({node.name for node in model.graph}) == len(model.graph)


def test_a_number_that_is_taken_gives_a_suffix() -> None:
    model, [stack] = found(Net())
    model.graph.initializers["head.weight"].name = "layers.3.0.query"
    new, _ = deepen(model.graph, stack, [0, 1, 2, 2])
    assert "layers.3.0.query_copy1" in {weight.name for weight in new.blocks[3].weights}


def test_deepening_twice() -> None:
    model, [stack] = found(Net(cache="layer"))
    stack, _ = deepen(model.graph, stack, [0, 1, 1, 2])
    stack, _ = deepen(model.graph, stack, [0, 1, 2, 2, 3])
    expected, _ = Net(cache="layer", sources=(0, 1, 1, 1, 2)).build()
    assert interface(ir.to_proto(model)) == interface(expected)
    feeds = feeds_of(expected)
    np.testing.assert_allclose(run(model, feeds)[0], run(expected, feeds)[0], rtol=1e-5, atol=1e-5)


branches = st.builds(
    Branch,
    st.sampled_from(["mlp", "gate", "attention"]),
    st.sampled_from(["pre", "post", "none"]),
    st.sampled_from([6, 12]),
)


def period(layer: Sequence[Branch]) -> int:
    """The branches after which a layer begins again."""
    said = [replace(branch, ffn=0) if branch.kind == "attention" else branch for branch in layer]
    sizes = (size for size in range(1, len(said) + 1) if len(said) % size == 0)
    return next(size for size in sizes if said == said[:size] * (len(said) // size))


@given(st.lists(branches, min_size=1, max_size=3), st.integers(2, 4), st.booleans())
def test_the_depth_of_any_residual_network_is_found(layer: list[Branch], depth: int, stem_norm: bool) -> None:
    _, [stack] = found(Net(tuple(layer), sources=tuple(range(depth)), stem_norm=stem_norm))
    assert len(stack.blocks) == depth * len(layer) // period(layer)


# --- what exporters write --------------------------------------------------------------------------------------------

QUICK = ("bert-legacy17-eager", "llama-legacy17-eager", "t5-legacy17-eager", "gemma2-odd-legacy17-eager")
REPEATED = ("bert", "roberta", "distilbert", "gpt2", "vit", "llama", "qwen3", "t5", "gemma2-odd", "bart", "nano")
DEPTHS = {
    "modernbert": [3],  # its first block has no norm
}
BLIND = ("bf16", "unoptimised")  # kinds that the runtime has no operators for, or that hold lists


def marked(files: Sequence[File]) -> list[Any]:
    return [pytest.param(f, id=f.name, marks=() if f.name in QUICK else pytest.mark.slow) for f in files]


READABLE = [
    file
    for file in FILES
    if not file.cannot_be_made and file.expected == GROWS and file.runs != NOWHERE and not {*BLIND} & {*file.variant}
]


def shapes(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shape of every floating point value, as ONNX Runtime computes it."""
    proto = ir.to_proto(model)
    made = {name for node in proto.graph.node for name in node.output if name}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in made - {o.name for o in proto.graph.output})
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = zip(names, session.run(None, dict(feeds)), strict=True)
    return {name: array.shape for name, array in arrays if array.dtype.kind == "f"}


def read(file: File, feeds: Mapping[str, np.ndarray]) -> tuple[ir.Model, tuple[Blocks, ...]]:
    """The file's graph and its stacks; whatever has an axis as large as the stream's is said to be in its space."""
    model = ir.load(make(file))
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    normalise(model)
    known = shapes(model, feeds)
    sizes = {stack.hidden for stack in file.stacks}
    return model, find_stacks(model.graph, lambda value: not sizes.isdisjoint(known.get(value.name or "", ())))


def feeds_for(file: File) -> dict[str, np.ndarray]:
    names = {value.name for value in onnx.load(make(file), load_external_data=False).graph.input}
    return {name: array for name, array in inputs(file, 1, 7, seed=1).items() if name in names}


@pytest.mark.parametrize("file", marked(READABLE))
def test_every_exporters_blocks_are_found(file: File) -> None:
    _, stacks = read(file, feeds_for(file))
    depths = DEPTHS.get(file.name, DEPTHS.get(file.family, [stack.layers for stack in file.stacks]))
    assert [len(stack.blocks) for stack in stacks] == depths


COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def repeat_layers(module: torch.nn.Module, sources: Sequence[int]) -> None:
    """Give a torch model the layers that its graph was given."""
    done: list[str] = []
    for name, layers in list(module.named_modules()):
        inside = any(name.startswith(f"{outer}.") for outer in done)
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == 3 and not inside:
            done.append(name)
            layers._modules = {str(target): layers[source] for target, source in enumerate(sources)}
    for config in {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}.values():
        config.use_cache = False  # a cache would take a layer that occurs twice for one layer
        for name in COUNTS:
            if hasattr(config, name):
                setattr(config, name, len(sources))
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[source] for source in sources]


DEEPENED = [f for f in READABLE if f.family in REPEATED and not f.post and f.opset in (17, 18) and not f.variant]


@pytest.mark.parametrize("sources", DEEPER[:3], ids=str)
@pytest.mark.parametrize(
    "file",
    marked([f for f in READABLE if f.family in REPEATED and not f.post and f.opset in (17, 18) and not f.variant]),
)
def test_a_deepened_export_is_the_deeper_model(file: File, sources: list[int]) -> None:
    feeds = feeds_for(file)
    model, stacks = read(file, feeds)
    for stack in stacks:
        deepen(model.graph, stack, sources)
    module = FAMILIES[file.family].build(file.attention)
    repeat_layers(module, sources)
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, inputs(file, 1, 7, seed=1).values()))
    for got, want in zip(run(model, feeds), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)
