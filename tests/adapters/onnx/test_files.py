"""ONNX files: what is wrong is said in one line, nothing outside the folder is read, weights stay out of memory."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper

from growkit_onnx import files
from growkit_onnx.files import from_proto, load, save
from growkit_specs import GrowkitError, InvalidModel, UnsupportedModel

SMALL = """
<ir_version: 10, opset_import: ["": 18, "own": 1], producer_name: "tests", metadata_props: ["kept": "yes"]>
small (float[n, 4] x, bool c) => (float[n, 4] y)
<float[4, 4] w, float[2] v = {0.5, 2}, float[4] b = {1, 2, 3, 4}>
{
    t = MatMul(x, w)
    u = own.double(t)
    y = If (c) <
        then_branch = yes () => (float[n, 4] p) { p = Add(u, b) },
        else_branch = no () => (float[n, 4] q) { k = Constant <value = float[1] {2.5}> ()  q = Mul(u, k) }
    >
}
<domain: "own", opset_import: ["": 18]>
double (a) => (z) { z = Add(a, a) }
"""


def small() -> ModelProto:
    """A valid model with a function, graphs in nodes, and weights in several forms."""
    model = onnx.parser.parse_model(SMALL)
    model.graph.initializer.insert(0, numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w"))
    del model.graph.value_info[:]
    return model


def stored(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def outside(tensor: TensorProto, path: Path, **entries: str) -> None:
    """Move a tensor's data out into a file."""
    path.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": path.name} | entries).items():
        tensor.external_data.add(key=key, value=value)


