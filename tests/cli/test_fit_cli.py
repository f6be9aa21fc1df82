"""Fitting on the command line: what it writes, prints and refuses; an interrupted fit goes on to the same end."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import growkit as growkit_python
from growkit.fit import Progress
from growkit.operator import GrowthOperator
from tests.adapters.onnx.zoo import FILES, make
from tests.cli.conftest import Growkit, Result

SIZES = ("--to", "hidden=24,layers=3")
ALONE = ("--learn", "depth,width", "--lr", "0.001")
SHORT = (*SIZES, *ALONE, "--steps", "4", "--batch", "4", "--set", "length=16", "--quiet")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that reads bytes; read only."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=256,
        max_position_embeddings=32,
    )
    path = tmp_path_factory.mktemp("models") / "small"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{n} and {m} make {n + m}.\n" for n in range(30) for m in range(30)))
    return path


@pytest.fixture
def fit(growkit: Growkit, small: Path, text: Path, tmp_path: Path) -> Any:
    """Fits to ``op.safetensors`` in the test's folder, where nothing else is."""

    def call(*more: object, model: object = small, data: object = text) -> Result:
        return growkit("fit", model, tmp_path / "op.safetensors", "--data", data, *SHORT, *more)

    return call


@pytest.fixture(scope="module")
def fitted(small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An operator fitted by a process of its own; read only."""
    path = tmp_path_factory.mktemp("fitted") / "op.safetensors"
    subprocess.run(command(small, path, text), check=True, capture_output=True)
    return path


def command(model: Path, operator: Path, data: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "growkit.cli", "fit", str(model), str(operator), "--data", str(data), *SHORT, *more]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_refused(result: Result, said: str, folder: Path, left: tuple[str, ...] = ()) -> None:
    """One line on stderr, exit status 2, and nothing beside what was there."""
    assert result.status == 2
    assert said in result.err
    assert result.err.startswith("growkit: ")
    assert result.err.count("\n") == 1
    assert names(folder) == sorted(left)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_a_fit_leaves_the_operator_and_nothing_else(fit: Any, tmp_path: Path) -> None:
    result = fit()
    assert result.status == 0
    assert result.err == ""
    assert names(tmp_path) == ["op.safetensors"]
    assert result.out.startswith(f"wrote {tmp_path / 'op.safetensors'}: loss ")
    learned = GrowthOperator.load(tmp_path / "op.safetensors")
    assert learned.start is not None
    assert not np.array_equal(
        learned.expansions["hidden"].write.as_matrix(), learned.start.expansions["hidden"].write.as_matrix()
    )


def test_json_tells_the_plan_and_the_losses_and_nothing_else_is_printed(fit: Any, tmp_path: Path) -> None:
    result = fit("--json")
    assert (result.status, result.err) == (0, "")
    assert set(result.json) == {"operator", "plan", "loss"}
    assert result.json["operator"] == str(tmp_path / "op.safetensors")
    assert set(result.json["loss"]) == {"first", "last", "validation"}
    assert all(0 < loss < 10 for loss in result.json["loss"].values())
    assert result.json["plan"]["operator"]["parameters"] > 0


def test_a_fit_by_itself_learns_as_much_as_the_plan_says(
    growkit: Growkit, small: Path, text: Path, tmp_path: Path
) -> None:
    planned = growkit("plan", small, *SIZES, "--json").json["operator"]
    shown = growkit("fit", small, tmp_path / "op.safetensors", "--data", text, *SIZES, "--steps", "1")
    assert shown.out.startswith(f"begins as lossless; {planned['parameters']:,} parameters are learned:\n")


def test_what_is_learned_is_told_by_its_parts(growkit: Growkit, small: Path, text: Path, tmp_path: Path) -> None:
    shown = growkit("fit", small, tmp_path / "op.safetensors", "--data", text, *SHORT[:-1])
    first, *parts = shown.out.splitlines()[:-1]
    assert {"w", "B of hidden", "A of hidden"} <= {part.strip().partition(":")[0] for part in parts}
    counts = [int(part.rpartition(" ")[2].replace(",", "")) for part in parts]
    assert first == f"begins as lossless; {sum(counts):,} parameters are learned:"


def test_the_log_has_a_line_for_each_step_and_is_added_to(fit: Any, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"before": true}\n')
    fit("--log", log)
    before, *steps = map(json.loads, log.read_text().splitlines())
    assert before == {"before": True}
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    told = {"step", "steps", "loss", "lr", "gradient", "tokens", "seconds"}
    assert [set(line) for line in steps] == [told, told, told, told | {"validation"}]
    assert [line["tokens"] for line in steps] == [64, 128, 192, 256]


def test_the_same_fit_gives_the_same_operator(fit: Any, fitted: Path, tmp_path: Path) -> None:
    assert fit().status == 0
    assert_same(tmp_path / "op.safetensors", fitted)


def assert_same(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-6, err_msg=name)


def test_the_operator_is_applied_inspected_and_drawn(
    growkit: Growkit, small: Path, fitted: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    told = growkit("grow", small, large, "--operator", fitted, "--check", "--json")
    assert told.status == 0
    assert told.json["verify"]["preserved"] is False  # it was learned, so nothing is promised, and it is written
    assert transformers.LlamaForCausalLM.from_pretrained(large).config.hidden_size == 24
    assert growkit("inspect", fitted, "--json").json["spaces"]["hidden"]["target"] == 24
    assert "learned       yes" in growkit("inspect", fitted).out
    assert growkit("show", fitted, tmp_path / "op.html").status == 0
    assert (tmp_path / "op.html").stat().st_size > 0


def test_the_loss_that_is_told_is_that_of_the_grown_model(
    growkit: Growkit, small: Path, text: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "op.safetensors", ("--set", "validate_every=1", "--learn", "depth,width,norms")
    told = growkit("fit", small, out, "--data", text, *SHORT, *settings, "--json").json["loss"]
    growkit("grow", small, tmp_path / "large", "--operator", out)
    grown = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "large")
    data = growkit_python.read_data(growkit_python.read(small), text, batch=4, length=16)
    total, count = 0.0, 0
    for batch in data.validation():
        with torch.no_grad():
            logits = grown(torch.as_tensor(batch.inputs["input_ids"])).logits
        labels = torch.as_tensor(batch.labels)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    assert told["validation"] == pytest.approx(total / count, rel=1e-4)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_killed_fit_goes_on_to_the_operator_of_one_that_was_not(
    growkit: Growkit, small: Path, text: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "op.safetensors", ("--steps", "60", "--save-every", "2")
    with subprocess.Popen(
        command(small, out, text, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        deadline = time.monotonic() + 300
        while not (tmp_path / "op.safetensors.fit").exists() and running.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert "op.safetensors" not in names(tmp_path)

    refused = growkit("fit", small, out, "--data", text, *SHORT, *more)
    assert refused.status == 2
    assert "op.safetensors.fit is there" in refused.err
    assert "--resume" in refused.err

    log = tmp_path / "log.jsonl"
    assert growkit("fit", small, out, "--data", text, *SHORT, *more, "--resume", "--log", log).status == 0
    first = json.loads(log.read_text().splitlines()[0])["step"]
    assert first > 2
    assert first % 2 == 1
    assert names(tmp_path) == ["log.jsonl", "op.safetensors"]

    whole = tmp_path / "whole.safetensors"
    assert growkit("fit", small, whole, "--data", text, *SHORT, *more).status == 0
    assert_same(out, whole)


class _StoppedError(Exception):
    """What stops a fit from within."""


@pytest.fixture
def stopped(small: Path, text: Path, tmp_path: Path) -> str:
    """The name of the checkpoint, of step 2, that a fit left which was stopped in step 3."""
    checkpoint = tmp_path / "op.safetensors.fit"
    model = growkit_python.read(small)
    plan = growkit_python.plan(model, hidden=24, layers=3)
    data = growkit_python.read_data(model, text, batch=4, length=16)

    def stop(step: Progress) -> None:
        if step.step == 3:
            raise _StoppedError

    settings = {"steps": 4, "batch": 4, "length": 16, "learn": ("depth", "width"), "lr": 0.001}
    with pytest.raises(_StoppedError):
        growkit_python.fit(model, plan, data, checkpoint=checkpoint, save_every=2, progress=stop, **settings)
    assert names(tmp_path) == [checkpoint.name]
    return checkpoint.name


def test_a_fit_from_python_goes_on_on_the_command_line(fit: Any, stopped: str, fitted: Path, tmp_path: Path) -> None:
    assert fit("--resume").status == 0
    assert names(tmp_path) == ["op.safetensors"]
    assert_same(tmp_path / "op.safetensors", fitted)


def test_an_interrupted_fit_is_not_begun_anew_by_mistake(fit: Any, stopped: str, tmp_path: Path) -> None:
    assert_refused(
        fit(), f"{stopped} is there, of a fit that was interrupted; go on with --resume", tmp_path, (stopped,)
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--set", "clip=2"), "clip is 1.0, here it is 2.0"),
        (("--steps", "9"), "steps is 4, here it is 9"),
        (("--learn", "width"), "learn is ['depth', 'width'], here it is ['width']"),
        (("--set", "tied=true"), "tied is None, here it is True"),
        (("--init", "ligo-paper"), "method is 'lossless', here it is 'ligo-paper'"),
        (("--to", "hidden=24,layers=4"), "target.layers is 3, here it is 4"),
        (("--seed", "1"), "first batch is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_another_fit_does_not_go_on_from_a_checkpoint(
    fit: Any, stopped: str, tmp_path: Path, changed: tuple[str, ...], said: str
) -> None:
    before = (tmp_path / stopped).read_bytes()
    assert_refused(fit("--resume", *changed), said, tmp_path, (stopped,))
    assert (tmp_path / stopped).read_bytes() == before


def test_other_data_does_not_go_on_from_a_checkpoint(fit: Any, stopped: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(text.read_text().upper())
    refused = fit("--resume", data=tmp_path / "other.txt")
    assert_refused(refused, "first batch is", tmp_path, ("other.txt", stopped))


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-1], lambda whole: b"\xff" * 99])
def test_a_damaged_checkpoint_is_refused(fit: Any, stopped: str, tmp_path: Path, damage: Any) -> None:
    (tmp_path / stopped).write_bytes(damage((tmp_path / stopped).read_bytes()))
    assert_refused(fit("--resume"), "not the checkpoint of a fit", tmp_path, (stopped,))


def test_resume_begins_where_there_is_no_checkpoint(fit: Any, fitted: Path, tmp_path: Path) -> None:
    assert fit("--resume").status == 0
    assert_same(tmp_path / "op.safetensors", fitted)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--set", "rate=1"), "unknown setting 'rate' of a fit; settings are learn, structure, tied,"),
        (("--set", "length"), "--set length: expected NAME=VALUE"),
        (("--set", "length=much"), "fit: length: Input should be a valid integer"),
        (("--set", "length=999"), "sequences of 999 tokens were asked for; the model takes 2 to 32"),
        (("--set", "structure=hidden=thick"), "fit: structure.hidden: Input should be 'source', 'dense' or 'fixed'"),
        (("--set", "structure=width=dense"), "structure: no space is called 'width'; spaces are hidden,"),
        (("--set", "accumulate=9"), "a batch of 4 examples cannot be shared out in 9 parts"),
        (("--steps", "0"), "fit: steps: Input should be greater than or equal to 1"),
        (("--lr", "-1"), "fit: lr: Input should be greater than 0"),
        (("--learn", "nonsense"), "fit: learn.0: Input should be 'depth', 'width', 'norms', 'residual' or 'source'"),
        (("--to", "layers=3", "--learn", "width"), "nothing is learned: learn=width has no part in a growth"),
        (("--to", ""), "no sizes asked for"),
        (("--to", "hidden=8"), "8"),
        (("--init", "nonsense"), "unknown method 'nonsense'; methods are"),
        (("--loss", "nonsense"), "the loss 'nonsense' is not known; expected auto, causal,"),
        (("--loss", "no_module:loss"), "the loss 'no_module:loss' cannot be loaded"),
        (("--log", "missing/log.jsonl"), "missing is no directory; make it first"),
        (("--device", "abacus"), "abacus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_in_one_line(fit: Any, tmp_path: Path, changed: tuple[str, ...], said: str) -> None:
    assert_refused(fit(*changed), said, tmp_path)


def test_nothing_is_overwritten(fit: Any, tmp_path: Path) -> None:
    (tmp_path / "op.safetensors").write_text("mine")
    assert_refused(fit(), "op.safetensors exists; growkit overwrites nothing", tmp_path, ("op.safetensors",))
    assert (tmp_path / "op.safetensors").read_text() == "mine"


def test_missing_and_empty_data_is_refused(fit: Any, growkit: Growkit, small: Path, tmp_path: Path) -> None:
    assert_refused(fit(data=tmp_path / "no.txt"), "no.txt: no such file; expected text,", tmp_path)
    assert_refused(growkit("fit", small, tmp_path / "op", *SIZES), "Missing option '--data'", tmp_path)
    (tmp_path / "empty.txt").write_text("")
    assert_refused(fit(data=tmp_path / "empty.txt"), "empty.txt: is empty", tmp_path, ("empty.txt",))


def test_text_without_a_tokenizer_is_refused(fit: Any, small: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    transformers.LlamaForCausalLM.from_pretrained(small).save_pretrained(bare)
    assert_refused(fit(model=bare), "tokenizer.json", tmp_path, ("bare",))


def test_a_loss_that_is_not_finite_stops_the_fit(
    fit: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("losses")
    (folder / "ending_loss.py").write_text(
        "factors = iter([1.0, 1.0, float('nan')])\n"
        "def loss(outputs, batch): return outputs['logits'].sum() * next(factors)\n"
    )
    monkeypatch.syspath_prepend(folder)
    refused = fit("--loss", "ending_loss:loss", "--save-every", "1")
    assert "step 3: the loss is nan; the fit stops; lower lr (now 0.001) or look at the data" in refused.err
    assert_refused(refused, "op.safetensors.fit holds the last good state", tmp_path, ("op.safetensors.fit",))
    monkeypatch.delitem(sys.modules, "ending_loss")


def test_an_operator_in_a_folder_that_is_not_there_is_refused(
    growkit: Growkit, small: Path, text: Path, tmp_path: Path
) -> None:
    refused = growkit("fit", small, tmp_path / "no" / "op.safetensors", "--data", text, *SHORT)
    assert_refused(refused, "is no directory; make it first", tmp_path)


def test_an_operator_does_not_grow_a_model_of_other_sizes(
    growkit: Growkit, llama: Path, fitted: Path, tmp_path: Path
) -> None:
    refused = growkit("grow", llama, tmp_path / "large", "--operator", fitted)
    assert_refused(refused, "the operator does not grow a model whose hidden is 24", tmp_path)


# --- recipes, ONNX files ---------------------------------------------------------------------------------------------


def test_a_recipe_with_a_fit_grows_by_what_was_learned(
    growkit: Growkit, small: Path, text: Path, fitted: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "fitted.yaml"
    told = {"source": str(small), "destination": "large", "target": {"hidden": 24, "layers": 3}, "data": str(text)}
    fit = {"steps": 4, "batch": 4, "length": 16, "learn": ["depth", "width"], "lr": 0.001}
    recipe.write_text(json.dumps(told | {"fit": fit, "check": True}))
    result = growkit("run", recipe, "--json")
    assert result.status == 0
    assert set(result.json) == {"out", "plan", "loss", "verify"}
    assert result.json["verify"]["preserved"] is False
    assert names(tmp_path) == ["fitted.yaml", "large"]
    assert_same(tmp_path / "large" / "growkit_operator.safetensors", fitted)
    assert_refused(growkit("run", recipe), "large exists", tmp_path, ("fitted.yaml", "large"))


def test_a_recipe_with_a_fit_and_no_data_is_refused(growkit: Growkit, small: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "fitted.yaml"
    recipe.write_text(json.dumps({"source": str(small), "destination": "large", "target": {"layers": 3}, "fit": {}}))
    assert_refused(growkit("run", recipe), "a fit and no data; add a line 'data: PATH'", tmp_path, ("fitted.yaml",))


def test_an_onnx_file_is_fitted_on_named_arrays_and_grown(growkit: Growkit, tmp_path: Path) -> None:
    encoder = make(next(file for file in FILES if file.name == "bert-legacy17-eager"))
    ids = np.random.default_rng(0).integers(0, 48, (24, 12))
    data, out, large = tmp_path / "data.npz", tmp_path / "op.safetensors", tmp_path / "large.onnx"
    np.savez(data, input_ids=ids, attention_mask=np.ones_like(ids))
    asked = ("--to", "hidden=48,layers=4", "--loss", "distill", "--steps", "2", "--batch", "4")
    result = growkit("fit", encoder, out, "--data", data, *asked, "--json")
    assert result.status == 0
    assert result.json["loss"]["last"] > 0
    assert growkit("grow", encoder, large, "--operator", out).status == 0
    assert growkit("inspect", large, "--json").json["stacks"] == {"layers": 4}
    beside = tuple(names(tmp_path))
    no = tmp_path / "no.safetensors"
    refused = growkit("fit", encoder, no, "--data", data, *asked, "--quiet", "--set", "checkpointing=1")
    assert_refused(refused, "the blocks of an ONNX graph cannot be run again", tmp_path, beside)


def test_a_decoder_with_a_cache_is_fitted_on_tokens_and_grown(growkit: Growkit, tmp_path: Path) -> None:
    decoder = make(next(file for file in FILES if file.name == "llama-cache-legacy17-eager"))
    data, out, large = tmp_path / "tokens.npy", tmp_path / "op.safetensors", tmp_path / "large.onnx"
    np.save(data, np.random.default_rng(0).integers(0, 48, 600))
    asked = ("--to", "hidden=36,layers=4", "--steps", "2", "--batch", "2", "--set", "length=16")
    result = growkit("fit", decoder, out, "--data", data, *asked, "--json")
    assert (result.status, result.err) == (0, "")
    assert growkit("grow", decoder, large, "--operator", out).status == 0
    assert growkit("verify", decoder, large).status == 1  # both run, and what was learned is another function
