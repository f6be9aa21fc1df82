"""Losses against what they are by definition, and names that are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import growkit
from growkit.data import read_data, token_batch
from growkit.loss import Batch, start_loss
from growkit.testing import memory_model, transformer
from growkit_specs import GrowkitError, LayerGraph, Port
from growkit_torch.losses import LABELS, Loss, loss_named
from tests.adapters.tiny_models import tiny

rng = np.random.default_rng(0)


def tensors(**arrays: Any) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean cross-entropy, entry by entry."""
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = [shares[(*place, label)] for place, label in np.ndenumerate(labels) if label != -100]
    return float(-np.log(right).mean())


def graph_of(**features: Any) -> LayerGraph:
    return transformer(**{"vocab": 7, "positions": 8, **features})


@pytest.mark.parametrize(
    ("name", "head", "shape"), [("causal", "untied", (3, 4, 7)), ("masked", "tied", (3, 4, 7)),
                                ("classification", "pooler", (5, 3))],
)  # fmt: skip
def test_labels_are_what_the_logits_in_their_place_should_say(name: str, head: str, shape: tuple[int, ...]) -> None:
    logits = rng.standard_normal(shape)
    labels = rng.integers(0, shape[-1], shape[:-1])
    labels.flat[[0, -1]] = -100
    loss = loss_named(name, graph_of(head=head))(tensors(logits=logits), tensors(labels=labels))
    assert loss.item() == pytest.approx(entropy(logits, labels), rel=1e-12)


def test_half_types_are_summed_in_a_wider_one() -> None:
    logits, labels = rng.standard_normal((3, 4, 7)), rng.integers(0, 7, (3, 4))
    halves = torch.as_tensor(logits, dtype=torch.bfloat16)
    loss = loss_named("causal", graph_of())({"logits": halves}, tensors(labels=labels))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(entropy(halves.double().numpy(), labels), rel=1e-6)


def test_the_loss_of_a_batch_is_its_start_loss() -> None:
    source = growkit.read(tiny("llama", "LlamaForCausalLM"))
    batch = token_batch(source, rng.integers(0, source.graph.sizes["vocab"], 400))
    outputs = source.adapter.forward(source, "cpu")(batch.inputs)
    loss = loss_named("auto", source.graph)
    given = tensors(**batch.inputs, labels=batch.labels)
    assert loss.name == "causal"
    assert loss(tensors(**outputs), given).item() == pytest.approx(start_loss(source, batch, device="cpu"), rel=1e-6)


@pytest.mark.parametrize(
    ("features", "chosen"),
    [
        ({"head": "tied", "causal": True}, "causal"),
        ({"head": "tied", "causal": False}, "masked"),
        ({"head": "pooler"}, "classification"),
    ],
)
def test_auto_takes_what_the_outputs_say(features: dict[str, Any], chosen: str) -> None:
    graph = graph_of(**features)
    assert loss_named("auto", graph).name == chosen
    own = graph.model_copy(update={"outputs": (*graph.outputs, Port(name="loss"))})
    assert loss_named("auto", own).name == "output"


def test_logits_of_another_name_are_found_by_their_space() -> None:
    graph = graph_of(head="tied", causal=True)
    ports = tuple(p.model_copy(update={"name": "2047"}) if p.name == "logits" else p for p in graph.outputs)
    logits, labels = rng.standard_normal((3, 4, 7)), rng.integers(0, 7, (3, 4))
    outputs = {"states": torch.zeros(3, 4, 4), "2047": torch.as_tensor(logits)}
    loss = loss_named("auto", graph.model_copy(update={"outputs": ports}))(outputs, tensors(labels=labels))
    assert loss.item() == pytest.approx(entropy(logits, labels))


def test_the_models_own_loss_needs_no_labels() -> None:
    outputs = tensors(loss=2.5, other=3.5)
    assert loss_named("output", graph_of())(outputs, {}).item() == 2.5
    assert loss_named("output:other", graph_of())(outputs, {}).item() == 3.5


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "own_losses_of_a_user.py").write_text(
        "def far(outputs, batch):\n    return (outputs['states'] - batch['wanted']).abs().mean()\nnumber = 3\n"
    )
    loss = loss_named("own_losses_of_a_user:far", graph_of())
    assert loss(tensors(states=[1.0, 4.0]), tensors(wanted=[2.0, 1.0])).item() == 2.0
    for name, problem in (
        ("own_losses_of_a_user:near", "cannot be loaded"),
        ("nothing_of_that_name:far", "cannot be loaded"),
        ("own_losses_of_a_user:number", "is a int; expected a function"),
    ):
        with pytest.raises(GrowkitError, match=problem):
            loss_named(name, graph_of())


# --- distillation ----------------------------------------------------------------------------------------------------


def distilled(source: growkit.Model, large: growkit.Model, inputs: dict[str, np.ndarray]) -> torch.Tensor:
    theirs, ours = (tensors(**model.adapter.forward(model)(inputs)) for model in (source, large))
    assert large.growth is not None
    return loss_named("distill", source.graph)(ours, {}, source=theirs, operator=large.growth.operator)


INPUTS = {"ids": rng.integers(0, 7, (3, 5)), "mask": np.ones((3, 5), dtype=np.int64)}