def run(model: Path | bytes, *, c: bool) -> np.ndarray:
    """What onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 4), np.float32), "c": np.array(c)})[0]


def test_a_valid_model_is_read_from_memory_and_from_disk(tmp_path: Path) -> None:
    proto = small()
    onnx.checker.check_model(proto)
    for model in (from_proto(proto), load(stored(proto, tmp_path))):
        assert [node.op_type for node in model.graph] == ["MatMul", "double", "If"]
        np.testing.assert_array_equal(model.graph.initializers["w"].const_value, np.arange(16).reshape(4, 4))
        assert model.metadata_props == {"kept": "yes"}


def test_nodes_in_any_order_and_both_names_of_the_domain_are_read() -> None:
    proto = small()
    proto.opset_import[0].domain = proto.functions[0].opset_import[0].domain = "ai.onnx"
    proto.graph.node.extend([proto.graph.node.pop() for _ in range(3)])
    assert [node.op_type for node in proto.graph.node] == ["If", "double", "MatMul"]
    model = from_proto(proto)
    assert [node.op_type for node in model.graph] == ["MatMul", "double", "If"]
    assert model.opset_imports == {"": 18, "own": 1}
    assert all(function.opset_imports == {"": 18} for function in model.functions.values())


# --- what is wrong with a model --------------------------------------------------------------------------------------


def branch(model: ModelProto) -> onnx.GraphProto:
    return model.graph.node[2].attribute[0].g


def negative_size(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


def as_map(model: ModelProto) -> None:
    model.graph.output[0].type.map_type.key_type = TensorProto.INT64


def call_itself(model: ModelProto) -> None:
    model.functions[0].node.add(op_type="double", domain="own", input=["a"], output=["again"])
    model.functions[0].opset_import.add(domain="own", version=1)


def laugh(model: ModelProto) -> None:
    """A chain of functions, each calling the next one eight times."""
    for i in range(20):
        function = model.functions.add(domain="own", name=f"f{i}", input=["a"], output=["z0"])
        function.opset_import.add(domain="own", version=1)
        for j in range(8):
            function.node.add(op_type=f"f{i + 1}" if i < 19 else "double", domain="own", input=["a"], output=[f"z{j}"])


def nest(model: ModelProto, levels: int = 60) -> None:
    for level in range(levels):
        inner = onnx.GraphProto()
        inner.CopyFrom(model.graph)
        model.graph.ClearField("node")
        attribute = model.graph.node.add(op_type="If", name=str(level), output=["y"]).attribute.add(name="then_branch")
        attribute.type = onnx.AttributeProto.GRAPH
        attribute.g.CopyFrom(inner)


def w(model: ModelProto) -> TensorProto:
    return model.graph.initializer[0]


MALFORMED: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "no graph": (lambda m: m.ClearField("graph"), "holds no graph"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "has no outputs"),
    "duplicate initializer": (lambda m: m.graph.initializer.append(w(m)), "'w' is given twice by the initializers"),
    "nameless initializer": (lambda m: w(m).ClearField("name"), "the initializer 0 of the graph has no name"),
    "duplicate input": (lambda m: m.graph.input.append(m.graph.input[0]), "'x' is given twice by the inputs"),
    "duplicate value": (lambda m: m.graph.node.append(m.graph.node[0]), "'t' is given twice by the nodes"),
    "a node makes a weight": (lambda m: m.graph.node[0].output.append("b"), "'b' is given twice by the nodes"),
    "duplicate attribute": (lambda m: m.graph.node[2].attribute.append(m.graph.node[2].attribute[0]), "'then_branch'"),
    "duplicate function": (lambda m: m.functions.append(m.functions[0]), "'own.double.' is given twice"),
    "unmade input": (lambda m: m.graph.node[0].input.append("ghost"), "node 't' (MatMul) of the graph reads 'ghost'"),
    "unmade inner input": (lambda m: branch(m).node[0].input.append("ghost"), "reads 'ghost', which nothing makes"),
    "functions see no graph": (lambda m: m.functions[0].node[0].input.append("w"), "function 'double' reads 'w'"),
    "unmade output": (lambda m: m.graph.output.add(name="ghost"), "the graph gives 'ghost', which nothing makes"),
    "unmade inner output": (lambda m: branch(m).output.add(name="u"), "gives 'u', which nothing makes"),
    "unmade function output": (lambda m: m.functions[0].output.append("ghost"), "function 'double' gives 'ghost'"),
    "cycle": (lambda m: m.graph.node[0].input.__setitem__(0, "y"), "cycle"),
    "opset missing": (lambda m: m.opset_import.pop(1), "of 'own', whose opset is not imported"),
    "inner opset missing": (lambda m: m.functions[0].ClearField("opset_import"), "the default domain, whose opset"),
    "opset too new": (lambda m: setattr(m.opset_import[0], "version", 999), "imports opset 999; expected 1 to"),
    "opset twice": (lambda m: m.opset_import.add(domain="ai.onnx", version=17), "the default domain 2 times"),
    "format too new": (lambda m: setattr(m, "ir_version", 999), "ir_version is 999; expected 3 to"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "sparse"),
    "sparse attribute": (
        lambda m: m.graph.node[0].attribute.add(name="s", type="SPARSE_TENSOR").sparse_tensor.SetInParent(),
        "attribute 's' of node 't' (MatMul) of the graph is sparse",
    ),
    "training": (lambda m: m.training_info.add(), "training_info"),
    "segment": (lambda m: w(m).segment.SetInParent(), "segments"),
    "function calls itself": (call_itself, "a function calls itself: 'double' -> 'double'"),
    "functions without end": (laugh, "more than 10,000,000 nodes"),
    "nested too deeply": (nest, "nested too deeply"),
    "attribute without type": (lambda m: m.graph.node[0].attribute.add(name="a"), "'a' of node 't' (MatMul)"),
    "attribute of bytes": (
        lambda m: m.graph.node[0].attribute.add(name="a", type="STRINGS", strings=[b"\xff"]),
        "b'\\xff', which is no UTF-8",
    ),
    "negative size": (negative_size, "type of 'x' of the graph has a negative size, -1"),
    "map": (as_map, "is a map_type"),
    "unknown type": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99), "element type 99"),
    "unknown element type": (lambda m: setattr(w(m), "data_type", 99), "'w' of the graph has the unknown element type"),
    "no element type": (lambda m: setattr(w(m), "data_type", 0), "'w' of the graph has no element type"),
    "short data": (lambda m: setattr(w(m), "raw_data", b"1234"), "shape [4, 4] as FLOAT, 64 in raw_data; got 4"),
    "long typed data": (lambda m: m.graph.initializer[2].float_data.append(5), "4 in float_data; got 5"),
    "data of another type": (lambda m: m.graph.initializer[2].int64_data.append(5), "more than once: float_data and"),
    "no data": (lambda m: w(m).ClearField("raw_data"), "no data"),
    "negative axis": (lambda m: w(m).dims.__setitem__(0, -4), "shape [-4, 4], which no tensor can have"),
    "huge axis": (lambda m: w(m).dims.extend([0, 2**40, 2**40]), "which no tensor can have"),
    "many axes": (lambda m: w(m).dims.extend([1] * 100), "which no tensor can have"),
    "inner tensor": (
        lambda m: m.graph.node[2].attribute[1].g.node[0].attribute[0].t.dims.append(3),
        "attribute 'value' of node 'k' (Constant) of the graph in attribute 'else_branch' of node 'y' (If)",
    ),
    "external in memory": (lambda m: setattr(w(m), "data_location", 1), "stored more than once"),
    "a name on two lines": (lambda m: m.graph.node[0].input.append("a\nb\x1b[0m"), r"reads 'a\nb\x1b[0m'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_models_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    damage, expected = MALFORMED[case]
    model = small()
    damage(model)
    with pytest.raises((InvalidModel, UnsupportedModel)) as caught:
        from_proto(model)
    assert expected in str(caught.value)
    path = stored(model, tmp_path)
    with pytest.raises((InvalidModel, UnsupportedModel)) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message or "nested" in case  # the parser itself refuses that one
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 no model", "not an ONNX file, or truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an ONNX file, or truncated"),
        (small().SerializeToString()[:-9], "not an ONNX file, or truncated"),
        (small().SerializeToString().replace(b"MatMul", b"Mat\xff\xfel"), "no UTF-8; the file is damaged"),
        (b"\x08\x0a", "holds no graph"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModel) as caught:
        load(path)
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**31)
    expected = {
        "": "not a regular",
        "pipe": "not a regular",
        "none": "No such file",
        "large": "expected less than 2 GB",
    }
    for name, message in expected.items():
        with pytest.raises(InvalidModel, match=message):
            load(tmp_path / name)


# --- external data ---------------------------------------------------------------------------------------------------

ENTRIES = {
    "absolute": ({"location": "/etc/hostname"}, "is not a path within the model's folder"),
    "drive": ({"location": r"C:\w.data"}, "is not a path within"),
    "upwards": ({"location": "../w.data"}, "is not a path within"),
    "upwards inside": ({"location": "a/../../w.data"}, "is not a path within"),
    "empty": ({"location": ""}, "is not a path within"),
    "zero byte": ({"location": "w\0.data"}, "is not a path within"),
    "too long a name": ({"location": "w" * 5000}, "cannot be read: File name too long"),
    "missing": ({"location": "none.data"}, "cannot be read: No such file"),
    "a folder": ({"location": "."}, "is not a regular file"),
    "a pipe": ({"location": "pipe"}, "is not a regular file"),
    "a link outside": ({"location": "link"}, "is a link that leads out of the model's folder"),
    "a link to itself": ({"location": "loop"}, "cannot be read"),
    "a linked folder outside": ({"location": "linked/secret"}, "is a link that leads out of the model's folder"),
    "a hard link": ({"location": "hard"}, "has 2 hard links; put a copy there"),
    "beyond the end": ({"offset": "4"}, "ends at byte 68 of the external data 'w.data', which has 64"),
    "far beyond the end": ({"offset": str(2**62)}, "which has 64"),
    "negative offset": ({"offset": "-4"}, "the offset '-4'; expected a number"),
    "huge offset": ({"offset": "9" * 5000}, "expected a number"),
    "other length": ({"length": "60"}, "64 in external_data; got 60"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_external_data_stays_in_the_folder_and_in_its_file(tmp_path: Path, case: str) -> None:
    entries, expected = ENTRIES[case]
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    (folder / "linked").symlink_to("..")
    (folder / "hard").hardlink_to(tmp_path / "secret")
    model = small()
    outside(w(model), folder / "w.data", **entries)
    with pytest.raises(InvalidModel) as caught:
        load(stored(model, folder))
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(InvalidModel, match=r"has no folder|expected a number|got 60"):
        from_proto(model)


def test_external_data_is_found_whatever_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through links that stay inside, with keys of other tools, and among the attributes of nodes."""
    model = small()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link").symlink_to("../w.data")
    outside(w(model), tmp_path / "w.data", location="deep/link", prepacked_0="?")
    constant = model.graph.node[2].attribute[1].g.node[0].attribute[0].t
    constant.CopyFrom(numpy_helper.from_array(np.array([2.5], np.float32), ""))
    outside(constant, tmp_path / "k.data")
    stored(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    loaded = load(Path("model.onnx"))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(loaded.graph.initializers["w"].const_value, np.arange(16).reshape(4, 4))
    save(loaded, tmp_path / "again.onnx")
    for c in (True, False):  # nothing in it refers to the old files
        np.testing.assert_array_equal(run(tmp_path / "again.onnx", c=c), run(small().SerializeToString(), c=c))


def test_a_linked_file_is_read_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the user's own choice, wherever a link to it leads; and its own weights are in no other file."""
    monkeypatch.setattr(files, "MAPPED_BYTES", 1)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "hard").hardlink_to(stored(small(), tmp_path / "blobs"))
    (tmp_path / "link").symlink_to("hard")
    model = load(tmp_path / "link")
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)
    np.testing.assert_array_equal(run(ir.to_proto(model).SerializeToString(), c=True), run(tmp_path / "hard", c=True))


