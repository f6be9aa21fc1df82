"""How a grown model starts and where it ends: closed forms and learned operators, at equal training steps.

    python -m benchmarks.start [--quick] [--task NAME] [--json FILE]

Tiny sources are trained, grown twice as wide and deep by each method, and trained on: the same batches, schedule and
learning rate for all. What a fit costs is told apart, in training steps of the larger model; ``longer`` spends as much
on training in place of the fit. Rates and the defaults of fits were chosen on other seeds and another held-out part
(benchmarks/LOG.md).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from json import dumps
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import growkit
from benchmarks.report import report
from benchmarks.sources import TASKS, Drawn, Sizes, Split, Task, fashion_mnist, in_order
from growkit.data import Examples
from growkit.fit import fit
from growkit.loss import IGNORED, Batch
from growkit_specs import FitSettings

SEEDS = (0, 1, 2)
SMALL, LARGE = Sizes(hidden=48, layers=2), Sizes(hidden=96, layers=4)
BETAS, DECAY, CLIP, WARMUP, FLOOR = (0.9, 0.95), 0.1, 1.0, 0.1, 0.1  # of all training but the fits'
SOURCE, TRAINING, FIT = range(3)  # streams of batches


@dataclass(frozen=True)
class Start:
    """One way to start the larger model.

    Attributes:
        name: What rows call it.
        method: growkit's method.
        fit: The settings of the fit, where there is one; empty for the defaults.
        longer: Whether what the default fit costs is spent on training in its place.
        fresh: The scale of fresh entries; None takes the method's.
    """

    name: str
    method: str
    fit: Mapping[str, Any] | None = None
    longer: bool = False
    fresh: float | None = None


STARTS = (
    Start("random", "random"),
    Start("lossless", "lossless"),
    Start("lossless, longer", "lossless", longer=True),
    Start("lossless, fitted", "lossless", fit={}),
    Start("fresh", "fresh"),
    Start("fresh, fitted", "fresh", fit={}),
    Start("net2net", "width=net2net,depth=stack"),
    Start("ligo-paper", "ligo-paper"),
    Start("ligo-paper, fitted", "ligo-paper", fit={"learn": ("depth", "width"), "lr": 1e-2}),  # as published
)
PAIRS = tuple((f"{name}, fitted", name) for name in ("lossless", "fresh", "ligo-paper"))
PAIRS += (("lossless, fitted", "lossless, longer"),)


@dataclass(frozen=True)
class Settings:
    """The sizes of the benchmark."""

    source: Sizes = SMALL
    target: Sizes = LARGE
    source_steps: int | None = None  # None takes the task's
    steps: int = 150
    source_lr: float = 3e-3
    lr: float = 1e-3  # of the larger models, whatever they start from
    seeds: tuple[int, ...] = SEEDS
    fit_steps: int | None = None  # None takes the default
    most: int | None = None  # batches to measure a loss on; None takes all
    split: Split = "reported"


QUICK = Settings(
    source=Sizes(24, 1, context=16),
    target=Sizes(48, 2, context=16),
    source_steps=4,
    steps=2,
    seeds=(0,),
    fit_steps=2,
    most=2,
)


# --- training --------------------------------------------------------------------------------------------------------


def batch_loss(module: Any, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy of a batch's labels, in nats."""
    inputs = {name: torch.as_tensor(value) for name, value in batch.inputs.items()}
    logits = module(**inputs).logits
    return F.cross_entropy(logits.flatten(0, -2), torch.as_tensor(batch.labels).flatten(), ignore_index=IGNORED)


@torch.no_grad()
def held_out_loss(module: Any, examples: Examples, size: int, most: int | None = None) -> float:
    """The mean cross-entropy of all held-out labels, in nats; of the first ``most`` batches where that is said."""
    module.eval()
    total, counted = 0.0, 0
    for number, batch in enumerate(in_order(examples, size)):
        if number == most:
            break
        count = int((torch.as_tensor(batch.labels) != IGNORED).sum())
        total, counted = total + count * float(batch_loss(module, batch)), counted + count
    return total / counted


