"""Writing: a model directory, tensor by tensor, beside its destination first and then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from growkit.adapters import Adapter
from growkit.matrices import Array
from growkit.model import Model
from growkit.staging import staged_directory
from growkit.weights import dtype_of
from growkit_specs import LayerGraph, Recipe, Tensor
from growkit_torch.read import INDEX, OPERATOR, RECIPE, SINGLE, Origin, read_directory
from growkit_torch.safetensors_file import write_file

SHARD_BYTES = 5_000_000_000
"""The size past which a file of weights is split, in bytes: the Hub's own limit."""

NOT_CARRIED = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.h5", "*.msgpack",
    "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.mlmodel", "*.tflite", "*.ot", RECIPE, ".git",
    ".cache",
)  # fmt: skip
"""What a directory's copy leaves out: weights of the source's size, in any format, and version control."""


def write_directory(
    adapter: Adapter,
    model: Model,
    like: Origin,
    destination: Path,
    progress: Callable[[int], None],
    check: Callable[[Model], None],
) -> None:
    """Write a model directory.

    Args:
        adapter: The adapter that reads it back.
        model: The model.
        like: Its origin; the files beside the source's weights come along.
        destination: Where; nothing appears there unless the whole of it is right.
        progress: Called with the number of bytes written since the last call.
        check: Called with the written model, read back, before it is put in place.

    Raises:
        GrowkitError: Where it cannot be written; nothing is left behind.
    """
    with staged_directory(destination, model.bytes) as folder:
        if like.path is not None:
            _carry_over(like.path, folder, model.graph)
        _write_json(folder / "config.json", like.library.document(like, model.graph))
        _write_weights(folder, model, like, progress)
        if model.growth is not None:
            model.growth.operator.save(folder / OPERATOR)
            if model.growth.recipe is not None:
                (folder / RECIPE).write_text(
                    _stored(model.growth.recipe, like, destination).to_yaml(), encoding="utf-8"
                )
            _describe(folder / "README.md", model)
        check(read_directory(adapter, folder))


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- weights ---------------------------------------------------------------------------------------------------------


def _write_weights(folder: Path, model: Model, like: Origin, progress: Callable[[int], None]) -> None:
    shards = _shards(model.graph)
    names = _names_in_file(model, like)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(files, shards, strict=True):
        shapes = {names[t.name]: (t.shape, dtype_of(t.parameter.dtype)) for t in shard}
        write_file(folder / name, shapes, (_plain(model.weights[t.name]) for t in shard), progress)
    if len(shards) > 1:
        weight_map = {names[t.name]: name for name, shard in zip(files, shards, strict=True) for t in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": model.bytes}, "weight_map": weight_map})


def _names_in_file(model: Model, like: Origin) -> dict[str, str]:
    """The name in a file of each tensor: as the source directory has it; a module's by the architecture's own names.

    transformers renames modules between versions, and keeps the names in files.
    """
    if like.module is None:
        return {t.name: t.name for t in model.graph.tensors()}
    own = {(t.key, t.layer): t.name for t in like.architecture.graph(like.config, like.class_name).tensors(tied=True)}
    return {t.name: own[t.key, t.layer] for t in model.graph.tensors()}


def _plain(array: Array) -> np.ndarray:
    return np.asarray(array)


def _shards(graph: LayerGraph) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in graph.tensors():
        size = tensor.count * dtype_of(tensor.parameter.dtype).itemsize
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
    return shards


# --- what stands beside the weights --------------------------------------------------------------------------------

COMPANIONS = {"*_Pooling/config.json": {"word_embedding_dimension": "hidden"}}
"""Files beside the model that repeat a size: sentence-transformers' pooling."""


def _carry_over(source: Path, folder: Path, graph: LayerGraph) -> None:
    """Copy every file but weights; sizes that companions repeat follow the growth."""

    def left_out(directory: str, names: list[str]) -> set[str]:
        return {
            name
            for name in names
            if any(fnmatch(name, pattern) for pattern in NOT_CARRIED)
            and (name != "config.json" or Path(directory) == source)
        }

    shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)
    for pattern, keys in COMPANIONS.items():
        for path in folder.glob(pattern):
            data = json.loads(path.read_text(encoding="utf-8"))
            _write_json(path, data | {key: graph.sizes[space] for key, space in keys.items() if key in data})


def _stored(recipe: Recipe, like: Origin, destination: Path) -> Recipe:
    """The recipe as it lies beside the grown model: its source's path starts there."""
    if like.path is None:
        return recipe
    return recipe.model_copy(update={"source": os.path.relpath(like.path, destination)})


def _describe(card: Path, model: Model) -> None:
    """A section on the model card that tells the growth."""
    assert model.growth is not None
    recipe = model.growth.recipe
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {model.origin.class_name}\n"
    sizes = ", ".join(f"{name} {size}" for name, size in {**model.graph.sizes, **model.graph.depths}.items())
    files = f"`{OPERATOR}` holds the growth operator" + (f", `{RECIPE}` says how it was grown" if recipe else "")
    lines = [
        "",
        "## Grown with growkit",
        "",
        f"This model was grown out of a smaller trained one. It has {model.graph.parameter_count:,} parameters "
        f"({sizes}). {files}. What is said above of "
        "sizes and results was said of the smaller model.",
        "",
    ]
    if recipe is not None:
        named = recipe.model_copy(update={"source": Path(recipe.source).name})  # a card tells no machine's paths
        lines += ["```yaml", named.to_yaml().rstrip(), "```", ""]
    card.write_text(before.rstrip("\n") + "\n" + "\n".join(lines), encoding="utf-8")
