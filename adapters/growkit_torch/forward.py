"""Running: a model as a module of its class, and as a function of its inputs and weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from growkit.matrices import Array
from growkit.model import Model
from growkit_specs import GrowkitError, UnsupportedModel
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
    with _quiet():
        module, loading = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    missing = [name for name in loading["missing_keys"] if not _is_derived(module, name)]
    if missing or loading["unexpected_keys"] or loading["mismatched_keys"]:
        raise GrowkitError(f"{cls.__name__} did not take its tensors: {missing or ''} {loading['unexpected_keys'] or ''}")
    return module.eval()


def _is_derived(module: Any, name: str) -> bool:
    """Whether a missing name is tied to one that is there."""
    tied = getattr(module, "all_tied_weights_keys", None) or dict.fromkeys(getattr(module, "_tied_weights_keys", None) or ())
    return name in tied


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of every tied or fresh tensor, and draws bars of its own."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars is None:
            logging.enable_progress_bar()


def _norms_in_float64(module: Any) -> None:
    """transformers' RMSNorms compute in float32 whatever they are given; here they keep float64."""
    from functools import partial

    import torch

    def forward(norm: Any, x: Any) -> Any:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for norm in module.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.forward = partial(forward, norm)


class ModuleForward:
    """A model as a function: ``forward(inputs, weights=None)``.

    Half types are run in float32: what is compared is the weights, not the arithmetic of a device.
    """

    def __init__(self, model: Model) -> None:
        import torch

        types = {tensor.parameter.dtype for tensor in model.graph.tensors()}
        self.module = build(model, torch.float64 if "float64" in types else torch.float32)
        if "float64" in types:
            _norms_in_float64(self.module)

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
        given = {name: torch.as_tensor(value) for name, value in inputs.items()}
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        if weights is not None:
            outputs = torch.func.functional_call(self.module, dict(weights), (), given)
            return {name: value for name, value in outputs.items() if torch.is_tensor(value)}
        with torch.no_grad():
            outputs = self.module(**given)
        return {name: as_numpy(value) for name, value in outputs.items() if torch.is_tensor(value)}
