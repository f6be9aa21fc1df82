"""`import growkit` and `growkit --help` import no framework; each is asked in a fresh interpreter."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

FRAMEWORKS = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "growkit_torch", "growkit_onnx"}
# Heavy, and of no use for a page of help.
UNNEEDED = {"PIL", "datasets", "hypothesis", "matplotlib", "pytest", "scipy", "sympy", "tokenizers"}


REPORT = """
import json, sys
print()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules_after(code: str) -> set[str]:
    """The top-level modules that are loaded after `code` ran."""
    done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_growkit_imports_no_framework() -> None:
    assert not modules_after("import growkit") & (FRAMEWORKS | UNNEEDED)


def test_import_growkit_specs_stands_alone() -> None:
    assert not modules_after("import growkit_specs") & (FRAMEWORKS | UNNEEDED | {"growkit"})


def test_help_imports_no_framework() -> None:
    code = """
import sys
sys.argv = ["growkit", "--help"]
from growkit.cli import main
try:
    status = main()
except SystemExit as exit:
    status = exit.code
assert not status, status
"""
    assert not modules_after(code) & (FRAMEWORKS | UNNEEDED)


def test_help_answers_as_a_command() -> None:
    command = shutil.which("growkit", path=Path(sys.executable).parent)
    assert command, "growkit is not installed beside this interpreter"
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