def train(module: Any, data: Drawn, steps: int, lr: float) -> None:
    """Train a module in place: up in a line over the warm-up, down a cosine to a tenth."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=BETAS, weight_decay=DECAY)
    rising = max(round(WARMUP * steps), 1)
    for step in range(steps):
        share = max(step + 1 - rising, 0) / max(steps - rising, 1)
        rate = min(1, (step + 1) / rising) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        batch_loss(module, data.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def counting() -> FlopCounterMode:
    """Counts the FLOPs of products; torch's own list lacks those in place, and attention on a CPU."""
    aten = torch.ops.aten
    alike = {
        aten.addmm_: aten.addmm,
        aten.baddbmm_: aten.baddbmm,
        aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
    }
    more = {op: partial(flop_counter.flop_registry[other]) for op, other in alike.items()}
    for formula in more.values():
        formula._get_raw = True  # it takes shapes of arguments itself
    return FlopCounterMode(display=False, custom_mapping=more)


def step_flops(module: Any, data: Drawn) -> float:
    """FLOPs of the products of one training step."""
    with counting() as counter:
        batch_loss(module, data.batch(0)).backward()
    module.zero_grad()
    return float(counter.get_total_flops())


def fit_flops(learned: Callable[[int], Any]) -> float:
    """FLOPs of the products of one step of a fit: what a second step adds to the first."""
    totals = []
    for steps in (1, 2):
        with counting() as counter:
            learned(steps)
        totals.append(counter.get_total_flops())
    return float(totals[1] - totals[0])


# --- one task, one seed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A trained source, and what is needed to grow it and train on."""

    task: Task
    settings: Settings
    seed: int
    source: growkit.Model
    source_loss: float

    @classmethod
    def trained(cls, task: Task, settings: Settings, seed: int) -> Bench:
        """Train the source of a seed."""
        torch.set_num_threads(1)  # so small a model gains nothing from more, and one thread adds in one order
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(seed)
        module = task.module(settings.source)
        model = growkit.read(module)
        data = cls(task, settings, seed, model, math.nan).data(SOURCE)
        train(module, data, settings.source_steps or task.source_steps, settings.source_lr)
        bare = cls(task, settings, seed, growkit.read(module), math.nan)
        return cls(task, settings, seed, bare.source, bare.loss(module))

    def examples(self, split: Split) -> Examples:
        """The examples of a split."""
        return self.task.examples(self.source, self.settings.source, split)

    def data(self, stream: int) -> Drawn:
        """Batches to train on."""
        return Drawn(self.examples("training"), self.task.batch, seed=3 * self.seed + stream)

    def loss(self, module: Any) -> float:
        """The loss on what is held out."""
        return held_out_loss(module, self.examples(self.settings.split), self.task.batch, self.settings.most)

    def row(self, start: Start) -> dict[str, Any]:
        """Grow by one method, fit where it is asked for, train on, and measure."""
        settings, target = self.settings, self.settings.target
        plan = growkit.plan(
            self.source,
            hidden=target.hidden,
            layers=target.layers,
            method=start.method,
            seed=self.seed,
            fresh=start.fresh,
        )
        large = growkit.grow(self.source, plan).to_torch()
        grown_loss, fitted_loss = self.loss(large), None
        one_step = step_flops(large, self.data(TRAINING))
        fitted = start.fit is not None or start.longer
        told = dict(start.fit or {})
        if settings.fit_steps is not None:
            told.setdefault("steps", settings.fit_steps)
        fit_steps = FitSettings.of(**told).steps if fitted else 0

        def learned(steps: int) -> Any:
            return fit(self.source, plan, self.data(FIT), device="cpu", **{**told, "steps": steps})

        cost = fit_steps * fit_flops(learned) / one_step if fitted else 0.0
        if start.fit is not None:
            large = growkit.grow(self.source, learned(fit_steps)).to_torch()
            fitted_loss = self.loss(large)
        steps = settings.steps + (round(cost) if start.longer else 0)
        train(large, self.data(TRAINING), steps, settings.lr)
        return {
            "task": self.task.name,
            "method": start.name,
            "seed": self.seed,
            "source_loss": round(self.source_loss, 4),
            "grown_loss": round(grown_loss, 4),
            "fitted_loss": None if fitted_loss is None else round(fitted_loss, 4),
            "final_loss": round(self.loss(large), 4),
            "steps": steps,
            "fit_steps": 0 if start.longer else fit_steps,
            "fit_cost": 0.0 if start.longer else round(cost, 1),
            "flops": float(f"{(steps + (0 if start.longer else cost)) * one_step:.3e}"),
        }


