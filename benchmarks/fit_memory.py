"""The memory that fitting a large target takes: a decoder of 100 million parameters to one of a billion.

    python -m benchmarks.fit_memory [--quick] [--json FILE]

Random weights, a few steps of `growkit.fit` as it comes, in float32, 512 tokens a step. The peak is the process's, the
source's module and the imports included. To train the target itself would take 16 bytes for each of its parameters and
then its activations.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import measured, report


@dataclass(frozen=True)
class Pair:
    """A source and what it grows to."""

    hidden: int
    layers: int
    to_hidden: int
    to_layers: int
    vocab: int


LARGE = Pair(hidden=768, layers=12, to_hidden=1792, to_layers=26, vocab=32_000)
QUICK = Pair(hidden=128, layers=4, to_hidden=256, to_layers=8, vocab=4_000)
STEPS, BATCH, LENGTH = 3, 4, 128

FIT = """
import sys, json, torch, numpy as np, growkit
from transformers import LlamaConfig, LlamaForCausalLM
hidden, layers, to_hidden, to_layers, vocab, steps, batch, length = map(int, sys.argv[1:9])
torch.manual_seed(0)
heads = hidden // 64
config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 64 * 64,
                     num_hidden_layers=layers, num_attention_heads=heads)
model = growkit.read(LlamaForCausalLM(config))
plan = growkit.plan(model, hidden=to_hidden, layers=to_layers)
ids = np.random.default_rng(0).integers(0, vocab, (batch, length))
data = [{"input_ids": ids, "labels": np.concatenate([ids[:, 1:], np.full((batch, 1), -100)], axis=1)}]
losses = []
growkit.fit(model, plan, data, steps=steps, progress=lambda step: losses.append(step.loss))
told = {"source": model.graph.parameter_count, "target": plan.target.parameter_count, "losses": losses}
open(sys.argv[9], "w").write(json.dumps(told))
"""


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A pair of a few million parameters.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there, too.")] = None,
) -> None:
    """Measure the peak memory of a fit."""
    import json as json_
    from tempfile import TemporaryDirectory

    pair = QUICK if quick else LARGE
    sizes = [*vars(pair).values(), STEPS, BATCH, LENGTH]
    with TemporaryDirectory(prefix="fit_memory.") as folder:
        told = Path(folder) / "told.json"
        began = time.perf_counter()
        cost = measured([sys.executable, "-c", FIT, *map(str, sizes), str(told)])
        result = json_.loads(told.read_text())
    target_gb = 16 * result["target"] / 1e9
    rows = [
        {
            "source_parameters": result["source"],
            "target_parameters": result["target"],
            "steps": STEPS,
            "tokens": BATCH * LENGTH,
            "peak_gb": round((cost.peak_rss_mb or 0) / 1000, 2),
            "training_would_hold_gb": round(target_gb, 2),
            "wall_s": round(time.perf_counter() - began, 1),
            "first_loss": round(result["losses"][0], 4),
            "last_loss": round(result["losses"][-1], 4),
        }
    ]
    report("fit_memory", rows, json)


if __name__ == "__main__":
    typer.run(main)
