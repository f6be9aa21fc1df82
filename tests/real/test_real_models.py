"""Real checkpoints grown from the command line and judged by transformers itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import growkit

SENTENCES = ["A small model is trained.", "A larger one grows out of it, and knows what it knew.", "Rain."]
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from growkit.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def told(*arguments: object) -> dict[str, Any]:
    result = command(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def embeddings(path: Path) -> np.ndarray:
    """Mean-pooled token embeddings, as sentence-transformers makes them, not normalised."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return np.asarray((states * mask).sum(1) / mask.sum(1))


def test_minilm_doubles_exactly(minilm_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("grow", minilm_directory, out, "--to", "hidden=768,layers=6").returncode == 0
    report = told("verify", minilm_directory, out)
    assert report["preserved"]
    assert report["max_rel_diff"] < 1e-5
    small, large = embeddings(minilm_directory), embeddings(out)
    assert large.shape[1] == 2 * small.shape[1]
    for half in np.split(large, 2, axis=1):  # the stream is tiled: either copy is the source's embedding
        np.testing.assert_allclose(half, small, atol=1e-5 * np.abs(small).max())
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 768


def test_minilm_at_a_broken_ratio_is_told_inexact_and_still_grows(minilm_directory: Path, tmp_path: Path) -> None:
    plan = told("plan", minilm_directory, "--to", "hidden=576")
    assert plan["preserving"] is False
    (reason,) = [reason for reason in plan["reasons"] if not reason["holds"]]
    assert "only whole ratios" in reason["detail"]
    assert command("grow", minilm_directory, tmp_path / "out", "--to", "hidden=576").returncode == 0
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").config.hidden_size == 576
    assert command("verify", minilm_directory, tmp_path / "out").returncode == 1


@pytest.fixture(scope="module")
def grown_smollm2(smollm2_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grown") / "out"
    target = "hidden=768,heads=12,kv_heads=4,ffn=2048,layers=36"
    assert told("plan", smollm2_directory, "--to", target)["preserving"] is True
    assert command("grow", smollm2_directory, out, "--to", target, "--quiet").returncode == 0
    return out


def test_smollm2_keeps_its_function(smollm2_directory: Path, grown_smollm2: Path) -> None:
    report = growkit.verify(growkit.read(smollm2_directory), growkit.read(grown_smollm2))
    assert report.preserved
    assert report.max_rel_diff < 2e-6  # in float64: what is left is the rounding of the norms' scales


def test_smollm2_generates_the_same_tokens(smollm2_directory: Path, grown_smollm2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(grown_smollm2)
    models = [transformers.AutoModelForCausalLM.from_pretrained(p).eval() for p in (smollm2_directory, grown_smollm2)]
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        said = [m.generate(**ids, max_new_tokens=64, min_new_tokens=64, do_sample=False) for m in models]
        assert torch.equal(*said), prompt
        assert said[0].shape[1] == ids["input_ids"].shape[1] + 64
