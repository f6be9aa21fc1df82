"""The ONNX adapter is held to the laws of every adapter, and its forward carries gradients to the weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import growkit
from growkit.testing import assert_adapter_conforms
from growkit_onnx import OnnxAdapter
from tests.adapters.onnx.zoo import FILES, File, inputs, make

NAMES = (
    "gpt2-legacy17-eager",
    "gpt2-legacy13-nofold-eager",
    "gpt2-cache-legacy17-eager",
    "llama-dynamo18-external-eager",
    "qwen3-dynamo20-sdpa",
    "t5-legacy17-eager",
    "bert-cls-legacy17-eager",
    "deit-legacy17-eager",
)


def file_called(name: str) -> File:
    return next(file for file in FILES if file.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_files_conform(name: str, tmp_path: Path) -> None:
    skipped = assert_adapter_conforms(OnnxAdapter(), make(file_called(name)), tmp_path)
    assert all("vocab cannot grow" in reason for reason in skipped), skipped


def test_a_model_in_memory_conforms(tmp_path: Path) -> None:
    message = onnx.load(make(file_called("gpt2-legacy17-eager")))
    skipped = assert_adapter_conforms(OnnxAdapter(), message, tmp_path)
    assert all("vocab cannot grow" in reason for reason in skipped), skipped


@pytest.mark.parametrize("name", ["gpt2-legacy17-eager", "llama-dynamo18-sdpa"])
def test_gradients_flow_into_the_weights_of_a_grown_file(name: str) -> None:
    """What fitting an operator needs: the grown graph in torch, differentiable in every weight that its outputs see."""
    file = file_called(name)
    model = growkit.read(make(file))
    large = growkit.grow(model, hidden="1.5x", layers=4)
    forward = large.adapter.forward(large)
    weights = {n: torch.from_numpy(np.array(w)).requires_grad_() for n, w in large.weights.items()}
    given = inputs(file, 2, 5)
    outputs = forward(given, weights)
    expected = model.adapter.forward(model)(given)
    np.testing.assert_allclose(outputs["logits"].detach().numpy(), expected["logits"], atol=2e-5)
    outputs["logits"].square().sum().backward()
    unseen = {n for n, w in weights.items() if w.grad is None}
    assert not unseen
