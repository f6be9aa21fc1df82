"""Damaged files are refused in one line, or grow and compute what they did; nothing else is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

COUNT = 150 if settings().max_examples <= 100 else 2000
FIRST = 0
FINE = {"refused", "written", "right"}
RUNNING = "running"  # in ONNX Runtime, which damaged files may crash


def outcomes(place: Path, first: int, count: int) -> dict[int, str]:
    """What became of each file; a process that ends with one is followed by another that begins after it."""
    found: dict[int, str] = {}
    while len(found) < count:
        command = [sys.executable, "-m", "tests.adapters.onnx.mutated", str(place), str(first + len(found))]
        result = subprocess.run(
            [*command, str(count - len(found))],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"},
        )
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert lines, result.stderr
        found |= {line["seed"]: line["outcome"] for line in lines}
        if result.returncode:
            seed, last = lines[-1]["seed"], lines[-1]["outcome"]
            ended = f"status {result.returncode}, {result.stderr.strip()[-2000:]}"
            found[seed] = "written" if last == RUNNING and result.returncode < 0 else ended
    return found


def test_damaged_files_are_refused_or_grow_right(tmp_path: Path) -> None:
    found = outcomes(tmp_path, FIRST, COUNT)
    assert len(found) == COUNT
    wrong = {seed: outcome for seed, outcome in found.items() if outcome not in FINE}
    assert not wrong
    assert list(found.values()).count("refused") > COUNT / 4
    assert list(found.values()).count("right") > COUNT / 10


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_process_that_ends_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own net holds: a worker that dies is a finding, and the files behind it are tried as well."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho "{\\"seed\\": $4, \\"outcome\\": \\"started\\"}"\n[ $4 = 1 ] && exit 1\n'
        'echo "{\\"seed\\": $4, \\"outcome\\": \\"right\\"}"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert outcomes(tmp_path, 0, 3) == {0: "right", 1: "status 1, ", 2: "right"}
