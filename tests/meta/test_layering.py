"""Imports point down only: adapters on growkit, growkit on growkit_specs, growkit_specs on nothing of ours.

Every import statement counts, also one inside a function or under TYPE_CHECKING, and so does
`import_module("name")`. Only what is listed for a layer may be imported; whatever else is an error.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> set[str]:
    """The import names of the core dependencies and of `extras`."""
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    names = {re.match(r"[\w.-]+", line).group() for line in lines}
    return {{"pyyaml": "yaml"}.get(name.lower(), name.replace("-", "_")) for name in names} - {"growkit"}


LAYERS = {
    "specs/growkit_specs": {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "yaml"},
    # Imported where data is read or something is drawn, and only there: `tokenizers`, and what `show` draws with.
    "growkit": requirements("show") | {"growkit_specs", "tokenizers", "PIL", "datasets"},
    "adapters/growkit_torch": requirements("torch", "timm") | {"growkit", "growkit_specs"},
    "adapters/growkit_onnx": requirements("onnx") | {"growkit", "growkit_specs"},
}
# What is for tests, and public, needs a test library.
FOR_TESTS = re.compile(r"growkit/testing/|adapters/growkit_\w+/testing\.py")
FILES = [path.relative_to(ROOT).as_posix() for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `tree` imports, relative imports aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__", "find_spec"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file: str) -> None:
    layer = next(layer for layer in LAYERS if file.startswith(f"{layer}/"))
    allowed = (
        LAYERS[layer]
        | {"hypothesis" if FOR_TESTS.match(file) else layer}
        | {layer.rpartition("/")[2]}
        | set(sys.stdlib_module_names)
    )
    wrong = [
        f"{file}:{line} imports {name}; {layer} may import {', '.join(sorted(LAYERS[layer]))}"
        for line, name in imported_names(ast.parse((ROOT / file).read_text()))
        if name.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_finds_every_form_of_import() -> None:
    source = """
import torch.nn
def late():
    from onnx import helper
    importlib.import_module("transformers")
    __import__("growkit_torch")
from . import layout
"""
    found = {name for _, name in imported_names(ast.parse(source))}
    assert found == {"torch.nn", "onnx", "transformers", "growkit_torch"}


def test_no_layer_may_import_upwards_or_sideways() -> None:
    frameworks = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "growkit_torch", "growkit_onnx"}
    assert not LAYERS["growkit"] & frameworks
    assert not LAYERS["specs/growkit_specs"] & (frameworks | {"growkit"})
    assert "growkit_onnx" not in LAYERS["adapters/growkit_torch"]
    assert "growkit_torch" not in LAYERS["adapters/growkit_onnx"]


@pytest.mark.parametrize("folder", ["adapters", "specs"])
def test_the_folders_around_packages_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
