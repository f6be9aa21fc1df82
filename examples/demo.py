"""A tiny language model is trained, grown twice as wide and deep, and trained on; beside it, one from scratch.

    python -m examples.demo            # about three minutes, into demo/

Nothing is downloaded: the text is the standard library's own help pages. Both large models see the same batches under
the same learning rates; the loss is that of pages that no model was trained on.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import growkit
from growkit.plan import flops_per_token

END = "<|end|>"
MARKER = ".made-by-the-demo"
OUTPUTS = ("small", "large", "loss.png", "result.json")
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@dataclass(frozen=True)
class Stage:
    """A model's size, and how long and fast it is trained."""

    hidden: int
    layers: int
    steps: int
    learning_rate: float  # the highest; the target's is the best of five from scratch


@dataclass(frozen=True)
class Settings:
    """The sizes of the demo."""

    vocab: int = 512
    context: int = 128  # tokens
    batch: int = 8  # sequences a step
    warmup: int = 40  # steps
    evaluate_every: int = 40  # steps
    source: Stage = Stage(hidden=64, layers=2, steps=600, learning_rate=5e-3)
    target: Stage = Stage(hidden=128, layers=4, steps=800, learning_rate=3e-3)


QUICK = Settings(300, 32, 2, warmup=2, evaluate_every=4, source=Stage(32, 1, 8, 5e-3), target=Stage(48, 2, 8, 3e-3))


@dataclass(frozen=True)
class Text:
    """Token ids, ``(tokens,)``, of the pages that are trained on and of those that are held out."""

    training: torch.Tensor
    validation: torch.Tensor


@dataclass(frozen=True)
class Run:
    """One model's training: its validation loss, in nats per token, after so many FLOPs of training."""

    name: str
    parameters: int
    flops: list[float]
    losses: list[float]


