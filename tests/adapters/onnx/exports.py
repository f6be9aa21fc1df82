"""How a test file is made: a tiny model exported and optimised in the ways that users do, kept in a cache."""

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch
from filelock import FileLock

from tests.adapters.onnx.families import FAMILIES, Axes, Family
from tests.adapters.onnx.handmade import HANDMADE

if TYPE_CHECKING:
    from tests.adapters.onnx.zoo import File

PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "onnxsim", "onnxslim", "torch", "transformers")

Tensors = tuple[torch.Tensor, ...]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Every message that an exporter or optimiser is known to give on a file that is right; any other is an error.
HARMLESS = (
    (DeprecationWarning, "You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, "The feature will be removed. Please remove usage of this function"),
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, "Exporting aten::index operator of advanced indexing"),
    (UserWarning, "# The axis name: .* will not be used"),
    (UserWarning, "To copy construct from a tensor, it is recommended"),
    (torch.jit.TracerWarning, ""),
)


def make(file: "File", folder: Path | None = None) -> Path:
    """The path of `file`, which is made where it isn't there yet.

    It is made in a folder beside its place, then renamed, so it is whole or absent; other processes wait meanwhile.

    Args:
        file: What to make.
        folder: Where made files are kept; None takes the tests' cache, which can be deleted at any time.
    """
    folder = folder or _cache()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{file.name}-{_key(file)}"
    with FileLock(folder / f"{place.name}.lock"):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as work:
                made = Path(work) / "made"
                made.mkdir()
                _make(file, folder, made / "model.onnx")
                made.rename(place)
    return place / "model.onnx"


def _cache() -> Path:
    return Path(os.environ.get("GROWKIT_TEST_CACHE") or Path.home() / ".cache" / "growkit-tests") / "onnx"


def _key(file: "File") -> str:
    """Changes with whatever the file is made from: its description, the code of the zoo, the exporters' versions."""
    family = FAMILIES[file.family]
    recipe = (file.family, file.exporter, file.opset, file.attention, file.post, file.variant)
    parts = [repr(recipe), family.record, *map(importlib.metadata.version, PACKAGES)]
    code = ("families.py", "handmade.py" if file.exporter == "hand" else "exports.py")
    parts += [Path(__file__).with_name(name).read_text() for name in code]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _make(file: "File", folder: Path, path: Path) -> None:
    with quiet():
        if file.post:
            OPTIMISERS[file.post](make(replace(file, post=""), folder), path, file)
        else:
            _export(file, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say about files that are right."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # torchvision isn't installed: so be it
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("error")
            for category, message in HARMLESS:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logger.setLevel(level)


def _export(file: "File", path: Path) -> None:
    family = FAMILIES[file.family]
    if file.exporter == "hand":
        HANDMADE[file.family](family, path)
        return
    module = family.build(file.attention)
    dtype = next((DTYPES[name] for name in file.variant if name in DTYPES), torch.float32)
    drawn = family.inputs.draw(*family.traced, np.random.default_rng(0))
    values = tuple(torch.from_numpy(value) for value in drawn.values())
    values = tuple(value.to(dtype) if value.is_floating_point() else value for value in values)
    EXPORTERS[file.exporter](file, family, module.to(dtype), values, path)


def _legacy(file: "File", family: Family, module: torch.nn.Module, values: Tensors, path: Path) -> None:
    torch.onnx.export(
        module,
        values,
        str(path),
        dynamo=False,
        opset_version=file.opset,
        do_constant_folding="nofold" not in file.variant,
        input_names=list(family.inputs.axes),
        output_names=list(family.outputs),
        dynamic_axes=None if "static" in file.variant else {**_named(family.inputs.axes), **_named(family.outputs)},
    )


def _named(axes: Axes) -> dict[str, dict[int, str]]:
    """The axes that vary, by input or output and position."""
    return {name: {axis: label for axis, label in enumerate(labels) if label} for name, labels in axes.items()}


def _dynamo(file: "File", family: Family, module: torch.nn.Module, values: Tensors, path: Path) -> None:
    axes = tuple(
        {
            axis: label if label.isidentifier() and "unnamed" not in file.variant else torch.export.Dim.DYNAMIC
            for axis, label in named.items()
        }
        for named in _named(family.inputs.axes).values()
    )
    torch.onnx.export(
        module.requires_grad_(False),  # attention to a learned bias can't be exported while the bias takes gradients
        values,
        str(path),
        dynamo=True,
        opset_version=file.opset,
        input_names=list(family.inputs.axes),
        output_names=list(family.outputs),
        dynamic_shapes=None
        if "static" in file.variant
        else (axes,),  # one tuple: the modules take their inputs as *values
        external_data="external" in file.variant,
        optimize="unoptimised" not in file.variant,
        verbose=False,
    )


EXPORTERS: dict[str, Callable[..., None]] = {"legacy": _legacy, "dynamo": _dynamo}


def _fused(*, multi_head: bool) -> Callable[[Path, Path, "File"], None]:
    """As the transformers optimiser of ONNX Runtime writes it, with Attention or MultiHeadAttention."""

    def write(source: Path, path: Path, file: "File") -> None:
        from onnxruntime.transformers import fusion_options, optimizer

        stack, kind = FAMILIES[file.family].stacks[0], FUSED_AS.get(file.family.split("-")[0], "bert")
        options = fusion_options.FusionOptions(kind)
        options.use_multi_head_attention = multi_head
        sizes = {"num_heads": stack.heads, "hidden_size": stack.hidden}
        optimised = optimizer.optimize_model(str(source), kind, **sizes, optimization_options=options, opt_level=0)
        optimised.save_model_to_file(str(path))

    return write


FUSED_AS = {"gpt2": "gpt2", "vit": "vit", "deit": "vit", "t5": "t5", "bart": "bart", "clip": "clip", "qwen3": "qwen3"}


def _optimised(level: Any) -> Callable[[Path, Path, "File"], None]:
    """As a session of ONNX Runtime writes it after its graph optimisations of `level`."""

    def write(source: Path, path: Path, file: "File") -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3  # it warns that what it wrote may not suit every machine
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return write


def _onnxslim(source: Path, path: Path, file: "File") -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), path)


def _onnxsim(source: Path, path: Path, file: "File") -> None:
    import onnxsim

    model, same = onnxsim.simplify(onnx.load(source))
    if not same:
        raise RuntimeError(f"{file.name}: onnxsim changed what the model computes")
    onnx.save(model, path)


_LEVEL = onnxruntime.GraphOptimizationLevel
OPTIMISERS: dict[str, Callable[[Path, Path, "File"], None]] = {
    "fused": _fused(multi_head=False),
    "mha": _fused(multi_head=True),
    "basic": _optimised(_LEVEL.ORT_ENABLE_BASIC),
    "extended": _optimised(_LEVEL.ORT_ENABLE_EXTENDED),
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
}
