"""What every benchmark shares: what a command costs, and a table and a JSON file of its rows."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

PACKAGES = ("growkit", "numpy", "torch", "transformers", "safetensors", "onnx", "onnx-ir", "onnxruntime")
ROOT = Path(__file__).parents[1]
SAMPLED_EVERY = 0.01  # seconds
MEMORY = {"rss": "VmHWM", "anonymous": "RssAnon"}  # the words of /proc

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """What a command cost.

    Attributes:
        wall_s: Seconds from its start to its end.
        cpu_s: Seconds of processor time, its children's too.
        peak_rss_mb: The most memory it held, mapped files included, in MB; None where /proc is missing.
        peak_anonymous_mb: The most memory of its own, without mapped files, in MB; None where /proc is missing.
    """

    wall_s: float
    cpu_s: float
    peak_rss_mb: float | None
    peak_anonymous_mb: float | None


def measured(command: Sequence[str]) -> Cost:
    """Run a command from the project's root and say what it cost.

    Raises:
        SystemExit: Where it fails; what it printed stands on standard error.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks = dict.fromkeys(MEMORY.values(), 0)
    ended = 0
    while not ended:
        for kind, size in _memory(process.pid).items():
            peaks[kind] = max(peaks[kind], size)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        time.sleep(0 if ended else SAMPLED_EVERY)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"status {process.returncode} of: {shlex.join(command)}")
    return Cost(
        wall_s=round(time.perf_counter() - start, 2),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 2),
        **{f"peak_{kind}_mb": round(peaks[line] / 1000, 1) or None for kind, line in MEMORY.items()},
    )


def _memory(process: int) -> dict[str, int]:
    """What a process holds, in kB, by /proc's words; nothing where /proc is missing or the process has ended.

    The operating system's account of a child (ru_maxrss) starts with its parent's memory and would say too much.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = dict(line.split(":", 1) for line in lines)
    return {kind: int(sizes[kind].split()[0]) for kind in MEMORY.values() if kind in sizes}


def report(benchmark: str, rows: Sequence[Row], destination: Path | None = None) -> None:
    """Print rows as a table, and write them with what they were measured on.

    Args:
        benchmark: The benchmark's name.
        rows: The rows, all with the same keys.
        destination: The JSON file; None for none.
    """
    table = Table(*rows[0], title=benchmark, box=SIMPLE)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if destination is not None:
        document = {
            "benchmark": benchmark,
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "machine": _machine(),
            "versions": _versions(),
            "rows": [dict(row) for row in rows],
        }
        destination.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _machine() -> dict[str, Any]:
    processors = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in processors if line.startswith("model name")]
    return {
        "system": platform.platform(terse=True),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
