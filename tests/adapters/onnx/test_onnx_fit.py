"""Operators of ONNX files are learned in torch, and ONNX Runtime has the loss that the fit reports."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import growkit
from growkit.caches import fed
from growkit.data import token_batch
from growkit.loss import Batch, logits_port, start_loss
from growkit_specs import GrowkitError
from tests.adapters.fitting import gradients, ready, tensors
from tests.adapters.onnx.zoo import SLICE, inputs, make
from tests.adapters.test_fit import fitted

FILES = {file.name: file for file in SLICE}
QUICK = ("gpt2-legacy17-eager", "bert-mlm-legacy17-eager")
SLOW = (
    "llama-dynamo18-sdpa",
    "gpt2-legacy17-eager-fused",
    "llama-legacy17-eager-fused",
    "bert-cls-legacy17-eager",
    "t5-legacy17-eager",
)


@cache
def source(name: str) -> growkit.Model:
    return growkit.read(make(FILES[name]))


def batch(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a file, and random labels of the shape of its logits."""
    model, rng = source(name), np.random.default_rng(seed)
    given = inputs(FILES[name], 2, 6, seed)
    port = logits_port(model.graph)
    assert port is not None
    logits = model.adapter.forward(model, "cpu")(given)[port.name]
    return given | {"labels": rng.integers(0, logits.shape[-1], logits.shape[:-1])}


def larger(name: str, **told: Any) -> growkit.Plan:
    model = source(name)
    return growkit.plan(model, hidden="1.5x", layers="2x", **told)


def in_runtime(model: growkit.Model, given: dict[str, np.ndarray]) -> float:
    return start_loss(model, Batch({n: v for n, v in given.items() if n != "labels"}, given["labels"]), device="cpu")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_runtime_has_the_loss_that_the_fit_reports(name: str) -> None:
    given = [batch(name, seed) for seed in range(2)]
    data = growkit.as_data(given[:1], validation=given[:1])
    plan = larger(name)
    operator, steps = fitted(data, model=source(name), plan=plan, steps=8, lr=0.02)
    if plan.preserving:
        assert steps[0].loss == pytest.approx(in_runtime(source(name), given[0]), rel=1e-4)
    assert steps[-1].loss < 0.97 * steps[0].loss
    large = growkit.grow(source(name), operator)
    assert in_runtime(large, given[0]) == pytest.approx(steps[-1].validation, rel=1e-4)


