"""What looks at the stream behind the last layer gets it as it was: a normalised embedding stays what it is."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import growkit
from tests.adapters.onnx import exports
from tests.adapters.onnx.families import FAMILIES


class Embedding(torch.nn.Module):
    """The mean of the last states, divided by its length."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = FAMILIES["distilbert"].build("eager")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids, attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedding") / "embedding.onnx"
    ids = torch.ones(2, 7, dtype=torch.int64)
    with exports.quiet():
        torch.onnx.export(
            Embedding().eval(),
            (ids, ids),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["embedding"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")},
            opset_version=17,
            dynamo=False,
        )
    return path


def test_a_normalised_embedding_stays(embedding: Path, tmp_path: Path) -> None:
    model = growkit.read(embedding)
    large = growkit.grow(model, hidden="2x")
    assert large.graph.sizes["hidden"] == 2 * model.graph.sizes["hidden"]
    report = growkit.verify(model, large)
    assert report.max_abs_diff < 2e-6
    growkit.write(large, tmp_path / "large.onnx")
    onnx.checker.check_model(tmp_path / "large.onnx", full_check=True)


def test_growth_by_nothing_leaves_no_mark(embedding: Path) -> None:
    model = growkit.read(embedding)
    surgery = growkit.grow(model).origin.surgery()
    grown = surgery.model_with(model.weights)
    kept = [node for node in onnx.load(embedding).graph.node if node.op_type not in ("Identity", "Constant")]
    before = [node.op_type for node in kept if (node.op_type, len(node.input)) != ("Concat", 1)]
    assert [node.op_type for node in grown.graph if node.op_type != "Constant"] == before
    assert not any(node.metadata_props.get("growkit.read") == "" for node in grown.graph)
    assert np.isfinite(growkit.verify(model, growkit.grow(model)).max_abs_diff)
