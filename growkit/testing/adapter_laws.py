"""The laws of adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from growkit.adapters import Adapter
from growkit.grow import grow
from growkit.model import Model
from growkit.plan import plan
from growkit.testing.function_law import Runnable, assert_preserved
from growkit.testing.law import assert_equal, broken
from growkit_specs import GrowkitError, InvalidTarget, LayerGraph, Target, Tensor, UnsupportedFormat
from growkit_specs.layer_graph import slot_key

DOUBLED = ("hidden", "layers", "ffn", "vocab")
"""The sizes that an adapter is tried with at twice their value; hidden takes heads and ffn with it."""


def assert_adapter_conforms(adapter: Adapter, source: Any, destination_dir: str | Path) -> tuple[str, ...]:
    """Hold an adapter to its protocol's laws, on one source it matches.

    - *matches*: it says that it reads the source.
    - *every parameter once*: graph and weights hold the same names, each tensor has the shape its layout says, finite
      entries, and the element type the graph says.
    - *ties*: what the source holds in memory once is one tensor, or tied.
    - *forward*: outputs are finite, and those that live in a space that grows are there and of its size.
    - *identity*: growing to no other size gives bit-equal weights and equal outputs.
    - *growth*: models of twice the width, depth, MLP or vocabulary have finite outputs, and the same ones wherever the
      plan promises it. It is here that an axis with its factors in the wrong order shows.
    - *written and read back*: the same graph and weights, as it was and grown; nothing stands at the destination while
      ``check`` runs, or after it has refused.
    - *source unmodified*: the files, the state dict, the weights are what they were, after each of the laws.

    Args:
        adapter: The adapter; any object with the protocol of :class:`~growkit.adapters.Adapter`.
        source: What it reads: a path, or the framework's own object. Small, or this takes long.
        destination_dir: An existing folder to write into; it is left as it was.

    Returns:
        The laws that could not be tried, each with its reason: writing, where the adapter raises
        :class:`~growkit_specs.errors.UnsupportedFormat`; a growth that the format has no config for.

    Raises:
        AssertionError: For the first law that is broken; one message with the tensor or output, expected and got.
    """
    source = Path(source) if isinstance(source, str) else source
    before = _contents(source)
    if not adapter.matches(source):
        raise broken("matches", f"adapter '{adapter.name}'", "True for the source", False)
    model = adapter.read(source)
    skipped: dict[str, None] = {}
    with tempfile.TemporaryDirectory(dir=destination_dir, prefix="conforms-") as folder:
        for name, law in _LAWS.items():
            try:
                skipped |= dict.fromkeys(law(name, model, Path(folder)))
            except GrowkitError as error:
                raise broken(name, f"adapter '{adapter.name}'", "no refusal", error) from error
            _assert_unmodified(before, _contents(source), name)
    return tuple(skipped)


def _assert_unmodified(before: Mapping[str, str], after: Mapping[str, str], law: str) -> None:
    for part in {**before, **after}:
        if before.get(part) != after.get(part):
            what = "something else" if part in before and part in after else "gone" if part in before else "new"
            raise broken("source unmodified", part, "what it was before", f"{what} after '{law}'")


def _contents(source: Any) -> dict[str, str]:
    """A fingerprint of each part of a source, without any adapter: files, a state dict, a message, or weights."""
    if isinstance(source, Path):
        files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
        parts = {str(path): path.read_bytes() for path in files}
    elif hasattr(source, "state_dict"):
        # Through float64, which every element type fits into, because numpy lacks some of them.
        state = source.state_dict().items()
        parts = {name: np.asarray(tensor.detach().cpu().double()).tobytes() for name, tensor in state}
    elif hasattr(source, "SerializeToString"):
        parts = {"the message": source.SerializeToString(deterministic=True)}
    else:
        weights = source.weights if isinstance(source, Model) else source if isinstance(source, Mapping) else {}
        parts = {str(name): np.asarray(array).tobytes() for name, array in weights.items()}
    return {name: sha256(content).hexdigest() for name, content in parts.items()}


def _each_once(law: str, model: Model, folder: Path) -> tuple[str, ...]:
    tensors: dict[str, Tensor] = {}
    for tensor in model.graph.tensors():
        if tensor.name in tensors:
            raise broken(law, tensor.name, "one place in the graph", f"{tensors[tensor.name].key} and {tensor.key}")
        tensors[tensor.name] = tensor
    for name in (*tensors, *model.weights):
        if (name in tensors) != (name in model.weights):
            there, missing = ("graph", "weights") if name in tensors else ("weights", "graph")
            raise broken(law, name, "a tensor in the graph and in the weights", f"it in the {there}, not in {missing}")
    arrays = {name: np.asarray(model.weights[name]) for name in tensors}
    for name, tensor in tensors.items():
        array = arrays[name]
        if array.shape != tensor.shape:
            raise broken(law, f"{name} ({tensor.parameter.layout})", list(tensor.shape), list(array.shape))
        if str(array.dtype) != tensor.parameter.dtype:
            raise broken(law, name, tensor.parameter.dtype, array.dtype)
        if not np.isfinite(array.astype(np.float64)).all():
            raise broken(law, name, "finite entries", "NaN or infinity")
    return ()


def _ties(law: str, model: Model, folder: Path) -> tuple[str, ...]:
    """What a source holds once is one tensor; the tensors of a grown model may well share their memory."""
    arrays = {name: np.asarray(model.weights[name]) for name in model.weights}
    starts = sorted((array.__array_interface__["data"][0], name) for name, array in arrays.items() if array.size)
    for (start, name), (other, again) in pairwise(starts):
        if start == other:
            raise broken(law, f"{name} and {again}", "a tie in the graph, as they are one tensor", "no tie")
    return ()


def _runs(law: str, model: Model, folder: Path) -> tuple[str, ...]:
    """Outputs are finite; those in a space that grows have its size. Of the others a class may lack some."""
    graph = model.graph
    growing = [port for port in graph.outputs if port.space and graph.kinds[port.space] != "fixed"]
    for outputs in _outputs(model, model):
        for name, size in ((port.name, graph.sizes[str(port.space)]) for port in growing):
            if name not in outputs:
                raise broken(law, f"output {name}", "one, as the graph has it", ", ".join(sorted(outputs)) or "none")
            if outputs[name].shape[-1] != size:
                raise broken(law, f"output {name}", f"{size} entries on its last axis", list(outputs[name].shape))
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                raise broken(law, f"output {name}", "finite entries", "NaN or infinity")
        if not outputs:
            raise broken(law, "the model", "an output", "none")
    return ()


def _outputs(model: Model, source: Model) -> Iterator[dict[str, np.ndarray]]:
    """What a model gives for inputs of ``source``."""
    forward = model.adapter.forward(model)
    for inputs in source.adapter.inputs(source, 0, forward):
        yield {name: np.asarray(value) for name, value in forward(inputs).items()}


def _identity(law: str, model: Model, folder: Path) -> tuple[str, ...]:
    same = grow(model)
    _assert_same_model(law, model, same)
    pairs = zip(*(_outputs(each, model) for each in (model, same)), strict=True)
    for before, after in pairs:
        for name, value in before.items():
            assert_equal(law, f"output {name}", value, after.get(name, np.empty(0, value.dtype)))
    return ()


def _writes(law: str, model: Model, folder: Path) -> Iterator[str]:
    yield from _written(law, model, folder / f"same{model.adapter.suffix}")


def _grows(law: str, model: Model, folder: Path) -> Iterator[str]:
    for name in DOUBLED:
        if name not in {*model.graph.sizes, "layers"}:
            continue
        try:
            planned = plan(model, Target.of(**{name: "2x"}))
        except InvalidTarget as error:
            yield f"{law} of {name}: {error}"
            continue
        large = grow(model, planned)
        _each_once(f"{law} of {name}", large, folder)
        _runs(f"{law} of {name}", large, folder)
        if planned.preserving:
            assert_preserved(f"{law} of {name}", Runnable(model), Runnable(large))
        yield from _written(f"{law} of {name}, written and read back", large, folder / f"{name}{model.adapter.suffix}")


class _Refused(Exception):
    """What a ``check`` raises to see that nothing is left behind."""


def _written(law: str, model: Model, path: Path) -> Iterator[str]:
    seen: list[Model] = []

    def refuse(written: Model) -> None:
        raise _Refused

    def check(written: Model) -> None:
        if path.exists():
            raise broken(law, str(path.name), "nothing there until the check is done", "something")
        seen.append(written)

    def write(check: Callable[[Model], None]) -> None:
        model.adapter.write(model, model.origin, path, lambda count: None, check)

    try:
        write(refuse)
    except UnsupportedFormat as error:
        yield f"writing: {error}"
        return
    except _Refused:
        pass
    else:
        raise broken(law, "the check", "its exception to be raised on", "none")
    if path.exists():
        raise broken(law, path.name, "nothing there after the check refused", "something")
    write(check)
    if not seen:
        raise broken(law, "the check", "one call with the written model", "none")
    _assert_same_model(law, model, model.adapter.read(path))


def _assert_same_model(law: str, expected: Model, got: Model) -> None:
    """The same graph but for the tensors' names, which a format may spell otherwise, and bit-equal weights."""
    for part, before, after in _differences(expected.graph, got.graph):
        raise broken(law, part, before, after)
    names = {(tensor.key, tensor.layer): tensor.name for tensor in got.graph.tensors()}
    for tensor in expected.graph.tensors():
        name = names[tensor.key, tensor.layer]
        if name not in got.weights:
            raise broken(law, tensor.name, "a tensor", "none")
        assert_equal(law, tensor.name, expected.weights[tensor.name], got.weights[name])


