"""Normalising keeps the function, makes every use private, and is undone by restoring."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from growkit_onnx.normalise import COPY, FUSED, normalise, restore
from growkit_specs import InvalidModel, UnsupportedModel

Arrays = dict[str, np.ndarray]

BATCH, SEQUENCE, HIDDEN, VOCAB, LONGEST = 2, 5, 8, 11, 9
MICROSOFT = "com.microsoft"


def node(op: str, reads: str, makes: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node whose inputs and outputs are words; "_" stands for none."""
    words = [["" if word == "_" else word for word in text.split()] for text in (reads, makes)]
    return helper.make_node(op, *words, name=name or words[1][0] + "_node", **attributes)


def constant(makes: str, value: Any, dtype: Any = np.int64) -> onnx.NodeProto:
    return node("Constant", "", makes, value=numpy_helper.from_array(np.array(value, dtype)))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    nodes: Sequence[onnx.NodeProto],
    feeds: Arrays,
    weights: Arrays,
    outputs: str = "y",
    *,
    opset: int = 17,
    functions: Sequence[onnx.FunctionProto] = (),
    exposed: Sequence[str] = (),
    ir_version: int = 8,
    shape: Sequence[int] | None = None,
) -> onnx.ModelProto:
    """A model; `exposed` initializers are inputs, too."""
    tensors = feeds | {name: weights[name] for name in exposed}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in tensors.items()
    ]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in outputs.split()]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    imports += [helper.make_opsetid(domain, 1) for domain in sorted({f.domain for f in functions})]
    graph = helper.make_graph(list(nodes), "graph", inputs, results, initializers)
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=ir_version)


def run(proto: onnx.ModelProto, feeds: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def equal(first: Arrays, second: Arrays) -> bool:
    return first.keys() == second.keys() and all(np.allclose(first[k], second[k], rtol=1e-6, atol=1e-6) for k in first)


def content(proto: onnx.ModelProto) -> Any:
    """What must come back: nodes in order, initializers, inputs and outputs, all with their names."""
    graph = proto.graph
    nodes = [
        (
            n.name,
            n.domain,
            n.op_type,
            tuple(n.input),
            tuple(n.output),
            {a.name: a.SerializeToString() for a in n.attribute},
        )
        for n in graph.node
    ]
    weights = {w.name: numpy_helper.to_array(w).tobytes() for w in graph.initializer}
    return nodes, weights, [v.name for v in graph.input], [v.name for v in graph.output]


def private(loaded: ir.Model) -> bool:
    """Whether every initializer has one use."""
    return all(
        len(v.uses()) + v.is_graph_output() == 1 for v in loaded.graph.initializers.values() if v.name != "unread"
    )


def marks(loaded: ir.Model) -> list[str]:
    return [key for n in loaded.graph for key in n.metadata_props if key in (FUSED, COPY)]


def operators(loaded: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in loaded.graph)


def load(proto: onnx.ModelProto) -> ir.Model:
    """The model, of a copy: the tensors of `ir.from_proto` write their names into the proto that they come from."""
    return ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))


