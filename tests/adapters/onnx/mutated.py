"""Damaged ONNX files, and what becomes of them: ``python -m tests.adapters.onnx.mutated FOLDER FIRST COUNT``.

Prints a line of JSON for each file before ("started") and after. A file that takes too long ends the process.
"""

import contextlib
import faulthandler
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

import growkit
import growkit.cli
from growkit_specs import GrowkitError
from tests.adapters.onnx.drawn import Blueprint

PATIENCE = 60  # seconds for one file
MEMORY = 12 << 30  # bytes of address space
EXACT = 1e-4  # relative to the largest output; damage may leave huge entries
CLI_EVERY = 10
BESIDE = ("data", "growkit_operator.safetensors", "growkit_recipe.yaml")

BLUEPRINTS = (
    Blueprint(blocks=2, positions="Gather", mask="input"),
    Blueprint(blocks=2, kind="rms", norms="pow", qkv="Split", mlp="Slice", group=2, linear="Gemm", shared=True),
    Blueprint(blocks=1, place="post", norms="skip", attention="MultiHeadAttention", head="pooled"),
    Blueprint(blocks=2, opset=23, kind="rms", attention="Attention", mlp="Split", linear="transposed", head="tied"),
    Blueprint(blocks=2, static=True, source="narrow", attention="Einsum", linear="Einsum", head="stream", unary="Erf"),
)

Mutation = Callable[[ModelProto, Random], None]


# --- damage ----------------------------------------------------------------------------------------------------------

SIZES = (0, 1, -1, 2, 3, 7, 8, 2**31, 2**40, -(2**40))
TYPES = (0, 1, 6, 7, 9, 10, 11, 16, 99)
TEXTS = ("", "x", "Add", "ghost", "\n", "../x", "Split", "Loop", "com.microsoft")


def some(things: Any, random: Random) -> Any:
    return random.choice(things) if things else None


def drop_node(model: ModelProto, random: Random) -> None:
    del model.graph.node[random.randrange(len(model.graph.node))]


def short_circuit(model: ModelProto, random: Random) -> None:
    """Drop a node; its input takes its output's place."""
    node = model.graph.node[random.randrange(len(model.graph.node))]
    if node.input and node.output:
        for user in model.graph.node:
            user.input[:] = [node.input[0] if name == node.output[0] else name for name in user.input]
        model.graph.node.remove(node)


def repeat_node(model: ModelProto, random: Random) -> None:
    node = NodeProto.FromString(some(model.graph.node, random).SerializeToString())
    model.graph.node.append(node)


def shuffle(model: ModelProto, random: Random) -> None:
    nodes = list(model.graph.node)
    random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def rewire(model: ModelProto, random: Random) -> None:
    """Let a node read another value, perhaps one made after it."""
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    node = some(model.graph.node, random)
    if node.input:
        node.input[random.randrange(len(node.input))] = random.choice(names)


def swap_inputs(model: ModelProto, random: Random) -> None:
    node = some([node for node in model.graph.node if len(node.input) > 1], random)
    node.input[:] = node.input[::-1]


def drop_input(model: ModelProto, random: Random) -> None:
    node = some([node for node in model.graph.node if node.input], random)
    if random.random() < 0.5:
        node.input.pop()
    else:
        node.input[random.randrange(len(node.input))] = ""


def add_input(model: ModelProto, random: Random) -> None:
    some(model.graph.node, random).input.append(random.choice(["x", "", some(model.graph.initializer, random).name]))


def change_operator(model: ModelProto, random: Random) -> None:
    node, other = some(model.graph.node, random), some(model.graph.node, random)
    node.op_type = random.choice([other.op_type, other.op_type, *TEXTS])
    node.domain = random.choice([node.domain, other.domain, "own"])


def rename(model: ModelProto, random: Random) -> None:
    named = [*model.graph.initializer, *model.graph.input, *model.graph.output]
    some(named, random).name = random.choice([some(named, random).name, *TEXTS])


def drop_output(model: ModelProto, random: Random) -> None:
    node = some(model.graph.node, random)
    if random.random() < 0.5:
        node.output.append(random.choice(TEXTS))
    else:
        node.output.pop()


def drop_attribute(model: ModelProto, random: Random) -> None:
    node = some([node for node in model.graph.node if node.attribute], random)
    if node is not None:
        del node.attribute[random.randrange(len(node.attribute))]


def change_attribute(model: ModelProto, random: Random) -> None:
    attribute = some([attribute for node in model.graph.node for attribute in node.attribute], random)
    match random.randrange(4):
        case 0:
            attribute.type = random.choice(range(12))
        case 1:
            attribute.i = random.choice(SIZES)
            attribute.f = random.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])
        case 2:
            attribute.ints[:] = [random.choice(SIZES) for _ in attribute.ints or "1"]
        case _:
            attribute.s = random.choice([b"", b"\xff", b"bsi,io->", b"bij,jk->bik", b"...i,io->...o"])
            attribute.name = random.choice([attribute.name, *TEXTS])


