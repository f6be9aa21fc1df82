"""Running: a model in ONNX Runtime, or in torch where gradients are wanted; and inputs to run it on."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from growkit.adapters import Forward
from growkit.caches import fed
from growkit.matrices import Array
from growkit.model import Model
from growkit_onnx.execute import Executor
from growkit_onnx.files import write_file
from growkit_onnx.inputs import looked_up
from growkit_onnx.operation import as_numpy, torch_dtype
from growkit_onnx.read import Origin, build
from growkit_specs import GrowkitError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class BareGraph:
    """A model as a function of its inputs and weights in torch, ``forward(inputs, weights)``.

    It reads no weight that it is given, and of the others each when it is needed.

    Args:
        model: The model.
        device: Where it runs.
        dtype: The type in which all floating point runs; None leaves the file's.
    """

    def __init__(self, model: Model, device: str = "auto", dtype: torch.dtype | None = torch.float32) -> None:
        origin: Origin = model.origin
        surgery = origin.surgery() if origin.operator is not None else None
        graph = surgery.model_with(model.weights) if surgery is not None else origin.model
        self._holders = {
            tensor.name: [
                str(value.name)
                for value in (surgery.holders(tensor) if surgery else origin.description.stored[tensor.name])
            ]
            for tensor in model.graph.tensors()
        }
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._executor = Executor(graph, self.device, dtype)

    checkpointed = 0  # a graph has no blocks that it could run again

    def clear(self) -> None:
        """Nothing is held between two calls."""

    def __call__(self, inputs: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, as tensors."""
        held = {
            holder: weights[name] for name, holders in self._holders.items() if name in weights for holder in holders
        }
        known = self._executor.graph.initializers
        return self._executor(inputs, {name: tensor for name, tensor in held.items() if name in known})


