"""Verifying: both models run on the same inputs, and their outputs are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from growkit.caches import brought_back, fed, grown_spaces
from growkit.matrices import Array
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError, LayerGraph, Port

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest relative difference that counts as preserved, by the coarsest element type of either model."""

LONGEST = 512
"""The longest sequence that is tried, in tokens; models with fewer positions are tried up to their last."""


@dataclass(frozen=True)
class OutputReport:
    """One output compared.

    Attributes:
        name: The output's name.
        shape: Its shape in the source, of the last inputs tried.
        max_abs_diff: The largest absolute difference.
        max_rel_diff: The largest absolute difference over the largest absolute value of the source's output.
        space: The grown space it lives in, where it was compared through the read matrix; of a cache all of them.
    """

    name: str
    shape: tuple[int, ...]
    max_abs_diff: float
    max_rel_diff: float
    space: str | None = None


@dataclass(frozen=True)
class Report:
    """How the outputs of two models differ.

    Attributes:
        outputs: One entry for each output.
        atol: The absolute tolerance, where one was given.
        rtol: The relative tolerance.
    """

    outputs: tuple[OutputReport, ...]
    atol: float | None
    rtol: float

    @property
    def max_abs_diff(self) -> float:
        """The largest absolute difference of any output."""
        return max(output.max_abs_diff for output in self.outputs)

    @property
    def max_rel_diff(self) -> float:
        """The largest relative difference of any output."""
        return max(output.max_rel_diff for output in self.outputs)

    @property
    def preserved(self) -> bool:
        """Whether the outputs differ by no more than the tolerance."""
        return self.max_rel_diff <= self.rtol if self.atol is None else self.max_abs_diff <= self.atol

    def to_json(self) -> dict[str, Any]:
        """The report as the command line prints it under ``--json``."""
        return {
            "max_abs_diff": self.max_abs_diff,
            "max_rel_diff": self.max_rel_diff,
            "preserved": self.preserved,
            "tolerance": {"atol": self.atol} if self.atol is not None else {"rtol": self.rtol},
            "outputs": [asdict(output) for output in self.outputs],
        }


def verify(source: Model, target: Model, *, atol: float | None = None, seed: int = 0, device: str = "auto") -> Report:
    """Run both models on the same generated inputs and compare every output.

    An output that lives in a space that grew is compared through the operator's read matrix.

    Args:
        source: The smaller model.
        target: The larger one, grown in memory or read from where it was written.
        atol: The largest absolute difference that counts as preserved; None takes a relative one by element type.
        seed: The seed of the inputs.
        device: Where the models run: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.

    Raises:
        GrowkitError: Where the device is not there, the models have no output in common, or one output's shapes differ
            and no operator says how.
    """
    operator = target.growth.operator if target.growth else None
    first, second = source.adapter.forward(source, device), target.adapter.forward(target, device)
    worst: dict[str, OutputReport] = {}
    for inputs in source.adapter.inputs(source, seed, first):
        given = fed(source.graph, target.graph, operator, inputs)
        outputs = brought_back(source.graph, target.graph, operator, second(given))
        for report in compared(source.graph, operator, first(inputs), outputs):
            if report.name not in worst or not report.max_rel_diff <= worst[report.name].max_rel_diff:
                worst[report.name] = report
    if not worst:
        raise GrowkitError("the two models have no output in common; expected the same class")
    types = {p.dtype for m in (source, target) for _, layer in m.graph.walk() for p in layer.parameters}
    rounding = max(getattr(forward, "rounding", 0.0) for forward in (first, second))
    return Report(tuple(worst.values()), atol, max(tolerance(types), rounding))


def tolerance(dtypes: Iterable[str]) -> float:
    """The largest relative difference that counts as preserved between models of these element types."""
    return max((TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=TOLERANCES["float64"])


def compared(
    graph: LayerGraph | None, operator: GrowthOperator | None, a: Mapping[str, Array], b: Mapping[str, Array]
) -> Iterator[OutputReport]:
    """Compare every output that both models gave.

    Args:
        graph: The source; None where nothing is known of its outputs, which are then compared as they are.
        operator: What grew it, where that is known; an output in a grown space is compared through its read matrix.
        a: The source's outputs by name.
        b: The target's.

    Raises:
        GrowkitError: Where one output's shapes differ and no operator says how.
    """
    ports = {port.name: port for port in graph.outputs} if graph is not None else {}
    cached = {name: port for port in graph.layer_outputs for name in port.names} if graph is not None else {}
    for name in (name for name in a if name in b):
        report = _compared(ports.get(name), operator, name, np.asarray(a[name]), np.asarray(b[name]))
        grown = grown_spaces(cached[name], operator) if name in cached and operator is not None else ()
        yield replace(report, space=", ".join(grown)) if grown else report


def _compared(
    port: Port | None, operator: GrowthOperator | None, name: str, a: np.ndarray, b: np.ndarray
) -> OutputReport:
    space = port.space if port is not None and operator is not None else None
    if space is not None and operator is not None:
        expansion = operator.expansions[space]
        lives_there = (b.shape[-1], a.shape[-1]) == expansion.write.shape  # a classifier's logits are not of the vocab
        space = space if expansion.grows and lives_there else None
    if space is not None and operator is not None and port is not None:
        b = operator.read_matrix(space, port.through).apply(b.astype(np.float64), b.ndim - 1)
    if a.shape != b.shape:
        raise GrowkitError(
            f"output {name}: {list(a.shape)} in the source, {list(b.shape)} in the target, and no growth operator "
            "stands beside the target to compare them through"
        )
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    difference = float(np.max(np.abs(a64 - b64), initial=0.0))
    difference = difference if np.isfinite(difference) else float("inf")
    scale = float(np.max(np.abs(a64), initial=0.0))
    return OutputReport(name, a.shape, difference, difference / scale if scale else difference, space)


def generated_inputs(graph: LayerGraph, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Inputs that exercise a model: plain, padded, and up to the last position; or images.

    Args:
        graph: The model.
        seed: The seed.
    """
    rng = np.random.default_rng(seed)
    if any(port.kind == "image" for port in graph.inputs):
        for batch in (1, 2):
            yield {port.name: _image(graph, rng, batch) for port in graph.inputs if port.kind == "image"}
        return
    last = min(graph.sizes.get("positions", LONGEST) - int(graph.attributes.get("reserved_positions") or 0), LONGEST)
    short = min(16, last)
    for batch, length, padded in ((2, short, 0), (3, short, short // 3), (1, last, 0)):
        yield _text(graph, rng, batch, length, padded)


def _text(graph: LayerGraph, rng: np.random.Generator, batch: int, length: int, padded: int) -> dict[str, np.ndarray]:
    mask = np.ones((batch, length), dtype=np.int64)
    if padded:
        mask[0, length - padded :] = 0
    told = {"mask": mask, "positions": np.arange(length) + np.zeros_like(mask)}
    return {
        port.name: told[port.kind]
        if port.kind in told
        else rng.integers(0, graph.sizes[str(port.space)], (batch, length))
        for port in graph.inputs
    }


def _image(graph: LayerGraph, rng: np.random.Generator, batch: int) -> np.ndarray:
    size = int(graph.attributes["image_size"] or 0)
    return rng.standard_normal((batch, graph.sizes["channels"], size, size)).astype(np.float32)