def proto_of(loaded: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(loaded)
    names = [name for n in proto.graph.node for name in n.output if name]
    names += [w.name for w in proto.graph.initializer]
    assert len(names) == len(set(names))
    return proto


def there_and_back(
    proto: onnx.ModelProto, feeds: Arrays, between: Callable[[ir.Model], None] = lambda _: None
) -> tuple[ir.Model, onnx.ModelProto]:
    """The normalised and the restored model, of which both compute what the original computes.

    What is restored is the normalised model written and read: nothing but names and marks leads back.
    """
    before = run(proto, feeds)
    loaded = load(proto)
    done = normalise(loaded)
    assert private(loaded)
    assert equal(run(proto_of(loaded), feeds), before)
    normalised, loaded = loaded, load(proto_of(loaded))
    between(loaded)
    restore(loaded, done)
    assert not marks(loaded)
    restored = proto_of(loaded)
    assert equal(run(restored, feeds), before)
    return normalised, restored


X = {"x": random(0, BATCH, SEQUENCE, HIDDEN)}
W = {"w": random(1, HIDDEN, HIDDEN), "b": random(2, HIDDEN), "unit": np.ones(HIDDEN, np.float32)}

SHARED = {
    "by nodes": ([node("MatMul", "x w", "a"), node("MatMul", "a w", "c"), node("Add", "c b", "y")], "w b"),
    "at two inputs of a node": ([node("MatMul", "w w", "a"), node("MatMul", "x a", "y")], "w"),
    "through a transposition": (
        [node("Transpose", "w", "wt", perm=[1, 0]), node("MatMul", "x wt", "a"), node("MatMul", "a wt", "y")],
        "w",
    ),
    "in front of a transposition and behind it": (
        [node("MatMul", "x w", "a"), node("Transpose", "w", "wt", perm=[1, 0]), node("MatMul", "a wt", "y")],
        "w",
    ),
    "through a chain": (
        [
            constant("shape", [1, HIDDEN]),
            node("Reshape", "b shape", "row"),
            node("Cast", "row", "wide", to=onnx.TensorProto.DOUBLE),
            node("Cast", "wide", "narrow", to=onnx.TensorProto.FLOAT),
            node("Add", "x narrow", "a"),
            node("Mul", "a narrow", "c"),
            node("Add", "c row", "y"),
        ],
        "b",
    ),
    "as an integer": (
        [
            constant("flat", [-1]),
            node("Reshape", "x flat", "a"),
            node("Reshape", "unit flat", "c"),
            node("Reshape", "a shape", "d"),
            node("Reshape", "d shape", "y"),
        ],
        "unit shape",
    ),
    "as a quantised weight": (
        [
            node("DequantizeLinear", "small step", "wide"),
            node("MatMul", "x wide", "a"),
            node("MatMul", "a wide", "y"),
        ],
        "small step",
    ),
    "as an output of the graph": ([node("MatMul", "x w", "a"), node("Add", "a w2", "y")], "w w2"),
}
EXTRA = {"shape": np.array([BATCH, SEQUENCE, HIDDEN]), "w2": random(3, HIDDEN)}
EXTRA |= {"small": (W["w"] * 50).astype(np.int8), "step": np.array(0.02, np.float32)}


@pytest.mark.parametrize("case", SHARED)
def test_what_is_shared_becomes_private_and_shared_again(case: str) -> None:
    nodes, weights = SHARED[case]
    tensors = {name: (W | EXTRA)[name] for name in weights.split()}
    proto = model(nodes, X, tensors, "y w2" if "w2" in tensors else "y")
    normalised, restored = there_and_back(proto, X)
    assert len(normalised.graph.initializers) + len(normalised.graph) > len(tensors) + len(nodes)
    assert content(restored) == content(proto)


def test_copies_share_the_data() -> None:
    loaded = load(model(SHARED["by nodes"][0], X, W))
    done = normalise(loaded)
    first, second = loaded.graph.initializers["w"], loaded.graph.initializers["w_2"]
    assert first.const_value is second.const_value
    assert done.ties == {"w_2": "w"}


def test_no_weight_is_loaded() -> None:
    def load_it() -> ir.TensorProtocol:
        raise AssertionError("a weight was loaded")

    loaded = load(model(SHARED["through a transposition"][0], X, {"w": W["w"]}))
    lazy = ir.LazyTensor(load_it, ir.DataType.FLOAT, ir.Shape([HIDDEN, HIDDEN]))
    loaded.graph.initializers["w"].const_value = lazy
    restore(loaded, normalise(loaded))
    assert [value.const_value for value in loaded.graph.initializers.values()] == [lazy]


def test_copies_that_differ_stay_apart() -> None:
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "c"), node("MatMul", "c w", "y")]
    loaded = load(model(nodes, X, {"w": W["w"]}))
    done = normalise(loaded)
    for name in ("w_2", "w_3"):
        loaded.graph.initializers[name].const_value = ir.tensor(2 * W["w"])
    restore(loaded, done)
    weights = {name: value.const_value.numpy() for name, value in loaded.graph.initializers.items()}
    assert {name: weight[0, 0] / W["w"][0, 0] for name, weight in weights.items()} == {"w": 1, "w_2": 2}


