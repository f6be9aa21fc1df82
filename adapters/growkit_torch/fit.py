"""Learning a growth operator: AdamW on the loss of the larger model, alone or in several processes.

Started by ``torchrun``, the processes share each batch out (DistributedDataParallel) or the parameters too (FSDP2).
Whatever way a batch is shared out, among processes or one part after the other, its gradient is that of the whole.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist

from growkit.data import Data
from growkit.fit import Progress, Run
from growkit.grow import grow
from growkit.loss import IGNORED, Batch
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.plan import Plan
from growkit_specs import FitSettings, GrowkitError
from growkit_torch.fit_state import FitState, read_state, write_state
from growkit_torch.forward import device_named
from growkit_torch.growing import Growing
from growkit_torch.losses import loss_named

BETAS = (0.9, 0.99)
"""AdamW's: a hundred steps are few for the usual 0.999."""


def fit(model: Model, plan: Plan, data: Data, settings: FitSettings, run: Run) -> GrowthOperator:
    """The operator of a plan, learned; see :func:`growkit.fit`.

    Raises:
        GrowkitError: For what cannot be learned, data that does not fit, or a loss that is not finite.
    """
    with _processes(run) as world:
        return Fit(model, plan, data, settings, run, world).run()


class World:
    """The processes that fit together.

    Attributes:
        rank: This one's number.
        size: How many there are.
        device: Where this one runs.
    """

    def __init__(self, device: str) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = device


@contextmanager
def _processes(run: Run) -> Iterator[World]:
    """The processes that ``torchrun`` started; where they are joined already they are left so."""
    device = device_named(run.device)
    joins = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if joins:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(device)
    finally:
        if joins:
            dist.destroy_process_group()


