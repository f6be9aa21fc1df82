"""Tiny random models, one for each architecture file.

No two sizes are equal where an axis could be taken for another, and no entry is left at zero or one: what a fresh model
has by its initialisation (biases of zero, scales of one) would hide what is lost or mixed up.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers

from growkit_specs import Architecture, architectures
from growkit_torch.testing import random_module, randomised
from tests.adapters.timm_models import import_timm


def tiny(
    architecture: str, class_name: str | None = None, *, options: dict[str, Any] | None = None, **config: Any
) -> Any:
    """A tiny model of an architecture file, every parameter random, always the same.

    Args:
        architecture: The architecture's name.
        class_name: The model's class; None takes the bare model.
        options: Further arguments of the class's constructor.
        config: Config keys that differ from the file's ``tiny``.
    """
    file = architectures()[architecture]
    if file.library == "timm":
        timm = import_timm()
        (name, *_) = timm.list_models(list(file.model_types))
        return randomised(timm.create_model(name, **{**file.tiny, **config})).eval()
    class_name = class_name or file.base_class
    labels = {"num_labels": 3} if "Classification" in class_name else {}
    return random_module(class_name, {**file.tiny, **labels, **config}, options)


def directory(tmp_path: Path, module: Any, name: str = "source") -> Path:
    """`module`, saved by its library in a folder of `tmp_path`."""
    path = tmp_path / name
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(path)
    else:
        import_timm().models.save_for_hf(module, path, safe_serialization=True)
    return path


def loaded(module: Any, path: Path) -> Any:
    """What the library of `module` loads from `path`."""
    if hasattr(module, "from_pretrained"):
        return type(module).from_pretrained(path)
    return import_timm().create_model(f"local-dir:{path}", pretrained=True)


def hidden_and_layers(module: Any) -> tuple[int, int]:
    """The width and the depth that a module says it has."""
    if hasattr(module, "config"):
        return module.config.hidden_size, module.config.num_hidden_layers
    return module.embed_dim, len(module.blocks)


def library_class(file: Architecture, class_name: str) -> Any:
    """The class of that name in the library of an architecture file."""
    return getattr(import_timm().models if file.library == "timm" else transformers, class_name)


def library_defaults(file: Architecture) -> Any:
    """What a config means that says nothing, as attributes."""
    cls = library_class(file, file.base_class)
    if file.library == "transformers":
        return cls.config_class()
    return SimpleNamespace(**{name: p.default for name, p in inspect.signature(cls).parameters.items()})
