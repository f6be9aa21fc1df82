"""Running: a model as a module of its class, and as a function of its inputs and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from growkit.example import named_outputs
from growkit.matrices import Array
from growkit.model import Model
from growkit_specs import GrowkitError, LayerGraph, Tensor
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


def device_named(name: str) -> str:
    """The device that is meant: ``cpu`` or ``cuda``; ``auto`` is a GPU where there is one.

    Raises:
        GrowkitError: For another name, and where there is no GPU.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise GrowkitError(f"the device '{name}' is not known; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise GrowkitError("the device 'cuda' was asked for, and torch sees no GPU; use --device cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class _Place:
    """Where a module has a tensor: the module that holds it, its path, and the parameter's name there."""

    tensor: Tensor
    holder: Any
    path: str
    name: str


class BareModule:
    """A model as a function of its inputs and all of its weights, ``forward(inputs, weights)``; it holds none itself.

    The weights stay in their places until the next call, so that what gradients
    need may be run again.

    Args:
        model: The model.
        device: Where it runs.
        dtype: The element type in which it runs, that of the weights.
        checkpointing: The share of its stacks' blocks that are run again for their gradients, and not kept; None takes
            half, and none of a compiled module's.
        compiled: Whether the module is compiled by ``torch.compile``.
    """

    def __init__(
        self,
        model: Model,
        device: str = "auto",
        *,
        dtype: str = "float32",
        checkpointing: float | None = None,
        compiled: bool = False,
    ) -> None:
        import torch

        self.dtype = getattr(torch, dtype)
        self.device = device_named(device)
        tensors = list(model.graph.tensors())
        # Each tensor is one number, another for each, which takes no memory: it tells where the module has the tensor.
        marks = {t.name: torch.tensor(i + 1.0, dtype=self.dtype).expand(t.shape) for i, t in enumerate(tensors)}
        self.module = model.origin.library.build(model, marks, self.dtype).eval()
        if self.dtype == torch.float64:
            _norms_in_float64(self.module, model.graph)
        self._places = list(_places(self.module, tensors))
        if missing := {t.name for t in tensors} - {place.tensor.name for place in self._places}:
            raise GrowkitError(f"{type(self.module).__name__} has no place for the tensor {min(missing)}")
        self.clear()
        self.module.to(self.device)
        for part in self.module.modules():  # an encoder and a decoder have a config each
            if getattr(part, "config", None) is not None:
                part.config.use_cache = False
        blocks = self._blocks()
        usual = 0.0 if compiled else 0.5
        self.checkpointed = round((usual if checkpointing is None else checkpointing) * len(blocks))
        for block in blocks[: self.checkpointed]:
            block.forward = _run_again(block.forward)
        self._names = [p.name for p in signature(self.module.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
        self._run = torch.compile(self.module) if compiled else self.module

    def __call__(self, inputs: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, as tensors."""
        import torch

        for place in self._places:
            place.holder._parameters[place.name] = weights[place.tensor.name]
        if unknown := sorted(inputs.keys() - self._names):
            raise GrowkitError(f"the model has no input {unknown[0]}; it takes {', '.join(self._names)}")
        given = {name: torch.as_tensor(value, device=self.device) for name, value in inputs.items()}
        given = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in given.items()}
        with _by_default(self.dtype):
            return named_outputs(self._run(**given))

    def clear(self) -> None:
        """Let go of the weights of the last call."""
        for place in self._places:
            place.holder._parameters[place.name] = None

    def _blocks(self) -> list[Any]:
        """The modules that are the blocks of stacks: the parts of the tensors' paths up to the layer's number."""
        paths: dict[str, None] = {}
        for place in self._places:
            steps = f"{place.path}.{place.name}".split(".")
            number = str(place.tensor.layer)
            if place.tensor.stack is not None and number in steps:
                paths[".".join(steps[: steps.index(number) + 1])] = None
        return [self.module.get_submodule(path) for path in paths]


def _places(module: Any, tensors: Sequence[Tensor]) -> Iterator[_Place]:
    """Where a module has tensors that are marked by their numbers, counted from 1."""
    for path, holder in module.named_modules():
        for name, parameter in holder._parameters.items():
            mark = float(parameter.detach().reshape(-1)[0]) if parameter is not None and parameter.numel() else 0.0
            if mark.is_integer() and 0 < mark <= len(tensors):
                yield _Place(tensors[int(mark) - 1], holder, path, name)


def _run_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward, of which nothing is kept but what it is given."""
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


class ModuleForward:
    """A model as a function: ``forward(inputs, weights=None)``.

    What is compared is the weights, not a device's arithmetic: float32 models run in float64, half types in float32.
    (A 30-layer float32 decoder differs from itself in float64 by 7e-6, more than from what it was grown into.)
    """

    def __init__(self, model: Model, device: str = "auto") -> None:
        import torch

        self.device = device_named(device)
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
