"""Methods side by side: what each would make of one model and one target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from growkit.caches import fed
from growkit.data import read_batch
from growkit.grow import grow
from growkit.loss import Batch, start_loss
from growkit.methods import Method, methods
from growkit.model import Model
from growkit.plan import Plan, flops_per_token, plan
from growkit_specs import InvalidTarget, LayerGraph, Target


@dataclass(frozen=True)
class Candidate:
    """What one method would make of a model.

    Attributes:
        method: The request, as ``--method`` takes it.
        use: What the method is for: ``keep`` the function, or ``train`` on.
        refused: Why it cannot, where it cannot; then nothing else is told.
        preserving: Whether the grown model computes what the source does.
        broken: The conditions that do not hold.
        parameters: The grown model's parameters.
        trained_parameters: Those the method trains at first.
        flops_per_token: The grown model's forward FLOPs per token in matrix products with weights.
        start_loss: The grown model's loss on the data, in nats, where there is data.
    """

    method: str
    use: str
    refused: str | None = None
    preserving: bool | None = None
    broken: tuple[str, ...] = ()
    parameters: int | None = None
    trained_parameters: int | None = None
    flops_per_token: int | None = None
    start_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The candidate as ``growkit methods --for MODEL --json`` prints it."""
        return asdict(self)


def compare(
    model: Model,
    target: Target | None = None,
    *,
    data: str | Path | None = None,
    seed: int = 0,
    like: LayerGraph | None = None,
    device: str = "auto",
    **sizes: Any,
) -> Iterator[Candidate]:
    """Every method that grows what a target asks, one after the other.

    A method that does only one of width and depth is joined by ``lossless`` for the other.

    Args:
        model: The source.
        target: The sizes asked for; or name them as keywords.
        data: A file to measure start losses on, see :func:`growkit.data.read_batch`.
        seed: The seed of what methods draw.
        like: A graph whose sizes to grow to.
        device: Where losses are measured.
        sizes: As :func:`growkit.plan` takes them.

    Raises:
        InvalidTarget: Where no method could: the sizes cannot be.
        GrowkitError: Where the data does not fit the model.
    """
    target = target or Target.of(**sizes)
    asked = plan(model, target, like=like)  # refuses what no method can do
    widens = asked.target.sizes != asked.source.sizes
    deepens = asked.target.depths != asked.source.depths
    batch = None if data is None else read_batch(model, data, seed=seed)
    for method in methods():
        request = _request(method, widens, deepens)
        if request is None:
            continue
        try:
            made = plan(model, target, method=request, seed=seed, like=like)
        except InvalidTarget as error:
            yield Candidate(request, method.use, refused=str(error))
            continue
        loss = None if batch is None else _start_loss(model, made, batch, device)
        yield _candidate(request, method, made, loss)


def _start_loss(model: Model, made: Plan, batch: Batch, device: str) -> float:
    large = grow(model, made)
    inputs = fed(model.graph, large.graph, made.operator, batch.inputs)
    return start_loss(large, replace(batch, inputs=inputs), device=device)


def _request(method: Method, widens: bool, deepens: bool) -> str | None:
    """How ``method`` is asked for, with ``lossless`` for what it does not do; None where it has nothing to do."""
    needed = {way for way, needs in (("width", widens), ("depth", deepens)) if needs}
    if not needed & set(method.grows):
        return None
    if needed <= set(method.grows):
        return method.name
    return f"width={method.name},depth=lossless" if "width" in method.grows else f"width=lossless,depth={method.name}"


def _candidate(request: str, method: Method, made: Plan, loss: float | None) -> Candidate:
    trained = {t.name: t.count for t in made.target.tensors()}
    return Candidate(
        method=request,
        use=method.use,
        preserving=made.preserving,
        broken=tuple(f"{reason.condition}: {reason.detail}" for reason in made.verdict.broken),
        parameters=made.target.parameter_count,
        trained_parameters=sum(count for name, count in trained.items() if name in (made.trainable or trained)),
        flops_per_token=flops_per_token(made.target),
        start_loss=loss,
    )
