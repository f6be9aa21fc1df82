"""The protobuf wire format, as far as weights need it: left where they lie when read, streamed when written.

protobuf's own parser and serialiser hold every byte of a message, twice over. A message is a list of fields, each a
number and a kind, then the value; a text, bytes or a message within has its length before it
(https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

from onnx import GraphProto, ModelProto, TensorProto

Data = bytes | mmap.mmap

MODEL_TO_RAW_DATA = (
    ModelProto.GRAPH_FIELD_NUMBER,
    GraphProto.INITIALIZER_FIELD_NUMBER,
    TensorProto.RAW_DATA_FIELD_NUMBER,
)
_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}


class Malformed(ValueError):
    """Bytes that are no message."""


def header(number: int, length: int) -> bytes:
    """What stands before a field's ``length`` bytes."""
    return _varint(number << 3 | _DELIMITED) + _varint(length)


def with_references(data: Data, location: str, least: int) -> bytes:
    """A stored model without its weights: external data in its place, that refers to the stored bytes themselves.

    Args:
        data: The model's message.
        location: What to call the file in which ``data`` lies.
        least: The length from which raw data is left out, in bytes.

    Returns:
        The message of the model.

    Raises:
        Malformed: Where ``data`` is no message.
    """

    def reference(start: int, stop: int) -> bytes | None:
        tensor = TensorProto()
        refer(tensor, location, start, stop - start)
        return tensor.SerializeToString() if stop - start >= least else None

    return _replaced(data, (0, len(data)), MODEL_TO_RAW_DATA, reference)


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make ``tensor`` say that its data lies in a file."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))


def _replaced(
    data: Data, span: tuple[int, int], path: tuple[int, ...], replace: Callable[[int, int], bytes | None]
) -> bytes:
    """The message at ``span``, with every field at ``path`` within it replaced where there is something for it."""
    pieces = []
    copied = span[0]
    for number, first, start, stop in _delimited_fields(data, *span):
        if number != path[0]:
            continue
        if len(path) == 1:
            new = replace(start, stop)
        else:
            within = _replaced(data, (start, stop), path[1:], replace)
            new = header(number, len(within)) + within
        if new is not None:
            pieces += [data[copied:first], new]
            copied = stop
    return b"".join((*pieces, data[copied : span[1]]))


def _delimited_fields(data: Data, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each field with a length: its number, where it begins, where its value does, and where it ends."""
    while position < end:
        first = position
        key, position = _varint_at(data, position, end)
        kind = key & 7
        if kind in (_VARINT, _DELIMITED):
            number, position = _varint_at(data, position, end)
            length = number if kind == _DELIMITED else 0
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            raise Malformed(f"byte {first} begins no field")
        if position + length > end:
            raise Malformed(f"the field at byte {first} is longer than what it stands in")
        if kind == _DELIMITED:
            yield key >> 3, first, position, position + length
        position += length


def _varint_at(data: Data, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise Malformed(f"byte {position} ends no number")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