def test_the_caller_says_what_is_equal() -> None:
    loaded = load(model(SHARED["by nodes"][0], X, W))
    done = normalise(loaded)
    restore(loaded, done, same=lambda a, b: False)
    assert {"w", "w_2"} <= loaded.graph.initializers.keys()


def test_copied_nodes_that_differ_stay_apart() -> None:
    nodes = [constant("s", [0, 0, 0]), node("Reshape", "x s", "a"), node("Relu", "a", "b"), node("Reshape", "b s", "y")]
    proto = model(nodes, X, {})

    def patch(loaded: ir.Model) -> None:
        last = [n for n in loaded.graph if n.op_type == "Constant"][-1]
        last.attributes["value"] = ir.AttrTensor("value", ir.tensor([BATCH, -1, HIDDEN]))

    _, restored = there_and_back(proto, X, patch)
    assert [n.op_type for n in restored.graph.node].count("Constant") == 2


def test_a_plain_model_comes_back_as_it_was() -> None:
    nodes = [
        constant("s", [0, 0, -1]),
        node("MatMul", "x w", "a"),
        node("Add", "a b", "c"),
        node("Reshape", "c s", "y"),
    ]
    proto = model(nodes, X, {"w": W["w"], "b": W["b"]})
    normalised, restored = there_and_back(proto, X)
    assert content(proto_of(normalised)) == content(restored) == content(proto)


def test_initializers_that_are_inputs() -> None:
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "c"), node("Add", "c b", "y")]
    weights = {"w": W["w"], "b": W["b"], "unread": W["unit"]}
    proto = model(nodes, X, weights, exposed=["b", "unread", "w"], opset=8, ir_version=3)
    normalised, restored = there_and_back(proto, X)
    assert [value.name for value in normalised.graph.inputs] == ["x", "unread"]
    assert content(restored) == content(proto)


def test_constants_of_several_entries_become_initializers() -> None:
    nodes = [
        constant("big", random(4, HIDDEN, HIDDEN + 1), np.float32),
        constant("small", random(5, 1), np.float32),
    ]
    nodes += [constant("ids", np.zeros(100)), node("Gather", "small ids", "_unread")]
    nodes += [node("Add", "x small", "a"), node("MatMul", "a big", "y")]
    normalised, restored = there_and_back(model(nodes, X, {}), X)
    assert list(normalised.graph.initializers) == ["big"] == [w.name for w in restored.graph.initializer]


def test_identities_and_idle_dropout_go() -> None:
    nodes = [
        node("Identity", "x", "a"),
        node("MatMul", "a w", "c"),
        constant("ratio", 0.1, np.float32),
        constant("training", False, np.bool_),
        node("Dropout", "c ratio training", "d"),
        node("Identity", "unit", "layer1.bias"),
        node("Identity", "unit", "layer2.bias"),
        node("Add", "d layer1.bias", "e"),
        node("Add", "e layer2.bias", "f"),
        node("Relu", "f", "g"),
        node("Identity", "g", "y"),
        node("Identity", "x", "same"),
        node("Identity", "g", "again"),
    ]
    proto = model(nodes, X, {"w": W["w"], "unit": W["unit"]}, "y same again")
    normalised, restored = there_and_back(proto, X)
    assert operators(normalised) == {"MatMul": 1, "Add": 2, "Relu": 1, "Identity": 2}
    assert {"layer1.bias", "unit"} <= normalised.graph.initializers.keys()
    assert {w.name for w in restored.graph.initializer} == {"w", "unit"}
    assert [v.name for v in restored.graph.output] == ["y", "same", "again"]


