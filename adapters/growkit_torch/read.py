"""Reading: a model directory or a module becomes a layer graph with lazy weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from growkit.adapters import Adapter
from growkit.model import Growth, LazyWeights, Model
from growkit.operator import GrowthOperator
from growkit.verify import generated_inputs
from growkit_specs import Architecture, InvalidModel, LayerGraph, Recipe, Tensor, UnsupportedModel
from growkit_specs.layout import axis_size, spaces_of
from growkit_torch.libraries import Library, described, introspected, library_named
from growkit_torch.safetensors_file import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OPERATOR = "growkit_operator.safetensors"
RECIPE = "growkit_recipe.yaml"


@dataclass(frozen=True)
class Origin:
    """Where a torch model came from.

    Attributes:
        config: Its config.
        class_name: Its class.
        architecture: The architecture file that reads it.
        path: Its directory, where it has one.
        module: The module, where it was read from memory.
        document: The contents of its ``config.json``, as far as they are not its config.
    """

    config: Mapping[str, Any]
    class_name: str
    architecture: Architecture
    path: Path | None = None
    module: Any = None
    document: Mapping[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> Library:
        """The library of its class."""
        return library_named(self.architecture.library)

    def inputs(self, graph: LayerGraph, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Inputs made from the graph's ports."""
        return generated_inputs(graph, seed)

    def resized(self, graph: LayerGraph, operator: GrowthOperator) -> Origin:
        """The origin of what an operator makes of this model: the same, with its config grown.

        Raises:
            InvalidTarget: Where the architecture's config cannot express the sizes.
        """
        epsilons = {
            str(layer.attributes["epsilon_key"]): float(layer.attributes["epsilon"])  # type: ignore[arg-type]
            for _, layer in graph.walk()
            if "epsilon_key" in layer.attributes
        }
        config = self.architecture.grown_config(
            self.config,
            graph.sizes,
            {stack: operator.layer_map(stack) for stack in graph.depths},
            epsilons={k: e for k, e in epsilons.items() if e != self.architecture.value(self.config, k)},
            untied=bool(operator.untied),
        )
        stored = next(iter(graph.tensors())).parameter.dtype
        config.update({key: stored for key in ("dtype", "torch_dtype") if config.get(key)})
        return replace(self, config=config)


def read_directory(adapter: Adapter, path: Path) -> Model:
    """Read a directory with ``config.json`` and safetensors; headers only, the weights when they are asked for.

    Raises:
        GrowkitError: Where anything is missing, contradictory or not understood.
    """
    if path.is_file():
        raise InvalidModel(f"{path}: a config has no weights; expected the model's directory")
    told = described(_json(path / "config.json"))
    stored = _stored_tensors(path)
    class_name = told.class_name or _class_of(told.architecture, stored, path)
    shapes = {name: (tuple(t.shape), np.dtype(t.dtype)) for name, t in stored.items()}
    graph, names = _fitted_graph(told.architecture, told.config, class_name, shapes, str(path))
    _refuse_broken_ties(graph, stored, path)
    weights = LazyWeights({name: stored[name] for name in names}, lambda tensor: tensor.load())
    origin = Origin(told.config, class_name, told.architecture, path=path, document=told.document)
    return Model(graph, weights, adapter, origin, _growth_beside(path))


def read_module(adapter: Adapter, module: Any) -> Model:
    """Read a module of a known architecture; its tensors are seen as numpy arrays that share their memory."""
    told = introspected(module)
    state = module.state_dict()
    tied = shared_names(state)
    shapes = {n: (tuple(t.shape), _numpy_dtype(t)) for n, t in state.items()}
    class_name = str(told.class_name)
    graph, names = _fitted_graph(told.architecture, told.config, class_name, shapes, class_name, frozenset(tied))
    weights = LazyWeights({name: state[name] for name in names}, as_numpy)
    origin = Origin(told.config, class_name, told.architecture, module=module, document=told.document)
    return Model(graph, weights, adapter, origin)


