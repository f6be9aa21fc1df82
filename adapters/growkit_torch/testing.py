"""Tiny random modules of every architecture that transformers has; needs hypothesis, as :mod:`growkit.testing` does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from hypothesis import strategies as st

from growkit.testing import SmallConfig, architecture_names, small_configs
from growkit_specs import architectures


def architecture_models(names: Sequence[str] | None = None) -> st.SearchStrategy[torch.nn.Module]:
    """Modules of every class of every architecture file that this version of transformers has, every entry random.

    Args:
        names: The architectures; None takes all that have a ``tiny`` config.
    """
    known = [name for name in names or architecture_names() if any(map(_has_class, architectures()[name].classes))]
    return small_configs(known, _has_class).map(_module)


def _has_class(name: str) -> bool:
    return hasattr(transformers, name)


def _module(small: SmallConfig) -> torch.nn.Module:
    """The module; what no config says about its optional layers is an argument of its constructor."""
    accepted = inspect.signature(getattr(transformers, small.class_name).__init__).parameters
    file = architectures()[small.architecture]
    arguments = {rule.argument for rule in (*file.stem.values(), *file.head.values()) if rule.argument in accepted}
    return random_module(small.class_name, small.config, {str(name): small.optional for name in arguments})


def random_module(
    class_name: str, config: Mapping[str, Any], options: Mapping[str, Any] | None = None, seed: int = 0
) -> torch.nn.Module:
    """A module of transformers in evaluation mode, every parameter random: nothing is zero or one by initialisation.

    Args:
        class_name: Its class.
        config: Its config.
        options: Further arguments of the class's constructor.
        seed: The seed of its entries.
    """
    cls = getattr(transformers, class_name)
    return randomised(cls(cls.config_class(**config), **(options or {})), seed).eval()


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """``module`` with every parameter drawn anew: around what it starts with where it scales, around zero elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                scales = "norm" in type(part).__name__.lower() and name == "weight"
                centre = parameter.mean() if scales else 0.0  # zero where the norm computes with 1 + scale
                centre = 1.0 if name in ("lambda1", "gamma_1", "gamma_2") else centre  # a layer scale starts near zero
                parameter.normal_(0.0, 0.2, generator=generator).add_(centre)
    return module