def test_states_are_matched_through_the_read_matrix() -> None:
    source = memory_model(graph_of(head="bare", depths=(2,)))
    same = growkit.grow(source, hidden="2x", layers=3)
    assert distilled(source, same, INPUTS).item() == pytest.approx(0, abs=1e-20)
    other = growkit.grow(source, hidden="2x", layers=3, method="fresh")
    theirs, ours = (model.adapter.forward(model)(INPUTS)["states"] for model in (source, other))
    assert other.growth is not None
    (port,) = source.graph.outputs
    read = other.growth.operator.read_matrix("hidden", port.through).as_matrix()
    expected = float(np.square(ours @ read.T - theirs).mean())
    assert expected > 1e-3
    assert distilled(source, other, INPUTS).item() == pytest.approx(expected, rel=1e-9)


def test_logits_are_matched_by_their_shares() -> None:
    graph = graph_of(head="pooler")
    only = graph.model_copy(update={"outputs": tuple(p for p in graph.outputs if p.name == "logits")})
    ours, theirs = rng.standard_normal((2, 4, 3))
    shares = np.exp(theirs) / np.exp(theirs).sum(-1, keepdims=True)
    logs = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
    loss = loss_named("distill", only)(tensors(logits=ours), {}, source=tensors(logits=theirs))
    assert loss.item() == pytest.approx(-(shares * logs).sum(-1).mean(), rel=1e-9)


def test_gradients_flow_into_the_grown_model_alone() -> None:
    graph = graph_of(head="tied", causal=True)
    ours, theirs = (torch.ones(1, 2, 7, requires_grad=True) for _ in range(2))
    loss = loss_named("distill", graph)({"logits": 2 * ours}, {}, source={"logits": theirs**2})
    loss.backward()
    assert ours.grad is not None
    assert theirs.grad is None


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "features", "problem"),
    [
        ("perplexity", {}, "the loss 'perplexity' is not known; expected auto, causal, masked, classification, output"),
        ("auto", {"head": "bare"}, "the model gives states, and nothing says what these should be; name the loss"),
        ("causal", {"head": "bare"}, "the loss 'causal' needs logits; the model gives states"),
    ],
)
def test_names_that_give_no_loss(name: str, features: dict[str, Any], problem: str) -> None:
    with pytest.raises(GrowkitError, match=problem):
        loss_named(name, graph_of(**features))


@pytest.mark.parametrize(
    ("loss", "outputs", "batch", "problem"),
    [
        ("causal", {"logits": np.zeros((1, 2, 7))}, {"ids": [1]}, "the loss 'causal' needs labels; the data gives ids"),
        ("causal", {"logits": np.zeros((1, 2, 7))}, {LABELS: [1]}, r"labels: shape \[1\]; the logits' are \[1, 2\]"),
        ("causal", {"states": [0.0]}, {LABELS: [1]}, "the model gives states; the loss needs logits"),
        ("output", {"loss": [1.0, 2.0]}, {}, r"the loss 'output' gives shape \[2\]; expected one number"),
        ("output:score", {"loss": [1.0, 2.0]}, {}, "the model gives loss; the loss needs score"),
        ("distill", {"logits": [0.0]}, {}, "the loss 'distill' needs the outputs of the source"),
    ],
)
def test_batches_that_give_no_loss(loss: str, outputs: Any, batch: Any, problem: str) -> None:
    with pytest.raises(GrowkitError, match=problem):
        loss_named(loss, graph_of(head="untied"))(tensors(**outputs), tensors(**batch))


def test_sources_that_give_nothing_to_match() -> None:
    loss = loss_named("distill", graph_of(head="untied"))
    with pytest.raises(GrowkitError, match="the source gives score; expected an output to match: states, logits"):
        loss({}, {}, source=tensors(score=[1.0]))
    with pytest.raises(GrowkitError, match=r"the output logits is \[1, 7\] in the source, \[1, 9\] in the grown model"):
        loss(tensors(logits=np.zeros((1, 9))), {}, source=tensors(logits=np.zeros((1, 7))))


def test_a_loss_that_is_no_tensor() -> None:
    with pytest.raises(GrowkitError, match="the loss 'own' gives a float; expected one number"):
        Loss("own", lambda outputs, batch: 1.0, takes_labels=False)({}, {})  # type: ignore[arg-type,return-value]


def test_images_give_the_loss_of_their_classes(tmp_path: Path) -> None:
    source = growkit.read(tiny("vit", "ViTForImageClassification", num_channels=3))
    size = source.graph.attributes["image_size"]
    for number, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for each in range(2):
            _picture(tmp_path / name / f"{each}.png", 20 + number)
    batch = read_data(source, tmp_path, batch=2).batch(0)
    assert batch.inputs["pixel_values"].shape == (2, 3, size, size)
    outputs = source.adapter.forward(source, "cpu")(batch.inputs)
    loss = loss_named("auto", source.graph)
    found = loss(tensors(**outputs), tensors(**batch.inputs, labels=batch.labels)).item()
    assert loss.name == "classification"
    assert found == pytest.approx(start_loss(source, batch, device="cpu"), rel=1e-6)
    assert found == pytest.approx(entropy(outputs["logits"], np.asarray(batch.labels)), rel=1e-6)


def _picture(path: Path, size: int) -> None:
    from PIL import Image

    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def test_a_batch_without_labels_has_no_start_loss() -> None:
    with pytest.raises(GrowkitError, match="the data has no labels"):
        start_loss(memory_model(graph_of()), Batch(INPUTS))