def lie_about_shape(model: ModelProto, random: Random) -> None:
    """In an input, an output, or a note about an inner value."""
    value = some([*model.graph.input, *model.graph.output], random)
    if random.random() < 0.4:
        value = model.graph.value_info.add()
        value.CopyFrom(some([*model.graph.input, *model.graph.output], random))
        value.name = some(some(model.graph.node, random).output or ["x"], random)
    shape = value.type.tensor_type.shape.dim
    match random.randrange(5):
        case 0:
            shape.add().dim_value = random.choice(SIZES)
        case 1 if shape:
            del shape[random.randrange(len(shape))]
        case 2 if shape:
            some(shape, random).dim_param = random.choice(["batch", "sequence", "2 * batch", "batch //", "0", ""])
        case _ if shape:
            some(shape, random).dim_value = random.choice(SIZES)


def change_type(model: ModelProto, random: Random) -> None:
    some([*model.graph.input, *model.graph.output], random).type.tensor_type.elem_type = random.choice(TYPES)


def lie_about_weight(model: ModelProto, random: Random) -> None:
    tensor = some(model.graph.initializer, random)
    match random.randrange(5):
        case 0 if tensor.dims:
            tensor.dims[random.randrange(len(tensor.dims))] = random.choice(SIZES)
        case 1:
            dims = list(tensor.dims)
            random.shuffle(dims)
            tensor.dims[:] = dims
        case 2:
            tensor.dims[:] = [int(np.prod(tensor.dims))]
        case 3:
            tensor.data_type = random.choice(TYPES)
        case _:
            tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]


def change_weight(model: ModelProto, random: Random) -> None:
    """Other entries, valid in themselves."""
    tensor = some(model.graph.initializer, random)
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    with contextlib.suppress(Exception):  # damaged before
        array = numpy_helper.to_array(tensor).copy()
        if array.size:
            odd = SIZES if array.dtype.kind == "i" else (0.0, np.nan, np.inf, 1e4, -1.0)
            array.reshape(-1)[random.randrange(array.size)] = random.choice(odd)
        if random.random() < 0.3:
            with np.errstate(all="ignore"):
                array = array.astype(random.choice([np.float64, np.float16, np.int32, np.bool_]))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def drop_weight(model: ModelProto, random: Random) -> None:
    del model.graph.initializer[random.randrange(len(model.graph.initializer))]


def change_version(model: ModelProto, random: Random) -> None:
    match random.randrange(3):
        case 0:
            model.ir_version = random.choice([0, 2, 3, 7, 10, 11, 99])
        case 1:
            some(model.opset_import, random).version = random.choice([0, 1, 7, 11, 13, 18, 21, 23, 24, 99])
        case _:
            del model.opset_import[random.randrange(len(model.opset_import))]


def wrap(model: ModelProto, random: Random) -> None:
    """Put a node's whole graph into an attribute of it."""
    inner = NodeProto.FromString(some(model.graph.node, random).SerializeToString())  # not the message it is put into
    attribute = some(model.graph.node, random).attribute.add(name=random.choice(["body", "then_branch"]))
    attribute.type = onnx.AttributeProto.GRAPH
    attribute.g.node.append(inner)


LOCATIONS = ("../secret", "/etc/hostname", "link", "linked/secret", "..", "", "w.data", "none", "a/../../secret")


def point_elsewhere(model: ModelProto, random: Random) -> None:
    """Let a weight's data lie somewhere else."""
    tensor = some(model.graph.initializer, random)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    entries = {"location": random.choice(LOCATIONS), "offset": str(random.choice(SIZES)), "length": "64"}
    for key in random.sample(sorted(entries), random.randrange(1, 4)):
        tensor.external_data.add(key=key, value=entries[key])


MUTATIONS: tuple[Mutation, ...] = (
    *(drop_node, short_circuit, repeat_node, shuffle, rewire, rewire, swap_inputs, drop_input, add_input),
    *(change_operator, rename, drop_output, drop_attribute, change_attribute, change_attribute, lie_about_shape),
    *(lie_about_shape, change_type, lie_about_weight, change_weight, change_weight, change_weight, drop_weight),
    *(change_version, wrap, point_elsewhere),
)


def damaged_bytes(data: bytes, random: Random) -> bytes:
    """Some bytes flipped, added, dropped, or the end cut off."""
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(data))
        match random.randrange(4):
            case 0:
                data = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
            case 1:
                data = data[:at] + random.randbytes(random.randrange(1, 4)) + data[at:]
            case 2:
                data = data[:at] + data[at + random.randrange(1, 9) :]
            case _:
                data = data[: max(at, 1)] if random.random() < 0.3 else data
    return data