def read_config(source: Any) -> LayerGraph:
    """The layer graph of a config file, a directory's config or a module, its weights not looked at."""
    if not isinstance(source, Path):
        return read_module(None, source).graph  # type: ignore[arg-type]
    told = described(_json(source / "config.json" if source.is_dir() else source))
    return told.architecture.graph(told.config, told.class_name)


# --- config and class ----------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidModel(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidModel(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise InvalidModel(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _class_of(architecture: Architecture, stored: Mapping[str, Any], path: Path) -> str:
    if architecture.base and any(name.startswith(architecture.base) for name in stored):
        raise InvalidModel(
            f"{path / 'config.json'}: no class under 'architectures', and the tensors "
            "are of a model with a task head; name its class"
        )
    return architecture.base_class


def _growth_beside(path: Path) -> Growth | None:
    """The operator and recipe that growkit left beside a grown model."""
    if not (path / OPERATOR).is_file():
        return None
    recipe = Recipe.load(path / RECIPE) if (path / RECIPE).is_file() else None
    return Growth(GrowthOperator.load(path / OPERATOR), recipe)


# --- tensors -------------------------------------------------------------------------------------------------------


def _stored_tensors(path: Path) -> dict[str, Any]:
    """Every tensor of a directory, by name: from an index and its shards, a single file, or a readable pickle."""
    if (path / INDEX).is_file():
        return _sharded(path)
    if (path / SINGLE).is_file():
        return dict(read_header(path / SINGLE))
    if (path / PICKLES[0]).is_file():
        return _unpickled(path / PICKLES[0])
    if (path / PICKLES[1]).is_file():
        index = _json(path / PICKLES[1]).get("weight_map", {})
        return {
            name: t for shard in sorted(set(index.values())) for name, t in _unpickled(_inside(path, shard)).items()
        }
    raise InvalidModel(f"{path}: no weights; expected {SINGLE} or {INDEX}")


