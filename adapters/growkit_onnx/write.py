"""Writing: an ONNX file, weight by weight; its external data, operator, recipe and genai_config.json beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from growkit.adapters import Adapter
from growkit.model import Model
from growkit.staging import staged_files
from growkit_onnx.files import sidecar, write_file
from growkit_onnx.genai import CONFIG, genai_config
from growkit_onnx.read import Origin, build, operator_beside, read_model, recipe_beside
from growkit_specs import Recipe


def write_model(
    adapter: Adapter,
    model: Model,
    like: Origin,
    destination: Path,
    progress: Callable[[int], None],
    check: Callable[[Model], None],
) -> None:
    """Write an ONNX file.

    Args:
        adapter: The adapter that reads it back.
        model: The model.
        like: Its origin; a source whose weights lie in a file beside it is written so too.
        destination: The file; nothing appears there unless the whole of it is right.
        progress: Called with the number of bytes written since the last call.
        check: Called with the written model, read back, before it is put in place.

    Raises:
        GrowkitError: Where it cannot be written; nothing is left behind.
    """
    texts = _texts(model, like, destination)
    beside = [sidecar(destination).name, operator_beside(destination).name, *texts]
    with staged_files(destination, model.bytes, beside=beside) as folder:
        path = folder / destination.name
        write_file(build(model), path, external=like.is_external or None, progress=progress)
        if model.growth is not None:
            model.growth.operator.save(operator_beside(path))
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        check(read_model(adapter, path))


def _texts(model: Model, like: Origin, destination: Path) -> dict[str, str]:
    """What else stands beside a grown file, by name: the recipe, and onnxruntime-genai's config."""
    if model.growth is None:
        return {}
    texts = {}
    if model.growth.recipe is not None:
        texts[recipe_beside(destination).name] = _stored(model.growth.recipe, like, destination).to_yaml()
    config = genai_config(like.path, destination, model.graph, model.growth.operator)
    if config is not None:
        texts[CONFIG] = config
    return texts


def _stored(recipe: Recipe, like: Origin, destination: Path) -> Recipe:
    """The recipe as it lies beside the grown file: its source's path starts there."""
    if like.path is None:
        return recipe
    return recipe.model_copy(update={"source": os.path.relpath(like.path, destination.parent)})
