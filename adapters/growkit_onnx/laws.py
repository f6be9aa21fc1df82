"""What a file must obey before anything of it is used: one function per law, and the table of them.

onnx-ir repairs much in silence: a value that nobody makes, an initializer without a name, a sparse one. Here every such
file is refused. The laws look at the protobuf message alone, never at the weights' bytes, and are as quick as reading.
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath, PureWindowsPath
from reprlib import Repr
from typing import Any, NamedTuple, cast

import onnx
import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

from growkit_specs import GrowkitError, InvalidModel, UnsupportedModel

DEEPEST = 100
"""How deeply messages may be nested: protobuf's own parsers stop there."""

MOST_NODES = 10_000_000
"""How many nodes a model may have once its functions are written out."""

HIGHEST_RANK = 64
"""How many axes numpy and torch bear."""

ONNX = "the default domain"
_BRIEF = Repr()
_BRIEF.maxstring = 100


def shown(name: object) -> str:
    """A name out of an untrusted file, on one line and not too long."""
    return _BRIEF.repr(name[:1000] if isinstance(name, str | bytes) else name)


# --- what a model consists of ----------------------------------------------------------------------------------------

FunctionKey = tuple[str, str, str]


@dataclass(frozen=True)
class Body:
    """A body of nodes: the model's graph, a graph in a node's attribute, or a function.

    Attributes:
        where: Which one, in words.
        proto: Its message.
        root: The function it belongs to; None in the model's graph.
        outer: The body around it, whose values it sees.
    """

    where: str
    proto: GraphProto | FunctionProto
    root: FunctionProto | None = None
    outer: Body | None = None

    @cached_property
    def inputs(self) -> list[str]:
        """The names of its inputs."""
        if isinstance(self.proto, FunctionProto):
            return list(self.proto.input)
        return [value.name for value in self.proto.input]

    @cached_property
    def outputs(self) -> list[str]:
        """The names of its outputs."""
        if isinstance(self.proto, FunctionProto):
            return list(self.proto.output)
        return [value.name for value in self.proto.output]

    @cached_property
    def initializers(self) -> list[TensorProto]:
        """Its initializers; a function has none."""
        return [] if isinstance(self.proto, FunctionProto) else list(self.proto.initializer)

    @cached_property
    def computed(self) -> list[str]:
        """The names that its nodes make, in order."""
        return [name for node in self.proto.node for name in node.output if name]

    @cached_property
    def made(self) -> frozenset[str]:
        """The names of all its values."""
        return frozenset((*self.inputs, *(tensor.name for tensor in self.initializers), *self.computed))

    def sees(self, name: str) -> bool:
        """Whether a node in it may read ``name``."""
        body: Body | None = self
        while body is not None:
            if name in body.made:
                return True
            body = body.outer
        return False

    def attributes(self) -> Iterator[tuple[Place, AttributeProto]]:
        """Every attribute of its nodes, and where it stands."""
        for node in self.proto.node:
            for attribute in node.attribute:
                yield Place(self, node, attribute.name), attribute
        if isinstance(self.proto, FunctionProto):
            for attribute in self.proto.attribute_proto:
                yield Place(self, None, attribute.name, "the default of attribute"), attribute

    def tensors(self) -> Iterator[tuple[Place, TensorProto]]:
        """Its initializers and the tensors among its attributes, and where they stand; not those of bodies within."""
        for tensor in self.initializers:
            yield Place(self, None, tensor.name, "initializer"), tensor
        for place, attribute in self.attributes():
            if attribute.type == AttributeProto.TENSOR and not attribute.ref_attr_name:
                yield place, attribute.t
            yield from ((place, tensor) for tensor in attribute.tensors)

    def within(self) -> Iterator[Body]:
        """The bodies in its nodes' attributes."""
        for place, attribute in self.attributes():
            graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH and not attribute.ref_attr_name else []
            for graph in (*graphs, *attribute.graphs):
                yield Body(f"the graph in {place}" if self.outer is None else "a nested graph", graph, self.root, self)


