"""Model directories: shards, element types, what comes along, and that tensors are streamed."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import growkit
from growkit_torch.safetensors_file import read_header, write_file


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit_torch.write.SHARD_BYTES", 10_000)


def grown(source: Path, out: Path, **request: Any) -> growkit.Model:
    growkit.write(growkit.grow(growkit.read(source), **request), out)
    return growkit.read(out)


@pytest.mark.usefixtures("small_shards")
def test_shards_are_indexed_read_again_and_loaded_by_transformers(llama: Path, tmp_path: Path) -> None:
    sharded = grown(llama, tmp_path / "sharded", layers=3)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == sorted(p.name for p in (tmp_path / "sharded").glob("model-*.safetensors"))
    assert index["metadata"]["total_size"] == sharded.bytes
    assert set(index["weight_map"]) == {tensor.name for tensor in sharded.graph.tensors()}
    again = grown(tmp_path / "sharded", tmp_path / "again", hidden=36)
    assert growkit.verify(sharded, again).preserved
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.config.hidden_size == 36


def test_depth_alone_leaves_every_tensor_as_it_was(llama: Path, tmp_path: Path) -> None:
    source = growkit.read(llama)
    for dtype in ("float32", "bfloat16", "float16"):
        first = grown(llama, tmp_path / f"{dtype}0", layers=2, dtype=dtype)
        deeper = grown(tmp_path / f"{dtype}0", tmp_path / f"{dtype}1", layers=4)
        for tensor in source.graph.tensors():
            if tensor.layer in (None, 0):
                np.testing.assert_array_equal(deeper.weights[tensor.name], first.weights[tensor.name])
                assert deeper.weights[tensor.name].dtype == dtype


def test_what_stands_beside_the_weights_comes_along(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "modeling_custom.py").write_text("raise SystemExit('this code was run')")
    (source / "nested").mkdir()
    (source / "nested" / "config.json").write_text('{"kept": true}')
    for weights in ("pytorch_model.bin", "tf_model.h5", "model.onnx", "flax_model.msgpack"):
        (source / weights).write_bytes(b"weights of the source's size")
    grown(source, tmp_path / "out", hidden=36)
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"modeling_custom.py", "nested/config.json", "tokenizer.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "tf_model.h5", "model.onnx", "flax_model.msgpack"} & names
    assert {"growkit_recipe.yaml", "growkit_operator.safetensors"} <= names


def test_one_tensor_at_a_time_is_asked_for(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each grown tensor is written before the next is made."""
    events: list[str] = []
    grower = import_module("growkit.grow").Grower  # growkit.grow is the function
    make = grower.__call__
    monkeypatch.setattr(grower, "__call__", lambda self, target: events.append("made") or make(self, target))
    large = growkit.grow(growkit.read(llama), hidden=36)
    assert not events, "planning a growth makes no tensor"
    growkit.write(large, tmp_path / "out", progress=lambda written: events.append("written"))
    assert events == ["made", "written"] * len(large.weights)


def test_progress_counts_every_byte(llama: Path, tmp_path: Path) -> None:
    large = growkit.grow(growkit.read(llama), hidden=36)
    written: list[int] = []
    growkit.write(large, tmp_path / "out", progress=written.append)
    assert sum(written) == large.bytes


def test_a_plain_pickle_is_read_as_weights(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    source.mkdir()
    (source / "config.json").write_bytes((llama / "config.json").read_bytes())
    torch.save(load_file(llama / "model.safetensors"), source / "pytorch_model.bin")
    assert growkit.verify(growkit.read(llama), growkit.read(source)).max_abs_diff == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_files_agree_with_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 4).to(dtype), "b": torch.randn(5).to(dtype), "empty": torch.zeros(0, 2, dtype=dtype)}
    save_file(tensors, tmp_path / "theirs")
    ours = {name: tensor.load() for name, tensor in read_header(tmp_path / "theirs").items()}
    assert {name: tuple(array.shape) for name, array in ours.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name].astype(np.float64), tensor.double().numpy())
    shapes = {name: (array.shape, array.dtype) for name, array in ours.items()}
    write_file(tmp_path / "ours", shapes, ours.values(), lambda written: None)
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_module_is_grown_in_memory(llama: Path, tmp_path: Path) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    large = growkit.grow(growkit.read(module), hidden=36, layers=3).to_torch()
    assert type(large) is type(module)
    assert large.dtype == torch.bfloat16
    assert large.lm_head.weight is large.model.embed_tokens.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    growkit.write(growkit.grow(growkit.read(module), hidden=36, layers=3), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in large.state_dict().items())
