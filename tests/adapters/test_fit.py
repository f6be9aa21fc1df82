"""Learning operators: what a fit reports is what its operator gives, however it is run."""

import gc
import json
import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import growkit
from growkit.description import describe
from growkit.fit import Progress
from growkit.loss import Batch, start_loss
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError
from growkit_torch.fit import as_tensors
from tests.adapters.fitting import batch_for, ready
from tests.adapters.test_growing import CLASSES, LARGER, source_of
from tests.adapters.tiny_models import tiny

EXACT = {"precision": "float64", "checkpointing": 0.0}


@cache
def llama() -> growkit.Model:
    """A tiny decoder."""
    return growkit.read(tiny("llama", CLASSES["llama"]))


@cache
def llama_plan(method: str = "lossless") -> growkit.Plan:
    """A plan to grow it."""
    return growkit.plan(llama(), method=method, **LARGER)


def batches(count: int = 3, *, model: growkit.Model | None = None, size: int = 4) -> list[dict[str, np.ndarray]]:
    """Random batches."""
    return [batch_for(model or llama(), size=size, seed=seed) for seed in range(count)]


def fitted(
    data: Any = None, *, model: growkit.Model | None = None, plan: growkit.Plan | None = None, **told: Any
) -> tuple[GrowthOperator, list[Progress]]:
    """The operator of a fit on the CPU, and what it told."""
    steps: list[Progress] = []
    operator = growkit.fit(
        model or llama(),
        plan or llama_plan(),
        batches() if data is None else data,
        device="cpu",
        progress=steps.append,
        **{"steps": 3, "lr": 0.01, "warmup": 0.0, **told},
    )
    return operator, steps


def losses(steps: list[Progress]) -> list[float]:
    return [each.loss for each in steps]


def arrays_of(operator: GrowthOperator) -> dict[str, np.ndarray]:
    """Everything in it that is numbers."""
    arrays: dict[str, np.ndarray] = {}
    operator._structure(arrays)
    return arrays


