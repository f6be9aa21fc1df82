"""JSON Schema of the files and objects that others read: layer graphs, recipes and architecture files.

python -m growkit_specs.schemas docs/reference/schemas      writes them anew
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from growkit_specs.architecture import Architecture
from growkit_specs.layer_graph import LayerGraph, Spec
from growkit_specs.recipe import Recipe

SPECS: dict[str, type[Spec]] = {"layer_graph": LayerGraph, "recipe": Recipe, "architecture": Architecture}


def schemas() -> dict[str, str]:
    """Every schema as JSON text, by file name."""
    return {
        f"{name}.json": json.dumps(spec.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
        for name, spec in SPECS.items()
    }


def write_schemas(folder: Path) -> None:
    """Write every schema into ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(*sys.argv[1:2] or ["docs/reference/schemas"]))
