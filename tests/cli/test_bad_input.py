"""Bad input: one line that says what is wrong and what to do, exit status 2, nothing written, nothing lost."""

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Growkit

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _fingerprint(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*")) if p.is_file()
    }


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return edit


def _edit_weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, model / WEIGHTS)

    return edit


def _truncate(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:-100])


def _shard(weight_map: dict[str, str]) -> Callable[[Path], None]:
    """Turn the single file into a shard with an index; ``weight_map`` overrides its entries."""

    def edit(model: Path) -> None:
        names = load_file(model / WEIGHTS)
        (model / WEIGHTS).rename(model / "one.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors") | weight_map}
        (model / INDEX).write_text(json.dumps(index))

    return edit


def _pickled(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": _Evil()}))


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("the pickle was run",))


def _nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan


def _wider(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)


def _odd(tensors: dict[str, np.ndarray]) -> None:
    tensors["odd"] = np.zeros(3, np.float32)


def _quantise(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.ones(24, np.int8)


def _untie(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


BROKEN_MODELS = {
    "no config": (lambda model: (model / "config.json").unlink(), "a directory without config.json"),
    "config is not JSON": (lambda model: (model / "config.json").write_text("{"), "config.json: not JSON"),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), "no weights; expected model.safetensors"),
    "truncated": (_truncate, "truncated"),
    "header cut": (lambda model: (model / WEIGHTS).write_bytes(b"abc"), "not a safetensors file"),
    "missing shard": (_shard({"model.norm.weight": "two.safetensors"}), "two.safetensors: the shard is missing"),
    "index names a ghost": (_shard({"ghost": "one.safetensors"}), "ghost should be in one.safetensors"),
    "shard outside": (_shard({"model.norm.weight": "../one.safetensors"}), "not a file of the model's directory"),
    "config disagrees": (_edit_config(intermediate_size=44), "'ffn' is 44 by the config (ffn 44), the tensor has 40"),
    "tensor disagrees": (_edit_weights(_wider), "'hidden' is 24 by the config (hidden 24), the tensor has 32 on"),
    "tensor missing": (_edit_weights(lambda t: t.pop("model.norm.weight")), "the tensor model.norm.weight is missing"),
    "tensor unknown": (_edit_weights(_odd), "the tensor odd [3] is not understood"),
    "tie broken": (_edit_weights(_untie), "tied by the config, and differ"),
    "unknown architecture": (_edit_config(model_type="mamba"), "'mamba' is not known; known: "),
    "unknown class": (_edit_config(architectures=["LlamaForArt"]), "'LlamaForArt' is not known"),
    "unknown key": (_edit_config(moe_experts=8), "the key 'moe_experts' is not understood"),
    "unsupported value": (_edit_config(pretraining_tp=2), "pretraining_tp is 2"),
    "sizes that are not whole": (_edit_config(num_key_value_heads=3), "group"),
    "NaN": (_edit_weights(_nan), "model.layers.1.mlp.up_proj.weight: the entry [3, 5] is nan"),
    "pickle": (_pickled, "growkit never unpickles code"),
    "quantised": (_edit_weights(_quantise), "dequantise it first"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models_are_refused(growkit: Growkit, llama: Path, tmp_path: Path, name: str) -> None:
    break_it, expected = BROKEN_MODELS[name]
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    break_it(model)
    before = _fingerprint(model)
    result = growkit("grow", model, tmp_path / "out", "--to", "hidden=36,layers=3", "--quiet")
    assert result.status == 2
    assert expected in result.err
    assert result.err.count("\n") == 1, "one line"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "nothing half-written is left"
    assert _fingerprint(model) == before


BAD_TARGETS = {
    "hidden=20": "hidden=20 is smaller than the source's 24",
    "hidden=40": "nearest hidden: 36 or 48",
    "heads=5": "heads=5 is not a whole number of groups: 2 kv_heads; nearest heads: 4 or 6",
    "heads=8,kv_heads=3": "heads=8 is not a whole number of groups: 3 kv_heads; nearest heads: 6 or 9",
    "hidden=1.3x": "nearest: 24 or 36",
    "hidden=0": "a size is a whole number (768) or a ratio (1.5x)",
    "hidden": "expected NAME=SIZE",
    "hidden=36,hidden=48": "given twice",
    "width=36": "unknown size 'width'; sizes are hidden, heads,",
    "layers=1": "layers=1 is smaller",
    "": "no sizes asked for",
}


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_targets_that_cannot_be_are_refused(growkit: Growkit, llama: Path, tmp_path: Path, target: str) -> None:
    result = growkit("grow", llama, tmp_path / "out", "--to", target)
    assert result.status == 2
    assert BAD_TARGETS[target] in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--to", "hidden=36", "--method", "magic"], "unknown method 'magic'; methods are"),
        (["--to", "hidden=36", "--method", "stack"], "for width: lossless"),
        (["--to", "layers=4", "--method", "net2net"], "for depth: lossless"),
        (["--to", "hidden=36", "--method", "width=lossless,height=stack"], "does not parse"),
        (["--to", "hidden=36", "--dtype", "int8"], "the dtype 'int8' is not supported"),
        (["--to", "hidden=36", "--check", "--device", "tpu"], "the device 'tpu' is not known"),
        (["--to", "hidden=36", "--seed", "-1"], "Invalid value for '--seed'"),
        (["--operator", "nowhere.safetensors"], "not a growth operator"),
        (["--frobnicate"], "No such option"),
        (["--to", "hidden=36", "--method", "hypercloning"], "nearest: 24 or 48; methods for any ratio: aki, "),
        (["--to", "layers=3", "--method", "gstack"], "nearest: 2 or 4; depth methods for any depth: interpolate"),
        (["--to", "layers=3", "--method", "stack:part=side"], "expected again, front, middle, back"),
        (["--layers-from", "0,1,2"], "layer 2 of layers is not there; its layers are 0 to 1"),
        (["--layers-from", "0,1,x"], "a layer map is layers or half-open ranges of them"),
        (["--to", "layers=5", "--layers-from", "0,1,1"], "layers_from names 3 layers for layers, layers=5"),
        (["--to", "hidden=36", "--fresh", "loud"], "fresh is 'loud'; expected a factor"),
    ],
)
def test_bad_requests_are_refused(
    growkit: Growkit, llama: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    result = growkit("grow", llama, tmp_path / "out", *arguments, "--quiet")
    assert result.status == 2
    assert expected in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    result = growkit("grow", llama, out, "--to", "hidden=36")
    assert result.status == 2
    assert "exists; growkit overwrites nothing" in result.err
    assert (out / "precious").read_text() == "mine"


def test_missing_folder_and_missing_model(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    assert "is no directory; make it first" in growkit("grow", llama, tmp_path / "a" / "b", "--to", "hidden=36").err
    result = growkit("inspect", tmp_path / "nothing")
    assert result.status == 2
    assert "no such file or directory" in result.err


def test_no_space_left_is_seen_before_and_while_writing(
    growkit: Growkit, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        result = growkit("grow", llama, tmp_path / "out", "--to", "hidden=36")
    assert result.status == 2
    assert "no space left" in result.err

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("growkit_torch.write.write_file", full)
    result = growkit("grow", llama, tmp_path / "out", "--to", "hidden=36", "--quiet")
    assert result.status == 2
    assert "No space left on device; nothing was written" in result.err
    assert not list(tmp_path.iterdir())


def test_broken_promise_writes_nothing(
    growkit: Growkit, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the check finds a difference that the plan ruled out, the status is 1 and nothing is put in place."""
    monkeypatch.setattr("growkit.norms.grown_scale", lambda expansion, scale, fill, factor, offset: np.ones(36))
    result = growkit("grow", llama, tmp_path / "out", "--to", "hidden=36", "--check", "--quiet")
    assert result.status == 1
    assert not list(tmp_path.iterdir())


def test_bad_recipes_are_refused(growkit: Growkit, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert "No such file" in growkit("run", recipe).err
    recipe.write_bytes(b"\xff\xfe\x00")
    assert "recipe.yaml: " in growkit("run", recipe).err
    recipe.write_text("source: x\ntarget: {hidden: big}\n")
    assert "target.hidden: a size is a whole number" in growkit("run", recipe).err
    recipe.write_text("source: x\ntarget: {hidden: 36}\nspeed: 3\n")
    assert "speed: Extra inputs are not permitted" in growkit("run", recipe).err
    recipe.write_text("source: x\ntarget: {hidden: 36}\n")
    assert "names no destination" in growkit("run", recipe).err