def measure(task: str, settings: Settings, seed: int, starts: Iterable[Start]) -> Iterator[dict[str, Any]]:
    """The rows of one task and seed."""
    bench = Bench.trained(TASKS[task], settings, seed)
    for start in starts:
        yield bench.row(start)


def _rows(task: str, settings: Settings, seed: int) -> list[dict[str, Any]]:
    rows = []
    for row in measure(task, settings, seed, STARTS):
        print(dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


# --- what came out ---------------------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each task and method the means over seeds, and the standard deviation of the final loss."""
    for (task, method), group in _grouped(rows).items():
        finals = [row["final_loss"] for row in group]
        yield {
            "task": task,
            "method": method,
            "source": f"{mean(row['source_loss'] for row in group):.3f}",
            "grown": f"{mean(row['grown_loss'] for row in group):.3f}",
            "fitted": f"{mean(row['fitted_loss'] for row in group):.3f}" if group[0]["fit_steps"] else "",
            "final": f"{mean(finals):.4f}",
            "seed noise": f"{stdev(finals):.4f}" if len(finals) > 1 else "",
            "fit cost": f"{mean(row['fit_cost'] for row in group):.0f}" if group[0]["fit_steps"] else "",
        }


def differences(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each task the final loss with a fit minus that without, seed by seed: mean and standard deviation."""
    groups = _grouped(rows)
    for task in dict.fromkeys(row["task"] for row in rows):
        for fitted, other in PAIRS:
            pairs = zip(groups[task, fitted], groups[task, other], strict=True)
            apart = [one["final_loss"] - two["final_loss"] for one, two in pairs]
            yield {
                "task": task,
                "fitted": fitted,
                "minus": other,
                "final loss": f"{mean(apart):+.4f}",
                "seed noise": f"{stdev(apart):.4f}" if len(apart) > 1 else "",
                "by seed": " ".join(f"{each:+.4f}" for each in apart),
            }


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    return groups


def show(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows as a table."""
    rows = list(rows)
    table = Table(*rows[0], title=title, box=SIMPLE)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of tinier models, one seed.")] = False,
    task: Annotated[list[str] | None, typer.Option(help=f"One or several of {', '.join(TASKS)}.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes, each with a task and a seed of its own.")] = 1,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there, too.")] = None,
) -> None:
    """Measure where grown models start and end."""
    settings = QUICK if quick else Settings()
    names = task or list(TASKS)
    if unknown := sorted(set(names) - set(TASKS)):
        raise SystemExit(f"unknown task '{unknown[0]}'; tasks are {', '.join(TASKS)}")
    if "images" in names:
        fashion_mnist()  # once, and before anything is trained
    work = [(name, settings, seed) for seed in settings.seeds for name in names]
    rows = [row for done in _worked(work, jobs) for row in done]
    rows.sort(key=lambda row: (names.index(row["task"]), row["seed"]))
    report("start", rows, json)
    show("means over seeds", summary(rows))
    show("fitted minus unfitted", differences(rows))


def _worked(work: list[tuple[str, Settings, int]], jobs: int) -> Iterator[list[dict[str, Any]]]:
    if jobs == 1:
        for each in work:
            yield _rows(*each)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_rows, *each) for each in work]):
            yield done.result()


if __name__ == "__main__":
    typer.run(main)
