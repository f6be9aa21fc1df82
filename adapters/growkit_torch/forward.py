"""Running: a model as a module of its class, and as a function of its inputs and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from growkit.example import named_outputs
from growkit.matrices import Array
from growkit.model import Model
from growkit_specs import GrowkitError, LayerGraph
from growkit_torch.read import as_numpy, as_torch


def build(model: Model, dtype: Any = None) -> Any:
    """The model as a module, in evaluation mode.

    Args:
        model: The model.
        dtype: The element type of the module; None takes the tensors' own.

    Raises:
        GrowkitError: Where the tensors do not fill the module.
    """
    import torch

    dtype = dtype or getattr(torch, next(iter(model.graph.tensors())).parameter.dtype)
    state = {name: as_torch(np.asarray(array)) for name, array in model.weights.items()}
    return model.origin.library.build(model, state, dtype).eval()


def _norms_in_float64(module: Any, graph: LayerGraph) -> None:
    """Transformers' RMSNorms compute in float32 whatever they are given; here they keep float64."""
    from functools import partial

    import torch

    offsets = {layer.attributes.get("offset", 0) for _, layer in graph.walk() if layer.attributes.get("norm") == "rms"}
    if len(offsets) != 1:  # none there, or which has which is not known
        return
    (offset,) = offsets

    def forward(norm: Any, epsilon: float, x: Any) -> Any:
        return (norm.weight + offset) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    for norm in module.modules():
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        own = type(norm).__module__.startswith("transformers.") and not isinstance(norm, torch.nn.LayerNorm)
        if epsilon is not None and own:
            norm.forward = partial(forward, norm, epsilon)


@contextmanager
def _by_default(dtype: Any) -> Iterator[None]:
    """The type of what a model makes without naming one: transformers 4.5x puts the least float64 into such masks."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise GrowkitError(f"the device '{name}' is not known; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise GrowkitError("the device 'cuda' was asked for, and torch sees no GPU; use --device cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


class ModuleForward:
    """A model as a function: ``forward(inputs, weights=None)``.

    What is compared is the weights, not a device's arithmetic: float32 models run in float64, half types in float32.
    (A 30-layer float32 decoder differs from itself in float64 by 7e-6, more than from what it was grown into.)
    """

    def __init__(self, model: Model, device: str = "auto") -> None:
        import torch

        self.device = _device(device)
        stored = {tensor.parameter.dtype for tensor in model.graph.tensors()}
        self.module = build(model, torch.float64 if stored & {"float64", "float32"} else torch.float32)
        if next(self.module.parameters()).dtype == torch.float64:
            _norms_in_float64(self.module, model.graph)
        self.module.to(self.device)
        config = getattr(self.module, "config", None)
        if config is not None and getattr(config, "pad_token_id", 0) is None:
            config.pad_token_id = -1  # no token pads: classifiers of sequences read the last one

    def __call__(self, inputs: Mapping[str, Array], weights: Mapping[str, Any] | None = None) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: Arrays or tensors by name.
            weights: Tensors to use in place of the module's own, by its parameters' names; gradients flow into them.

        Returns:
            Outputs by name: numpy arrays, or tensors where ``weights`` are given.
        """
        import torch

        dtype = next(self.module.parameters()).dtype
        given = {name: torch.as_tensor(value, device=self.device) for name, value in inputs.items()}
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        if weights is not None:
            with _by_default(dtype):
                outputs = torch.func.functional_call(self.module, dict(weights), (), given)
            return named_outputs(outputs)
        with torch.no_grad(), _by_default(dtype):
            outputs = self.module(**given)
        return {name: as_numpy(value) for name, value in named_outputs(outputs).items()}
