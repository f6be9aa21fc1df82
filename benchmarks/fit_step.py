"""One step of learning a growth operator, against a plain training step of the large model.

    python -m benchmarks.fit_step [--quick] [--json FILE] [--tokens 256 --tokens 1024]

BERT of 6 layers, 512 wide, to 12 layers, 768 wide, random weights, sequences of 128 tokens. Every way runs in a process
of its own: a step to warm up, then some that are counted: forward, backward, and the optimizer's step. `floor` is the
ratio of the multiplications that the products with weights and scores take, the fewest that the chosen operator allows;
the head over the vocabulary is among them. Memory is what a process holds at its peak above what it held before there
was a model.

| strategy | what it is |
|---|---|
| plain | the large model trained: what all others are divided by |
| auto | `growkit.fit` as it comes: the source's weights and the norms are learned along |
| alone | `learn=("depth", "width")`, the operator alone; so have all below |
| factored, materialised | one way to act for all weights |
| dense | every matrix dense, q, k and v mixing the entries of all heads, as the paper has them |
| mixed ffn | `structure={"ffn": "source"}`: the units behind the activation mixed too |
| no fresh | from copies, without fresh entries Z |
| depth | `learn=("depth",)`: the blends of layers alone |
| keeping, three quarters, running again | so many of the blocks run again for their gradients; as it comes, half |
| published | the paper's equation written out: every large weight made in each step and kept for the gradient |
"""

from __future__ import annotations

import json as json_
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import ROOT, report

SOURCE = {"hidden": 512, "layers": 6, "heads": 8}
TARGET = {"hidden": 768, "layers": 12, "heads": 12}
VOCAB, LENGTH = 30_522, 128
TOKENS, QUICK_TOKENS = (256, 1024, 4096), (256,)
ALONE = {"learn": ("depth", "width")}
STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {},
    "alone": ALONE,
    "factored": {**ALONE, "strategy": "factored"},
    "materialised": {**ALONE, "strategy": "materialised"},
    "dense": {**ALONE, "structure": {"(heads head_dim)": "dense", "hidden": "dense", "ffn": "dense"}},
    "mixed ffn": {**ALONE, "structure": {"ffn": "source"}},
    "no fresh": {**ALONE, "method": "width=net2net,depth=interpolate", "fresh": 0.0},
    "depth": {"learn": ("depth",)},
    "keeping": {**ALONE, "checkpointing": 0.0},
    "three quarters": {**ALONE, "checkpointing": 0.75},
    "running again": {**ALONE, "checkpointing": 1.0},
}


@dataclass(frozen=True)
class Cost:
    """What one step cost: seconds of processor and of time, and the process's peak memory in MB."""

    cpu_s: float
    wall_s: float
    memory_mb: float
    multiplications: int


def main(
    quick: Annotated[bool, typer.Option("--quick", help="256 tokens alone.")] = False,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", help="Tokens in a step.")] = None,
    strategy: Annotated[list[str] | None, typer.Option("--strategy", help="Only these, beside plain.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there, too.")] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure a step of fitting."""
    if child is not None:
        from benchmarks.fit_step_child import measure

        way, _, count = child.partition("@")
        print(json_.dumps(vars(measure(way, int(count)))))
        return
    rows = []
    for count in tokens or (QUICK_TOKENS if quick else TOKENS):
        plain = _cost("plain", count)
        for way in strategy or [*STRATEGIES, "published"]:
            cost = _cost(way, count)
            rows.append(
                {
                    "pair": "6x512 to 12x768",
                    "tokens": count,
                    "strategy": way,
                    "cpu_ratio": round(cost.cpu_s / plain.cpu_s, 2),
                    "wall_ratio": round(cost.wall_s / plain.wall_s, 2),
                    "memory_ratio": round(cost.memory_mb / plain.memory_mb, 2),
                    "floor": round(cost.multiplications / plain.multiplications, 2) if cost.multiplications else None,
                    "plain_cpu_s": round(plain.cpu_s, 2),
                    "plain_memory_mb": round(plain.memory_mb),
                }
            )
    report("fit_step", rows, json)


def _cost(way: str, tokens: int) -> Cost:
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.fit_step", "--child", f"{way}@{tokens}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} at {tokens} tokens: {done.stderr.strip()}")
    print(f"{way} at {tokens} tokens: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return Cost(**json_.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    typer.run(main)
