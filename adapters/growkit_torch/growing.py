"""The larger model as a function of the growth operator: a batch in, a loss out, gradients in the operator.

The source's weights are frozen, unless they are learned along. Whole slots are blended at once, ``w (L2, L1)`` times
the stacked tensors of the source's layers; then each grown weight acts as its factors or as the matrix they make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from growkit.adapters import BareForward
from growkit.caches import fed
from growkit.learnable import Learnable
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.weights import Grower, refuse_nonfinite
from growkit_specs import GrowkitError, Tensor
from growkit_torch.factored import Factors, Fresh, GrownWeight, Reads
from growkit_torch.learned import LearnedOperator, is_factored
from growkit_torch.losses import LABELS, Loss
from growkit_torch.read import as_torch

PATCHES = 197
"""Rows of an image, where nobody says: patches of 16 in 224, and a class token."""


@dataclass(frozen=True)
class Held:
    """The source's tensors of one slot: the entry that holds them, stacked by layer where they are several."""

    entry: int
    names: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether the entry has an axis of layers before its own."""
        return len(self.names) > 1


class Growing(torch.nn.Module):
    """The larger model as a function of the operator.

    Args:
        model: The source.
        large: The larger model; its weights are not asked for.
        learnable: What is learned.
        forward: Runs the larger model.
        loss: The loss.
        device: Where the tensors lie.
        source_forward: Runs the source, where the loss asks for what it gives.
    """

    def __init__(
        self,
        model: Model,
        large: Model,
        *,
        learnable: Learnable,
        forward: BareForward,
        loss: Loss,
        device: str,
        source_forward: BareForward | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.loss, self.graph = learnable.settings, loss, model.graph
        self.takes = {port.name for port in model.graph.inputs}
        self.start, self.large = learnable.start, large.graph
        self.dtype = getattr(torch, self.settings.dtype)
        self.run, self.run_source = forward, source_forward
        self.sources = [tensor.name for tensor in model.graph.tensors()]
        self.targets = list(large.graph.tensors())
        self.names = Grower(model, learnable.start).names
        self.frozen = torch.nn.ParameterList()
        self.held: dict[str, Held] = {}
        self._hold(model, device)
        weights = {name: self._frozen(name) for held in self.held.values() for name in held.names}
        self.learned = LearnedOperator(learnable, weights).to(device)
        if learnable.weights and source_forward is None:
            self.frozen = torch.nn.ParameterList()  # all of it is learned along, and the source itself is not run
        self.fresh: dict[str, Fresh] = {}
        self.entries: dict[str, torch.Tensor] = {}
        self._draw(learnable.start)
        self.readers = _readers(self.targets)

    def _hold(self, model: Model, device: str) -> None:
        """Read the source's tensors, each once."""
        layers: dict[str, dict[int | None, str]] = {}
        for (key, layer), name in self.names.items():
            layers.setdefault(key, {})[layer] = name
        entries: dict[tuple[str, ...], int] = {}
        for key, by_layer in layers.items():
            names = tuple(dict.fromkeys(by_layer.values()))
            if names not in entries:
                read = []
                for name in names:
                    array = np.asarray(model.weights[name])
                    refuse_nonfinite(name, array)
                    read.append(as_torch(array).to(device, self.dtype))
                tensor = torch.stack(read) if len(read) > 1 else read[0].clone()
                entries[names] = len(self.frozen)
                self.frozen.append(torch.nn.Parameter(tensor, requires_grad=False))
            self.held[key] = Held(entries[names], names)

    def _frozen(self, name: str) -> torch.Tensor:
        held = next(each for each in self.held.values() if name in each.names)
        entry: torch.Tensor = self.frozen[held.entry]
        return entry[held.names.index(name)] if held.stacked else entry

    def source(self, key: str, layer: int | None) -> torch.Tensor:
        """A source tensor by its slot's key and its layer."""
        held = self.held[key]
        number = min(layer or 0, len(held.names) - 1)
        learned = self.learned.source_weight(held.names[number])
        if learned is not None:
            return learned
        entry: torch.Tensor = self.frozen[held.entry]
        return entry[number] if held.stacked else entry

    def _draw(self, start: GrowthOperator) -> None:
        """``Z`` of every tensor whose fresh entries stay; where they are learned, that is what they begin with."""
        operator = self.learned.operator()
        with torch.no_grad():
            for target in self.targets:
                Z = start.residual_for(target, self.source)
                if Z is None:
                    continue
                Z = torch.as_tensor(Z, dtype=self.dtype, device=self.learned.entries[0].device)
                if target.name in self.learned.learnable.residuals:
                    self.learned.set_residual(target.name, Z)
                elif is_factored(operator, target):
                    fresh = Fresh.of(Z, self._shape(target))
                    if fresh.parts:
                        self.fresh[target.name] = fresh
                else:
                    self.entries[target.name] = Z

    def _shape(self, target: Tensor) -> tuple[int, int]:
        rows, columns = self.source(target.key, 0 if target.stack is not None else None).shape
        return rows, columns

    # --- the grown weights -------------------------------------------------------------------------------------------

    def operator(self) -> GrowthOperator:
        """The operator as it is now."""
        return self.learned.operator(self.entries)

    def weights(self, operator: GrowthOperator, rows: int) -> dict[str, torch.Tensor]:
        """Every tensor of the larger model, those that can as their factors.

        Args:
            operator: The operator as it is now.
            rows: How many rows the products of a model have, its tokens: what tells which way is cheaper where that
                must be known beforehand.
        """
        blends = self._blends(operator)
        reads = Reads()
        grown: dict[str, torch.Tensor] = {}
        for target in self.targets:
            if not is_factored(operator, target):
                grown[target.name] = operator.grow(target, self.source)
                continue
            blend = blends.get(target.key)
            M = operator.blended(target, self.source) if blend is None else blend[target.layer or 0]
            B, A = (operator.axis_matrix(target, axis) for axis in (0, 1))
            factors = Factors(
                B,
                M,
                A,
                self._fresh(operator, target),
                reads,
                self.settings.strategy,
                readers=self.readers[target.name],
            )
            grown[target.name] = factors.matrix if self.settings.compile else GrownWeight(self._settled(factors, rows))
        return grown

    def _blends(self, operator: GrowthOperator) -> dict[str, tuple[torch.Tensor, ...]]:
        """``w W`` of every slot whose blend is learned: one product for all of its target layers."""
        blends = {}
        for key in self.learned.learnable.blends:
            held = self.held[key]
            if self.learned.source_weight(held.names[0]) is None and held.stacked:
                entry = self.frozen[held.entry]
            else:
                entry = torch.stack([self.source(key, layer) for layer in range(len(held.names))])
            w = operator.blend[key]
            if w.ndim == 2:
                blends[key] = torch.unbind((w @ entry.reshape(len(entry), -1)).reshape(len(w), *entry.shape[1:]))
        return blends

    def _fresh(self, operator: GrowthOperator, target: Tensor) -> Fresh | None:
        if target.name in self.learned.learnable.residuals:
            Z: Any = operator.residual[target.name]
            return Fresh.whole(Z)
        return self.fresh.get(target.name)

    def _settled(self, factors: Factors, rows: int) -> Factors:
        """With blocks that are run again nothing may depend on what was run before: the way is chosen now."""
        if not self.run.checkpointed:
            return factors
        made = factors.is_made(rows)
        settled = replace(factors, strategy="materialised" if made else "factored")
        if made:
            settled.matrix  # noqa: B018 - made before the blocks, which find it there both times
        return settled

    def _fed(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs with the caches of the larger model's layers, in which nothing is yet."""
        cached = [name for port in self.graph.layer_inputs for name in port.names]
        if not cached:
            return dict(inputs)
        for name in cached:
            if name not in inputs:
                raise GrowkitError(f"the batch lacks {name}; expected a cache of no tokens")
            if inputs[name].numel():
                shape = list(inputs[name].shape)
                raise GrowkitError(f"{name}: the batch has a cache of shape {shape}; expected one of no tokens")
        arrays = {name: value.detach().cpu().numpy() for name, value in inputs.items()}
        return {name: torch.as_tensor(array) for name, array in fed(self.graph, self.large, self.start, arrays).items()}

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch: its inputs by name, and its labels where there are any."""
        inputs = {name: value for name, value in batch.items() if name != LABELS or name in self.takes}
        operator = self.operator()
        outputs = self.run(self._fed(inputs), self.weights(operator, rows_of(inputs)))
        if self.run_source is None:
            return self.loss(outputs, batch)
        with torch.no_grad():
            source = self.run_source(inputs, {name: self._frozen(name) for name in self.sources})
        return self.loss(outputs, batch, source=source, operator=operator)


def _readers(targets: Sequence[Tensor]) -> dict[str, int]:
    """For each tensor how many of its layer read the same axis: what is read is made once for queries, keys, values."""
    axes = {
        t.name: (t.stack, t.layer, t.owner.name, tuple(map(str, t.parameter.parsed.reads)), t.parameter.parsed.roles)
        for t in targets
    }
    counts = Counter(axes.values())
    return {name: counts[place] for name, place in axes.items()}


def rows_of(inputs: Mapping[str, torch.Tensor]) -> int:
    """About how many rows the products of a model have: its tokens, or the patches of its images."""
    tokens = next((value for value in inputs.values() if not value.is_floating_point()), None)
    if tokens is not None:
        return tokens.numel()
    return next(iter(inputs.values())).shape[0] * PATCHES
