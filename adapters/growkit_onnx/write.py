"""Writing: an ONNX file, weight by weight, its external data and its operator beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from growkit.adapters import Adapter
from growkit.model import Model
from growkit.staging import staged_files
from growkit_onnx.files import sidecar, write_file
from growkit_onnx.read import Origin, build, operator_beside, read_model
from growkit_specs import UnsupportedFormat


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
    if destination.suffix != ".onnx":
        raise UnsupportedFormat(f"{destination}: what came from an ONNX file is written as one; name a file OUT.onnx")
    beside = [sidecar(destination).name, operator_beside(destination).name]
    with staged_files(destination, model.bytes, beside=beside) as folder:
        path = folder / destination.name
        write_file(build(model), path, external=like.is_external or None, progress=progress)
        if model.growth is not None:
            model.growth.operator.save(operator_beside(path))
        check(read_model(adapter, path))
