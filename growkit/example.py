"""Examples: a module beside inputs that it runs on, for modules that no architecture file knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from growkit_specs import GrowkitError, LayerGraph

Build = Callable[[LayerGraph], Any]
"""Makes a module of the sizes and depths of a layer graph; its weights do not matter."""


@dataclass(frozen=True)
class Example:
    """A module and what it can be run on.

    Attributes:
        module: The module.
        inputs: Its tensors by the names of the arguments of ``forward``, batch first.
        build: Makes larger modules of its kind; None where only their weights are wanted.
    """

    module: Any
    inputs: Mapping[str, Any]
    build: Build | None = None

    @classmethod
    def of(cls, module: Any, inputs: Any, build: Build | None = None) -> Example:
        """The example that a caller gives: one tensor, several in the order of ``forward``, or tensors by name.

        Raises:
            GrowkitError: Where it is no module, takes fewer inputs, or is given what is no tensor.
        """
        if not callable(getattr(module, "forward", None)):
            raise GrowkitError(f"example inputs are for modules; got {module!r}; leave them out")
        if not isinstance(inputs, Mapping):
            several = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            names = list(inspect.signature(module.forward).parameters)
            if len(several) > len(names):
                takes = f"{type(module).__name__}.forward takes {len(names)} inputs ({', '.join(names)})"
                raise GrowkitError(f"{takes}, got {len(several)} example inputs")
            inputs = dict(zip(names, several, strict=False))
        odd = next((name for name, value in inputs.items() if not _is_tensor(value)), None)
        if odd is not None:
            raise GrowkitError(f"the example input {odd} is of type {type(inputs[odd]).__name__}; expected a tensor")
        return cls(module, dict(inputs), build)


def named_outputs(outputs: Any) -> dict[str, Any]:
    """The tensors that a module gave, by name: ``output`` for a single one, ``output_0``... for several without names.

    What is no tensor, like a cache, is left out.
    """
    if _is_tensor(outputs):
        return {"output": outputs}
    if not isinstance(outputs, Mapping):
        outputs = {f"output_{i}": value for i, value in enumerate(outputs)}
    return {name: value for name, value in outputs.items() if _is_tensor(value)}


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, of whichever framework."""
    return hasattr(value, "shape") and hasattr(value, "dtype")