class Place(NamedTuple):
    """Where something stands; put into words only where they are needed.

    Attributes:
        body: The body it is in.
        node: The node, where it is one or in one.
        name: The name of what it is in the node or the body; None for the node itself.
        kind: What it is, in words.
    """

    body: Body
    node: NodeProto | None = None
    name: str | None = None
    kind: str = "attribute"

    def __str__(self) -> str:
        words = [] if self.name is None else [f"{self.kind} {shown(self.name)}"]
        if self.node is not None:
            name = self.node.name or next(iter(self.node.output), "")
            words.append(f"node {shown(name)} ({shown(self.node.op_type)[1:-1]})")
        return " of ".join((*words, self.body.where))


@dataclass(frozen=True)
class Contents:
    """A model as it was stored.

    Attributes:
        model: The message.
        folder: Where its external data lies; None for a model in memory, which can have none.
        own: The location of data that was left where it lies in the model's own file; empty where none was.
    """

    model: ModelProto
    folder: Path | None = None
    own: str = ""

    @cached_property
    def bodies(self) -> list[Body]:
        """Every body of nodes, outer ones before what is in them."""
        model = self.model
        found = [
            Body("the graph", model.graph),
            *(Body(f"function {shown(function.name)}", function, function) for function in model.functions),
        ]
        for body in found:  # grows while it is walked
            found.extend(body.within())
        return found

    @cached_property
    def functions(self) -> dict[FunctionKey, FunctionProto]:
        """The model's functions."""
        return {_key(function.domain, function.name, function.overload): function for function in self.model.functions}

    def tensors(self) -> Iterator[tuple[Place, TensorProto]]:
        """Every tensor, and where it stands."""
        for body in self.bodies:
            yield from body.tensors()


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _key(domain: str, name: str, overload: str) -> FunctionKey:
    return _domain(domain), name, overload


# --- the laws --------------------------------------------------------------------------------------------------------


def text_is_text(contents: Contents) -> None:
    """Every text is UTF-8, and nothing is nested deeper than a protobuf can be read back."""
    pending: list[tuple[Any, int]] = [(contents.model, 0)]
    while pending:
        message, depth = pending.pop()
        if depth > DEEPEST:
            raise InvalidModel(f"graphs are nested too deeply: more than {DEEPEST} messages within each other")
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                # A text that cannot be decoded comes as bytes.
                for text in [value] if isinstance(value, str | bytes) else value:
                    if isinstance(text, bytes):
                        raise InvalidModel(f"{field.full_name} {shown(text)} is no UTF-8; the file is damaged")
            elif field.type == field.TYPE_MESSAGE:
                children = [value] if hasattr(value, "ListFields") else value
                pending.extend((child, depth + 1) for child in children)


def there_is_a_graph(contents: Contents) -> None:
    """The file holds a graph that gives something."""
    if not contents.model.HasField("graph"):
        raise InvalidModel("it holds no graph; expected an ONNX model")
    if not contents.model.graph.output:
        raise InvalidModel("the graph has no outputs")


def versions_are_known(contents: Contents) -> None:
    """The format and every imported opset are versions that the installed onnx knows."""
    model = contents.model
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        raise UnsupportedModel(
            f"its ir_version is {model.ir_version}; expected 3 to {onnx.IR_VERSION}; "
            "export it again, or install a newer onnx"
        )
    newest = onnx.defs.onnx_opset_version()
    imports = [("the model", model.opset_import)]
    imports += [(f"function {shown(function.name)}", function.opset_import) for function in model.functions]
    for where, opsets in imports:
        for opset in opsets:
            if _domain(opset.domain) == "" and not 1 <= opset.version <= newest:
                raise UnsupportedModel(
                    f"{where} imports opset {opset.version}; expected 1 to {newest}; "
                    "export it with an older opset, or install a newer onnx"
                )
        domain, count = next(iter(Counter(_domain(opset.domain) for opset in opsets).most_common(1)), ("", 0))
        if count > 1:
            raise InvalidModel(f"{where} imports the opset of {shown(domain) if domain else ONNX} {count} times")


def opsets_are_imported(contents: Contents) -> None:
    """Every node is of a domain that its body imports."""
    for body in contents.bodies:
        imports = {_domain(opset.domain) for opset in (body.root or contents.model).opset_import}
        for node in body.proto.node:
            if _domain(node.domain) not in imports:
                domain = shown(node.domain) if _domain(node.domain) else ONNX
                raise InvalidModel(f"{Place(body, node)} is of {domain}, whose opset is not imported")