class GraphForward:
    """A model as a function: ``forward(inputs, weights=None)``.

    It runs in ONNX Runtime, from a file, so that weights that lie beside it are mapped and not loaded. Where weights
    are given it runs in torch; so does, in float32, what the runtime has no operators for (bfloat16 on a CPU).

    Attributes:
        rounding: How far the outputs of two models that compute the same may be apart, relative to the largest: the
            runtime computes in the types of the file, and sums of different lengths are rounded differently.
    """

    rounding = 5e-5

    def __init__(self, model: Model, device: str = "auto") -> None:
        self.model = model
        self.provider = _provider(device)
        self._session: ort.InferenceSession | None = None
        self._bare: BareGraph | None = None

    def __call__(self, inputs: Mapping[str, Array], weights: Mapping[str, Any] | None = None) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: Arrays by the names of the graph's inputs.
            weights: Tensors to use in place of the model's own, by its tensors' names; gradients flow into them.

        Returns:
            Outputs by name: numpy arrays, or torch tensors where ``weights`` are given.
        """
        inputs = {name: self._declared(name, value) for name, value in inputs.items()}
        if weights is not None:
            return self._in_torch(inputs, weights)
        if not self._is_implemented:
            wide = {n: np.float32(x) if x.dtype == ml_dtypes.bfloat16 else x for n, x in inputs.items()}
            return {name: as_numpy(tensor) for name, tensor in self._in_torch(wide, {}, torch.float32).items()}
        session = self.session
        names = [output.name for output in session.get_outputs()]
        try:
            given = {name: np.asarray(value) for name, value in inputs.items()}
            return dict(zip(names, session.run(names, given), strict=True))
        except Exception as error:  # the runtime's errors share no base class
            raise GrowkitError(f"ONNX Runtime cannot run the model: {_line(error)}") from None

    def _declared(self, name: str, value: Array) -> Array:
        """An input in the type that the file declares for it: tokens may be of 32 bits, a mask of truth values."""
        dtype = self._types.get(name)
        if dtype is None:
            return value
        if isinstance(value, torch.Tensor):
            return value if value.is_floating_point() else value.to(torch_dtype(dtype, name))
        return np.asarray(value).astype(dtype.numpy(), copy=False)

    @cached_property
    def _types(self) -> dict[str, ir.DataType]:
        """The types of the source's inputs; caches of new layers are made by who knows theirs."""
        graph = self.model.origin.model.graph
        return {str(value.name): value.dtype for value in graph.inputs if value.dtype is not None}

    @property
    def session(self) -> ort.InferenceSession:
        """The model in ONNX Runtime."""
        if self._session is None:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            path = self._path()
            try:
                self._session = ort.InferenceSession(str(path), options, providers=[self.provider])
            except Exception as error:  # the runtime's errors share no base class
                raise GrowkitError(f"ONNX Runtime cannot load the model: {_line(error)}") from None
        return self._session

    @cached_property
    def _is_implemented(self) -> bool:
        """Whether the runtime has the file's operators for its element types."""
        try:
            return self.session is not None
        except GrowkitError as error:
            if "NOT_IMPLEMENTED" not in str(error):
                raise
            return False

    def _path(self) -> Path:
        """The model's file; of a model in memory, one that is written for the purpose."""
        origin: Origin = self.model.origin
        if origin.operator is None and origin.path is not None:
            return origin.path
        folder = tempfile.mkdtemp(prefix="growkit-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)  # a TemporaryDirectory would warn of that
        path = Path(folder) / "model.onnx"
        write_file(build(self.model), path, external=True)
        return path

    def _in_torch(
        self, inputs: Mapping[str, Array], weights: Mapping[str, Any], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        if self._bare is None:
            self._bare = BareGraph(self.model, "cuda" if self.provider == _PROVIDERS["cuda"] else "cpu", dtype)
        return self._bare(inputs, weights)


def _provider(device: str) -> str:
    available = ort.get_available_providers()
    if device == "auto":
        device = "cuda" if _PROVIDERS["cuda"] in available else "cpu"
    if device not in _PROVIDERS:
        raise GrowkitError(f"the device '{device}' is not known; expected auto, cpu or cuda")
    if _PROVIDERS[device] not in available:
        raise GrowkitError(
            "the device 'cuda' was asked for, and this ONNX Runtime has no CUDA provider; install growkit[gpu], or use "
            "--device cpu"
        )
    return _PROVIDERS[device]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# --- inputs ----------------------------------------------------------------------------------------------------------


def random_inputs(model: Model, seed: int, forward: Forward) -> Iterator[dict[str, np.ndarray]]:
    """Inputs that exercise a model: plain, padded, a batch of one, and one step after what was cached.

    Their sizes are not those that its axes were inferred with. An operator may refuse some of them (GroupQueryAttention
    takes several tokens after cached ones in a batch of one alone), and those are left out.

    Args:
        model: The model.
        seed: The seed.
        forward: Runs it.

    Raises:
        GrowkitError: Where it runs at none of the sizes; the first reason is told.
    """
    origin: Origin = model.origin
    rng = np.random.default_rng(seed)
    refusal: GrowkitError | None = None
    ran = False
    for batch, lengths, padded in _tried(min([16, *(size // 2 for size in _table_sizes(origin) if size >= 8)])):
        shapes = origin.trial.shapes(batch, lengths)
        inputs = {
            name: _drawn(origin, value, shapes[name], rng, padded=padded) for name, value in _given(origin).items()
        }
        inputs = fed(origin.description.graph, model.graph, origin.operator, inputs)
        try:
            forward(inputs)
        except GrowkitError as error:
            refusal = refusal or error
            continue
        ran = True
        yield inputs
    if not ran and refusal is not None:
        raise refusal


def _tried(longest: int) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """Sizes of the batch and of what else varies, and whether there is padding."""
    for batch, length, padded in ((4, longest, False), (5, max(longest // 2, 2), True), (1, longest, False)):
        yield batch, (length, max(length - 3, 2), max(length // 2, 2)), padded
    yield 3, (1, max(longest - 3, 2), max(longest // 2, 2)), False


def _given(origin: Origin) -> dict[str, ir.Value]:
    """The inputs that are no initializers, by name."""
    graph = origin.model.graph
    return {str(value.name): value for value in graph.inputs if value.name not in graph.initializers}


def _table_sizes(origin: Origin) -> list[int]:
    """The sizes of tables that positions may be looked up in."""
    return [size for name, size in origin.description.graph.sizes.items() if name.startswith("positions")]


def _drawn(
    origin: Origin, value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator, *, padded: bool
) -> np.ndarray:
    assert value.dtype is not None
    dtype = value.dtype.numpy()
    if dtype.kind == "f" or dtype == ml_dtypes.bfloat16:
        return rng.standard_normal(shape).astype(dtype)
    below = min((origin.scene.sizes(axis)[0] for axis in looked_up(value, origin.scene)), default=None)
    if below is not None:
        return rng.integers(0, below, shape).astype(dtype)
    ones = np.ones(shape, dtype=dtype)
    if padded and ones.ndim >= 2 and shape[-1] > 2:
        ones[0, ..., shape[-1] - shape[-1] // 3 :] = 0
    return ones