def assert_same(one: GrowthOperator, other: GrowthOperator) -> None:
    """Bit for bit."""
    ours, theirs = arrays_of(one), arrays_of(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert np.array_equal(array, theirs[name]), name


def loss_of(model: growkit.Model, batch: dict[str, np.ndarray]) -> float:
    """The cross-entropy by numpy."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return start_loss(model, Batch(inputs, batch["labels"]), device="cpu")


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "sizes", "told"),
    [
        ("llama", LARGER, {}),
        ("llama", LARGER, {"learn": ("depth", "width", "norms", "residual")}),
        ("llama", LARGER, {"learn": ("width", "source")}),
        ("llama", LARGER, {"learn": ("depth", "source"), "init": "width=net2net,depth=stack"}),
        ("llama", LARGER, {"per_layer": True, "structure": {"ffn": "source"}}),
        ("llama", LARGER, {"structure": {"hidden": "dense", "(kv_heads group head_dim)": "dense"}}),
        ("gpt2", {"hidden": 36, "layers": 3}, {"init": "ligo-paper"}),
        ("bert", LARGER, {"init": "ligo-paper", "learn": ("depth", "width", "norms")}),
        ("bert", {"hidden": 48, "ffn": 80, "layers": 3}, {"init": "aki", "learn": ("depth", "residual")}),
        ("vit", LARGER, {}),
        ("dinov2", {"hidden": 36, "layers": 3}, {"init": "lemon"}),
        ("t5", {"hidden": 36, "ffn": 60, "layers": 4}, {}),
    ],
)
def test_the_grown_model_has_the_loss_that_the_fit_reports(
    architecture: str, sizes: dict[str, int], told: dict[str, Any], tmp_path: Path
) -> None:
    source = source_of(architecture)
    given = batches(2, model=source)
    data = growkit.as_data(given, validation=given[:1])
    operator, steps = fitted(data, model=source, plan=growkit.plan(source, **sizes), **{**EXACT, **told})
    operator.save(tmp_path / "operator.safetensors")
    loaded = GrowthOperator.load(tmp_path / "operator.safetensors")
    assert_same(operator, loaded)
    large = growkit.grow(source, loaded, dtype="float64", outputs="grow")
    assert steps[-1].validation == pytest.approx(loss_of(large, given[0]), rel=1e-9)
    assert steps[-1].validation != pytest.approx(steps[0].loss, rel=1e-3)
    described = describe(loaded)
    assert described


@pytest.mark.parametrize("strategy", ["factored", "materialised", "auto"])
def test_the_loss_falls(strategy: str) -> None:
    _, steps = fitted(batches(1), steps=30, lr=0.03, strategy=strategy)
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert [each.step for each in steps] == list(range(1, 31))
    assert {each.steps for each in steps} == {30}
    assert steps[-1].tokens == 30 * 4 * 6
    assert all(later.seconds >= earlier.seconds > 0 for earlier, later in pairwise(steps))


def test_a_fit_is_the_same_every_time_and_leaves_the_source_alone() -> None:
    before = {name: np.array(array) for name, array in llama().weights.items()}
    one, steps = fitted()
    other, again = fitted()
    assert_same(one, other)
    assert losses(steps) == losses(again)
    for name, array in llama().weights.items():
        assert np.array_equal(array, before[name])


def test_what_was_grown_can_be_fitted_again() -> None:
    first = growkit.grow(llama(), hidden=36, layers=3)
    given = batches(1)
    data = growkit.as_data(given, validation=given)
    operator, steps = fitted(data, model=first, plan=growkit.plan(first, hidden=48, layers=5), **EXACT)
    large = growkit.grow(first, operator, dtype="float64")
    assert loss_of(large, given[0]) == pytest.approx(steps[-1].validation, rel=1e-9)


def test_half_weights_are_learned_on_in_single() -> None:
    source = growkit.read(tiny("llama", CLASSES["llama"]).to(torch.bfloat16))
    given = batches(1)
    data = growkit.as_data(given, validation=given)
    operator, steps = fitted(data, model=source, plan=growkit.plan(source, **LARGER))
    assert loss_of(growkit.grow(source, operator, dtype="float32"), given[0]) == pytest.approx(
        steps[-1].validation, rel=1e-5
    )


def test_the_order_of_the_data_is_the_datas() -> None:
    given = batches(2)
    assert losses(fitted(given)[1]) != losses(fitted(given[::-1])[1])


# --- the same numbers however it is run ------------------------------------------------------------------------------


@cache
def reference() -> tuple[float, ...]:
    """The losses of a fit of three steps."""
    return tuple(losses(fitted(lame(), strategy="materialised", **EXACT)[1]))


def lame() -> list[dict[str, np.ndarray]]:
    """Batches whose examples have 6, 5, 1 and 0 labels that count."""
    given = batches()
    for batch in given:
        batch["labels"][0] = np.abs(batch["labels"][0]) % 50
        batch["labels"][1, :1] = batch["labels"][2, 1:] = batch["labels"][3] = -100
    return given


@pytest.mark.parametrize(
    "how",
    [
        {"accumulate": 2},
        {"accumulate": 4},
        {"accumulate": 3, "strategy": "factored"},
        {"strategy": "factored"},
        {"strategy": "auto", "checkpointing": 0.5},
        {"strategy": "factored", "checkpointing": 1.0, "accumulate": 2},
        {"strategy": "materialised", "checkpointing": 1.0},
    ],
)
def test_however_a_batch_is_run_the_numbers_are_the_same(how: dict[str, Any]) -> None:
    found = losses(fitted(lame(), **{**EXACT, **how})[1])
    assert found == pytest.approx(list(reference()), rel=1e-10)


def test_parts_of_masked_data_weigh_as_many_labels_as_they_have() -> None:
    source = source_of("bert")
    given = batches(2, model=source)
    rng = np.random.default_rng(0)
    for batch in given:
        hidden = rng.random(batch["labels"].shape) < 0.3
        hidden[0] = False
        hidden[1] = True
        batch["labels"] = np.where(hidden, np.abs(batch["labels"]) % 50, -100)
    plan = growkit.plan(source, layers=3, method="stack")
    whole, parts = (
        losses(fitted(given, model=source, plan=plan, accumulate=accumulate, **EXACT)[1]) for accumulate in (1, 4)
    )
    assert parts == pytest.approx(whole, rel=1e-10)


def test_bfloat16_is_near() -> None:
    exact, half = (losses(fitted(precision=precision)[1]) for precision in ("float32", "bfloat16"))
    assert half == pytest.approx(exact, rel=0.03)
    assert half != exact
    operator, _ = fitted(precision="bfloat16")
    assert {array.dtype for array in arrays_of(operator).values() if array.dtype.kind == "f"} <= {
        np.dtype(np.float32),
        np.dtype(np.float64),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_a_gpu_gives_the_numbers_of_a_cpu(precision: str) -> None:
    told = {"steps": 3, "lr": 0.01, "precision": precision}
    found: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for device, each in found.items():
        growkit.fit(
            llama(), llama_plan(), batches(), device=device, progress=lambda s, e=each: e.append(s.loss), **told
        )
    assert found["cuda"] == pytest.approx(
        found["cpu"], rel={"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05}[precision]
    )


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine() -> None:
    _, steps = fitted(steps=10, lr=0.5, warmup=0.2, clip=1e-9)
    rates = [each.lr for each in steps]
    assert rates[:2] == pytest.approx([0.25, 0.5])
    assert rates[2:] == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])


@pytest.mark.parametrize(("warmup", "rates"), [(0.0, [1.0, 0.5]), (1.0, [0.5, 1.0]), (0.01, [1.0, 1.0])])
def test_rates_of_two_steps(warmup: float, rates: list[float]) -> None:
    assert [each.lr for each in fitted(steps=2, lr=1e-3, warmup=warmup)[1]] == pytest.approx([1e-3 * r for r in rates])


@pytest.mark.parametrize("strategy", ["auto", "materialised", "factored"])
@pytest.mark.parametrize("checkpointing", [0.0, 1.0])
def test_a_step_leaves_nothing_behind(strategy: str, checkpointing: float) -> None:
    """What a step made once was held by its own gradient: a fit grew with every step."""
    fit = ready(llama(), llama_plan(), data=batches(1), strategy=strategy, checkpointing=checkpointing)
    held = []
    for _ in range(3):
        fit.stepped(as_tensors(fit.data.batch(0)), 1e-3)
        gc.collect()
        held.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert held[1] == held[2]


def test_steps_are_adamws_without_decay() -> None:
    fit = ready(llama(), llama_plan(), seed=1, clip=None, **EXACT)
    before = [entry.detach().clone() for entry in fit.learned.entries]
    fit.stepped(as_tensors(growkit.as_data(batches()).batch(0)), 0.02)
    for entry, old in zip(fit.learned.entries, before, strict=True):
        g = entry.grad
        assert g is not None  # every entry there is counts
        assert g.any()
        torch.testing.assert_close(entry.detach(), old - 0.02 * g / (g.abs() + 1e-8), rtol=1e-9, atol=1e-12)


def test_gradients_are_clipped_and_reported_as_they_were() -> None:
    batch = as_tensors(growkit.as_data(batches()).batch(0))
    norms = {}
    for clip in (None, 1e-3):
        fit = ready(llama(), llama_plan(), seed=1, clip=clip, **EXACT)
        _, norms[clip] = fit.stepped(batch, 0.01)
        applied = math.sqrt(sum(float((p.grad**2).sum()) for p in fit.parameters if p.grad is not None))
        assert applied == pytest.approx(norms[clip] if clip is None else clip, rel=1e-5)
    assert norms[None] == pytest.approx(norms[1e-3], rel=1e-12)
    assert norms[None] > 1e-2


def test_the_frozen_source_gets_no_gradient() -> None:
    fit = ready(llama(), llama_plan(), learn=("depth",))
    fit.stepped(as_tensors(growkit.as_data(batches()).batch(0)), 0.01)
    assert all(entry.grad is None for entry in fit.growing.frozen)
    assert len(fit.parameters) == len(fit.learned.entries)


# --- validation and what is told -------------------------------------------------------------------------------------


def test_the_validation_split_is_looked_at_when_it_is_time() -> None:
    given = batches()
    data = growkit.as_data(given[:2], validation=given[2:])
    assert [each.validation is not None for each in fitted(data, steps=5)[1]] == [False] * 4 + [True]
    looked = [each.validation is not None for each in fitted(data, steps=5, validate_every=2)[1]]
    assert looked == [False, True, False, True, True]
    assert all(each.validation is None for each in fitted(given, steps=2, validate_every=1)[1])


def test_the_validation_loss_is_the_mean_over_labels() -> None:
    given = lame()
    given[0] = {name: value[:2] for name, value in given[0].items()}
    data = growkit.as_data(given[2:], validation=given[:2])
    operator, steps = fitted(data, steps=1, **EXACT)
    large = growkit.grow(llama(), operator, dtype="float64")
    again = fitted(data, steps=1, accumulate=4, **EXACT)[1]  # of the held-out batches one has two examples
    counts = [int((batch["labels"] != -100).sum()) for batch in given[:2]]
    expected = sum(n * loss_of(large, batch) for n, batch in zip(counts, given, strict=False)) / sum(counts)
    assert counts[0] != counts[1]
    assert steps[-1].validation == pytest.approx(expected, rel=1e-9)
    assert again[-1].validation == pytest.approx(expected, rel=1e-9)


def test_patience_stops_early_and_gives_the_best_back() -> None:
    given = batches(2)
    data = growkit.as_data(given[:1], validation=given[1:])
    told = {"steps": 40, "lr": 0.05, "validate_every": 1, "patience": 3, **EXACT}
    operator, steps = fitted(data, **told)
    seen = [each.validation for each in steps if each.validation is not None]
    best = min(seen)
    assert len(steps) < 40
    assert seen.index(best) == len(seen) - 4
    large = growkit.grow(llama(), operator, dtype="float64")
    assert loss_of(large, given[1]) == pytest.approx(best, rel=1e-9)


def test_each_step_is_a_line_of_json(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n')
    given = batches()
    _, steps = fitted(growkit.as_data(given, validation=given[:1]), log=str(log))
    first, *lines = map(json.loads, log.read_text().splitlines())
    assert first == {"step": 0}  # what is there stays
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == losses(steps)
    assert set(lines[0]) == {"step", "steps", "loss", "lr", "gradient", "tokens", "seconds"}
    assert set(lines[-1]) == {*lines[0], "validation"}


# --- losses of other kinds -------------------------------------------------------------------------------------------


def test_a_model_is_brought_near_to_its_source_without_labels() -> None:
    source = source_of("bert")
    given = [{"input_ids": batch["input_ids"]} for batch in batches(1, model=source)]
    plan = growkit.plan(source, method="width=net2net,depth=stack", hidden=48, ffn=80, layers=3)
    _, steps = fitted(given, model=source, plan=plan, loss="distill", steps=15, lr=0.01)
    assert steps[-1].loss < steps[0].loss


def test_modules_that_no_file_knows_are_fitted() -> None:
    from growkit_torch.testing import randomised
    from tests.adapters.test_exported import POSITIONS, VOCAB, Nano

    sizes = {"hidden": 24, "heads": 4, "head_dim": 6, "ffn": 40}
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    assert POSITIONS >= 9
    source = growkit.read(
        randomised(Nano(sizes, 2)),
        example_inputs=ids,
        build=lambda graph: Nano(graph.sizes, next(iter(graph.depths.values()))),
    )
    (port,) = [port for port in source.graph.inputs if port.kind == "tokens"]
    given = [{port.name: ids.numpy(), "labels": np.roll(ids.numpy(), -1, 1)}]
    plan = growkit.plan(source, hidden=36, layers=3)
    data = growkit.as_data(given, validation=given)
    operator, steps = fitted(data, model=source, plan=plan, loss="causal", steps=10, lr=0.03, **EXACT)
    assert steps[-1].loss < 0.95 * steps[0].loss
    large = growkit.grow(source, operator, dtype="float64", outputs="grow")
    assert loss_of(large, given[0]) == pytest.approx(steps[-1].validation, rel=1e-9)


# --- what cannot be --------------------------------------------------------------------------------------------------


def spoiled(**changes: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{**batches(1)[0], **changes}]


def no_labels() -> list[dict[str, np.ndarray]]:
    return [{"input_ids": batches(1)[0]["input_ids"]}]


def nothing() -> Iterator[Any]:
    yield from ()


IDS = np.array([[1, 2, 50, 3]])


@pytest.mark.parametrize(
    ("data", "told", "problem"),
    [
        (spoiled(input_ids=IDS, labels=IDS % 50), {}, "input_ids: the batch has the entry 50; expected 0 to 49"),
        (spoiled(input_ids=-IDS, labels=IDS % 50), {}, "input_ids: the batch has the entry -1; expected 0 to 49"),
        (spoiled(input_ids=IDS % 50, labels=IDS), {}, "labels: the batch has the entry 50; expected 0 to 49"),
        ([], {}, "there are no batches; expected at least one"),
        (nothing(), {}, "the batches ran out at step 0"),
        (no_labels(), {}, "the loss 'causal' needs labels; the data gives input_ids"),
        ([{"labels": np.array([[1, 2]])}], {}, "the batch has no inputs; the model takes input_ids, attention_mask"),
        (spoiled(input_idz=np.ones((4, 6))), {}, "the model has no input input_idz; it takes input_ids, atten"),
        (spoiled(labels=np.array([1])), {}, "examples differ in number: input_ids has 4, labels has 1"),
        (spoiled(labels=np.full((4, 6), -100)), {}, "step 1: no label of the batch counts, all are -100"),
        (spoiled(labels=np.ones((4, 5), dtype=int)), {}, r"labels: shape \[4, 5\]; the logits' are \[4, 6\]"),
        (spoiled(attention_mask=np.ones((4, 9))), {}, r"step 1: the model cannot be run on input_ids \[4, 6\], "),
        (None, {"accumulate": 5}, "a batch of 4 examples cannot be shared out in 5 parts; take a larger batch"),
        (None, {"loss": "tests.adapters.test_fit:vector"}, r"gives shape \[4, 6, 50\]; expected one number"),
        (None, {"loss": "perplexity"}, "the loss 'perplexity' is not known; expected auto, causal"),
        (None, {"learn": ()}, "nothing is learned: learn= has no part"),
        (None, {"learn": ("depths",)}, "fit: learn"),
        (None, {"structure": {"hiden": "dense"}}, "structure: no space is called 'hiden'; spaces are hidden, ffn"),
        (None, {"structure": {"hidden": "sparse"}}, "fit: structure.hidden"),
        (None, {"learning_rate": 1.0}, "unknown setting 'learning_rate' of a fit; settings are learn, structure"),
        (None, {"steps": 0}, "fit: steps"),
        (None, {"precision": "float16"}, "fit: precision"),
        (None, {"resume": True}, "resume goes on from a checkpoint; name its file, checkpoint=FILE"),
        (None, {"save_every": 0}, "save_every is 0; expected at least one step"),
        (None, {"loss": "tests.adapters.test_fit:steep"}, "step 1: the gradient is nan; the fit stops"),
        (None, {"init": "lego"}, "lego"),
        (None, {"loss": "output"}, "the model gives logits"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(data: Any, told: dict[str, Any], problem: str) -> None:
    with pytest.raises(GrowkitError, match=problem) as refusal:
        fitted(data, **told)
    assert "\n" not in str(refusal.value)


def vector(outputs: Any, batch: Any) -> Any:
    """A loss that is none."""
    return outputs["logits"]


def steep(outputs: Any, batch: Any) -> Any:
    """A loss that is a number and has no gradient."""
    return (0 * outputs["logits"]).abs().sqrt().mean()


def test_a_device_that_is_not_there() -> None:
    for device, problem in (("tpu", "the device 'tpu' is not known"), ("cuda", "torch sees no GPU")):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(GrowkitError, match=problem):
            growkit.fit(llama(), llama_plan(), batches(), device=device)


def test_nothing_to_learn_where_nothing_grows() -> None:
    with pytest.raises(GrowkitError, match="nothing is learned: learn=depth,width has no part in a growth of these"):
        fitted(plan=growkit.plan(llama(), hidden=24), learn=("depth", "width"))


def exploding(outputs: Any, batch: Any) -> Any:
    """A loss that is no number after three calls."""
    exploding.calls += 1  # type: ignore[attr-defined]
    return outputs["logits"].square().mean() * (math.nan if exploding.calls > 3 else 1.0)  # type: ignore[attr-defined]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.safetensors"
    told = {"steps": 6, "save_every": 2, "checkpoint": checkpoint}
    exploding.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(GrowkitError, match=r"step 4: the loss is nan; the fit stops; lower lr \(now 0.01\)") as refusal:
        fitted(loss="tests.adapters.test_fit:exploding", **told)
    assert f"{checkpoint} holds the last good state" in str(refusal.value)
    exploding.calls = -100  # type: ignore[attr-defined]
    _, steps = fitted(loss="tests.adapters.test_fit:exploding", resume=True, **told)
    assert [each.step for each in steps] == [3, 4, 5, 6]
