"""What becomes of a file's inputs and outputs where it grows: projected, grown, refused, and still comparable."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import growkit
from growkit import GrowkitError
from growkit.model import Growth
from growkit_specs import InvalidTarget
from tests.adapters.onnx.zoo import FILES, make

ENCODER = "bert-legacy17-eager"
CACHED = ("gpt2-cache-legacy17-eager", "llama-cache-legacy17-eager", "genai-hand21-eager", "gpt2-cache-dynamo18-sdpa")
Shapes = dict[str, list[str | int]]


def made(name: str) -> Path:
    """A file of the zoo."""
    return make(next(file for file in FILES if file.name == name))


def shapes(values: Any) -> Shapes:
    """The shapes of a graph's inputs or outputs, by name, in their order; sums with their terms in one order."""

    def spelled(dimension: Any) -> str | int:
        return " + ".join(sorted(dimension.dim_param.split(" + "))) or dimension.dim_value

    return {v.name: [spelled(d) for d in v.type.tensor_type.shape.dim] for v in values}


def written(name: str, folder: Path, **request: Any) -> tuple[growkit.Model, Path]:
    """A file's model, and where what it grew into was written."""
    source = growkit.read(made(name))
    out = folder / "large.onnx"
    growkit.write(growkit.grow(source, **request), out)
    return source, out


@pytest.mark.parametrize(("outputs", "size"), [(None, 24), ("project", 24), ("grow", 48)])
def test_an_output_of_a_grown_space(outputs: str | None, size: int, tmp_path: Path) -> None:
    source, out = written(ENCODER, tmp_path, hidden=48, outputs=outputs)
    large, before = onnx.load(out).graph, onnx.load(made(ENCODER)).graph
    expected = shapes(before.output) | {"last_hidden_state": ["batch", "sequence", size]}
    assert shapes(large.output) == expected
    assert shapes(large.input) == shapes(before.input)
    told = {output["name"]: output for output in growkit.plan(source, hidden=48, outputs=outputs).outputs()}
    policy = "grow" if outputs == "grow" else "project"
    assert told["last_hidden_state"] == {"name": "last_hidden_state", "space": "hidden", "policy": policy}
    report = growkit.verify(source, growkit.read(out))
    assert report.preserved
    compared = {output.name: output.space for output in report.outputs}
    assert compared["last_hidden_state"] == ("hidden" if outputs == "grow" else None)


@pytest.mark.parametrize("name", CACHED)
def test_caches_grow_with_heads_and_layers(name: str, tmp_path: Path) -> None:
    source, out = written(name, tmp_path, hidden="1.5x", layers=5)
    before, large = onnx.load(made(name)).graph, onnx.load(out).graph
    heads = "kv_heads" if "kv_heads" in source.graph.sizes else "heads"
    count = 3 * source.graph.sizes[heads] // 2

    def grown(values: Any, prefix: str) -> Shapes:
        """The shapes that are expected: the cache's of five layers, layer by layer, behind everything else."""
        old = shapes(values)
        others = {name: shape for name, shape in old.items() if not name.startswith(prefix)}
        cached = {
            f"{prefix}.{i}.{part}": list(old[f"{prefix}.0.{part}"]) for i in range(5) for part in ("key", "value")
        }
        for shape in cached.values():
            shape[1] = count
        return others | cached

    assert list(shapes(large.input).items()) == list(grown(before.input, "past_key_values").items())
    assert list(shapes(large.output).items()) == list(grown(before.output, "present").items())
    read = growkit.read(out)
    report = growkit.verify(source, read)
    assert report.preserved
    assert {output.name: output.space for output in report.outputs} == {
        output.name: None if output.name == "logits" else heads for output in before.output
    }
    changes = growkit.plan(source, hidden="1.5x", layers=5).to_json()["kv_cache"]
    assert changes == {
        "inputs": [f"past_key_values.{i}.{part}" for i in (3, 4) for part in ("key", "value")],
        "outputs": [f"present.{i}.{part}" for i in (3, 4) for part in ("key", "value")],
        "spaces": [heads],
    }


