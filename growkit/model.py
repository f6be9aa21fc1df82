"""A model: its layer graph and its weights, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.matrices import Array
from growkit_specs import LayerGraph, Recipe

if TYPE_CHECKING:
    from growkit.adapters import Adapter
    from growkit.operator import GrowthOperator


@dataclass(frozen=True)
class Growth:
    """How a model came to be: the operator that grew it, and the recipe it was asked for with."""

    operator: GrowthOperator
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Model:
    """A transformer: the layer graph, and its weights by tensor name.

    Attributes:
        graph: What it is.
        weights: Its tensors by name, numpy arrays; they are loaded, or grown, when they are asked for.
        adapter: The adapter that read it and can write it.
        origin: What that adapter needs to know of where the model came from; of a grown model, of its source.
        growth: How it was grown, where it was.
    """

    graph: LayerGraph
    weights: Mapping[str, Array]
    adapter: Adapter
    origin: Any = None
    growth: Growth | None = None

    @property
    def bytes(self) -> int:
        """The size of all tensors, in bytes."""
        from growkit.weights import dtype_of

        return sum(tensor.count * dtype_of(tensor.parameter.dtype).itemsize for tensor in self.graph.tensors())

    def beside(self, name: str) -> Path | None:
        """The file ``name`` of the model's directory, or beside its file; None where there is none.

        A file in a folder called ``onnx``, as exporters lay it out, has its directory above that.
        """
        path = getattr(self.origin, "path", None)
        if path is None:
            return None
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        folders = [folder, folder.parent] if folder.name == "onnx" else [folder]
        return next((found for each in folders if (found := each / name).is_file()), None)

    def told_beside(self, name: str) -> dict[str, Any]:
        """What the JSON file ``name`` beside the model says; nothing where there is none.

        Raises:
            GrowkitError: Where it is no JSON object.
        """
        from growkit_specs import GrowkitError

        file = self.beside(name)
        if file is None:
            return {}
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GrowkitError(f"{file}: cannot be read as JSON ({error})") from None
        if not isinstance(told, dict):
            raise GrowkitError(f"{file}: expected a JSON object, got {type(told).__name__}")
        return told

    def to_torch(self) -> Any:
        """The model as an ``nn.Module``.

        Raises:
            GrowkitError: Where the model's adapter is not the torch adapter.
        """
        return self._as("torch")

    def to_onnx(self) -> Any:
        """The model as an ``onnx.ModelProto``.

        Raises:
            GrowkitError: Where the model's adapter is not the ONNX adapter.
        """
        return self._as("onnx")

    def _as(self, name: str) -> Any:
        from growkit_specs import GrowkitError

        if self.adapter.name != name:
            raise GrowkitError(f"this model was read by the adapter '{self.adapter.name}'; it has no {name} form")
        return self.adapter.build(self)


class LazyWeights(Mapping[str, Array]):
    """A mapping whose arrays are made when they are asked for, one at a time."""

    def __init__(self, names: Mapping[str, Any], load: Any) -> None:
        self._names = names
        self._load = load

    def __getitem__(self, name: str) -> Array:
        return self._load(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