def _differences(expected: LayerGraph, got: LayerGraph) -> Iterator[tuple[str, object, object]]:
    """``(part, expected, got)`` for each part of two graphs that differs."""
    for part in ("architecture", "sizes", "kinds", "depths", "inputs", "outputs", "attributes"):
        if getattr(expected, part) != getattr(got, part):
            yield f"the graph's {part}", getattr(expected, part), getattr(got, part)
    before, after = _facts(expected), _facts(got)
    for key in before | after:
        if not _same(before.get(key), after.get(key)):
            yield key, before.get(key), after.get(key)


def _same(a: object, b: object) -> bool:
    """Whether two facts are the same; numbers up to float32, in which a format may keep them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return isclose(a, b, rel_tol=np.finfo(np.float32).eps)
    return a == b


def _facts(graph: LayerGraph) -> dict[str, object]:
    """What a graph says of each layer and slot, whatever its tensors are called."""
    slots = {
        parameter.name: slot_key(stack, layer.name, parameter.slot)
        for stack, layer in graph.walk()
        for parameter in layer.parameters
    }
    facts: dict[str, object] = {}
    for stack, layer in graph.walk():
        facts[f"layer {stack.name if stack else ''}/{layer.name}"] = layer.model_dump(exclude={"parameters"})
        for parameter in layer.parameters:
            tie = slots[parameter.tied_to] if parameter.tied_to is not None else None
            facts[slots[parameter.name]] = (parameter.layout, parameter.dtype, f"tied to {tie}" if tie else "not tied")
    return facts


_LAWS: dict[str, Callable[[str, Model, Path], Iterable[str]]] = {
    "every parameter once": _each_once,
    "ties": _ties,
    "forward": _runs,
    "identity": _identity,
    "written and read back": _writes,
    "growth": _grows,
}
"""The laws by name. Each is told its name, and gives what it could not try."""