@pytest.mark.parametrize(
    "request_",
    [{"head_dim": 8, "layers": 4}, {"hidden": "2x", "head_dim": "2x", "method": "net2net"}],
    ids=["padded", "copied"],
)
def test_caches_of_wider_heads_are_mapped(request_: dict[str, Any]) -> None:
    source = growkit.read(made("gpt2-cache-legacy17-eager"))
    large = growkit.grow(source, **request_)
    report = growkit.verify(source, large)
    assert report.preserved
    (present,) = (output for output in report.outputs if output.name == "present.1.value")
    assert present.space is not None
    assert "head_dim" in present.space


def test_a_cache_of_another_layer_shows(tmp_path: Path) -> None:
    """The larger model reads the caches that it is given: told of another layer map, it is given the wrong ones."""
    source, out = written("gpt2-cache-legacy17-eager", tmp_path, hidden="1.5x", layers=5)
    large = growkit.read(out)
    assert large.growth is not None
    operator = large.growth.operator
    blend = {key: w[::-1] if key == "layers" else w for key, w in operator.blend.items()}
    wrong = dataclasses.replace(large, growth=Growth(dataclasses.replace(operator, blend=blend)))
    assert growkit.verify(source, large).preserved
    assert not growkit.verify(source, wrong).preserved


@pytest.mark.parametrize(
    ("request_", "what"),
    [({"hidden": "1.5x"}, "change with kv_heads;"), ({"layers": 4}, "change with the number of layers;")],
)
def test_caches_that_are_to_stay_are_not_changed(request_: dict[str, Any], what: str) -> None:
    source = growkit.read(made("llama-cache-legacy17-eager"))
    with pytest.raises(InvalidTarget, match=what):
        growkit.plan(source, **request_, kv_cache="refuse")
    plan = growkit.plan(source, ffn="2x", kv_cache="refuse")
    assert plan.to_json()["kv_cache"] == {"inputs": [], "outputs": [], "spaces": []}


def test_an_operator_is_applied_with_the_signature_that_is_asked_for(tmp_path: Path) -> None:
    source = growkit.read(made(ENCODER))
    plan = growkit.plan(source, hidden=48)
    grown = growkit.grow(source, plan.operator, outputs="grow")
    assert shapes(grown.to_onnx().graph.output)["last_hidden_state"][-1] == 48
    with pytest.raises(GrowkitError, match="the plan settles the sizes; got outputs beside it"):
        growkit.grow(source, plan, outputs="grow")
    with pytest.raises(InvalidTarget, match="outputs: Input should be 'project' or 'grow', got 'wide'"):
        growkit.plan(source, hidden=48, outputs="wide")


def test_a_torch_model_keeps_no_output_its_size(llama: Path) -> None:
    model = growkit.read(llama)
    assert growkit.plan(model, hidden=48, outputs="grow", kv_cache="grow").preserving
    for asked in ({"outputs": "project"}, {"kv_cache": "refuse"}):
        with pytest.raises(InvalidTarget, match="grow with its config"):
            growkit.plan(model, hidden=48, **asked)


def test_element_types_stay() -> None:
    with pytest.raises(InvalidTarget, match=r"an ONNX file keeps its element types.*got float16 for float32"):
        growkit.grow(growkit.read(made(ENCODER)), hidden=48, dtype="float16")


def test_inputs_are_drawn_where_a_model_runs() -> None:
    """GroupQueryAttention takes several tokens after a cache in a batch of one alone."""
    source = growkit.read(made("genai-hand21-eager"))
    drawn = list(source.adapter.inputs(source, 0, source.adapter.forward(source, "cpu")))
    assert [inputs["input_ids"].shape for inputs in drawn] == [(1, 16), (3, 1)]
    assert all(inputs["past_key_values.0.key"].shape[2] > 1 for inputs in drawn)


