"""What a handler of an ONNX operator knows and may ask: the vocabulary of the operator tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from growkit_onnx.laws import shown
from growkit_specs import UnsupportedModel

# torch has no arithmetic on wide unsigned integers: these are held in the next signed type.
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.int32,
    ir.DataType.UINT32: torch.int64,
    ir.DataType.UINT64: torch.int64,
}

# The domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"

T = TypeVar("T")
Numbers = list[Any]
Handler = Callable[..., Any]


class DataDependent(UnsupportedModel):
    """A shape or index that depends on numbers an abstract run does not have."""


def torch_dtype(data_type: int, where: str) -> torch.dtype:
    """The torch type that holds an ONNX element type.

    Raises:
        UnsupportedModel: For strings, complex numbers, and floats and integers of 8 bits and fewer that torch lacks.
    """
    try:
        return DTYPES[ir.DataType(data_type)]
    except KeyError:
        name = ir.DataType(data_type).name
        raise UnsupportedModel(
            f"{where} has element type {name}; expected a float of 16 to 64 bits, int or bool"
        ) from None


def run_type(dtype: torch.dtype, floating: torch.dtype | None) -> torch.dtype:
    """The type in which a tensor of ``dtype`` is run where all floats run as ``floating``, or as they are if None."""
    return floating if floating is not None and dtype.is_floating_point else dtype


def as_torch(tensor: ir.TensorProtocol, where: str) -> Tensor:
    """The numbers of an ONNX tensor, copied."""
    dtype = torch_dtype(tensor.dtype, where)
    array = np.array(tensor.numpy())  # a copy: what is mapped from a file is read-only, and torch warns of that
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(dtype)
    return torch.from_numpy(array.astype(np.int64) if array.dtype in (np.uint16, np.uint32, np.uint64) else array).to(
        dtype
    )


def data_type(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type of a torch type."""
    return next(ir.DataType(each) for each, held in DTYPES.items() if held == dtype)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor; numpy knows bfloat16 by way of ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        viewed: np.ndarray = tensor.cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return viewed
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


def named(node: ir.Node) -> str:
    """How a message calls a node: its name, or what it computes, and its operator."""
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"node {shown(node.name or (node.outputs[0].name if node.outputs else ''))} ({shown(operator)[1:-1]})"


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def used(node: ir.Node) -> Iterator[ir.Value]:
    """What a node needs: its inputs, and what its subgraphs take from around them."""
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
        for inner in graph:
            yield from used(inner)
        yield from graph.outputs


@dataclass(frozen=True)
class Operation:
    """What a handler knows of the node it runs, apart from its inputs.

    Attributes:
        node: The node.
        opset: The version of the standard operator set.
        dtype: The type in which all floating point runs; None leaves every tensor its own.
    """

    node: ir.Node
    opset: int
    dtype: torch.dtype | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute's value, or ``default`` where it is not set."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.is_ref():
            raise UnsupportedModel(
                f"{named(self.node)} takes its attribute '{name}' from a function; inline functions first"
            )
        return attribute.value

    def refuse(self, what: str) -> UnsupportedModel:
        """An error that names the node and the part of its meaning that is not supported."""
        return UnsupportedModel(f"{named(self.node)}: {what} is not supported")

    def choice(self, name: str, table: Mapping[str, T], default: str | None = None) -> T:
        """What a table holds for an attribute's value; refuses values that it does not hold."""
        value = self.get(name, default)
        if value not in table:
            raise self.refuse(f"{name}={value!r}")
        return table[value]

    def allow(self, **defaults: Any) -> None:
        """Refuses attributes that have another value than the one given here, which is their default."""
        for name, default in defaults.items():
            if self.get(name, default) != default:
                raise self.refuse(f"{name}={self.get(name)!r}")

    def read(self, tensor: Tensor) -> Numbers:
        """A tensor's entries as Python numbers.

        Raises:
            DataDependent: Where the tensor is abstract.
        """
        if tensor.is_meta:
            raise DataDependent(f"{named(self.node)} needs numbers that depend on the model's weights or float inputs")
        return torch.atleast_1d(tensor.detach()).flatten().tolist()

    def floating(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which a tensor of ``dtype`` is run: another one only for floats."""
        return run_type(dtype, self.dtype)

    def tensor(self, value: ir.TensorProtocol) -> Tensor:
        """A tensor attribute, in the type in which it is run."""
        found = as_torch(value, named(self.node))
        return found.to(self.floating(found.dtype))


@dataclass(frozen=True)
class Entry:
    """One operator: its handler, which inputs the handler reads as numbers, and which of these need not be whole."""

    run: Handler
    reads: frozenset[int]
    floats: frozenset[int] = frozenset()


class Table(dict[tuple[str, str], Entry]):
    """Operators by domain and name."""

    def add(
        self, *names: str, domain: str = "", reads: Sequence[int] = (), floats: Sequence[int] = ()
    ) -> Callable[[Handler], Handler]:
        """A decorator that enters a handler under these names."""

        def enter(handler: Handler) -> Handler:
            for name in names:
                self[domain, name] = Entry(handler, frozenset(reads), frozenset(floats))
            return handler

        return enter
