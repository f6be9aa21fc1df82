"""What every test shares: no network, reproducible examples, real models as fixtures."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read by the libraries when they are imported, so they are set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests import real_models

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

REAL_FIXTURES = {"minilm_directory", "smollm2_directory", "paraphrase_onnx", "magika_onnx"}


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that use a real model as `real`, and skips `gpu` tests where there is no device."""
    for item in items:
        if REAL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _cuda_is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """all-MiniLM-L6-v2, a post-norm BERT encoder: a model directory to read, never to write."""
    return real_models.minilm_directory()


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct, a Llama decoder in float32: a model directory to read, never to write."""
    return real_models.smollm2_directory()


@pytest.fixture(scope="session")
def paraphrase_onnx() -> Path:
    """paraphrase-MiniLM-L3-v2, a post-norm BERT encoder as an ONNX file: to read, never to write."""
    return real_models.paraphrase_onnx()


@pytest.fixture(scope="session")
def magika_onnx() -> Path:
    """An ONNX file that is no transformer."""
    return real_models.magika_onnx()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random Llama, a tokenizer's file and a model card; read only."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        vocab_size=50,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    module = transformers.LlamaForCausalLM(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("models") / "llama"
    module.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return path
