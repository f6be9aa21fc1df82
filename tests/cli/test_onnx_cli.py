"""ONNX files on the command line: what it writes, tells and refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from tests.adapters.onnx.zoo import FILES, make
from tests.cli.conftest import Growkit

GROWN = ("--to", "hidden=36,layers=5")
BESIDE = ["large.onnx", "large.onnx.growkit_operator.safetensors", "large.onnx.growkit_recipe.yaml"]


def copied(name: str, folder: Path) -> Path:
    """A file of the zoo, with what lies beside it, in a folder of its own."""
    made = make(next(file for file in FILES if file.name == name))
    return Path(shutil.copytree(made.parent, folder / "small")) / made.name


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT, whose output is its stream."""
    return copied("bert-legacy17-eager", tmp_path)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A Llama that takes its cache as inputs."""
    return copied("llama-cache-legacy17-eager", tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_inspect_reads_like_that_of_a_torch_model(growkit: Growkit, decoder: Path) -> None:
    told = growkit("inspect", decoder, "--json").json
    assert (told["format"], told["stacks"]) == ("onnx", {"layers": 3})
    assert told["spaces"]["hidden"] == 24
    scale = next(t for t in told["tensors"] if t["name"] == "model.model.layers.1.input_layernorm.weight")
    assert scale == {"name": scale["name"], "shape": [24], "layout": "* hidden", "slot": "scale", "layer": 1}
    assert {t["layout"] for t in told["tensors"]} >= {"vocab -> hidden", "hidden -> (kv_heads group head_dim)"}
    stored = {v.name: list(v.dims) for v in onnx.load(decoder).graph.initializer}
    kept = [t for t in told["tensors"] if t["name"] in stored]
    assert kept
    assert all(t["shape"] == stored[t["name"]] for t in kept)
    assert told["bytes"] == 4 * told["parameters"] == 4 * sum(np.prod(t["shape"], dtype=int) for t in told["tensors"])
    assert set(told["frozen"]) == {"head_dim", "vocab"}
    printed = growkit("inspect", decoder).out
    for name, why in told["frozen"].items():
        assert f"{name}: {why}" in printed
    assert "None" not in printed


@pytest.mark.parametrize(
    ("asked", "policy", "line"),
    [
        ((), "project", "the output last_hidden_state keeps its size, by the read matrix of hidden"),
        (("--outputs", "grow"), "grow", "the output last_hidden_state grows with hidden"),
    ],
)
def test_a_plan_tells_of_outputs(
    growkit: Growkit, encoder: Path, asked: tuple[str, ...], policy: str, line: str
) -> None:
    arguments = ("plan", encoder, "--to", "hidden=48", *asked)
    told = growkit(*arguments, "--json").json
    assert told["outputs"] == [{"name": "last_hidden_state", "space": "hidden", "policy": policy}]
    assert told["kv_cache"] == {"inputs": [], "outputs": [], "spaces": []}
    assert line in growkit(*arguments).out


def test_a_plan_tells_of_caches(growkit: Growkit, decoder: Path) -> None:
    printed = growkit("plan", decoder, *GROWN).out
    assert "cached keys and values grow with kv_heads" in printed
    assert "new inputs: past_key_values.3.key, past_key_values.3.value, past_key_values.4.key, " in printed
    assert "new outputs: present.3.key, present.3.value, present.4.key, present.4.value" in printed
    told = growkit("plan", decoder, "--to", "layers=4", "--json").json["kv_cache"]
    assert told["inputs"] == ["past_key_values.3.key", "past_key_values.3.value"]
    assert told["spaces"] == []


def test_a_file_grows_is_checked_and_verified(growkit: Growkit, decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "large" / "large.onnx"
    out.parent.mkdir()
    result = growkit("grow", decoder, out, *GROWN, "--check", "--json")
    assert result.status == 0
    assert result.json["verify"]["preserved"] is True
    assert names(out.parent) == BESIDE
    onnx.checker.check_model(out, full_check=True)
    verified = growkit("verify", decoder, out, "--json")
    assert verified.status == 0
    spaces = {output["name"]: output["space"] for output in verified.json["outputs"]}
    assert spaces["logits"] is None
    assert spaces["present.2.key"] == "kv_heads"
    assert growkit("inspect", out, "--json").json["stacks"] == {"layers": 5}


def test_verify_finds_the_operator_beside_the_file(growkit: Growkit, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "large.onnx"
    assert growkit("grow", encoder, out, "--to", "hidden=48", "--outputs", "grow", "--quiet").status == 0
    assert growkit("verify", encoder, out).status == 0
    (tmp_path / BESIDE[1]).unlink()
    alone = growkit("verify", encoder, out)
    assert alone.status == 2
    assert "no growth operator stands beside the target" in alone.err


def test_a_recipe_repeats_the_signature(growkit: Growkit, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "large.onnx"
    asked = ("--to", "hidden=48", "--outputs", "grow", "--kv-cache", "refuse", "--seed", 3)
    assert growkit("grow", encoder, out, *asked, "--quiet").status == 0
    recipe = yaml.safe_load((tmp_path / BESIDE[2]).read_text())
    assert recipe["source"] == "small/model.onnx"
    assert (recipe["outputs"], recipe["kv_cache"]) == ("grow", "refuse")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe | {"destination": "again.onnx"}))
    assert growkit("run", tmp_path / "again.yaml", "--quiet").status == 0
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()


def test_a_saved_operator_grows_the_same(growkit: Growkit, encoder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "large.onnx", tmp_path / "second.onnx"
    assert growkit("grow", encoder, first, "--to", "hidden=48", "--outputs", "grow", "--quiet").status == 0
    operator = ("--operator", tmp_path / BESIDE[1])
    assert growkit("grow", encoder, second, *operator, "--outputs", "grow", "--check", "--quiet").status == 0
    assert second.read_bytes() == first.read_bytes()
    assert not second.with_name("second.onnx.growkit_recipe.yaml").exists()


def test_external_data_comes_along(growkit: Growkit, tmp_path: Path) -> None:
    source = copied("llama-dynamo18-external-eager", tmp_path)
    before = {path: path.read_bytes() for path in source.parent.iterdir()}
    assert growkit("grow", source, tmp_path / "large.onnx", *GROWN, "--check", "--quiet").status == 0
    assert names(tmp_path) == sorted([*BESIDE, "large.onnx.data", "small"])
    assert {path: path.read_bytes() for path in source.parent.iterdir()} == before


# --- what can't be ---------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def quantised(path: Path) -> None:
    """The first weight of a product in 8 bits, brought back by DequantizeLinear."""
    model = onnx.load(path)
    weights = {w.name: w for w in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights)
    kept = weights[node.input[1]]
    array = numpy_helper.to_array(kept)
    scale = float(np.abs(array).max()) / 127
    model.graph.initializer.remove(kept)
    model.graph.initializer.append(numpy_helper.from_array((array / scale).round().astype(np.int8), "narrow"))
    model.graph.initializer.append(helper.make_tensor("by", TensorProto.FLOAT, [], [scale]))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["narrow", "by"], [kept.name], "dequantise"))
    onnx.save(model, path)


def not_finite(path: Path) -> None:
    model = onnx.load(path)
    weight = next(w for w in model.graph.initializer if "word_embeddings" in w.name)
    array = numpy_helper.to_array(weight).copy()
    array[3, 5] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no ONNX": (lambda path: path.write_text("name: small\n"), "not an ONNX file, or truncated"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated": (truncated, "not an ONNX file, or truncated"),
    "quantised": (quantised, "DequantizeLinear"),
    "NaN": (not_finite, "the entry [3, 5] is nan"),
    "gone": (lambda path: path.unlink(), "no such file or directory"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(growkit: Growkit, encoder: Path, tmp_path: Path, name: str) -> None:
    break_it, expected = BROKEN[name]
    break_it(encoder)
    before = {path: path.read_bytes() for path in encoder.parent.iterdir()}
    result = growkit("grow", encoder, tmp_path / "large.onnx", "--to", "hidden=48", "--quiet")
    assert result.status == 2, result.err
    assert expected in result.err
    assert result.err.count("\n") == 1, "one line"
    assert names(tmp_path) == ["small"]
    assert {path: path.read_bytes() for path in encoder.parent.iterdir()} == before


REQUESTS: dict[tuple[str, ...], str] = {
    ("large.onnx", "--outputs", "wide"): "outputs: Input should be 'project' or 'grow', got 'wide'",
    ("large.onnx", "--kv-cache", "keep"): "kv_cache: Input should be 'grow' or 'refuse', got 'keep'",
    ("large.onnx", "--kv-cache", "refuse"): "change with kv_heads, the number of layers; leave out kv_cache 'refuse'",
    ("large.onnx", "--dtype", "float16"): "an ONNX file keeps its element types",
    ("large.onnx", "--device", "tpu", "--check"): "the device 'tpu' is not known; expected auto, cpu or cuda",
    ("large",): "large: growkit writes what it read, here onnx; give it a name that ends with .onnx",
    ("there.onnx",): "there.onnx exists; growkit overwrites nothing",
    ("known.onnx",): "known.onnx.growkit_operator.safetensors exists; growkit overwrites nothing",
    ("nowhere/large.onnx",): "nowhere is no directory; make it first",
}  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS, ids=" ".join)
def test_what_cannot_be_written_is_refused(
    growkit: Growkit, decoder: Path, tmp_path: Path, request_: tuple[str, ...]
) -> None:
    (tmp_path / "there.onnx").touch()
    (tmp_path / "known.onnx.growkit_operator.safetensors").touch()
    before = names(tmp_path)
    out, *options = request_
    result = growkit("grow", decoder, tmp_path / out, *GROWN, "--quiet", *options)
    assert result.status == 2
    assert REQUESTS[request_] in result.err
    assert result.err.count("\n") == 1, "one line"
    assert names(tmp_path) == before
