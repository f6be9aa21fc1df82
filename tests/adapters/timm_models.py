"""timm, importable wherever torch is."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest

OF_TORCHVISION = ("models", "models.feature_extraction", "ops", "ops.misc", "transforms", "transforms.functional")
OF_TORCHVISION += ("datasets",)


def import_timm() -> Any:
    """timm; the test is skipped where it is not installed.

    timm imports torchvision for its image transforms, and torchvision loads only beside the build of torch that it was
    made for, which the registry has for CUDA alone. No model needs it, so where it does not load a stand-in takes its
    place for as long as timm is imported.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with torchvision_stand_in():
            return pytest.importorskip("timm", exc_type=ImportError)
    return pytest.importorskip("timm", exc_type=ImportError)


@contextmanager
def torchvision_stand_in() -> Iterator[None]:
    names = ["torchvision", *(f"torchvision.{name}" for name in OF_TORCHVISION)]
    sys.modules.update({name: MagicMock() for name in names})
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