def test_dropout_whose_mask_is_read_stays() -> None:
    nodes = [node("Dropout", "x", "a mask"), node("Cast", "mask", "b", to=1), node("Add", "a b", "y")]
    loaded = load(model(nodes, X, {}))
    normalise(loaded)
    assert operators(loaded)["Dropout"] == 1


def test_subgraphs_read_their_own_copies() -> None:
    empty: list[onnx.ValueInfoProto] = []
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(op, "x w", name)], name, empty, [helper.make_empty_tensor_value_info(name)]
        )
        for name, op in (("then", "MatMul"), ("else", "Add"))
    }
    weights = {"w": random(1, HIDDEN, HIDDEN), "flag": np.array(True)}
    feeds = {"x": random(0, HIDDEN, HIDDEN)}
    nodes = [node("If", "flag", "a", **branches), node("MatMul", "a w", "y")]
    proto = model(nodes, feeds, weights)
    normalised, restored = there_and_back(proto, feeds)
    assert len([name for name in normalised.graph.initializers if name.startswith("w")]) == 3
    assert content(restored)[1:] == content(proto)[1:]


# Functions


def function(
    name: str, inputs: str, outputs: str, nodes: Sequence[onnx.NodeProto], opset: int = 17, **more: Any
) -> Any:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, inputs.split(), outputs.split(), list(nodes), imports, **more)


def referring(op: str, reads: str, makes: str, domain: str = "", **references: tuple[str, int]) -> onnx.NodeProto:
    """A node with attributes that are those of the function it stands in."""
    made = node(op, reads, makes, domain=domain)
    for name, (outer, kind) in references.items():
        made.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=outer, type=kind))
    return made


def functions() -> list[onnx.FunctionProto]:
    INT, FLOAT = onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT
    norm = function(
        "norm",
        "x scale shift",
        "y",
        [referring("LayerNormalization", "x scale shift", "y", epsilon=("eps", FLOAT), axis=("axis", INT))],
        attributes=["axis"],
        attribute_protos=[helper.make_attribute("eps", 0.5)],
    )
    block = function(
        "block",
        "x w scale shift",
        "y skip",
        [
            node("MatMul", "x w", "h", name="dense"),
            referring("norm", "h scale shift", "n", eps=("eps", FLOAT), domain="local"),
            node("Add", "x n", "y"),
            node("Identity", "x", "skip"),
        ],
        attributes=["eps"],
    )
    return [norm, block]


def test_functions_are_inlined() -> None:
    nodes = [
        node("block", "x w b unit", "a skip", name="layer.0", domain="local", eps=0.25),
        node("block", "a w b _", "c skip2", name="layer.1", domain="local"),
        node("Sub", "c skip2", "y"),
    ]
    nodes[0].metadata_props.add(key="module", value="layer.0")
    proto = model(nodes, X, {k: W[k] for k in ("w", "b", "unit")}, "y skip", functions=functions())
    normalised, _ = there_and_back(proto, X)
    assert not normalised.functions
    assert "local" not in normalised.opset_imports
    named = {n.name: n for n in normalised.graph}
    assert {"layer.0/dense", "layer.1/dense", "layer.0/n_node/y_node", "layer.1/n_node/y_node"} <= named.keys()
    assert named["layer.0/n_node/y_node"].metadata_props["module"] == "layer.0"
    epsilons = [n.attributes["epsilon"].as_float() for n in normalised.graph if n.op_type == "LayerNormalization"]
    assert epsilons == [0.25, 0.5]


NOT_INLINED = {
    "a circle": (function("f", "x", "y", [node("f", "x", "y", domain="local")]), InvalidModel, "local::f calls itself"),
    "another version": (
        function("f", "x", "y", [node("Relu", "x", "y")], opset=13),
        UnsupportedModel,
        "version 13 of the operator set 'ai.onnx', expected the model's 17",
    ),
    "too many inputs": (
        function("f", "", "y", [constant("y", 1.0, np.float32)]),
        InvalidModel,
        "y_node: expected at most the 0 inputs of the function local::f, got 1",
    ),
    "an input returned": (function("f", "x", "x", []), UnsupportedModel, "the function local::f returns an input"),
}


