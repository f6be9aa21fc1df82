"""Learning a growth operator: AdamW on the loss of the larger model, alone or in several processes.

Started by ``torchrun``, the processes share each batch out (DistributedDataParallel) or the parameters too (FSDP2).
Whatever way a batch is shared out, among processes or one part after the other, its gradient is that of the whole.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
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
from growkit.loss import IGNORED, Batch, refuse_unfit
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
    return Fit(model, plan, data, settings, run, joined(run)).run()


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


def joined(run: Run) -> World:
    """The processes that ``torchrun`` started, which are joined at the first fit and stay so until they end.

    Raises:
        GrowkitError: Where there are more of them than GPUs.
    """
    device = device_named(run.device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise GrowkitError(
                f"process {local} has no GPU of its own; start as many as there are, {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(_leave)
    return World(device)


def _leave() -> None:
    if dist.is_initialized():
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
        return self._first if step == 0 else self._asked_for(step)

    @cached_property
    def _first(self) -> Mapping[str, Any]:
        """The batch of the first step, by which data is known again; some data gives it only once."""
        return self._asked_for(0)

    def _asked_for(self, step: int) -> Mapping[str, Any]:
        batch = self.data.batch(step)
        refuse_unfit(self.growing.graph, batch)
        made = as_tensors(batch)
        if self._counted(made) == 0:
            raise GrowkitError(f"step {step + 1}: no label of the batch counts, all are {IGNORED}; look at the data")
        return made

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
        wanted = self.world.size * self.settings.accumulate
        if not backward:  # the last batch of a validation split may be small
            wanted = min(wanted, *map(len, batch.values()))
        parts = list(_split(batch, wanted))
        counts = [self._counted(part) for part in parts]
        spare = -len(parts) % self.world.size  # every process has as many parts to run, some of which count nothing
        shares = [*zip(parts, counts, strict=True), *[(parts[0], 0)] * spare]
        mine = shares[self.world.rank :: self.world.size]
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i, (part, count) in enumerate(mine):
            if count == 0 and self.world.size == 1:  # alone, for several have to run as many parts
                continue
            with self._told(part), self._alone(i + 1 < len(mine)):
                with self._precision():
                    weighed = self.module(part) * (count / max(sum(counts), 1))
                if backward:
                    (weighed * self.world.size).backward()
            total += weighed.detach()
            self.growing.run.clear()
        if self.world.size > 1:
            dist.all_reduce(total)
        return float(total)

    @contextmanager
    def _told(self, part: Mapping[str, Any]) -> Iterator[None]:
        """What torch has to say about a part that it cannot run is told in one line."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise GrowkitError(
                f"step {self.step + 1}: out of memory; take a smaller batch, more of accumulate, or checkpointing=1"
            ) from error
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            if isinstance(error, GrowkitError):
                raise
            given = ", ".join(f"{name} {list(value.shape)}" for name, value in part.items())
            told = " ".join(str(error).split())[:300]
            raise GrowkitError(f"step {self.step + 1}: the model cannot be run on {given}: {told}") from error

    def _counted(self, batch: Mapping[str, Any]) -> int:
        """How many entries of a batch a loss is the mean of: its labels that count, or its examples."""
        labels = None if self.growing.loss.takes_source else batch.get("labels")
        if labels is None or labels.is_floating_point():
            return len(next(iter(batch.values())))
        return int((labels != IGNORED).sum())

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
                refuse_unfit(self.growing.graph, each)
                batch = as_tensors(each)
                count = self._counted(batch)
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
        state = read_state(path, self._identity(), self.learned.learnable.shapes)
        state.put(self.learned, self.optimizer)
        self.step, self.best, self.waited = state.step, state.best, state.waited

    def _identity(self) -> dict[str, Any]:
        """What a fit must agree on with the one that it goes on from."""
        told = self.settings.model_dump(mode="json")
        for free in ("lr", "validate_every", "patience", "accumulate", "strategy", "checkpointing", "compile"):
            told.pop(free)
        recipe = self.plan.recipe
        first = {name: tensor.cpu().flatten().view(torch.uint8) for name, tensor in self._first.items()}
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


def _size(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch; its examples where it has none."""
    tokens = next((v for n, v in batch.items() if n != "labels" and not v.is_floating_point()), None)
    return tokens.numel() if tokens is not None else len(next(iter(batch.values())))
