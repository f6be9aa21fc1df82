"""What can be learned of an operator: which entries, what they begin as, and where they act."""

from typing import Any

import numpy as np
import pytest

import growkit
from growkit.learnable import Learnable, source_rows
from growkit.matrices import Composition, Dense, Identity, Matrix, MeanFill, RowBlocks, Scaled, Selection, pad
from growkit.testing import memory_model, transformer
from growkit_specs import FitSettings, GrowkitError

SIZES = {"hidden": 12, "heads": 6, "ffn": 10, "layers": 3}
FEATURES = {"hidden": 8, "heads": 4, "head_dim": 2, "ffn": 6, "vocab": 9, "positions": 5, "depths": (2,), "norm": "rms"}


def learnable(method: str = "lossless", sizes: dict[str, Any] | None = None, **settings: Any) -> Learnable:
    source = memory_model(transformer(**FEATURES))
    return growkit.plan(source, method=method, **(sizes or SIZES)).learnable(FitSettings.of(**settings))


def initial(what: Learnable) -> list[np.ndarray]:
    return [make() for make in what.initial]


def matrices(what: Learnable) -> dict[str, tuple[int, ...]]:
    return {
        name: shape for name, shape in zip(what.names, what.shapes, strict=True) if name.startswith(("A of", "B of"))
    }