@pytest.mark.parametrize("key", ["location", "offset"])
def test_data_lies_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """What a file says of external data does not mix with data of its own."""
    monkeypatch.setattr(files, "MAPPED_BYTES", 1)
    model = small()
    w(model).external_data.add(key=key, value="9999999")
    with pytest.raises(InvalidModel, match="in more than one place"):
        load(stored(model, tmp_path))


# --- any bytes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def valid_bytes(folder: Path) -> bytes:
    model = small()
    outside(w(model), folder / "w.data", offset="0", length="64")
    return model.SerializeToString()


@given(
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4),
    external=st.booleans(),
)
def test_mutated_files_are_read_or_refused(folder: Path, edits: list[tuple[int, int, bytes]], external: bool) -> None:
    data = valid_bytes(folder)
    for position, dropped, added in edits:
        position %= len(data)
        data = data[:position] + added + data[position + dropped :]
    path = folder / "model.onnx"
    path.write_bytes(data)
    try:
        model = load(path)
    except GrowkitError as error:
        assert str(error).isprintable()  # noqa: PT017 - most are refused, some are not
        return
    with TemporaryDirectory(dir=folder) as place:
        again = Path(place) / "again.onnx"
        save(model, again, external=external)
        assert [node.op_type for node in load(again).graph] == [node.op_type for node in model.graph]