@pytest.mark.parametrize("case", NOT_INLINED)
def test_functions_that_cannot_be_inlined(case: str) -> None:
    called, error, message = NOT_INLINED[case]
    with pytest.raises(error, match=re.escape(message)):
        normalise(load(model([node("f", "x", "y", domain="local")], X, {}, functions=[called])))


# Fused operators


def skip_block(op: str, reads: str, makes: str, stream: str, number: int) -> list[onnx.NodeProto]:
    """A dense layer on the stream, and the fused sum and norm behind it."""
    return [
        node("MatMul", f"{stream} w", f"branch{number}"),
        node(op, reads.format(b=f"branch{number}"), makes, domain=MICROSOFT, name=f"fused{number}", epsilon=1e-5),
    ]


FUSIONS = {
    "every input": ("SkipLayerNormalization", "{b} x g beta bias", "y _ _ sum"),
    "no bias": ("SkipLayerNormalization", "{b} x g beta", "y"),
    "no shift": ("SkipLayerNormalization", "{b} x g _ bias", "y _ _ sum"),
    "only what is needed": ("SkipLayerNormalization", "x {b} g", "y"),
    "the branch second": ("SkipLayerNormalization", "x {b} g beta bias", "y _ _ sum"),
    "RMS": ("SkipSimplifiedLayerNormalization", "{b} x g bias", "y _ _ sum"),
    "RMS, no bias": ("SkipSimplifiedLayerNormalization", "x {b} g", "y"),
}
NORM = {"g": random(6, HIDDEN), "beta": random(7, HIDDEN), "bias": random(8, HIDDEN), "w": W["w"]}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("form", FUSIONS)
def test_fused_residuals(form: str, opset: int) -> None:
    op, reads, makes = FUSIONS[form]
    nodes = skip_block(op, reads, makes, "x", 0)
    weights = {name: array for name, array in NORM.items() if name in [*reads.split(), "w"]}
    proto = model(nodes, X, weights, "y sum" if "sum" in makes else "y", opset=opset)
    normalised, restored = there_and_back(proto, X)
    assert {n.domain for n in normalised.graph} == {""}
    if "bias" in reads:
        first = next(n for n in normalised.graph if n.op_type == "Add")
        assert [value.name for value in first.inputs] == ["branch0", "bias"]
    assert content(restored) == content(proto)


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_an_epsilon_that_is_not_given(op: str) -> None:
    nodes = [node(op, "x skip g", "y", domain=MICROSOFT)]
    feeds = {"x": X["x"] * np.float32(1e-4), "skip": X["x"] * np.float32(1e-5)}
    there_and_back(model(nodes, feeds, {"g": NORM["g"]}), feeds)


def residual_stack(layers: int = 2) -> onnx.ModelProto:
    """Pre-norm: the sum goes on, the norm is what the branch reads."""
    nodes = [node("LayerNormalization", "x g beta", "n0", epsilon=1e-5)]
    for i in range(layers):
        stream, makes = ("x" if i == 0 else f"s{i}"), f"n{i + 1}" + (f" _ _ s{i + 1}" if i + 1 < layers else "")
        nodes += skip_block("SkipLayerNormalization", f"{{b}} {stream} g beta bias", makes, f"n{i}", i)
    return model([*nodes, node("Relu", f"n{layers}", "y")], X, NORM)