def test_what_the_runtime_cannot_run_is_compared_in_torch(tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 on a CPU."""
    source, out = written("llama-dynamo18-bf16-eager", tmp_path, hidden=36, layers=5)
    report = growkit.verify(source, growkit.read(out), device="cpu")
    assert report.preserved
    assert report.max_abs_diff > 0


def test_a_model_that_runs_nowhere_says_so() -> None:
    source = growkit.read(made(ENCODER))

    def forward(*_: object) -> Any:
        raise GrowkitError("ONNX Runtime cannot run the model: it never could")

    with pytest.raises(GrowkitError, match="it never could"):
        list(source.adapter.inputs(source, 0, forward))


# --- genai_config.json -----------------------------------------------------------------------------------------------

DECODER = {
    "filename": "small.onnx",
    "head_size": 16,
    "hidden_size": 24,
    "inputs": {"past_key_names": "past_key_values.%d.key"},
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "sliding_window": {"window_size": 8, "layers": [0, 2]},
}


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A decoder in a folder of its own, with its config, a tokenizer, and a second model that the config isn't of."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("small.onnx", "other.onnx"):
        (folder / name).write_bytes(made("genai-hand21-eager").read_bytes())
    config = {"model": {"type": "llama", "vocab_size": 48, "decoder": DECODER}, "search": {"max_length": 64}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder / "small.onnx"


def grown(source: Path, folder: Path) -> Path:
    out = folder / "large.onnx"
    growkit.write(growkit.grow(growkit.read(source), hidden=36, layers=5), out)
    return out


def test_the_config_of_a_decoder_follows(decoder: Path, tmp_path: Path) -> None:
    out = grown(decoder, tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    sizes = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 5}
    window = {"window_size": 8, "layers": [0, 1, 4]}
    assert config["model"]["decoder"] == DECODER | sizes | {"filename": "large.onnx", "sliding_window": window}
    assert config["search"] == {"max_length": 64}
    assert not (tmp_path / "tokenizer.json").exists()
    names = {value.name for value in onnxruntime.InferenceSession(out).get_inputs()}
    assert {DECODER["inputs"]["past_key_names"] % i for i in range(5)} <= names  # type: ignore[index]


def test_keys_that_a_config_has_not_are_not_made_up(decoder: Path, tmp_path: Path) -> None:
    path = decoder.with_name("genai_config.json")
    path.write_text(json.dumps({"model": {"decoder": {"filename": "small.onnx", "hidden_size": 24}}}))
    grown(decoder, tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config == {"model": {"decoder": {"filename": "large.onnx", "hidden_size": 36}}}


def test_a_config_of_another_file_stays_where_it_is(decoder: Path, tmp_path: Path) -> None:
    grown(decoder.with_name("other.onnx"), tmp_path)
    assert not (tmp_path / "genai_config.json").exists()


def test_a_config_is_never_overwritten(decoder: Path) -> None:
    before = {path: path.read_bytes() for path in decoder.parent.iterdir()}
    with pytest.raises(GrowkitError, match=r"genai_config.json exists; growkit overwrites nothing"):
        grown(decoder, decoder.parent)
    assert {path: path.read_bytes() for path in decoder.parent.iterdir()} == before


def test_a_config_that_is_not_json_is_refused(decoder: Path, tmp_path: Path) -> None:
    decoder.with_name("genai_config.json").write_text("{")
    with pytest.raises(GrowkitError, match=r"genai_config\.json: not JSON"):
        grown(decoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# --- external data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "external"), [("llama-dynamo18-external-eager", True), ("llama-dynamo18-sdpa", False)]
)
def test_weights_stay_where_they_were(name: str, external: bool, tmp_path: Path) -> None:
    _, out = written(name, tmp_path, hidden=36)
    assert (tmp_path / "large.onnx.data").exists() is external
    assert np.isfinite(growkit.verify(growkit.read(made(name)), growkit.read(out)).max_abs_diff)


def test_large_weights_within_a_file_are_not_external(tmp_path: Path) -> None:
    """Weights from 1 MiB on are mapped from the file itself; the grown file holds its own too."""
    path = tmp_path / "small.onnx"
    model = onnx.load(made("llama-dynamo18-sdpa"))
    wide = onnx.numpy_helper.from_array(np.ones((1024, 512), np.float32), "unused")
    model.graph.initializer.append(wide)
    model.graph.node.append(onnx.helper.make_node("Identity", ["unused"], ["unread"]))
    onnx.save(model, path)
    growkit.write(growkit.grow(growkit.read(path), hidden=36), tmp_path / "large.onnx")
    assert not (tmp_path / "large.onnx.data").exists()


def test_a_stack_on_top_of_itself_leaves_fused_names_apart(tmp_path: Path) -> None:
    """The last block's sum was fused with the final norm; its copy in the middle is not."""
    path = tmp_path / "large.onnx"
    growkit.write(growkit.grow(growkit.read(made("genai-hand21-eager")), layers=6, method="stack"), path)
    names = [name for node in onnx.load(path).graph.node for name in node.output if name]
    assert len(names) == len(set(names))
