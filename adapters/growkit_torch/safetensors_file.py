"""safetensors files, tensor by tensor: the header is parsed, tensors are mapped or streamed, nothing is held.

The library's own reader and writer hold a whole file's tensors, or give numpy no bfloat16; the format is a length, a
JSON header and the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.staging import made_ahead
from growkit_specs import InvalidModel, UnsupportedModel

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        path: The file.
        name: The tensor's name.
        dtype: Its element type.
        shape: Its shape.
        start: The offset of its first byte in the file.
    """

    path: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    def load(self) -> np.ndarray:
        """The tensor, mapped: pages are read when they are touched, and nothing can be written back."""
        if prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.start, shape=self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
        InvalidModel: For a missing, truncated or malformed file.
        UnsupportedModel: For an element type that holds no weights here (quantised formats).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise InvalidModel(f"{path}: truncated: its header says {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise InvalidModel(f"{path}: the shard is missing; fetch it again") from None
    except OSError as error:
        raise InvalidModel(f"{path}: {error.strerror}") from None
    except (struct.error, ValueError) as error:
        if isinstance(error, InvalidModel):
            raise
        raise InvalidModel(f"{path}: not a safetensors file, or truncated in its header; fetch it again") from None
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: Mapping[str, Any], base: int, size: int) -> StoredTensor:
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        raise InvalidModel(f"{path}: the header's entry of {name} is malformed") from None
    if kind not in DTYPES:
        raise UnsupportedModel(
            f"{path}: {name} is stored as {kind}; expected float64, float32, float16 or bfloat16; dequantise it first"
        )
    dtype = np.dtype(DTYPES[kind])
    if not counts or stop - start != prod(shape) * dtype.itemsize:
        raise InvalidModel(f"{path}: {name} has shape {list(shape)} as {kind}, which is not its {stop - start} bytes")
    if base + stop > size:
        raise InvalidModel(f"{path}: truncated: {name} ends at byte {base + stop}, the file has {size}; fetch it again")
    return StoredTensor(path, name, dtype, shape, base + start)


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    tensors: Iterable[np.ndarray],
    progress: Callable[[int], None],
) -> None:
    """Write one file, two tensors in memory at most: one is made while the one before it is written.

    Args:
        path: The file.
        shapes: Shape and element type of every tensor, by name, in the order of ``tensors``.
        tensors: The tensors.
        progress: Called with the number of bytes of each tensor once it is written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in shapes.items():
        stop = start + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in made_ahead(tensors):
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            progress(tensor.nbytes)
