"""ONNX files: read without their weights, which stay on the disk, and written one weight at a time."""

from __future__ import annotations

import mmap
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, cast

import onnx_ir as ir
from onnx import GraphProto, ModelProto, TensorProto

from growkit.staging import made_ahead, staged_files
from growkit_onnx.laws import Contents, check
from growkit_onnx.wire import Malformed, header, refer, with_references
from growkit_specs import GrowkitError, InvalidModel

EXTERNAL_BYTES = 1_500_000_000
"""The size of all weights past which they are written to a file of their own, in bytes: a protobuf ends at 2 GB."""

MAPPED_BYTES = 1 << 20
"""The size from which a weight within a model's own file stays on the disk when it is read, in bytes."""

INLINE_BYTES = 1024
"""The size up to which a weight stays in the model's own file, in bytes: runtimes read shapes there."""

ALIGNMENT = 4096
"""What the offset of external data is a multiple of, in bytes: a page, so that it can be mapped."""

LARGEST_MESSAGE = 2**31 - 1
"""How large a protobuf may be, in bytes."""

Progress = Callable[[int], None]


# --- reading ---------------------------------------------------------------------------------------------------------


def load(path: Path) -> ir.Model:
    """Read a model; its weights are mapped, and no file outside of its folder is read.

    Args:
        path: The .onnx file; it may be anybody's.

    Returns:
        The model, its nodes in an order in which they can be run. Weights of 1 MiB and more, and external ones, stay
        in their files until they are asked for; the files must stay, too.

    Raises:
        InvalidModel: Where the file or its external data is damaged, or leads out of the folder.
        UnsupportedModel: Where it holds what is not understood here, or is newer than the installed onnx.
    """
    own = token_hex()  # a location that no file can know, for its own data
    model = _understood(_parsed(path, own), str(path), path.absolute().parent, own)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location == own:
            value.const_value = _late(value.const_value, path.resolve())
    return model


def from_proto(proto: ModelProto) -> ir.Model:
    """The model of a message in memory, whose tensors it goes on using.

    Args:
        proto: The message; all its weights are in it.

    Returns:
        The model, its nodes in an order in which they can be run.

    Raises:
        InvalidModel: Where it contradicts itself.
        UnsupportedModel: Where it holds what is not understood here, or is newer than the installed onnx.
    """
    model = _understood(proto, "the ONNX model")
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _named_apart(value.const_value)
    return model