def nothing_is_lost(contents: Contents) -> None:
    """Nothing in it is of a kind that would be dropped when it is written again."""
    lost = "store it in the ordinary form"
    if contents.model.training_info:
        raise UnsupportedModel("it holds training_info; expected a model for inference; export it again without")
    for body in contents.bodies:
        if isinstance(body.proto, GraphProto) and body.proto.sparse_initializer:
            name = shown(body.proto.sparse_initializer[0].values.name)
            raise UnsupportedModel(f"the initializer {name} of {body.where} is sparse; {lost}")
        for where, attribute in body.attributes():
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise UnsupportedModel(f"{where} is sparse; {lost}")
    for where, tensor in contents.tensors():
        if tensor.HasField("segment"):
            raise UnsupportedModel(f"{where} is stored in segments; {lost}")


def names_are_unique(contents: Contents) -> None:
    """No name is given twice in a body; an input may have an initializer, its default."""
    for body in contents.bodies:
        named = [tensor.name for tensor in body.initializers]
        if "" in named:
            raise InvalidModel(f"the initializer {named.index('')} of {body.where} has no name")
        makers = {
            "inputs": body.inputs,
            "initializers": named,
            "nodes": [*body.computed, *frozenset((*body.inputs, *named))],
        }
        for kind, names in makers.items():
            _refuse_repeated(names, kind, body.where)
        for node in body.proto.node:
            _refuse_repeated([attribute.name for attribute in node.attribute], "attributes", Place(body, node))
    _refuse_repeated(
        [".".join(_key(f.domain, f.name, f.overload)) for f in contents.model.functions], "functions", "it"
    )


def _refuse_repeated(names: list[str], kind: str, where: str | Place) -> None:
    if len(set(names)) < len(names):
        name = Counter(names).most_common(1)[0][0]
        raise InvalidModel(f"the name {shown(name)} is given twice by the {kind} of {where}")


def values_are_made(contents: Contents) -> None:
    """Whatever a node reads or a body gives is made by something."""
    for body in contents.bodies:
        for node in body.proto.node:
            for name in node.input:
                if name and not body.sees(name):
                    raise InvalidModel(f"{Place(body, node)} reads {shown(name)}, which nothing makes")
        for name in body.outputs:
            if name not in body.made:
                raise InvalidModel(f"{body.where} gives {shown(name)}, which nothing makes")


def functions_end(contents: Contents) -> None:
    """No function calls itself, however indirectly, and all written out they are no more than can be handled."""
    calls: dict[FunctionKey | None, Counter[FunctionKey]] = {key: Counter() for key in (None, *contents.functions)}
    nodes: Counter[FunctionKey | None] = Counter()
    for body in contents.bodies:
        caller = None if body.root is None else _key(body.root.domain, body.root.name, body.root.overload)
        called = (_key(node.domain, node.op_type, node.overload) for node in body.proto.node)
        calls[caller].update(key for key in called if key in contents.functions)
        nodes[caller] += len(body.proto.node)
    try:
        for key in TopologicalSorter(calls).static_order():
            nodes[key] += sum(nodes[callee] * count for callee, count in calls[key].items())
            nodes[key] = min(nodes[key], MOST_NODES + 1)
    except CycleError as error:
        names = " -> ".join(shown(key[1]) for key in error.args[1][:5])
        raise InvalidModel(f"a function calls itself: {names}") from None
    if max(nodes.values()) > MOST_NODES:
        raise UnsupportedModel(f"its functions, written out, have more than {MOST_NODES:,} nodes")


_FLOATS = "epsilon scale alpha mask_filter_value softcap"
_INTS = (
    "axis num_heads kv_num_heads unidirectional do_rotary rotary_interleaved interleaved is_packed_batching stash_type "
    "local_window_size rotary_embedding_dim past_present_share_buffer transA transB transBatchA transBatchB"
)
CONTRIB = {
    **dict.fromkeys(_FLOATS.split(), AttributeProto.FLOAT),
    **dict.fromkeys(_INTS.split(), AttributeProto.INT),
    "qkv_hidden_sizes": AttributeProto.INTS,
}
"""The types of attributes of ONNX Runtime's own operators, whose definitions the onnx package does not hold."""


