"""What a fit needs to go on exactly where it stopped, as one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from growkit_specs import GrowkitError
from growkit_torch.learned import LearnedOperator, whole

_KEY = "growkit_fit"


@dataclass(frozen=True)
class FitState:
    """The state of a fit after a step.

    Attributes:
        step: Steps done.
        arrays: The operator's entries and the optimizer's moments, by name.
        best: The lowest loss on the validation split and the entries it was reached with, where it was looked at.
        waited: Looks since then.
    """

    step: int
    arrays: Mapping[str, np.ndarray]
    best: tuple[float, list[np.ndarray]] | None = None
    waited: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        step: int,
        learned: LearnedOperator,
        optimizer: torch.optim.Optimizer,
        best: tuple[float, list[np.ndarray]] | None,
        waited: int,
    ) -> FitState:
        """The state as it is now; in a sharded fit every process has to ask for it."""
        arrays: dict[str, np.ndarray] = {}
        for i, entry in enumerate(learned.entries):
            arrays[f"entry.{i}"] = whole(entry)
            for name in ("exp_avg", "exp_avg_sq"):
                if name in optimizer.state.get(entry, {}):
                    arrays[f"{name}.{i}"] = whole(optimizer.state[entry][name])
        return cls(step, arrays, best, waited)

    def put(self, learned: LearnedOperator, optimizer: torch.optim.Optimizer) -> None:
        """Bring the operator and the optimizer to this state."""
        with torch.no_grad():
            for i, entry in enumerate(learned.entries):
                entry.copy_(_like(entry, self.arrays[f"entry.{i}"]))
                if f"exp_avg.{i}" in self.arrays:
                    moments = {n: _like(entry, self.arrays[f"{n}.{i}"]).clone() for n in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[entry] = {"step": torch.tensor(float(self.step)), **moments}


def _like(entry: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """An array as a tensor that lies as ``entry`` does."""
    tensor = torch.from_numpy(np.array(array)).to(entry.device)
    if hasattr(entry, "device_mesh"):  # a shard of a distributed tensor
        from torch.distributed.tensor import distribute_tensor

        placed: torch.Tensor = distribute_tensor(tensor, entry.device_mesh, getattr(entry, "placements", None))
        return placed
    return tensor


def write_state(path: Path, state: FitState, identity: Mapping[str, Any]) -> None:
    """Write a state in place of the one before, which stays whole until this one is.

    Args:
        path: The file.
        state: The state.
        identity: What a fit must agree on to go on from here.
    """
    from safetensors.numpy import save

    arrays = dict(state.arrays)
    loss = None
    if state.best is not None:
        loss, entries = state.best
        arrays |= {f"best.{i}": entry for i, entry in enumerate(entries)}
    told = {"step": state.step, "best": loss, "waited": state.waited, "identity": identity}
    data = save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, metadata={_KEY: json.dumps(told)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise GrowkitError(f"{path}: the checkpoint cannot be written ({error.strerror})") from None


def read_state(path: Path, identity: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> FitState:
    """Read a state.

    Args:
        path: The file.
        identity: What the fit that goes on must agree on with the one before.
        shapes: The shapes of the operator's entries.

    Raises:
        GrowkitError: Where it is none, or that of another fit; the first setting that differs is told.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            told = json.loads((file.metadata() or {})[_KEY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise GrowkitError(f"{path}: not the checkpoint of a fit ({error}); remove it to begin anew") from None
    before, now = _flat(told["identity"]), _flat(json.loads(json.dumps(identity)))
    if different := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        name = different[0]
        raise GrowkitError(
            f"{path}: the checkpoint is of a fit whose {name} is {before.get(name)!r}, here it is {now.get(name)!r}; "
            "ask for the same, or remove the checkpoint to begin anew"
        )
    for i, shape in enumerate(shapes):
        found = arrays.get(f"entry.{i}")
        if found is None or found.shape != shape:
            raise GrowkitError(
                f"{path}: not the checkpoint of a fit (its entry {i} is {'missing' if found is None else found.shape}, "
                f"expected {shape}); remove it to begin anew"
            )
    best = sorted((name for name in arrays if name.startswith("best.")), key=lambda name: int(name[5:]))
    values = [arrays.pop(name) for name in best]
    return FitState(told["step"], arrays, None if told["best"] is None else (told["best"], values), told["waited"])


def _flat(told: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(told, dict):
        return {prefix: told}
    return {k: v for name, value in told.items() for k, v in _flat(value, f"{prefix}.{name}".lstrip(".")).items()}
