"""Weights: element types, and a source's tensors in one that bears the arithmetic of growing."""

from __future__ import annotations

from typing import Any

import numpy as np

from growkit.matrices import Array
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError, InvalidModel, Tensor


class Grower:
    """Grows one tensor at a time in an element type that bears the arithmetic."""

    def __init__(self, model: Model, operator: GrowthOperator) -> None:
        self.model = model
        self.operator = operator
        tied = {p.name: p.tied_to for _, layer in model.graph.walk() for p in layer.parameters if p.tied_to}
        self.names = {
            (tensor.key, layer): tied.get(tensor.name) or tensor.name
            for tensor in model.graph.tensors(tied=True)
            for layer in model.graph.layers_of(tensor)
        }

    def __call__(self, target: Tensor) -> Array:
        """The grown tensor.

        Raises:
            InvalidModel: Where a source tensor holds NaN or infinity, or is not of the shape its layout says.
        """
        grown = self.operator.grow(
            target,
            lambda key, layer: self.source(target, key, layer),
            begun=lambda key, layer: self.source(target, key, layer, learned=False),
        )
        if tuple(grown.shape) != target.shape:
            raise InvalidModel(f"{target.name}: grown to {tuple(grown.shape)}, expected {target.shape}")
        return np.asarray(grown).astype(dtype_of(target.parameter.dtype), copy=False)

    def source(self, target: Tensor, key: str, layer: int | None, *, learned: bool = True) -> Array:
        """A source tensor, finite, in the element type that ``target`` is computed in; ``learned`` if it was."""
        name = self.names[key, layer]
        own = self.operator.weights.get(name) if learned else None
        array = self.model.weights[name] if own is None else np.asarray(own)
        if array.dtype.itemsize < 4:  # half types: exact in float32, where arithmetic keeps its accuracy
            array = array.astype(np.float32)
        refuse_nonfinite(name, array)
        # A sum is rounded once, at the end.
        return array.astype(np.float64) if array.dtype == np.float32 and not self._only_moves(target) else array

    def _only_moves(self, target: Tensor) -> bool:
        layout = target.parameter.parsed
        return (
            not {"scale", "shift"} & set(layout.roles)
            and self._picks_a_layer(target)
            and all(self.operator.axis_matrix(target, axis).is_gather for axis in range(len(layout.roles)))
        )

    def _picks_a_layer(self, target: Tensor) -> bool:
        if target.stack is None:
            return True
        rows = np.atleast_2d(np.asarray(self.operator.blend_of(target))[..., target.layer, :])
        return bool(np.isin(rows, (0, 1)).all() and (np.count_nonzero(rows, axis=1) <= 1).all())


def refuse_nonfinite(name: str, array: np.ndarray) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises:
        InvalidModel: Naming the tensor and the first such entry.
    """
    if not np.isfinite(array.sum(dtype=np.float64)):  # a sum is quick; where it overflows, look entry by entry
        finite = np.isfinite(array)
        if not finite.all():
            where = tuple(map(int, np.argwhere(~finite)[0]))
            raise InvalidModel(
                f"{name}: the entry {list(where)} is {array[where]}; expected finite weights; nothing was written"
            )


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy element type called ``name``; ``bfloat16`` comes from ml_dtypes.

    Raises:
        GrowkitError: For a type that weights cannot have.
    """
    known = ("float64", "float32", "float16", "bfloat16")
    if name not in known:
        raise GrowkitError(f"the dtype '{name}' is not supported; expected {', '.join(known)}")
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401 - importing it makes numpy know the name

    dtype: np.dtype[Any] = np.dtype(name)
    return dtype
