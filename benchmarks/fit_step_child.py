"""One way of :mod:`benchmarks.fit_step`, measured in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import growkit
from benchmarks.fit_step import LENGTH, SOURCE, STRATEGIES, TARGET, VOCAB, Cost
from growkit_specs import FitSettings

COUNTED = {256: 4, 1024: 3, 4096: 2}
"""Steps that are counted, by the tokens in one."""


def measure(way: str, tokens: int) -> Cost:
    """What a step costs one way.

    Args:
        way: A strategy, ``plain`` or ``published``.
        tokens: Tokens in a step.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bert(layers=1, hidden=64, heads=1)  # imports are no model's memory
    before = memory("VmRSS")
    ids = torch.randint(0, VOCAB, (tokens // LENGTH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    step, multiplications = prepared(way, batch, ids)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wall, cpu, counted = time.perf_counter(), time.process_time(), COUNTED.get(tokens, 2)
    for _ in range(counted):
        step()
    return Cost(
        cpu_s=(time.process_time() - cpu) / counted,
        wall_s=(time.perf_counter() - wall) / counted,
        memory_mb=(memory("VmHWM") - before) / 1000,
        multiplications=multiplications,
    )


def memory(kind: str) -> int:
    """What the process holds, in kB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0])


def bert(layers: int, hidden: int, heads: int) -> Any:
    """A BERT with a masked-language head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def prepared(way: str, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[Callable[[], None], int]:
    """A function that makes one step, and the multiplications it takes; 0 where they are not counted."""
    if way == "plain":
        return plain(batch, labels)
    if way == "published":
        return published(batch, labels), 0
    return fitted(STRATEGIES[way], batch, labels)


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain(batch: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[Callable[[], None], int]:
    """The large model trained."""
    model = bert(**TARGET).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        entropy(model(**batch).logits, labels).backward()
        optimizer.step()

    rows = labels.numel()
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return step, 3 * rows * products + scores(rows)


def scores(rows: int) -> int:
    """Multiplications of scores and of what they weigh, forward and backward, in all layers."""
    return 3 * 2 * TARGET["layers"] * rows * LENGTH * TARGET["hidden"]


def fitted(
    told: dict[str, Any], batch: dict[str, torch.Tensor], labels: torch.Tensor
) -> tuple[Callable[[], None], int]:
    """A step of ``growkit.fit``."""
    from growkit.fit import Run
    from growkit_torch.factored import GrownWeight
    from growkit_torch.fit import Fit, World

    told = dict(told)
    planned = {name: told.pop(name) for name in ("method", "fresh") if name in told}
    model = growkit.read(bert(**SOURCE))
    plan = growkit.plan(model, hidden=TARGET["hidden"], layers=TARGET["layers"], **planned)
    arrays = {name: value.numpy() for name, value in {**batch, "labels": labels}.items()}
    fit = Fit(
        model, plan, growkit.as_data([arrays]), FitSettings.of(steps=1000, **told), Run(device="cpu"), World("cpu")
    )
    del model
    tensors = {**batch, "labels": labels}
    rows = labels.numel()
    operator = fit.growing.operator()
    total = scores(rows)
    for name, weight in fit.growing.weights(operator, rows).items():
        if isinstance(weight, GrownWeight) and "embeddings" not in name:
            costs = weight.factors.cost_factored(rows), weight.factors.cost_made(rows)
            chosen = {"factored": costs[0], "materialised": costs[1]}
            total += chosen.get(str(told.get("strategy")), min(costs))
    return lambda: fit.stepped(tensors, 1e-3) and None, total


def published(batch: dict[str, torch.Tensor], labels: torch.Tensor) -> Callable[[], None]:
    """The paper's equation: ``W' = sum_j w_j B W_j B_in^T`` for every weight, made in each step.

    ``B = [I; E]``, one for the stream, and one for q, k, v and the feed-forward of each target layer; each slot has its
    weights ``w`` for each target layer. What is made stays in the graph of the gradient, as in the authors' code.
    """
    source, large = bert(**SOURCE), bert(**TARGET).train()
    d, D, L1, L2 = SOURCE["hidden"], TARGET["hidden"], SOURCE["layers"], TARGET["layers"]
    frozen = {name: p.detach() for name, p in source.named_parameters()}
    parameters: dict[str, torch.nn.Parameter] = {}

    def learned(name: str, *shape: int) -> torch.nn.Parameter:
        if name not in parameters:
            parameters[name] = torch.nn.Parameter(torch.rand(shape) / math.prod(shape[1:]))
        return parameters[name]

    def widened(W: torch.Tensor, E_out: torch.Tensor | None, E_in: torch.Tensor | None) -> torch.Tensor:
        if E_in is not None:
            W = torch.cat([W, W @ E_in.T], dim=-1)
        return W if E_out is None else torch.cat([W, E_out @ W])

    stack = {
        name: torch.stack([frozen[name.replace(".0.", f".{j}.")] for j in range(L1)], dim=-1)
        for name in frozen
        if ".layer.0." in name
    }
    spaces = {"query": ("q", "emb"), "key": ("k", "emb"), "value": ("v", "emb"), "attention.output": ("emb", "v")}
    spaces |= {"intermediate": ("f", "emb"), ".output.dense": ("emb", "f")}

    def matrix(space: str, layer: int) -> torch.Tensor:
        size = 4 if space == "f" else 1
        name = "emb" if space == "emb" else f"{space}.{layer}"
        return learned(name, size * (D - d), size * d)

    def made() -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        for name, stacked in stack.items():
            out, into = next((pair for part, pair in spaces.items() if part in name), ("emb", "emb"))
            for t in range(L2):
                w = learned(f"w {name} {t}", L1)
                blended = (stacked * w).sum(-1)
                E_in = matrix(into, t) if blended.ndim == 2 else None
                weights[name.replace(".0.", f".{t}.")] = widened(blended, matrix(out, t), E_in)
        for name, W in frozen.items():
            if ".layer." in name:
                continue
            if "embeddings" in name and W.ndim == 2:
                weights[name] = widened(W, None, matrix("emb", 0))
            elif name.endswith("predictions.bias"):
                weights[name] = W
            else:
                weights[name] = widened(W, matrix("emb", 0), matrix("emb", 0) if W.ndim == 2 else None)
        return weights

    made()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    for parameter in large.parameters():
        parameter.requires_grad_(False)
        parameter.data = torch.zeros(()).expand(parameter.shape)

    def step() -> None:
        optimizer.zero_grad()
        logits = torch.func.functional_call(large, made(), (), batch).logits
        entropy(logits, labels).backward()
        optimizer.step()

    return step