def damaged(seed: int, folder: Path) -> Blueprint:
    """Write the damaged file of this number into a folder that holds links out of it; the blueprint it was."""
    random = Random(seed)
    blueprint = random.choice(BLUEPRINTS)
    model = blueprint.model()
    (folder / "link").symlink_to("../secret")
    (folder / "linked").symlink_to("..")
    if random.random() < 0.2:
        stored = onnx.ModelProto.FromString(model.SerializeToString())
        onnx.save(stored, folder / "whole.onnx", save_as_external_data=True, location="w.data", size_threshold=64)
        model = onnx.load(folder / "whole.onnx", load_external_data=False)
        (folder / "whole.onnx").unlink()
    for mutation in random.choices(MUTATIONS, k=random.choice([0, 1, 1, 1, 2, 3])):
        with contextlib.suppress(ValueError, TypeError, AttributeError, IndexError):  # nothing left to damage so
            mutation(model, random)
    data = model.SerializeToString()
    if random.random() < 0.25:
        data = damaged_bytes(data, random)
    (folder / "model.onnx").write_bytes(data)
    return blueprint


# --- what becomes of it ----------------------------------------------------------------------------------------------


def grown_by_command_line(source: Path, out: Path) -> str | None:
    """Grow a file; the line that is said where it is refused."""
    told = io.StringIO()
    arguments = ["growkit", "grow", str(source), str(out), "--to", "hidden=2x", "--quiet"]
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        before, sys.argv = sys.argv, arguments
        try:
            growkit.cli.main()
        except SystemExit as status:
            if status.code == 0:
                return None
            lines = told.getvalue().splitlines()
            assert status.code == 2, f"status {status.code}"  # noqa: PT017 - some are refused
            assert len(lines) == 1, f"{len(lines)} lines: {lines}"
            return lines[0]
        finally:
            sys.argv = before
    raise AssertionError("it didn't say how it ended")


def grown(source: Path, out: Path, random: Random) -> str | None:
    """Grow a file in some way; the line that is said where it is refused."""
    try:
        model = growkit.read(source)
        sizes = random.choice([{"hidden": "2x"}, {"hidden": "1.5x"}, {"layers": "2x"}, {"ffn": "2x"}])
        plan = growkit.plan(model, **{k: v for k, v in sizes.items() if k in (*model.graph.sizes, "layers")})
        growkit.write(growkit.grow(model, plan), out)
    except GrowkitError as error:
        return str(error)
    return None if plan.preserving else "written"


def outputs(path: Path, blueprint: Blueprint) -> list[np.ndarray] | None:
    """What ONNX Runtime makes of a file; None where it does not run it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        given = {name: value for name, value in blueprint.inputs(2, 5).items() if name in names}
        return session.run(None, given)
    except Exception:  # its errors share no base class
        return None


def outcome(seed: int, place: Path) -> str:
    """Grow the damaged file of this number, and see that all is as it should be.

    Raises:
        AssertionError: Where something isn't.
    """
    (place / "secret").write_bytes(bytes(64))
    folder, target = place / "model", place / "out"
    folder.mkdir()
    target.mkdir()
    blueprint = damaged(seed, folder)
    source, out = folder / "model.onnx", target / "out.onnx"
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    command_line = seed % CLI_EVERY == 0
    line = grown_by_command_line(source, out) if command_line else grown(source, out, Random(seed))
    written = {path.name for path in target.iterdir()}
    for path in target.iterdir():
        assert path.is_file(), f"{path.name} is no file"
    assert before.items() <= {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}.items()
    assert {path.parent for path in place.rglob("*") if path.is_file() and path not in before} <= {target}
    if line is not None and line != "written":
        assert not written, f"refused, and {written} was written"
        assert line.isprintable(), repr(line)
        assert len(line) < 1500, line
        return "refused"
    assert "out.onnx" in written
    assert written <= {"out.onnx", *(f"out.onnx.{ending}" for ending in BESIDE)}, written
    print(json.dumps({"seed": seed, "outcome": "running"}), flush=True)
    expected = outputs(source, blueprint)
    if expected is None or line == "written" or command_line:
        return "written"
    got = outputs(out, blueprint)
    assert got is not None, "ONNX Runtime runs the source, and not what it was grown to"
    assert len(got) == len(expected)
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
        finite = np.isfinite(a)
        if finite.all() and finite.any():
            off = float(np.abs(a.astype(np.float64) - b).max()) / max(float(np.abs(a).max()), 1e-3)
            assert off < EXACT, f"off by {off}"
    return "right"


def main(place: Path, first: int, count: int) -> None:
    """Try damaged files one after the other."""
    import resource

    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for seed in range(first, first + count):
        print(json.dumps({"seed": seed, "outcome": "started"}), flush=True)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        with tempfile.TemporaryDirectory(dir=place) as name:
            try:
                found = outcome(seed, Path(name))
            except Exception as error:  # that there is one is the finding
                found = f"{type(error).__name__}: {str(error)[:500]}"
                if os.environ.get("GROWKIT_FUZZ_TRACEBACK"):
                    import traceback

                    traceback.print_exc()
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"seed": seed, "outcome": found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
