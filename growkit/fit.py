"""Fitting: the growth operator is learned from data (LiGO).

Which framework learns is found by the entry-point group ``growkit.learners``; torch's comes with ``growkit[torch]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from growkit.data import Data, as_data
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.plan import Plan, plan
from growkit_specs import FitSettings, GrowkitError


@dataclass(frozen=True)
class Progress:
    """One step of a fit.

    Attributes:
        step: Its number, counted from 1.
        steps: How many there will be.
        loss: The loss of its batch, before the step.
        lr: The learning rate.
        gradient: The norm of the gradient, before it is clipped.
        tokens: Tokens (or examples, where there are no tokens) seen since the fit began or went on.
        seconds: Seconds since then.
        validation: The loss on the validation split, where it was looked at.
    """

    step: int
    steps: int
    loss: float
    lr: float
    gradient: float
    tokens: int
    seconds: float
    validation: float | None = None


@dataclass(frozen=True)
class Run:
    """Where and how a fit runs.

    Attributes:
        device: ``cpu``, ``cuda``, or ``auto``.
        checkpoint: The file that holds what a fit needs to go on.
        save_every: Steps between two times it is written.
        resume: Whether to go on from there.
        log: A file to which each step is added as one line of JSON.
        sharded: Whether several processes share the parameters out (FSDP), not only the batch (DDP).
        progress: Called after each step.
    """

    device: str = "auto"
    checkpoint: Path | None = None
    save_every: int = 25
    resume: bool = False
    log: Path | None = None
    sharded: bool = False
    progress: Callable[[Progress], None] = lambda step: None


class Learner(Protocol):
    """Learns operators in one framework."""

    def __call__(self, model: Model, plan: Plan, data: Data, settings: FitSettings, run: Run) -> GrowthOperator:
        """The operator of ``plan``, learned."""


def fit(
    model: Model,
    plan: Plan,
    data: Any,
    *,
    init: str | None = None,
    device: str = "auto",
    checkpoint: str | Path | None = None,
    save_every: int = 25,
    resume: bool = False,
    log: str | Path | None = None,
    sharded: bool = False,
    progress: Callable[[Progress], None] = lambda step: None,
    **settings: Any,
) -> GrowthOperator:
    """Learn the growth operator on the loss of the larger model; the source itself stays what it is.

    ``W' = sum_j w_j B W_j A^T + Z``: the blends ``w``, of ``B`` and ``A`` what ``structure`` says, corrections to the
    norms, and a copy of the weights ``W_j`` that the operator keeps, are moved by AdamW to make the larger model's loss
    small; nothing of the larger model is trained itself. ``learn=("depth", "width")`` is the published operator alone.

    Args:
        model: The source.
        plan: What to grow it to, and by which method the operator begins.
        data: A :class:`~growkit.data.Data`, or batches: an iterable of mappings of the model's inputs and ``labels``.
        init: A method to begin with in place of the plan's; ``ligo-paper`` is the published operator.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        checkpoint: A file that is written every ``save_every`` steps, from which an interrupted fit goes on.
        save_every: Steps between two checkpoints.
        resume: Whether to go on from ``checkpoint``; where it does not exist yet, the fit begins.
        log: A file to which each step is added as one line of JSON.
        sharded: Whether several processes share the parameters out (FSDP), not only the batch (DDP).
        progress: Called after each step.
        settings: What :class:`~growkit_specs.recipe.FitSettings` holds: ``steps=100``, ``lr=1e-3``, ``learn=...``.

    Returns:
        The operator, for :func:`growkit.grow`, and to be saved.

    Raises:
        GrowkitError: For settings that cannot be, data that does not fit the model, and a loss that is not finite.

    Source:
        Wang et al., LiGO, ICLR 2023, https://arxiv.org/abs/2303.00980, sections 3.2 and 3.3.

    Example:
        >>> operator = growkit.fit(model, plan, batches, steps=100)  # doctest: +SKIP
        >>> large = growkit.grow(model, operator)  # doctest: +SKIP
    """
    made = FitSettings.of(**settings)
    if init is not None and init != plan.method:
        plan = begun_by(model, plan, init)
    if resume and checkpoint is None:
        raise GrowkitError("resume goes on from a checkpoint; name its file, checkpoint=FILE")
    if save_every < 1:
        raise GrowkitError(f"save_every is {save_every}; expected at least one step between two checkpoints")
    for path in (checkpoint, log):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise GrowkitError(f"{Path(path).absolute().parent} is no directory; make it first")
    run = Run(
        device=device,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        save_every=save_every,
        resume=resume,
        log=None if log is None else Path(log),
        sharded=sharded,
        progress=progress,
    )
    return learner()(model, plan, as_data(data), made, run)


def begun_by(model: Model, by: Plan, method: str) -> Plan:
    """The plan of the same sizes that begins with another method."""
    recipe = by.recipe
    return plan(
        model,
        recipe.target,
        method=method,
        seed=recipe.seed,
        fresh=recipe.fresh,
        layers_from=recipe.layers_from,
        residual_scale=recipe.residual_scale,
        score_scale=recipe.score_scale,
        outputs=recipe.outputs,
        kv_cache=recipe.kv_cache,
    )


def learner() -> Learner:
    """What learns: the first installed one.

    Raises:
        GrowkitError: Where there is none.
    """
    from importlib.metadata import entry_points

    for entry in entry_points(group="growkit.learners"):
        try:
            found: Learner = entry.load()
        except ImportError as error:
            raise GrowkitError(f"fitting needs torch ({error}); pip install 'growkit[torch]'") from None
        return found
    raise GrowkitError("nothing that learns operators is installed; pip install 'growkit[torch]'")