def attributes_fit_operators(contents: Contents) -> None:
    """Every attribute of a known operator is of the type that the operator's definition says."""
    for body in contents.bodies:
        opsets = {_domain(o.domain): o.version for o in (body.root or contents.model).opset_import}
        for node in body.proto.node:
            expected = _attribute_types(node.op_type, _domain(node.domain), opsets[_domain(node.domain)])
            for attribute in node.attribute:
                if attribute.ref_attr_name or attribute.type == expected.get(attribute.name, attribute.type):
                    continue
                wanted, got = (AttributeProto.AttributeType.Name(t) for t in (expected[attribute.name], attribute.type))
                raise InvalidModel(f"{Place(body, node, attribute.name)} is of type {got}; expected {wanted}")


@cache
def _attribute_types(operator: str, domain: str, version: int) -> Mapping[str, int]:
    """The types of an operator's attributes, as far as they are known."""
    if domain == "com.microsoft":
        return CONTRIB
    try:
        schema = onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return {}
    return {name: cast(Any, attribute.type).value for name, attribute in schema.attributes.items()}


def attributes_have_values(contents: Contents) -> None:
    """Every attribute says what it is, and its texts are UTF-8."""
    for body in contents.bodies:
        for where, attribute in body.attributes():
            if attribute.type == AttributeProto.UNDEFINED and not attribute.ref_attr_name:
                raise InvalidModel(f"{where} has no type")
            try:
                for text in attribute.strings:
                    text.decode()
            except UnicodeDecodeError:
                raise InvalidModel(f"{where} holds {shown(text)}, which is no UTF-8") from None


def types_are_known(contents: Contents) -> None:
    """Every declared type is a tensor's, or a sequence or an optional of tensors, of a known element type and shape."""
    for body in contents.bodies:
        proto = body.proto
        declared = [*proto.value_info]
        if isinstance(proto, GraphProto):
            declared += [*proto.input, *proto.output]
        for value in declared:
            _check_type(Place(body, None, value.name, "the type of"), value.type)
        for where, attribute in body.attributes():
            for kind in (*([attribute.tp] if attribute.HasField("tp") else []), *attribute.type_protos):
                _check_type(where, kind)