# --- writing ---------------------------------------------------------------------------------------------------------

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.int8, np.bool_, ml_dtypes.int4)


def many_weights() -> ir.Model:
    """Weights of every size and element type, made when asked for."""
    model = from_proto(small())
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for count in (0, 3, 5000):
            array = rng.integers(0, 2, (count, 3)).astype(dtype)
            tensor = ir.tensor(array, name=f"{array.dtype}.{count}", doc_string="kept")
            lazy = ir.LazyTensor(lambda tensor=tensor: tensor, tensor.dtype, tensor.shape, name=tensor.name)
            model.graph.register_initializer(ir.Value(name=lazy.name, const_value=lazy))
    text = ir.StringTensor([b"a", b"b"], shape=ir.Shape([2]), name="text")
    model.graph.register_initializer(ir.Value(name="text", const_value=text))
    return model


@pytest.mark.parametrize("mapped", [1, 1 << 20])
@pytest.mark.parametrize("external", [False, True, None])
def test_what_is_written_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool | None, mapped: int
) -> None:
    monkeypatch.setattr(files, "MAPPED_BYTES", mapped)
    model = many_weights()
    written: list[int] = []
    save(model, tmp_path / "first.onnx", external=external, progress=written.append)
    assert sum(written) == files.weight_bytes(model)
    onnx.checker.check_model(tmp_path / "first.onnx")
    first = load(tmp_path / "first.onnx")
    save(first, tmp_path / "second.onnx", external=external)
    second = load(tmp_path / "second.onnx")
    for name, value in model.graph.initializers.items():
        for other in (first, second):
            stored_there = other.graph.initializers[name].const_value
            assert (stored_there.dtype, stored_there.shape) == (value.const_value.dtype, value.const_value.shape)
            np.testing.assert_array_equal(stored_there.numpy(), value.const_value.numpy())
    proto, again = (onnx.load(tmp_path / f"{name}.onnx", load_external_data=False) for name in ("first", "second"))
    original = ir.to_proto(ir.from_proto(small()))
    for message in (proto, again, original):
        for field in ("initializer", "value_info"):
            message.graph.ClearField(field)
    assert proto == again == original
    np.testing.assert_array_equal(run(tmp_path / "second.onnx", c=True), run(small().SerializeToString(), c=True))
    names = {path.name for path in tmp_path.iterdir()}
    assert ("first.onnx.data" in names) == bool(external)


