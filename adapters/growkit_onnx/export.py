"""Exporting: a torch module becomes an ONNX model in memory, whose weights are the module's own tensors.

Weights keep their names and the order in which they are stored: nothing is folded into them. So what is inferred of the
graph's initializers holds for the module's parameters.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from growkit.example import Example, named_outputs
from growkit_specs import UnsupportedModel

OPSET = 18
"""The version of the operator set that files are exported to: the first that both exporters write."""


def export(example: Example, *, fixed: bool = False) -> ir.Model:
    """The ONNX model of a module.

    Args:
        example: The module, and inputs it runs on.
        fixed: Whether the exported model takes inputs of the example's sizes only; else batch and sequence vary.

    Returns:
        The model; its initializers share the memory of the module's state and have its names.

    Raises:
        UnsupportedModel: Where no exporter of torch can export the module; the newer one's reason is told.
    """
    try:
        import onnxscript  # noqa: F401 - the exporter's
    except ImportError as error:
        raise UnsupportedModel(f"exporting a module takes onnxscript ({error}); install growkit[onnx]") from None
    reasons = []
    with _evaluating(example.module), _quiet():
        for inputs in _batches(example.inputs):
            for exported in (_captured, _traced):
                try:
                    varying = {name: range(0) if fixed else _varying(value) for name, value in inputs.items()}
                    return _with_names(exported(example.module, inputs, varying), example.module)
                except Exception as error:  # exporters raise whatever the module makes them raise
                    reasons.append(error)
    name = type(example.module).__name__
    raise UnsupportedModel(f"torch cannot export the module {name}: {_line(reasons[0])}")


def _line(error: BaseException) -> str:
    """The innermost reason in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _batches(inputs: Mapping[str, torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
    """The inputs with a batch of two where it is one, which exporters take for a constant; then as they are."""
    if all(value.ndim and len(value) == 1 for value in inputs.values()):
        yield {name: torch.cat([value, value]) for name, value in inputs.items()}
    yield inputs


Varying = Mapping[str, range]
"""The axes of each input that may vary."""


# --- the two exporters -----------------------------------------------------------------------------------------------


def _varying(value: torch.Tensor) -> range:
    """The axes of an input that may vary: the batch and the sequence, or the batch of images."""
    return range(min(value.ndim, 2 if value.ndim < 4 else 1))


class _Positional(torch.nn.Module):
    """A module as exporters like it: inputs by position, outputs as a tuple, and the names of both."""

    def __init__(self, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.module = module
        self.inputs = list(inputs)
        with torch.no_grad():
            self.outputs = list(named_outputs(module(**inputs)))

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = named_outputs(self.module(**dict(zip(self.inputs, values, strict=True))))
        return tuple(outputs.values())


def _captured(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], varying: Varying) -> ir.Model:
    """By torch.export; weights are hidden from what folds constants."""
    positional = _Positional(module, inputs)
    program = torch.onnx.export(
        positional,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=positional.inputs,
        output_names=positional.outputs,
        dynamic_shapes=(tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in varying.values()),),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    with _hidden_weights(program.model.graph):
        program.optimize()
    return program.model


@contextlib.contextmanager
def _hidden_weights(graph: ir.Graph) -> Iterator[None]:
    """Weights as inputs, of which nothing is known; they are initializers again afterwards."""
    held = {}
    for value in list(graph.initializers.values()):
        held[value], value.const_value = value.const_value, None
        del graph.initializers[str(value.name)]
        graph.inputs.append(value)
    yield
    for value, tensor in held.items():
        graph.inputs.remove(value)
        value.const_value = tensor
        graph.register_initializer(value)


def _traced(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], varying: Varying) -> ir.Model:
    """By running it once; of a copy with other weights, for this exporter stores equal tensors once."""
    positional = _Positional(copy.deepcopy(module), inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in positional.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    file = io.BytesIO()
    torch.onnx.export(
        positional,
        tuple(inputs.values()),
        file,  # type: ignore[arg-type]
        dynamo=False,
        opset_version=OPSET,
        input_names=positional.inputs,
        output_names=positional.outputs,
        dynamic_axes={name: {axis: f"{name}_{axis}" for axis in axes} for name, axes in varying.items()},
        do_constant_folding=False,
    )
    return ir.from_proto(onnx.load_from_string(file.getvalue()))


def _with_names(model: ir.Model, module: torch.nn.Module) -> ir.Model:
    """Every initializer under its name in the module's state, and holding the module's tensor."""
    state = module.state_dict(keep_vars=True)
    for value in list(model.graph.initializers.values()):
        name = str(value.name).removeprefix("module.")
        if name in state and str(value.name) != name:
            value.name = name
            value.const_value = TorchTensor(state[name].detach(), name=name)
    return model


# --- around them -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module in evaluation mode, its parameters without gradients: some attention cannot be exported with them."""
    training = {part: part.training for part in module.modules()}
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for part, was in training.items():
            part.training = was
        for parameter in learning:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say and warn of: a failure is an exception anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
