"""Data for ONNX files: what their inputs are is found, and text or images run on them as they do on a module."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import growkit
from growkit.compare import compare
from growkit.data import read_batch, read_data
from growkit.loss import start_loss
from growkit.text import objective_of
from growkit_specs import GrowkitError
from tests.adapters.onnx.zoo import FILES, File, make

KINDS = {
    "input_ids": ("tokens", "vocab"),
    "decoder_input_ids": ("tokens", "vocab"),
    "attention_mask": ("mask", None),
    "decoder_attention_mask": ("mask", None),
    "position_ids": ("positions", None),
    "pixel_values": ("image", None),
}


def of_families(*families: str) -> list[File]:
    """One file of each family for each exporter."""
    plain = [file for file in FILES if file.family in families and not file.post and not file.variant]
    return list({(file.family, file.exporter): file for file in reversed(plain)}.values())


TEXT = ("bert", "gpt2", "llama", "gpt2-cache", "llama-cache", "t5", "bert-mlm", "genai", "genai-positions", "vit")


@pytest.mark.parametrize("file", of_families(*TEXT), ids=lambda file: file.name)
def test_what_inputs_are_is_found(file: File) -> None:
    graph = growkit.read(str(make(file))).graph
    cached = {name for port in graph.layer_inputs for name in port.names}
    found = {port.name: (port.kind, port.space) for port in graph.inputs if port.name not in cached}
    assert found == {name: KINDS[name] for name in found}


@pytest.mark.parametrize("file", of_families("gpt2", "llama-cache", "bert-mlm"), ids=lambda file: file.name)
def test_whether_a_file_sees_ahead_is_tried(file: File) -> None:
    assert objective_of(growkit.read(str(make(file)))) == ("masked" if file.family == "bert-mlm" else "causal")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 48, 600))
    return path


@pytest.mark.parametrize("family", ["gpt2", "llama-cache"])
def test_exact_growth_starts_at_the_sources_loss(family: str, tokens: Path) -> None:
    source = growkit.read(str(make(of_families(family)[0])))
    loss = start_loss(source, read_batch(source, tokens), device="cpu")
    lossless = next(c for c in compare(source, data=tokens, layers=5, device="cpu") if c.method == "lossless")
    assert lossless.start_loss == pytest.approx(loss, rel=1e-4)


def test_the_tables_of_experts_are_no_positions(tokens: Path) -> None:
    source = growkit.read(str(make(next(file for file in FILES if file.name == "mixtral-legacy17-eager"))))
    assert source.graph.sizes["positions"] < 10
    assert read_data(source, tokens).batch(0).labels.shape == (2, 128)


def test_inputs_are_given_in_the_types_that_a_file_declares(tokens: Path, tmp_path: Path) -> None:
    model = onnx.load(make(of_families("gpt2")[0]))
    graph = model.graph
    for value in graph.input:
        value.type.tensor_type.elem_type = TensorProto.INT32
        for node in graph.node:
            node.input[:] = [f"{name}_64" if name == value.name else name for name in node.input]
        graph.node.insert(0, helper.make_node("Cast", [value.name], [f"{value.name}_64"], to=TensorProto.INT64))
    narrow = tmp_path / "narrow.onnx"
    onnx.save(model, narrow)
    source, wide = growkit.read(str(narrow)), growkit.read(str(make(of_families("gpt2")[0])))
    assert [port.kind for port in source.graph.inputs] == ["tokens", "mask"]
    batch = read_batch(source, tokens)
    assert start_loss(source, batch, device="cpu") == pytest.approx(start_loss(wide, batch, device="cpu"), rel=1e-6)
    assert source.adapter.forward(source, "cpu")(batch.inputs, {})["logits"].shape == (*batch.labels.shape, 48)


def test_images_are_as_large_as_a_file_declares(tmp_path: Path) -> None:
    from PIL import Image

    source = growkit.read(str(make(of_families("deit")[0])))
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
        Image.new("L", (50, 40)).save(tmp_path / name / "0.png")
    batch = read_data(source, tmp_path, batch=2).batch(0)
    assert batch.inputs["pixel_values"].shape == (2, 3, 24, 24)
    assert np.isfinite(start_loss(source, batch, device="cpu"))


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("t5", "an encoder-decoder's loss needs both sides"),
        ("whisper", "input_features is neither tokens nor a mask of them"),
        ("deit", r"none of the model's inputs \(pixel_values\) is known to take tokens"),
    ],
)
def test_files_that_take_more_than_text(family: str, problem: str, tokens: Path) -> None:
    source = growkit.read(str(make(of_families(family)[0])))
    with pytest.raises(GrowkitError, match=rf"{problem}; |{problem}: "):
        read_data(source, tokens).batch(0)
