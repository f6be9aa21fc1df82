"""A broken law: one message that says which law, where, what was expected and what was got."""

from __future__ import annotations

import numpy as np

from growkit.matrices import Array


def broken(law: str, where: str, expected: object, got: object) -> AssertionError:
    """The error that a law raises."""
    return AssertionError(f"the law '{law}' is broken by {where}: expected {expected}, got {got}")


def assert_equal(law: str, where: str, expected: Array, got: Array, rtol: float = 0.0) -> None:
    """Two arrays of one shape, with the same entries, bit for bit where ``rtol`` is zero."""
    expected, got = np.asarray(expected), np.asarray(got)
    if expected.shape != got.shape:
        raise broken(law, where, f"shape {list(expected.shape)}", list(got.shape))
    if expected.dtype != got.dtype:
        raise broken(law, where, f"element type {expected.dtype}", got.dtype)
    scale = np.max(np.abs(expected), initial=1.0) if rtol else 1.0
    same = np.abs(expected - got) <= rtol * scale if rtol else np.all(_bytes(expected) == _bytes(got), axis=-1)
    if not np.all(same):
        first = tuple(map(int, np.argwhere(~np.asarray(same))[0]))
        more = f" ({np.size(same) - np.count_nonzero(same)} of {np.size(same)} entries differ)"
        raise broken(law, f"{where}, entry {list(first)}", expected[first], f"{got[first]}{more}")


def _bytes(array: np.ndarray) -> np.ndarray:
    """``(*shape, itemsize)``: the bytes of each entry."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(*array.shape, array.itemsize)
