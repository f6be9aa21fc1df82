"""Real ONNX files grown, and one that cannot be."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnxruntime.transformers.optimizer import optimize_model

import growkit

VECTOR = "461"
"""The output of the exported sentence encoder that holds its vectors; the exporter gave it no better name."""


def run(path: Path) -> dict[str, np.ndarray]:
    """Every output of a file for sentences of random tokens, some of them padded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tokens = np.random.default_rng(0).integers(1000, 30000, (6, 24))
    mask = (np.arange(24) < np.array([24, 20, 17, 12, 9, 5])[:, None]).astype(np.int64)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input_ids": tokens, "attention_mask": mask}), strict=True))


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.fixture(scope="module", params=["exported", "fused"])
def encoder(request: pytest.FixtureRequest, paraphrase_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder as it was exported, and as ONNX Runtime's optimizer fuses it."""
    if request.param == "exported":
        return paraphrase_onnx
    path = tmp_path_factory.mktemp("fused") / "fused.onnx"
    optimize_model(str(paraphrase_onnx), model_type="bert", num_heads=12, hidden_size=384).save_model_to_file(str(path))
    return path


def test_a_sentence_encoder_keeps_its_outputs(encoder: Path, tmp_path: Path) -> None:
    model = growkit.read(encoder)
    assert {
        "hidden": 384,
        "heads": 12,
        "head_dim": 32,
        "ffn": 1536,
        "vocab": 30522,
    }.items() <= model.graph.sizes.items()
    growkit.write(growkit.grow(model, hidden="2x"), tmp_path / "large.onnx")
    small, large = run(encoder), run(tmp_path / "large.onnx")
    assert small.keys() == large.keys()
    for name, output in small.items():
        np.testing.assert_allclose(large[name], output, atol=2e-5, rtol=0)


def test_wide_vectors_keep_their_cosines(encoder: Path, tmp_path: Path) -> None:
    model = growkit.read(encoder)
    growkit.write(growkit.grow(model, hidden="2x", outputs="grow"), tmp_path / "large.onnx")
    small, large = run(encoder)[VECTOR], run(tmp_path / "large.onnx")[VECTOR]
    assert large.shape == (6, 768)
    np.testing.assert_allclose(cosines(large), cosines(small), atol=1e-5, rtol=0)


def test_what_is_no_transformer_is_refused(magika_onnx: Path) -> None:
    with pytest.raises(growkit.GrowkitError, match="no residual stream found: no space is written by several weights"):
        growkit.read(magika_onnx)