def test_each_weight_is_made_once_in_order_and_let_go(tmp_path: Path) -> None:
    made: list[str] = []
    held: list[weakref.ref[np.ndarray]] = []

    def make(name: str) -> ir.Tensor:
        assert all(array() is None for array in held[:-1]), "more than the weight before is still there"
        array = np.ones((100, 100), np.float32)
        held.append(weakref.ref(array))
        made.append(name)
        return ir.tensor(array)

    for external in (False, True):
        model = from_proto(small())
        names = [f"w{i}" for i in range(5)]
        for name in names:
            lazy = ir.LazyTensor(lambda name=name: make(name), ir.DataType.FLOAT, ir.Shape([100, 100]), name=name)
            model.graph.register_initializer(ir.Value(name=name, const_value=lazy))
        made.clear()
        save(model, tmp_path / f"{external}.onnx", external=external)
        assert made == names
        assert all(isinstance(model.graph.initializers[name].const_value, ir.LazyTensor) for name in names)


@pytest.mark.parametrize("external", [False, True])
def test_nothing_is_left_where_writing_fails(tmp_path: Path, external: bool) -> None:
    def broken() -> ir.Tensor:
        raise InvalidModel("w: the entry [0] is nan")

    failures = {"the entry [0] is nan": broken, "made with 8 bytes; expected 8000": lambda: ir.tensor(np.ones(2, "f4"))}
    for expected, make in failures.items():
        model = from_proto(small())
        lazy = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape([2000]), name="late")
        model.graph.register_initializer(ir.Value(name="late", const_value=lazy))
        with pytest.raises(InvalidModel) as caught:
            save(model, tmp_path / "out.onnx", external=external)
        assert expected in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = from_proto(small())
    for existing in ("out.onnx", "out.onnx.data"):
        (tmp_path / existing).write_text("mine")
        with pytest.raises(GrowkitError, match=f"{existing} exists; growkit overwrites nothing"):
            save(model, tmp_path / "out.onnx", external=True)
        assert [path.name for path in tmp_path.iterdir()] == [existing]
        (tmp_path / existing).unlink()


def test_more_than_a_protobuf_holds_is_refused_before_it_is_made(tmp_path: Path) -> None:
    def never() -> ir.Tensor:
        raise AssertionError

    model = from_proto(small())
    lazy = ir.LazyTensor(never, ir.DataType.FLOAT, ir.Shape([2**29]), name="large")
    model.graph.register_initializer(ir.Value(name="large", const_value=lazy))
    with pytest.raises(GrowkitError, match="write external data"):
        save(model, tmp_path / "out.onnx", external=False)
    assert not list(tmp_path.iterdir())


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from growkit_onnx.files import load, save

def anonymous():
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("RssAnon"))

folder, external = Path(sys.argv[1]), sys.argv[2] == "True"
value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, None]))
tape, first = ir.tape.Tape(), value
for i in range(12):
    make = lambda i=i: ir.tensor(np.full((5000, 1250), i, np.float32))
    weight = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape([5000, 1250]), name=f"w{i}")
    value = tape.op("Add", [value, tape.initializer(weight)])
value.name, value.type = "y", first.type
graph = ir.Graph([first], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 18}, name="g")
before, highest = anonymous(), {}
for step, model in [("save", ir.Model(graph, ir_version=9)), ("load", None), ("copy", "first")]:
    seen = []
    if step == "load":
        first = load(folder / "save.onnx")
    else:
        save(model if step == "save" else first, folder / f"{step}.onnx", external=external,
             progress=lambda written: seen.append(anonymous()))
    highest[step] = max([*seen, anonymous()]) - before
print(json.dumps(highest))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("external", [False, True])
def test_weights_stay_out_of_memory(tmp_path: Path, external: bool) -> None:
    """300 MB of weights, 25 MB each, of which one is made while another is written."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(external)],
        capture_output=True,
        check=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "1000000"},  # glibc keeps nothing freed
    )
    megabytes = json.loads(result.stdout)
    assert (tmp_path / "save.onnx").stat().st_size > (0 if external else 300e6)
    assert megabytes["load"] < 30
    assert megabytes["save"] < 60
    assert megabytes["copy"] < 30
