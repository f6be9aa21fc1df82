"""What the tests of fits share: a fit that is ready, its data, and the growth equation written densely in torch."""

from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import growkit
from growkit import matrices as m
from growkit.operator import GrowthOperator
from growkit.plan import Plan
from growkit_specs import FitSettings, Tensor
from growkit_torch.fit import Fit, World

IGNORED = -100
Batch = dict[str, torch.Tensor]


def ready(model: growkit.Model, plan: Plan, *, seed: int | None = None, data: Any = None, **settings: Any) -> Fit:
    """A fit before its first step, on the CPU.

    Args:
        model: The source.
        plan: The plan.
        seed: What every learned entry is moved by: nothing is left at a value where errors do not show.
        data: Batches.
        settings: How it is fitted.
    """
    fit = Fit(
        model, plan, growkit.as_data(data or [{"x": np.zeros(1)}]), FitSettings.of(**settings), run(), World("cpu")
    )
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for entry in fit.learned.entries:
                entry += 0.1 * torch.randn(entry.shape, generator=generator, dtype=entry.dtype)
    return fit


def run(**told: Any) -> Any:
    """Where a fit runs: on the CPU, and as told."""
    from growkit.fit import Run

    return Run(device="cpu", **told)


def batch_for(model: growkit.Model, *, size: int = 2, length: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs and labels, some of which do not count."""
    rng = np.random.default_rng(seed)
    sizes = model.graph.sizes
    given: dict[str, np.ndarray] = {}
    for port in model.graph.inputs:
        if port.kind == "tokens":
            given[port.name] = rng.integers(0, sizes[str(port.space)], (size, length))
        if port.kind == "image":
            side = model.graph.attributes["image_size"]
            given[port.name] = rng.standard_normal((size, sizes["channels"], side, side)).astype(np.float32)
    logits = next(port for port in model.graph.outputs if port.name == "logits")
    shape = (size, length) if str(logits.space) == "vocab" else (size,)
    labels = rng.integers(0, sizes[str(logits.space)], shape)
    if len(shape) == 2:
        labels[0, :2] = IGNORED
    return given | {"labels": labels}


def tensors(batch: dict[str, np.ndarray]) -> Batch:
    """A batch as torch has it."""
    return {name: torch.as_tensor(value) for name, value in batch.items()}


# --- the equation, densely -------------------------------------------------------------------------------------------


def dense(matrix: m.Matrix) -> torch.Tensor:
    """A matrix with all of its entries; gradients flow into those that are learned."""
    match matrix:
        case m.Dense(array):
            return torch.as_tensor(array, dtype=torch.float64)
        case m.Scaled(inner, factor):
            return factor * dense(inner)
        case m.Kronecker(factors):
            return reduce(torch.kron, map(dense, factors))
        case m.Concatenation(blocks):
            return torch.block_diag(*map(dense, blocks))
        case m.RowBlocks(blocks):
            return torch.cat([dense(block) for block in blocks])
        case m.ColumnBlocks(blocks):
            return torch.cat([dense(block) for block in blocks], dim=1)
        case m.Composition(left, right):
            return dense(left) @ dense(right)
        case m.Interleaved(blocks, (H, h)):
            whole = torch.block_diag(*map(dense, blocks))
            rows, columns = (
                np.concatenate([s + np.arange(n).reshape(runs, -1) for s, n in _segments(blocks, axis)], 1).reshape(-1)
                for axis, runs in ((0, H), (1, h))
            )
            return whole[rows][:, columns]
        case _:  # nothing in it is learned
            return torch.as_tensor(matrix.as_matrix())


def _segments(blocks: tuple[m.Matrix, ...], axis: int) -> list[tuple[int, int]]:
    sizes = [block.shape[axis] for block in blocks]
    return list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))


def along(matrix: torch.Tensor, W: torch.Tensor, axis: int) -> torch.Tensor:
    """A matrix on one axis of a tensor."""
    return torch.movedim(torch.tensordot(matrix, W, dims=([1], [axis])), 0, axis)


def grown(fit: Fit, model: growkit.Model, target: Tensor, operator: GrowthOperator) -> torch.Tensor:
    """``sum_r sum_j w_rtj B_r W_j A_r^T + Z``, layer by layer and axis by axis."""
    growing = fit.growing
    roles = target.parameter.parsed.roles
    if "scale" in roles:  # what a norm's scale becomes is no matrix of this equation
        return operator.grow(target, growing.source)
    start = fit.plan.operator
    if target.name in fit.learned.learnable.residuals:
        Z: Any = operator.residual[target.name]
    else:
        Z = start.residual_for(target, lambda key, layer: _as_read(fit, model, growing.names[key, layer]))
    scale = target.owner.parameter("layer_scale")
    folded = scale is not None and scale is not target.parameter and operator.is_folded(target)
    total = torch.zeros(target.shape, dtype=torch.float64)
    for term in operator.terms(target):
        axes = [dense(operator.axis_matrix(target, axis, term=term)) for axis in range(len(roles))]
        for j, w in _weights(operator, target, term.r or 0):
            W = growing.source(target.key, j)
            if folded:
                by = growing.source(f"{target.stack}/{target.owner.name}/layer_scale", j)
                W = W * by.reshape(-1, *(1,) * (W.ndim - 1))
            for axis, matrix in enumerate(axes):
                W = along(matrix, W, axis)
            total = total + w * W
    if folded:
        key = f"{target.stack}/{target.owner.name}/layer_scale"
        each = next(t for t in growing.targets if t.key == key and t.layer == target.layer)
        total = total / operator.grow(each, growing.source).reshape(-1, *(1,) * (total.ndim - 1))
    return total if Z is None else total + Z


def _as_read(fit: Fit, model: growkit.Model, name: str) -> torch.Tensor:
    """A source tensor as it was before it was learned, if it was."""
    return torch.as_tensor(np.asarray(model.weights[name])).to(fit.growing.dtype)


def _weights(operator: GrowthOperator, target: Tensor, r: int) -> list[tuple[int | None, Any]]:
    if target.stack is None:
        return [(None, 1.0)]
    w = operator.blend.get(target.key, operator.blend[target.stack])
    row = (w[r] if w.ndim == 3 else w)[target.layer]
    return [(j, row[j] if isinstance(row, torch.Tensor) else float(row[j])) for j in range(len(row))]


def dense_loss(fit: Fit, model: growkit.Model, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """The cross-entropy of the larger module, whose tensors the dense equation makes."""
    operator = fit.learned.operator()
    weights = {target.name: grown(fit, model, target, operator) for target in fit.growing.targets}
    large = growkit.grow(model, fit.plan.operator, outputs="grow")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    forward = model.adapter.forward(large, "cpu")
    for module in forward.module.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # torch would leave the gradient of that row out
    logits = forward(inputs, weights)["logits"]
    labels = torch.as_tensor(batch["labels"])
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def gradients(fit: Fit, loss: torch.Tensor) -> list[torch.Tensor]:
    """Of every learned entry."""
    found = torch.autograd.grad(loss, list(fit.learned.entries), allow_unused=True)
    return [torch.zeros_like(e) if g is None else g for e, g in zip(fit.learned.entries, found, strict=True)]
