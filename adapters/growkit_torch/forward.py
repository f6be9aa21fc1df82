"""Running: a model as a module of its class, and as a function of its inputs and weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from growkit.matrices import Array
from growkit.model import Model
from growkit_specs import GrowkitError, LayerGraph, UnsupportedModel
from growkit_torch.read import Origin, as_numpy, as_torch


def model_class(origin: Origin) -> Any:
    """The class of a model, from transformers or from its module.

    Raises:
        UnsupportedModel: Where this version of transformers has no such class.
    """
    if origin.module is not None:
        return type(origin.module)
    import transformers

    found = getattr(transformers, origin.class_name, None)
    if found is None:
        raise UnsupportedModel(f"transformers {transformers.__version__} has no class {origin.class_name}; upgrade it")
    return found


def build(model: Model, dtype: Any = None) -> Any:
    """The model as a module, in evaluation mode.

    Args:
        model: The model.
        dtype: The element type of the module; None takes the tensors' own.

    Raises:
        GrowkitError: Where the tensors do not fill the module.
    """
    import torch

    cls = model_class(model.origin)
    config = cls.config_class.from_dict(dict(model.origin.config))
    first = next(iter(model.graph.tensors()))
    dtype = dtype or getattr(torch, first.parameter.dtype)
    state = {name: as_torch(np.asarray(array)) for name, array in model.weights.items()}
    options = _constructor_options(cls, model)
    with _quiet():
        module, loading = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **options
        )
    missing = [name for name in loading["missing_keys"] if not _is_derived(module, name)]
    if missing or loading["unexpected_keys"] or loading["mismatched_keys"]:
        raise GrowkitError(
            f"{cls.__name__} did not take its tensors: {missing or ''} {loading['unexpected_keys'] or ''}"
        )
    return module.eval()


def _constructor_options(cls: Any, model: Model) -> dict[str, bool]:
    """What the constructor must be told because no config says it: which optional layers exist."""
    accepted = inspect.signature(cls.__init__).parameters
    rules = model.origin.architecture.stem | model.origin.architecture.head
    present = {layer.name for _, layer in model.graph.walk()}
    return {rule.argument: name in present for name, rule in rules.items() if rule.argument in accepted}


def _is_derived(module: Any, name: str) -> bool:
    """Whether a missing name is tied to one that is there."""
    tied = getattr(module, "all_tied_weights_keys", None) or dict.fromkeys(
        getattr(module, "_tied_weights_keys", None) or ()
    )
    return name in tied


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers warns of every tied or fresh tensor, and draws bars of its own."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


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
        if epsilon is not None and not isinstance(norm, torch.nn.LayerNorm):
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
        if self.module.dtype == torch.float64:
            _norms_in_float64(self.module, model.graph)
        self.module.to(self.device)
        if getattr(self.module.config, "pad_token_id", 0) is None:
            self.module.config.pad_token_id = -1  # no token pads: classifiers of sequences read the last one

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
            return {name: value for name, value in outputs.items() if torch.is_tensor(value)}
        with torch.no_grad(), _by_default(dtype):
            outputs = self.module(**given)
        return {name: as_numpy(value) for name, value in outputs.items() if torch.is_tensor(value)}