def _named_apart(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor that may be renamed while the message that holds its data stays as it is."""
    dtype, shape, name, doc = tensor.dtype, tensor.shape, tensor.name, tensor.doc_string
    if dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy(), shape=ir.Shape(shape.numpy()), name=name, doc_string=doc)
    apart = ir.LazyTensor(lambda: tensor, dtype, ir.Shape(shape.numpy()), name=name, doc_string=doc)
    apart.metadata_props.update(tensor.metadata_props)
    return apart


def _parsed(path: Path, own: str) -> ModelProto:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise InvalidModel(f"{path}: not a regular file; expected an .onnx file")
        if status.st_size > LARGEST_MESSAGE:
            raise InvalidModel(
                f"{path}: {status.st_size:,} bytes; expected less than 2 GB, with external data beside it"
            )
        if status.st_size == 0:
            raise InvalidModel(f"{path}: the file is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            message = with_references(data, own, MAPPED_BYTES)
    except OSError as error:
        raise InvalidModel(f"{path}: {error.strerror}") from None
    except Malformed as error:
        raise _damaged(path, error) from None
    try:
        return ModelProto.FromString(message)
    except Exception as error:  # protobuf's own, which is not among what onnx offers
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InvalidModel:
    return InvalidModel(f"{path}: not an ONNX file, or truncated: {_line(error)}; fetch it again")


def _understood(proto: ModelProto, source: str, folder: Path | None = None, own: str = "") -> ir.Model:
    check(Contents(proto, folder, own), source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Ignoring unknown external data key")
            model = ir.from_proto(proto)
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            if "ai.onnx" in graph.opset_imports:  # the default domain's other name, which onnx-ir takes from nodes only
                graph.opset_imports[""] = graph.opset_imports.pop("ai.onnx")
            graph.sort()
            ir.external_data.set_base_dir(graph, folder or "")
            _read_inner_data_late(graph)
    except Exception as error:  # the laws should have seen it; a file is nobody's reason for a traceback
        raise InvalidModel(f"{source}: {_line(_first_cause(error))}") from None
    return model


def _read_inner_data_late(graph: ir.Graph) -> None:
    """Make external tensors in nodes plain ones, read when asked for: only the graph's own are written outside."""
    for inner in graph.subgraphs():
        for value in inner.initializers.values():
            if value.const_value is not None:
                value.const_value = _late(value.const_value)
    for node in graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.AttrTensor(name, _late(attribute.value), attribute.doc_string)
            elif attribute.type == ir.AttributeType.TENSORS:
                tensors = [_late(tensor) for tensor in attribute.value]
                node.attributes[name] = ir.AttrTensors(name, tensors, attribute.doc_string)


def _late(tensor: ir.TensorProtocol, path: Path | None = None) -> ir.TensorProtocol:
    """A tensor that is written like any other, although its data lies in a file: in ``path``, or where it says."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    dtype, shape, name = tensor.dtype, tensor.shape, tensor.name
    data = ir.ExternalTensor(path, tensor.offset, tensor.length, dtype, shape=shape, name=name) if path else tensor
    late = ir.LazyTensor(lambda: data, dtype, shape, name=name, doc_string=tensor.doc_string)
    late.metadata_props.update(tensor.metadata_props)
    return late


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())[:300] or type(error).__name__
    return words if words.isprintable() else ascii(words)


# --- writing ---------------------------------------------------------------------------------------------------------


def save(
    model: ir.Model,
    destination: Path,
    *,
    external: bool | None = None,
    progress: Progress = lambda written: None,
) -> None:
    """Write a model, all of it or nothing.

    Args:
        model: The model, which stays as it is; weights that are made when asked for are made once, in order.
        destination: The .onnx file, at which nothing exists.
        external: Whether weights lie in a file of their own beside it; None for where they are more than 1.5 GB.
        progress: Called with the number of bytes of each weight once it is written.

    Raises:
        GrowkitError: Where something exists at either place, or it cannot be written; nothing is left behind.
    """
    names = [sidecar(destination).name] if _is_external(model, external) else []
    with staged_files(destination, weight_bytes(model), beside=names) as folder:
        write_file(model, folder / destination.name, external=external, progress=progress)


def sidecar(path: Path) -> Path:
    """The file beside ``path`` that holds its external data."""
    return path.with_name(f"{path.name}.data")


def weight_bytes(model: ir.Model) -> int:
    """The size of the graph's weights, in bytes."""
    return sum(_size(tensor) for _, tensor in _held(model))


def write_file(
    model: ir.Model,
    path: Path,
    *,
    external: bool | None = None,
    progress: Progress = lambda written: None,
) -> None:
    """Write a model into a folder that is staged, its external data beside it, two weights in memory at most.

    Args:
        model: The model, which stays as it is. Tensors in nodes stay within them.
        path: The .onnx file; neither it nor its :func:`sidecar` exists.
        external: As for :func:`save`.
        progress: As for :func:`save`.

    Raises:
        InvalidModel: Where a weight that is made when asked for is not of its size.
        GrowkitError: Where the file would be larger than 2 GB.
    """
    weights = _weights(model, external=_is_external(model, external))
    proto = _without_data(model, weights)
    frames = [
        _frame(tensor, weight, sidecar(path).name)
        for tensor, weight in zip(proto.graph.initializer, weights, strict=True)
    ]
    with ExitStack() as files:
        main = files.enter_context(path.open("xb"))
        if any(weight.offset is not None for weight in weights):
            beside = files.enter_context(sidecar(path).open("xb"))
        main.write(_head(proto, [len(frame) + weight.inline for frame, weight in zip(frames, weights, strict=True)]))
        made = made_ahead(weight.made() for weight in weights)
        for frame, weight, tensor in zip(frames, weights, made, strict=True):
            main.write(header(GraphProto.INITIALIZER_FIELD_NUMBER, len(frame) + weight.inline) + frame)
            if weight.offset is not None:
                beside.write(bytes(weight.offset - beside.tell()))
            if weight.streamed:
                _copy(tensor, weight, main if weight.offset is None else beside)
            progress(weight.size)


def _held(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value


def _size(tensor: ir.TensorProtocol) -> int:
    return 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes


def _is_external(model: ir.Model, asked: bool | None) -> bool:
    return weight_bytes(model) > EXTERNAL_BYTES if asked is None else asked


@dataclass(frozen=True)
class _Weight:
    """A weight to be written.

    Attributes:
        value: Whose weight it is.
        tensor: The weight.
        size: Its size in bytes; 0 for texts.
        streamed: Whether its data is written by itself; texts and small ones in memory stay in the message.
        offset: Where its data lies in the sidecar, in bytes; None for in the model's own file.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    size: int
    streamed: bool
    offset: int | None

    @property
    def inline(self) -> int:
        """How many bytes of data follow its message in the model's own file."""
        return self.size if self.streamed and self.offset is None else 0

    def made(self) -> ir.TensorProtocol:
        """The weight, computed where it is one that is computed when it is written."""
        return self.tensor.raw() if isinstance(self.tensor, ir.LazyTensor) else self.tensor


def _weights(model: ir.Model, *, external: bool) -> list[_Weight]:
    """The graph's weights and where they will lie, in order."""
    weights = []
    end = 0
    for value, tensor in _held(model):
        size, offset = _size(tensor), None
        if external and size > INLINE_BYTES:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            end = offset + size
        streamed = size > INLINE_BYTES or isinstance(tensor, ir.LazyTensor | ir.ExternalTensor)
        weights.append(_Weight(value, tensor, size, streamed, offset))
    return weights


def _without_data(model: ir.Model, weights: Sequence[_Weight]) -> ModelProto:
    """The model's message, with nothing in the place of the data that is written by itself."""
    streamed = [weight for weight in weights if weight.streamed]
    try:
        for weight in streamed:
            weight.value.const_value = _stand_in(weight.tensor)
        return ir.to_proto(model)
    except ir.serde.SerdeError as error:
        raise GrowkitError(f"the model cannot be written: {_line(_first_cause(error))}") from None
    finally:
        for weight in streamed:
            weight.value.const_value = weight.tensor


def _stand_in(tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        "",
        offset=None,
        length=None,
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _frame(tensor: TensorProto, weight: _Weight, location: str) -> bytes:
    """The message of an initializer up to its data."""
    if weight.streamed:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    if weight.offset is not None:
        refer(tensor, location, weight.offset, weight.size)
    elif weight.streamed:
        return tensor.SerializeToString() + header(TensorProto.RAW_DATA_FIELD_NUMBER, weight.size)
    return tensor.SerializeToString()


def _head(proto: ModelProto, lengths: Sequence[int]) -> bytes:
    """The message of a model up to its initializers, which come last and have these lengths."""
    del proto.graph.initializer[:]
    if proto.ByteSize() > LARGEST_MESSAGE:
        raise GrowkitError(f"the model's nodes alone hold more than {LARGEST_MESSAGE:,} bytes")
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    rest = proto.SerializeToString()
    length = len(graph) + sum(len(header(GraphProto.INITIALIZER_FIELD_NUMBER, n)) + n for n in lengths)
    if len(rest) + length > LARGEST_MESSAGE:
        raise GrowkitError(f"one file holds at most {LARGEST_MESSAGE:,} bytes; got {length:,}; write external data")
    return rest + header(ModelProto.GRAPH_FIELD_NUMBER, length) + graph


def _copy(tensor: ir.TensorProtocol, weight: _Weight, file: BinaryIO) -> None:
    start = file.tell()
    cast(Any, tensor).tofile(file)  # which the protocol does not name
    if (made := file.tell() - start) != weight.size:
        raise InvalidModel(f"{weight.value.name} was made with {made} bytes; expected {weight.size}")