def main(
    out: Annotated[Path, typer.Option(help="Where the models, the plot and the numbers go.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of tinier models, to see that it works.")] = False,
) -> None:
    """Train a tiny language model, grow it, verify it, train on, and compare with one from scratch."""
    settings = QUICK if quick else Settings()
    torch.set_num_threads(1)  # so small a model gains little from more, and loses much where cores are shared
    logging.disable_progress_bar()  # transformers' own
    clear(out)
    tokenizer, text = tokenized(settings)

    console.print(f"[bold]1. Train[/] a small model on {len(text.training):,} tokens of Python's help pages.")
    module = small_module(settings, tokenizer)
    source_run = train("source", module, text, settings)
    module.save_pretrained(out / "small")
    tokenizer.save_pretrained(out / "small")

    console.print("\n[bold]2. Grow[/] it wider and deeper.")
    source = growkit.read(out / "small")
    plan = growkit.plan(source, hidden=settings.target.hidden, layers=settings.target.layers)
    growkit.write(growkit.grow(source, plan), out / "large")
    large = growkit.read(out / "large")
    report = growkit.verify(source, large)
    show_growth(plan, report)

    console.print("\n[bold]3. Train on[/], and train the same large model from scratch.")
    scratch = growkit.grow(source, like=plan.target, method="random")
    grown_run = train("grown", large.to_torch(), text, settings)
    scratch_run = train("from scratch", scratch.to_torch(), text, settings)

    runs = [source_run, grown_run, scratch_run]
    saved = saving(*runs)
    show_runs(runs, saved)
    plot(runs, out / "loss.png")
    facts: dict[str, Any] = {"settings": asdict(settings), "runs": [asdict(run) for run in runs], "saving": saved}
    facts |= {"plan": plan.to_json(), "verify": report.to_json()}
    (out / "result.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.print(f"\nLoss against compute: {out / 'loss.png'}. All numbers: {out / 'result.json'}.")
    console.print(
        f"To look further: growkit inspect {out / 'large'}; growkit verify {out / 'small'} {out / 'large'}",
        soft_wrap=True,
    )


def clear(out: Path) -> None:
    """Make ``out``, and take away what an earlier demo left there; what is not the demo's own is never touched."""
    there = [path for path in (out / name for name in OUTPUTS) if path.exists()]
    if there and not (out / MARKER).exists():
        raise SystemExit(f"demo: {there[0]} is not from an earlier demo; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- text ------------------------------------------------------------------------------------------------------------


def tokenized(settings: Settings) -> tuple[PreTrainedTokenizerFast, Text]:
    """A byte-level BPE trained on nine tenths of the help pages, and the tokens of all of them."""
    pages = list(distinct_pages())
    held_out = pages[5::10]
    training = [page for page in pages if page not in held_out]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(training, vocab_size=settings.vocab, special_tokens=[END], show_progress=False)
    tokens = [torch.tensor([i for page in part for i in bpe.encode(page + END).ids]) for part in (training, held_out)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token=END)
    return tokenizer, Text(*tokens)


def distinct_pages() -> Iterator[str]:
    """The help pages without the paragraphs of earlier ones, so that none is both trained on and held out."""
    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = {" ".join(text.split()): text for text in topics[name].split("\n\n")}
        if fresh := [text for words, text in paragraphs.items() if words not in seen]:
            yield "\n\n".join(fresh)
        seen |= paragraphs.keys()


# --- training --------------------------------------------------------------------------------------------------------


def small_module(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The source: a Llama (RMSNorm, rotary positions, grouped queries, gated MLP) of a tiny size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.source.hidden,
        intermediate_size=3 * settings.source.hidden,
        num_hidden_layers=settings.source.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=settings.context,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(name: str, module: Any, text: Text, settings: Settings) -> Run:
    """Train a module in place; both large models get the same batches and learning rates."""
    stage = settings.source if name == "source" else settings.target
    optimizer = torch.optim.AdamW(module.parameters(), lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,  # up in a line over the warm-up, down a cosine to a tenth
        lambda step: min(1, (step + 1) / settings.warmup) * (0.55 + 0.45 * math.cos(math.pi * step / stage.steps)),
    )
    draw = torch.Generator().manual_seed(0 if name == "source" else 1)
    curve = {0: validation_loss(module, text, settings)}
    columns = (TextColumn(f"{name:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=stage.steps, loss=curve[0])
        for step in range(1, stage.steps + 1):
            starts = torch.randint(len(text.training) - settings.context, (settings.batch, 1), generator=draw)
            tokens = text.training[starts + torch.arange(settings.context)]  # (batch, context)
            module.train()(input_ids=tokens, labels=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % settings.evaluate_every == 0 or step == stage.steps:
                curve[step] = validation_loss(module, text, settings)
            progress.update(task, advance=1, loss=list(curve.values())[-1])
    flops = [step * flops_per_step(module, settings) for step in curve]
    return Run(name, module.num_parameters(), flops, list(curve.values()))


@torch.no_grad()
def validation_loss(module: Any, text: Text, settings: Settings) -> float:
    """The mean cross-entropy of the held-out pages, in nats per token."""
    whole = len(text.validation) // settings.context * settings.context
    windows = text.validation[:whole].view(-1, settings.context)
    parts = torch.split(windows, 64)
    losses = [float(module.eval()(input_ids=part, labels=part).loss) * len(part) for part in parts]
    return sum(losses) / len(windows)


def flops_per_step(module: Any, settings: Settings) -> float:
    """FLOPs of a training step: products with weights and attention scores; backward is twice forward."""
    graph = growkit.read(module).graph
    width = graph.sizes["kv_heads"] * graph.sizes["group"] * graph.sizes["head_dim"]
    scores = 4 * graph.depths["layers"] * width * settings.context
    return 3.0 * (flops_per_token(graph) + scores) * settings.batch * settings.context


# --- what came out ---------------------------------------------------------------------------------------------------


def reached(run: Run, loss: float) -> float | None:
    """The FLOPs at which a run first has this loss, on the line between two evaluations; None if it never has."""
    for i, found in enumerate(run.losses):
        if found <= loss:
            if i == 0:
                return 0.0
            share = (run.losses[i - 1] - loss) / (run.losses[i - 1] - found)
            return run.flops[i - 1] + share * (run.flops[i] - run.flops[i - 1])
    return None


def saving(source: Run, grown: Run, scratch: Run) -> dict[str, float] | None:
    """The share of the FLOPs to the loss from scratch that growing saves; None where it never gets there."""
    goal = scratch.losses[-1]
    whole, flops = reached(scratch, goal), reached(grown, goal)
    if whole is None or flops is None:
        return None
    included = 1 - (flops + source.flops[-1]) / whole
    return {"loss": goal, "source_excluded": 1 - flops / whole, "source_included": included}


def show_growth(plan: growkit.Plan, report: growkit.Report) -> None:
    """Print what the plan promised, and what was found."""
    promise = "keeps the function" if plan.preserving else "does not keep the function"
    console.print(f"planned: {promise} ({plan.method})")
    for reason in plan.verdict.reasons:
        console.print(f"  {'yes' if reason.holds else 'NO '}  {reason.condition}: {reason.detail}", soft_wrap=True)
    kept = "preserved" if report.preserved else "NOT preserved"
    console.print(f"verified: {kept}; largest difference {report.max_abs_diff:.1e}, relative {report.max_rel_diff:.1e}")


def show_runs(runs: list[Run], saved: dict[str, float] | None) -> None:
    """Print the table, and what growing saved."""
    goal = runs[-1].losses[-1]
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("model")
    for column in ("parameters", "training FLOPs", "start loss", "final loss", f"FLOPs to loss {goal:.3f}"):
        table.add_column(column, justify="right")
    for run in runs:
        to_goal = reached(run, goal)
        flops = [f"{run.flops[-1]:.2e}", f"{to_goal:.2e}" if to_goal is not None else "not reached"]
        losses = [f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}"]
        table.add_row(run.name, f"{run.parameters:,}", flops[0], *losses, flops[1])
    console.print("", table, sep="\n")
    if saved is None:
        console.print("\nThe grown model never reaches the final loss from scratch: nothing is saved.")
    else:
        console.print(
            f"\nFLOPs saved to the final loss from scratch: {saved['source_excluded']:.0%} where the source was there "
            f"anyway, {saved['source_included']:.0%} where its training counts.",
            soft_wrap=True,
        )
    console.print("Losses are of held-out pages. One seed of a tiny model: other sizes, other figures.")


def plot(runs: list[Run], path: Path) -> None:
    """Draw the loss against cumulative training FLOPs; the grown model starts where its source ended."""
    source, _, scratch = runs
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run, colour in zip(runs, ("tab:gray", "tab:green", "tab:orange"), strict=True):
        spent = source.flops[-1] if run.name == "grown" else 0.0
        axes.plot([spent + flops for flops in run.flops], run.losses, color=colour, label=run.name)
    axes.axhline(scratch.losses[-1], color="tab:orange", linestyle=":", linewidth=1)
    axes.axvline(source.flops[-1], color="tab:gray", linestyle=":", linewidth=1)
    axes.set(xlabel="training FLOPs, the source's included", ylabel="validation loss (nats per token)")
    axes.set_ylim(top=scratch.losses[len(scratch.losses) // 8])  # the fall from chance aside
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
