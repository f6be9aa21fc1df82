"""What is learned of a growth operator, as torch parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from growkit.learnable import Entries, Learnable
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError, Tensor


class LearnedOperator(torch.nn.Module):
    """The parameters of an operator that is learned.

    Args:
        learnable: What is learned.
        weights: The source's tensors by name, where they are learned along.

    Raises:
        GrowkitError: Where nothing is learned.
    """

    def __init__(self, learnable: Learnable, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.learnable = learnable
        if not learnable.names:
            raise GrowkitError(
                f"nothing is learned: learn={','.join(learnable.settings.learn)} has no part in a growth of these "
                "sizes; add norms, residual or source, or ask for other sizes"
            )
        dtype = getattr(torch, learnable.settings.dtype)
        own = {i: weights[name] for name, i in learnable.weights.items()}
        values = (own[i] if i in own else make() for i, make in enumerate(learnable.initial))
        self.entries = torch.nn.ParameterList(
            torch.nn.Parameter(torch.as_tensor(value).detach().to(dtype, copy=True)) for value in values
        )

    def operator(self, fixed: Mapping[str, Any] | None = None, *, entries: Entries | None = None) -> GrowthOperator:
        """The operator of the entries as they are now; gradients flow into them.

        Args:
            fixed: Entries of ``Z`` that are not learned, by the target tensor's name.
            entries: Values in place of the parameters.
        """
        return self.learnable.operator(list(self.entries) if entries is None else entries, fixed)

    def source_weight(self, name: str) -> torch.Tensor | None:
        """A source tensor that is learned along."""
        i = self.learnable.weights.get(name)
        return None if i is None else self.entries[i]

    def set_residual(self, name: str, Z: torch.Tensor) -> None:
        """Begin a tensor's learned ``Z`` with the fresh entries it has."""
        with torch.no_grad():
            self.entries[self.learnable.residuals[name]].copy_(Z)

    def values(self) -> list[np.ndarray]:
        """The entries as they are now, in numpy: with them :meth:`operator` gives one that can be saved and applied."""
        return [whole(entry) for entry in self.entries]


def whole(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers, copied; of one that is shared out among processes all of them."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    array: np.ndarray = gathered.detach().cpu().numpy().copy()
    return array


def is_factored(operator: GrowthOperator, target: Tensor) -> bool:
    """Whether a tensor can act as its factors: a matrix that reads, of one term, not folded with a layer scale."""
    layout = target.parameter.parsed
    return (
        len(layout.axes) == 2
        and set(layout.roles) <= {"read", "write"}
        and len(operator.terms(target)) == 1
        and not operator.is_folded(target)
    )
