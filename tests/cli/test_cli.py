"""The contract of the command line: JSON keys, exit statuses, and what a grown directory holds."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.cli.conftest import Growkit


def test_inspect_names_every_tensor_with_its_layout(growkit: Growkit, llama: Path) -> None:
    told = growkit("inspect", llama, "--json").json
    assert {"format", "architecture", "parameters", "bytes", "spaces", "stacks", "tensors"} <= set(told)
    assert told["format"] == "torch"
    assert told["stacks"] == {"layers": 2}
    assert told["spaces"]["hidden"] == 24
    q_proj = next(t for t in told["tensors"] if t["name"] == "model.layers.1.self_attn.q_proj.weight")
    assert q_proj == {
        "name": "model.layers.1.self_attn.q_proj.weight",
        "shape": [24, 24],
        "layout": "(kv_heads group head_dim) <- hidden",
        "slot": "q_proj.weight",
        "layer": 1,
    }
    assert told["bytes"] == 4 * told["parameters"]


def test_plan_tells_sizes_costs_and_verdict(growkit: Growkit, llama: Path) -> None:
    told = growkit("plan", llama, "--to", "hidden=36,layers=3", "--json").json
    for side in ("source", "target"):
        assert {"spaces", "stacks", "parameters", "bytes"} <= set(told[side])
    assert told["target"]["spaces"]["hidden"] == 36
    assert told["target"]["spaces"]["kv_heads"] == 3  # heads follow, head_dim and groups stay
    assert told["target"]["spaces"]["ffn"] == 60
    assert told["target"]["stacks"] == {"layers": 3}
    assert told["method"] == "lossless"
    assert told["preserving"] is True
    assert all(set(reason) == {"condition", "holds", "detail"} for reason in told["reasons"])


def test_plan_says_why_a_function_is_not_kept(growkit: Growkit, llama: Path) -> None:
    told = growkit("plan", llama, "--to", "layers=4", "--method", "stack", "--json").json
    assert told["preserving"] is False
    assert [reason["condition"] for reason in told["reasons"] if not reason["holds"]] == ["layers: depth"]


def test_grown_directory_is_whole_and_verifies(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = growkit("grow", llama, out, "--to", "hidden=36,layers=4", "--check", "--json")
    assert result.status == 0
    assert result.json["verify"]["preserved"] is True
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Tiny")
    assert "Grown with growkit" in card
    assert yaml.safe_load((out / "growkit_recipe.yaml").read_text())["target"] == {"hidden": 36, "layers": 4}
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 36
    verified = growkit("verify", llama, out, "--json")
    assert verified.status == 0
    assert set(verified.json) >= {"max_abs_diff", "max_rel_diff", "preserved", "outputs"}
    assert {"name", "shape", "max_abs_diff"} <= set(verified.json["outputs"][0])
    assert verified.json["max_rel_diff"] < 1e-5


def test_verify_fails_with_status_1_where_outputs_differ(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert growkit("grow", llama, out, "--to", "layers=4", "--method", "stack").status == 0
    assert growkit("verify", llama, out).status == 1
    assert growkit("verify", llama, out, "--atol", 1e9).status == 0


def test_saved_operator_grows_the_same(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    growkit("grow", llama, first, "--to", "hidden=36")
    result = growkit("grow", llama, second, "--operator", first / "growkit_operator.safetensors")
    assert result.status == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_recipe_of_a_grown_model_grows_it_again(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    growkit("grow", llama, first, "--to", "hidden=36", "--seed", 3)
    recipe = yaml.safe_load((first / "growkit_recipe.yaml").read_text()) | {"destination": "../again"}
    assert not Path(recipe["source"]).is_absolute(), "no path of this machine"
    (first / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert growkit("run", first / "recipe.yaml").status == 0
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (first / "model.safetensors").read_bytes()


def test_like_takes_the_sizes_of_a_grown_model(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    growkit("grow", llama, tmp_path / "large", "--to", "hidden=36,layers=3")
    told = growkit("plan", llama, "--like", tmp_path / "large" / "config.json", "--json").json
    assert told["target"]["spaces"]["hidden"] == 36
    assert told["target"]["stacks"] == {"layers": 3}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_converted_and_kept(growkit: Growkit, llama: Path, tmp_path: Path, dtype: str) -> None:
    half, grown = tmp_path / "half", tmp_path / "grown"
    assert growkit("grow", llama, half, "--to", "layers=3", "--dtype", dtype).status == 0
    assert growkit("grow", half, grown, "--to", "hidden=48", "--check").status == 0
    config = json.loads((grown / "config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == dtype
    from transformers import AutoModelForCausalLM

    assert str(AutoModelForCausalLM.from_pretrained(grown, dtype="auto").dtype) == f"torch.{dtype}"


def test_methods_are_listed(growkit: Growkit) -> None:
    rows = growkit("methods", "--json").json
    assert {"lossless", "net2net", "stack", "interpolate", "random"} <= {row["name"] for row in rows}
    assert all({"name", "grows", "exact_when", "paper"} <= set(row) for row in rows)


def test_methods_are_compared_on_a_model(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(400) % 50)
    told = growkit("methods", "--for", llama, "--to", "hidden=48,layers=3", "--data", tokens, "--json").json
    found = {candidate["method"]: candidate for candidate in told}
    assert found["lossless"]["preserving"] is True
    assert found["width=hypercloning,depth=lossless"]["preserving"] is True
    assert "nearest: 2 or 4" in found["width=lossless,depth=gstack"]["refused"]
    exact = {c["start_loss"] for c in told if c["preserving"]}
    assert max(exact) - min(exact) < 1e-4
    assert all(abs(c["start_loss"] - min(exact)) > 1e-4 for c in told if c["preserving"] is False)
    table = growkit("methods", "--for", llama, "--to", "hidden=48", "--data", tokens).out
    assert "keeping the function" in table
    assert f"{found['lossless']['start_loss']:.4f}"[:4] in table


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--to", "hidden=48"], "name it with --for MODEL"),
        (["--for", "MODEL"], "no sizes asked for"),
        (["--for", "MODEL", "--to", "hidden=48", "--data", "nowhere.txt"], "no such file; expected text, .npy"),
    ],
)
def test_comparisons_that_cannot_be(growkit: Growkit, llama: Path, arguments: list[str], problem: str) -> None:
    result = growkit("methods", *(llama if argument == "MODEL" else argument for argument in arguments))
    assert result.status == 2
    assert problem in result.err
    assert result.err.count("\n") == 1


def test_a_layer_map_is_grown_told_and_kept(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    arguments = ("--layers-from", "0:2,1:2", "--residual-scale", "0", "--score-scale", "0.5")
    assert "layers from 0,1,1; new: 2" in growkit("plan", llama, *arguments).out
    told = growkit("plan", llama, *arguments, "--json").json
    assert (told["layers_from"], told["new_layers"]) == ({"layers": [0, 1, 1]}, {"layers": [2]})
    assert told["preserving"] is True
    out = tmp_path / "out"
    assert growkit("grow", llama, out, *arguments, "--check", "--quiet").status == 0
    again = growkit("run", out / "growkit_recipe.yaml")
    assert again.status == 2  # it names no destination
    recipe = yaml.safe_load((out / "growkit_recipe.yaml").read_text())
    assert recipe["layers_from"] == {"layers": [0, 1, 1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"source": str(llama), "destination": "again"}))
    assert growkit("run", tmp_path / "recipe.yaml", "--quiet").status == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]


def test_what_to_train_first_is_told(growkit: Growkit, llama: Path) -> None:
    arguments = ("plan", llama, "--to", "layers=3", "--method", "width=lossless,depth=llama_pro")
    trainable = growkit(*arguments, "--json").json["trainable"]
    assert trainable
    assert all(".2." in name for name in trainable)
    assert "train the new layers alone at first" in growkit(*arguments).out


def test_people_get_tables(growkit: Growkit, llama: Path) -> None:
    assert "(kv_heads group head_dim) <- hidden" in growkit("inspect", llama).out
    assert "keeps the function" in growkit("plan", llama, "--to", "hidden=36").out
    assert "lossless" in growkit("methods").out
    assert "COMMAND" in growkit().out
    assert growkit("--version").out.strip()


def test_half_types_are_told_what_is_rounded(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    growkit("grow", llama, half, "--to", "layers=3", "--dtype", "bfloat16")
    for target, rounded in (("hidden=36", True), ("hidden=96", False), ("layers=4", False)):  # sqrt(4) is exact
        told = growkit("plan", half, "--to", target, "--json").json
        assert told["preserving"] is True
        assert any("rounded to bfloat16" in reason["detail"] for reason in told["reasons"]) is rounded
    assert growkit("grow", half, tmp_path / "out", "--to", "hidden=36", "--check").status == 0


def test_an_architecture_file_of_ones_own_is_found(
    growkit: Growkit, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from growkit_specs.architecture import architectures

    model, folder = tmp_path / "model", tmp_path / "architectures"
    shutil.copytree(llama, model)
    folder.mkdir()
    config = json.loads((model / "config.json").read_text()) | {"model_type": "my_llama"}
    (model / "config.json").write_text(json.dumps(config))
    assert "docs/how-to/add-an-architecture.md" in growkit("inspect", model).err
    text = (files("growkit_specs") / "architectures" / "llama.yaml").read_text()
    text = text.replace("architecture: llama", "architecture: my_llama").replace("[llama]", "[my_llama]")
    (folder / "my_llama.yaml").write_text(text)
    monkeypatch.setenv("GROWKIT_ARCHITECTURES", str(folder))
    architectures.cache_clear()
    try:
        assert growkit("inspect", model, "--json").json["architecture"] == "my_llama"
        assert growkit("inspect", llama, "--json").json["architecture"] == "llama"
        (folder / "my_llama.yaml").write_text("architecture: my_llama\nclasses: 3\n")
        architectures.cache_clear()
        assert "my_llama.yaml: " in growkit("inspect", model).err
    finally:
        monkeypatch.undo()
        architectures.cache_clear()