def _sharded(path: Path) -> dict[str, StoredTensor]:
    weight_map = _json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidModel(f"{path / INDEX}: expected a 'weight_map' of tensor names to shards")
    headers = {shard: read_header(_inside(path, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise InvalidModel(f"{path / INDEX}: {name} should be in {shard}, which does not hold it; fetch both again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _inside(path: Path, shard: str) -> Path:
    if Path(shard).name != shard:
        raise InvalidModel(f"{path}: the index names the shard '{shard}', which is not a file of the model's directory")
    return path / shard


class _Unpickled:
    """A tensor that torch loaded; it looks like one that lies in a file."""

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), _numpy_dtype(tensor)

    def load(self) -> np.ndarray:
        return as_numpy(self.tensor)


def _unpickled(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {str(name): _Unpickled(tensor) for name, tensor in state.items()}
    except FileNotFoundError:
        raise InvalidModel(f"{path}: the shard is missing; fetch it again") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
        raise UnsupportedModel(
            f"{path}: torch cannot read this pickle as plain weights ({str(error).splitlines()[0][:120]}), and growkit "
            "never unpickles code; convert it to safetensors"
        ) from None


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as a numpy array that shares its memory where it can; bfloat16 by way of ml_dtypes."""
    import ml_dtypes
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        viewed: np.ndarray = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return viewed
    array: np.ndarray = tensor.numpy()
    return array


def as_torch(array: np.ndarray) -> Any:
    """A numpy array as a torch tensor; the inverse of :func:`as_numpy`."""
    import torch

    array = np.require(array, requirements=["C", "W"])
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _numpy_dtype(tensor: Any) -> np.dtype[Any]:
    return as_numpy(tensor[:0] if tensor.ndim else tensor).dtype


def shared_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Names that share their memory with an earlier name: what the module ties."""
    first: dict[tuple[int, int, tuple[int, ...]], str] = {}
    shared = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and tensor.device.type != "meta" and key in first:
            shared[name] = first[key]
        first.setdefault(key, name)
    return shared


# --- graph and tensors together --------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def _fitted_graph(
    architecture: Architecture,
    config: Mapping[str, Any],
    class_name: str,
    shapes: Shapes,
    where: str,
    shared: frozenset[str] = frozenset(),
) -> tuple[LayerGraph, list[str]]:
    """The graph whose tensors these are, and their names; everything is accounted for or refused."""
    graph = min(
        _candidates(architecture, config, class_name, shapes.keys() - shared),
        key=lambda graph: sum(tensor.name not in shapes for tensor in graph.tensors()),
    )
    wanted = {tensor.name: tensor for tensor in graph.tensors()}
    missing = [name for name in wanted if name not in shapes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidModel(
            f"{where}: the tensor {missing[0]}{more} is missing, which {class_name} with this config has"
        )
    tied = {tensor.name for tensor in graph.tensors(tied=True)} - set(wanted)
    unknown = [n for n in shapes if n not in wanted and n not in tied and not architecture.is_ignored_tensor(n)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UnsupportedModel(
            f"{where}: the tensor {unknown[0]} {list(shapes[unknown[0]][0])}{more} is not understood for "
            f"{class_name}; add it, or list it as ignored, in {architecture.architecture}.yaml"
        )
    for name, tensor in wanted.items():
        _refuse_mismatch(graph, tensor, shapes[name][0], architecture)
    dtypes = {tensor.key: shapes[name][1] for name, tensor in wanted.items()}
    odd = next((name for name, t in wanted.items() if shapes[name][1].kind not in "fV"), None)
    if odd is not None:
        raise UnsupportedModel(
            f"{where}: {odd} is stored as {shapes[odd][1]}; expected a floating-point type; dequantise it first"
        )
    graph = graph.with_dtypes(lambda key: str(dtypes.get(key, next(iter(dtypes.values())))))
    return graph, list(wanted)


def _refuse_broken_ties(graph: LayerGraph, stored: Mapping[str, Any], path: Path) -> None:
    """A file may hold a tied tensor twice; then both must be the same."""
    for tensor in graph.tensors(tied=True):
        tied_to = tensor.parameter.tied_to
        if tied_to is None or not {tied_to, tensor.name} <= stored.keys():
            continue
        if not np.array_equal(stored[tensor.name].load(), stored[tied_to].load()):
            raise InvalidModel(
                f"{path}: {tensor.name} and {tied_to} are tied by the config, and differ; set tie_word_embeddings to "
                "false, or remove the wrong one"
            )


def _candidates(
    architecture: Architecture, config: Mapping[str, Any], class_name: str, names: Set[str]
) -> list[LayerGraph]:
    """The graphs under every naming scheme, with and without the base model's prefix."""

    def graph(base: str | None, naming: int) -> LayerGraph:
        return architecture.graph(config, class_name, base=base, naming=naming, has_tensor=lambda name: name in names)

    first = graph(None, 0)  # refuses an unknown class before its prefix is asked for
    bases = dict.fromkeys((architecture.base_of(class_name), "", architecture.base))
    others = [graph(b, i) for b in bases for i in range(len(architecture.naming) + 1)]
    return [first, *others]


def _refuse_mismatch(graph: LayerGraph, tensor: Tensor, shape: tuple[int, ...], architecture: Architecture) -> None:
    if shape == tensor.shape:
        return
    file = f"{architecture.architecture}.yaml"
    if len(shape) == len(tensor.shape):
        for axis, (expected, got) in enumerate(zip(tensor.shape, shape, strict=True)):
            if expected != got:
                written = tensor.parameter.parsed.axes[axis]
                names = ", ".join(f"{s} {graph.sizes[s]}" for s in dict.fromkeys(spaces_of(written)))
                raise InvalidModel(
                    f"{tensor.name}: '{written}' is {axis_size(written, graph.sizes)} by the config "
                    f"({names or 'fixed'}), the tensor has {got} on axis {axis}; fix the config, or the "
                    f"layout in {file}"
                )
    raise InvalidModel(
        f"{tensor.name}: expected shape {list(tensor.shape)} ({tensor.parameter.layout}), got {list(shape)}; fix the "
        f"config, or the layout in {file}"
    )
