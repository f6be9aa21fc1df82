"""Tiny random models, one for each architecture file.

No two sizes are equal where an axis could be taken for another, and no entry is left at zero or one: what a fresh model
has by its initialisation (biases of zero, scales of one) would hide what is lost or mixed up.
"""

from pathlib import Path
from typing import Any

from growkit_specs import architectures
from growkit_torch.testing import random_module


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
    class_name = class_name or file.base_class
    labels = {"num_labels": 3} if "Classification" in class_name else {}
    return random_module(class_name, {**file.tiny, **labels, **config}, options)


def directory(tmp_path: Path, module: Any, name: str = "source") -> Path:
    """`module`, saved by transformers in a folder of `tmp_path`."""
    path = tmp_path / name
    module.save_pretrained(path)
    return path