@pytest.mark.parametrize("suffix", ["", ".clone"])
def test_clones_are_fused_like_their_model(suffix: str) -> None:
    proto = residual_stack()
    loaded = load(proto)
    done = normalise(loaded)
    graph = loaded.graph
    block = [n for n in graph if n.metadata_props.get(FUSED, "").startswith("1:")]
    block = [block[0].inputs[0].producer(), *block]
    values = {block[0].inputs[0]: block[-1].outputs[0], block[-2].inputs[0]: block[-2].outputs[0]}
    clones = []
    for n in block:
        inputs = [values.get(value, value) for value in n.inputs]
        props = {key: mark.replace(":", f"{suffix}:") for key, mark in n.metadata_props.items()}
        clone = ir.Node("", n.op_type, inputs, n.attributes, name=f"{n.name}_clone", metadata_props=props)
        clone.outputs[0].name = f"{n.outputs[0].name}_clone"
        values[n.outputs[0]] = clone.outputs[0]
        clones.append(clone)
    end = graph[-1]
    graph.insert_before(end, clones)
    for i, value in enumerate(end.inputs):
        end.replace_input_with(i, values[value])
    expected = run(proto_of(loaded), X)
    assert not equal(expected, run(proto, X))
    restore(loaded, done)
    assert operators(loaded)["SkipLayerNormalization"] == 3
    assert operators(loaded)["LayerNormalization"] == 1
    assert {"fused1", "fused1_clone"} <= {n.name for n in loaded.graph}
    assert equal(run(proto_of(loaded), X), expected)


def test_a_changed_group_stays_apart_and_an_epsilon_goes_back() -> None:
    loaded = load(residual_stack(3))
    done = normalise(loaded)
    norms = [n for n in loaded.graph if n.op_type == "LayerNormalization"]
    norms[1].attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.125)
    total = norms[2].inputs[0]
    between = ir.Node("", "Neg", [total], name="between")
    between.outputs[0].name = "between"
    loaded.graph.insert_before(norms[2], between)
    norms[2].replace_input_with(0, between.outputs[0])
    expected = run(proto_of(loaded), X)
    restore(loaded, done)
    fused = [n for n in loaded.graph if n.domain == MICROSOFT]
    assert [(n.name, n.attributes["epsilon"].as_float()) for n in fused] == [
        ("fused0", 0.125),
        ("fused2", pytest.approx(1e-5)),
    ]
    assert not marks(loaded)
    assert equal(run(proto_of(loaded), X), expected)


def test_fused_norms_whose_mean_is_read_stay() -> None:
    nodes = [*skip_block("SkipLayerNormalization", "{b} x g", "a mean", "x", 0), node("Add", "a mean", "y")]
    loaded = load(model(nodes, X, {"g": NORM["g"], "w": W["w"]}))
    normalise(loaded)
    assert operators(loaded)["SkipLayerNormalization"] == 1


PRODUCTS = {
    "by a number": [node("FusedMatMul", "x w", "y", domain=MICROSOFT, alpha=0.25)],
    "of a weight that is turned": [node("FusedMatMul", "x w", "y", domain=MICROSOFT, transB=1)],
    "of keys": [node("MatMul", "x w", "q"), node("FusedMatMul", "q x", "y", domain=MICROSOFT, transB=1, alpha=0.5)],
    "of keys that were turned": [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("FusedMatMul", "t t", "y", domain=MICROSOFT, transA=1, transB=0, alpha=1.0),
    ],
    "of keys that were turned, one by one": [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("Transpose", "x", "u", perm=[1, 2, 0]),
        node("Transpose", "u", "v", perm=[2, 0, 1]),
        node("FusedMatMul", "v t", "s", domain=MICROSOFT, transA=0, transB=0),
        node("FusedMatMul", "s t", "y", domain=MICROSOFT, transA=0, transB=1),
    ],
}


@pytest.mark.parametrize("form", PRODUCTS)
def test_fused_products(form: str) -> None:
    nodes = PRODUCTS[form]
    weights = {"w": W["w"]} if any("w" in n.input for n in nodes) else {}
    proto = model(nodes, X, weights)
    normalised, restored = there_and_back(proto, X)
    assert {n.domain for n in normalised.graph} == {""}
    assert content(restored) == content(proto)