@pytest.mark.parametrize("name", ["llama-dynamo18-sdpa", *(pytest.param(n, marks=pytest.mark.slow) for n in QUICK)])
def test_gradients_reach_everything_that_is_learned(name: str) -> None:
    learn = ("depth", "width", "norms", "residual", "source")
    given = tensors(batch(name))
    expected: list[Any] = []
    for strategy in ("materialised", "factored"):
        fit = ready(source(name), larger(name), seed=1, learn=learn, strategy=strategy, precision="float64")
        found = gradients(fit, fit.growing(given))
        names = fit.learned.learnable.names
        without = [each for each, g in zip(names, found, strict=True) if not g.any()]
        assert all("position" in each or "token_type" in each for each in without), without
        largest = max(float(g.abs().max()) for g in found)
        for each, ours, theirs in zip(names, found, expected or found, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-10 * largest, each
        expected = found


@pytest.mark.slow
def test_rows_of_a_batch_are_independent_of_how_it_is_run() -> None:
    name = "gpt2-legacy17-eager"
    one, parts = (
        [
            each.loss
            for each in fitted(
                [batch(name)], model=source(name), plan=larger(name), accumulate=accumulate, precision="float64"
            )[1]
        ]
        for accumulate in (1, 2)
    )
    assert parts == pytest.approx(one, rel=1e-10)


def with_loss(name: str, folder: Path, *, labels: str) -> growkit.Model:
    """A file that computes its own loss, of labels among its inputs."""
    model = onnx.load(str(make(FILES[name])))
    graph = model.graph
    logits = graph.output[0].name
    vocab = FILES[name].vocab
    graph.input.append(helper.make_tensor_value_info(labels, TensorProto.INT64, ["batch_size", "sequence_length"]))
    graph.initializer.append(helper.make_tensor("flat_logits", TensorProto.INT64, [2], [-1, vocab]))
    graph.initializer.append(helper.make_tensor("flat_labels", TensorProto.INT64, [1], [-1]))
    graph.node.extend(
        [
            helper.make_node("Reshape", [logits, "flat_logits"], ["rows"]),
            helper.make_node("Reshape", [labels, "flat_labels"], ["right"]),
            helper.make_node("SoftmaxCrossEntropyLoss", ["rows", "right"], ["loss"], ignore_index=-100),
        ]
    )
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    path = folder / "with_loss.onnx"
    onnx.save(model, str(path))
    return growkit.read(path)


@pytest.mark.parametrize("labels", ["labels", pytest.param("wanted", marks=pytest.mark.slow)])
def test_a_graph_that_computes_its_own_loss(labels: str, tmp_path: Path) -> None:
    name = "gpt2-legacy17-eager"
    model = with_loss(name, tmp_path, labels=labels)
    given = batch(name)
    own = {**{n: v for n, v in given.items() if n != "labels"}, labels: given["labels"]}
    plan = growkit.plan(model, hidden="1.5x", layers="2x")
    found = {}
    for loss, data in (("output", own), ("causal", own | {"labels": given["labels"]})):
        found[loss] = [each.loss for each in fitted([data], model=model, plan=plan, loss=loss, steps=4)[1]]
    assert found["output"] == pytest.approx(found["causal"], rel=1e-4)
    assert found["output"][-1] < found["output"][0]


def test_caches_of_the_larger_model_begin_empty() -> None:
    name = "gpt2-cache-dynamo18-sdpa"
    model = source(name)
    ids = np.random.default_rng(0).integers(0, model.graph.sizes["vocab"], 200)
    one = token_batch(model, ids)
    given = {**one.inputs, "labels": one.labels}
    data = growkit.as_data([given], validation=[given])
    assert set(one.inputs) > {"past_key_values.0.key"}
    operator, steps = fitted(data, model=model, plan=larger(name), steps=4)
    assert steps[-1].loss < steps[0].loss
    assert steps[0].loss == pytest.approx(in_runtime(model, given), rel=1e-4)
    large = growkit.grow(model, operator)
    fed_to_it = fed(model.graph, large.graph, operator, one.inputs)
    assert in_runtime(large, {**fed_to_it, "labels": one.labels}) == pytest.approx(steps[-1].validation, rel=1e-4)
    for change, problem in (
        ({"past_key_values.0.key": np.zeros((len(ids) // 6, 4, 2, 6), np.float32)}, "expected one of no tokens"),
        ({}, "the batch lacks past_key_values.0.key; expected a cache of no tokens"),
    ):
        wrong = _without(given, "past_key_values.0.key") | change
        wrong = {n: v[:1] for n, v in wrong.items()}
        with pytest.raises(GrowkitError, match=problem):
            fitted([wrong], model=model, plan=larger(name))


def test_a_graph_is_brought_near_to_its_source() -> None:
    name = "bert-legacy17-eager"
    model = source(name)
    given = [inputs(FILES[name], 2, 6, 0)]
    plan = growkit.plan(model, hidden="1.5x", layers="2x", method="width=net2net,depth=stack")
    _, steps = fitted(given, model=model, plan=plan, loss="distill", steps=10, lr=0.01)
    assert steps[-1].loss < 0.9 * steps[0].loss
    exact = growkit.plan(model, hidden="2x")
    assert exact.preserving
    assert fitted(given, model=model, plan=exact, loss="distill", steps=1)[1][0].loss < 1e-8


def _without(given: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {each: value for each, value in given.items() if each != name}


@pytest.mark.parametrize(
    ("change", "told", "problem"),
    [
        (lambda b: _without(b, "input_ids"), {}, "input_ids"),
        (lambda b: b | {"input_idz": b["input_ids"]}, {}, "input_idz"),
        (
            lambda b: b | {"input_ids": b["input_ids"] + 1000},
            {},
            r"input_ids: the batch has the entry 1\d\d\d; expected 0",
        ),
        (lambda b: b, {"checkpointing": 0.5}, "checkpointing"),
        (lambda b: b, {"loss": "output:nothing"}, "nothing"),
    ],
)
def test_what_cannot_be_is_one_line(change: Callable[[Any], Any], told: dict[str, Any], problem: str) -> None:
    name = "gpt2-legacy17-eager"
    with pytest.raises(GrowkitError, match=problem) as refusal:
        fitted([change(batch(name))], model=source(name), plan=larger(name), **told)
    assert "\n" not in str(refusal.value)