class Fit:
    """One fit, from its first step or from a checkpoint to its end."""

    def __init__(self, model: Model, plan: Plan, data: Data, settings: FitSettings, run: Run, world: World) -> None:
        self.plan, self.data, self.settings, self.world = plan, data, settings, world
        self.to = run
        device = world.device
        large = grow(model, plan.operator, outputs="grow")
        forward = model.adapter.bare(
            large,
            device,
            dtype=settings.dtype,
            checkpointing=settings.checkpointing,
            compiled=settings.compile,
        )
        loss = loss_named(settings.loss, model.graph)
        self.growing = Growing(
            model,
            large,
            learnable=replace(plan, target=large.graph).learnable(settings),
            forward=forward,
            loss=loss,
            device=device,
            source_forward=model.adapter.bare(model, device, dtype=settings.dtype) if loss.takes_source else None,
        )
        self.learned = self.growing.learned
        self.module = self._shared_out()
        self.parameters = [p for p in self.growing.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, betas=BETAS, weight_decay=0.0)
        self.step = 0
        self.best: tuple[float, list[np.ndarray]] | None = None
        self.waited = 0

    def _shared_out(self) -> torch.nn.Module:
        if self.world.size == 1:
            return self.growing
        if self.to.sharded:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.growing)
            return self.growing
        return torch.nn.parallel.DistributedDataParallel(self.growing, find_unused_parameters=True)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> GrowthOperator:
        """Do the steps that are left, and give the operator."""
        if self.to.resume and self.to.checkpoint is not None and self.to.checkpoint.exists():
            self._restore(self.to.checkpoint)
        began, tokens = time.perf_counter(), 0
        while self.step < self.settings.steps:
            batch = self._batch(self.step)
            lr = self._rate(self.step)
            loss, gradient = self.stepped(batch, lr)
            self.step += 1
            tokens += _size(batch)
            validation = self._looked()
            done = Progress(
                self.step, self.settings.steps, loss, lr, gradient, tokens, time.perf_counter() - began, validation
            )
            self._tell(done)
            stops = self.settings.patience is not None and self.waited >= self.settings.patience
            if self.step == self.settings.steps or stops or self.step % self.to.save_every == 0:
                self._save()
            if stops:
                break
        return self._result()

    def _batch(self, step: int) -> Mapping[str, Any]:
        return as_tensors(self.data.batch(step))

    def _rate(self, step: int) -> float:
        """The learning rate: up along a line, down along a cosine to zero."""
        rising = math.ceil(self.settings.warmup * self.settings.steps)
        if step < rising:
            return self.settings.lr * (step + 1) / rising
        share = (step - rising) / max(self.settings.steps - rising, 1)
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * share))

    def stepped(self, batch: Mapping[str, Any], lr: float) -> tuple[float, float]:
        """One step: its loss, and the norm of its gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = self._losses(batch, backward=True)
        self._refuse_infinite(loss, "loss")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._refuse_infinite(float(norm), "gradient")
        self.optimizer.step()
        return loss, float(norm)

    def _losses(self, batch: Mapping[str, Any], *, backward: bool) -> float:
        """The loss of a batch: the mean over its parts, each weighed by what counts in it."""
        parts = list(_split(batch, self.world.size * self.settings.accumulate))
        counts = [_counted(part) for part in parts]
        mine = list(zip(parts, counts, strict=True))[self.world.rank :: self.world.size]
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i, (part, count) in enumerate(mine):
            with self._alone(i + 1 < len(mine)), self._precision():
                loss = self.module(part)
                weighed = loss * (count / max(sum(counts), 1))
            if backward:
                (weighed * self.world.size).backward()
            total += weighed.detach()
            self.growing.run.clear()
        if self.world.size > 1:
            dist.all_reduce(total)
        return float(total)

    def _alone(self, more: bool) -> AbstractContextManager[Any]:
        """Gradients are shared with the other processes once, after the last part."""
        if more and isinstance(self.module, torch.nn.parallel.DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    def _precision(self) -> AbstractContextManager[Any]:
        half = self.settings.precision == "bfloat16"
        return torch.autocast(self.world.device.partition(":")[0], torch.bfloat16) if half else nullcontext()

    def _refuse_infinite(self, value: float, what: str) -> None:
        if math.isfinite(value):
            return
        kept = self.to.checkpoint
        last = f"; {kept} holds the last good state" if kept is not None and kept.exists() else ""
        raise GrowkitError(
            f"step {self.step + 1}: the {what} is {value}; the fit stops; lower lr (now {self.settings.lr:g}) or look "
            f"at the data{last}"
        )

    # --- validation --------------------------------------------------------------------------------------------------

    def _looked(self) -> float | None:
        """The loss on the validation split, where it is time to look at it."""
        every = self.settings.validate_every
        last = self.step == self.settings.steps
        if not (last or (every is not None and self.step % every == 0)):
            return None
        total, counted = 0.0, 0
        with torch.no_grad():
            for each in self.data.validation():
                batch = as_tensors(each)
                count = _counted(batch)
                total, counted = total + count * self._losses(batch, backward=False), counted + count
        if counted == 0:
            return None
        loss = total / counted
        if self.best is None or loss < self.best[0]:
            self.best, self.waited = (loss, self._values()), 0
        else:
            self.waited += 1
        return loss

    def _values(self) -> list[np.ndarray]:
        return self.learned.values()

    def _result(self) -> GrowthOperator:
        """The operator: that of the best look at the validation split where patience was asked for, else the last."""
        if self.settings.patience is not None and self.best is not None:
            return self.learned.operator(entries=self.best[1])
        return self.learned.operator(entries=self._values())

    # --- what is told and kept ---------------------------------------------------------------------------------------

    def _tell(self, done: Progress) -> None:
        if self.world.rank != 0:
            return
        self.to.progress(done)
        if self.to.log is not None:
            line = {name: value for name, value in vars(done).items() if value is not None}
            with self.to.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        if self.to.checkpoint is None:
            return
        state = FitState.of(self.step, self.learned, self.optimizer, self.best, self.waited)  # every process takes part
        if self.world.rank == 0:
            write_state(self.to.checkpoint, state, self._identity())

    def _restore(self, path: Path) -> None:
        state = read_state(path, self._identity())
        state.put(self.learned, self.optimizer)
        self.step, self.best, self.waited = state.step, state.best, state.waited

    def _identity(self) -> dict[str, Any]:
        """What a fit must agree on with the one that it goes on from."""
        told = self.settings.model_dump(mode="json")
        for free in ("validate_every", "patience", "accumulate", "strategy", "checkpointing", "compile"):
            told.pop(free)
        recipe = self.plan.recipe
        first = self._batch(0)
        return {
            "settings": told,
            "method": recipe.method,
            "target": recipe.target.requested(),
            "seed": recipe.seed,
            "first batch": crc32(b"".join(first[name].numpy().tobytes() for name in sorted(first))),
        }


def as_tensors(batch: Batch) -> dict[str, Any]:
    """A batch as tensors by name, its ``labels`` among them."""
    named = dict(batch.inputs) | ({} if batch.labels is None else {"labels": batch.labels})
    return {name: torch.as_tensor(value) for name, value in named.items()}


def _split(batch: Mapping[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    """The batch in parts of its first axis, as equal as can be."""
    size = min(len(value) for value in batch.values())
    if size < parts:
        raise GrowkitError(f"a batch of {size} examples cannot be shared out in {parts} parts; take a larger batch")
    edges = [round(i * size / parts) for i in range(parts + 1)]
    for start, stop in pairwise(edges):
        yield {name: value[start:stop] for name, value in batch.items()}


def _counted(batch: Mapping[str, Any]) -> int:
    """How many entries of a batch a loss is the mean of: its labels that count, or its examples."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return len(next(iter(batch.values())))
    return int((labels != IGNORED).sum())


def _size(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch; its examples where it has none."""
    tokens = next((v for n, v in batch.items() if n != "labels" and not v.is_floating_point()), None)
    return tokens.numel() if tokens is not None else len(next(iter(batch.values())))