def test_products_that_swap_an_axis_with_the_batch_stay_fused() -> None:
    nodes = [node("FusedMatMul", "x w", "y", domain=MICROSOFT, transA=0, transBatchA=1)]
    normalised, _ = there_and_back(model(nodes, X, {"w": random(1, SEQUENCE, HIDDEN, HIDDEN)}), X)
    assert operators(normalised) == {"FusedMatMul": 1}


def token_inputs() -> Arrays:
    draw = np.random.default_rng(0).integers
    mask = np.ones((BATCH, SEQUENCE), np.int32)
    mask[1, 3:] = 0
    return {
        "ids": draw(0, VOCAB, (BATCH, SEQUENCE), np.int32),
        "segments": draw(0, 2, (BATCH, SEQUENCE), np.int32),
        "mask": mask,
        "positions": draw(0, LONGEST, (BATCH, SEQUENCE), np.int32),
    }


TABLES = {"words": random(9, VOCAB, HIDDEN), "places": random(10, LONGEST, HIDDEN), "kinds": random(11, 2, HIDDEN)}
EMBEDDINGS = {
    "every input": ("ids segments words places kinds g beta mask positions", "e index sum"),
    "no positions": ("ids segments words places kinds g beta mask", "e index sum"),
    "no segments": ("ids _ words places _ g beta mask", "e index"),
    "only what is needed": ("ids _ words places _ g beta", "e e/mask_index"),
}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("form", EMBEDDINGS)
def test_fused_embeddings(form: str, opset: int) -> None:
    reads, makes = EMBEDDINGS[form]
    feeds = {name: array for name, array in token_inputs().items() if name in reads.split()}
    weights = {name: array for name, array in (TABLES | NORM).items() if name in reads.split()}
    nodes = [node("EmbedLayerNormalization", reads, makes, "embed", domain=MICROSOFT, epsilon=1e-12)]
    outputs = ["e"]
    if "index" in makes.split():
        nodes.append(node("Cast", "index", "valid", to=onnx.TensorProto.FLOAT))
        outputs.append("valid")
    outputs += ["sum"] if "sum" in makes else []
    proto = model(nodes, feeds, weights, " ".join(outputs), opset=opset)
    normalised, restored = there_and_back(proto, feeds)
    assert {n.domain for n in normalised.graph} == {""}
    assert content(restored) == content(proto)


# Random graphs


@st.composite
def shared_graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """A chain of nodes that read a few weights in a few ways."""
    weights = {f"w{i}": random(i, HIDDEN, HIDDEN) / HIDDEN for i in range(3)} | {"shape": np.array([HIDDEN, HIDDEN])}
    nodes, values = [], list(weights)[:3]
    for i in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(["Identity", "Transpose", "Reshape", "Dropout"]))
        reads = draw(st.sampled_from(values)) + (" shape" if op == "Reshape" else "")
        nodes.append(node(op, reads, f"v{i}"))
        values.append(f"v{i}")
    last = "x"
    for i in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(["MatMul", "Add", "Identity"]))
        nodes.append(node(op, last if op == "Identity" else f"{last} {draw(st.sampled_from(values))}", f"a{i}"))
        last = f"a{i}"
    outputs = dict.fromkeys([last, *draw(st.lists(st.sampled_from(values), max_size=2, unique=True))])
    return model(nodes, {"x": random(0, HIDDEN, HIDDEN)}, weights, " ".join(outputs), shape=[HIDDEN, HIDDEN])


@given(shared_graphs())
def test_random_graphs(proto: onnx.ModelProto) -> None:
    feeds = {"x": random(0, HIDDEN, HIDDEN)}
    normalised, restored = there_and_back(proto, feeds)
    weights = {w.name for w in proto.graph.initializer}
    assert {w.name for w in restored.graph.initializer} <= weights | {v for n in proto.graph.node for v in n.output}
    assert len(restored.graph.initializer) <= len(weights)
    assert [v.name for v in restored.graph.output] == [v.name for v in proto.graph.output]
    onnx.checker.check_model(proto_of(normalised))
    onnx.checker.check_model(restored)