def _check_type(where: Place, kind: TypeProto) -> None:
    while (form := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
        kind = getattr(kind, form).elem_type
        if kind.WhichOneof("value") is None:
            raise InvalidModel(f"{where} does not say of what it is a {form.removesuffix('_type')}")
    if form is None:
        return
    if form not in ("tensor_type", "sparse_tensor_type"):
        raise UnsupportedModel(f"{where} is a {form}; expected a tensor, a sequence or an optional")
    tensor = getattr(kind, form)
    _element_type(where, tensor.elem_type)
    for dim in tensor.shape.dim:
        if dim.dim_value < 0:
            raise InvalidModel(
                f"{where} has a negative size, {dim.dim_value}; a size that varies has a name or nothing"
            )


def _element_type(where: Place, number: int) -> ir.DataType:
    try:
        return ir.DataType(number)
    except ValueError:
        raise UnsupportedModel(f"{where} has the unknown element type {number}; install a newer onnx-ir") from None


def tensors_are_whole(contents: Contents) -> None:
    """Every tensor's data, stored once, is as long as its shape and its element type say."""
    for where, tensor in contents.tensors():
        dtype = _element_type(where, tensor.data_type)
        if dtype == ir.DataType.UNDEFINED:
            raise InvalidModel(f"{where} has no element type")
        dims = list(tensor.dims)
        if any(dim < 0 for dim in dims) or len(dims) > HIGHEST_RANK or math.prod(max(dim, 1) for dim in dims) >= 2**60:
            raise InvalidModel(f"{where} has the shape {shown(dims)}, which no tensor can have")
        expected, stored = _lengths(dtype, math.prod(dims)), _stored(tensor)
        if len(stored) > 1:
            raise InvalidModel(f"{where} is stored more than once: {' and '.join(stored)}")
        for form, length in stored.items():
            if form not in expected or length not in (None, expected[form]):
                raise InvalidModel(
                    f"{where} has shape {shown(dims)} as {dtype.name}, {expected.get(form, 0)} in {form}; got {length}"
                )
        if not stored and math.prod(dims):
            raise InvalidModel(f"{where} has shape {shown(dims)} and no data")


EXTERNAL = "external_data"
_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def _stored(tensor: TensorProto) -> dict[str, int | None]:
    """The forms in which a tensor's data is stored, and how many bytes or entries; None for unsaid."""
    stored: dict[str, int | None] = {form: len(held) for form in _TYPED if (held := getattr(tensor, form))}
    if length := len(tensor.raw_data):
        stored["raw_data"] = length
    if tensor.data_location == TensorProto.EXTERNAL:
        stored[EXTERNAL] = _number(tensor, "length")
    return stored


def _lengths(dtype: ir.DataType, count: int) -> dict[str, int]:
    """How much there must be in each form that tensors of ``count`` elements may be stored in."""
    field = onnx.helper.tensor_dtype_to_field(dtype.value)
    if dtype == ir.DataType.STRING:
        return {field: count}
    size = math.ceil(count * dtype.bitwidth / 8)
    entries = {2: size, 4: size}.get(dtype.bitwidth, count)  # whole bytes of them in an entry
    parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
    return {"raw_data": size, EXTERNAL: size, field: entries * parts}


# --- external data ---------------------------------------------------------------------------------------------------


def external_data_is_there(contents: Contents) -> None:
    """External data lies in the model's own folder, in a regular file that is long enough."""
    size_of = cache(_size_of)
    for where, tensor in contents.tensors():
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = _external(tensor).get("location", "")
        if contents.own and location == contents.own:
            continue
        if contents.folder is None:
            raise InvalidModel(
                f"{where} lies in a file, and a model in memory has no folder; load the .onnx file itself"
            )
        size, named = size_of(contents.folder, location)
        start = _number(tensor, "offset") or 0
        length = _lengths(ir.DataType(tensor.data_type), math.prod(tensor.dims))[EXTERNAL]
        if start + length > size:
            raise InvalidModel(f"{where} ends at byte {start + length} of {named}, which has {size}; fetch it again")


def _external(tensor: TensorProto) -> dict[str, str]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):
        raise InvalidModel(f"the data of {shown(tensor.name)} is said to lie in more than one place")
    return entries


def _number(tensor: TensorProto, key: str) -> int | None:
    text = _external(tensor).get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise InvalidModel(f"the external data of {shown(tensor.name)} has the {key} {shown(text)}; expected a number")
    return int(text)


def _size_of(folder: Path, location: str) -> tuple[int, str]:
    """The size of a file of external data, and its name in words."""
    named = f"the external data {shown(location)}"
    forms = (PurePosixPath(location), PureWindowsPath(location))
    if not location or "\0" in location or any(form.anchor or ".." in form.parts for form in forms):
        raise InvalidModel(f"{named} is not a path within the model's folder; nothing outside of it is read")
    real = Path(os.path.realpath(folder / location))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise InvalidModel(
            f"{named} is a link that leads out of the model's folder, to {shown(str(real))}; "
            "put the file itself there, nothing outside is read"
        )
    try:
        status = real.stat()
    except OSError as error:
        raise InvalidModel(f"{named} cannot be read: {error.strerror}; put it beside the model") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModel(f"{named} is not a regular file")
    if status.st_nlink > 1:  # onnx-ir reads none of these: one may stand for a file elsewhere
        raise InvalidModel(f"{named} has {status.st_nlink} hard links; put a copy there")
    return status.st_size, named


LAWS = (
    text_is_text,
    there_is_a_graph,
    versions_are_known,
    names_are_unique,
    values_are_made,
    opsets_are_imported,
    functions_end,
    attributes_have_values,
    attributes_fit_operators,
    nothing_is_lost,
    types_are_known,
    tensors_are_whole,
    external_data_is_there,
)
"""Every law, in an order in which each may rely on those before it."""


def check(contents: Contents, source: str) -> None:
    """Hold a model to every law.

    Args:
        contents: The model as it was stored.
        source: What it is called in messages.

    Raises:
        InvalidModel: Where it contradicts itself, saying where.
        UnsupportedModel: Where it holds what is not understood here, or is newer than the installed onnx.
    """
    try:
        for law in LAWS:
            law(contents)
    except GrowkitError as error:
        raise type(error)(f"{source}: {error}") from None
