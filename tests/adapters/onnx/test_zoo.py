"""The test files are what they claim to be: valid, and the model they were made from, wherever they run."""

from operator import attrgetter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.adapters.onnx.families import FAMILIES
from tests.adapters.onnx.zoo import FILES, NOWHERE, ONE_ROW, SLICE, TRACED, File, inputs, make

MADE = [
    pytest.param(file, id=file.name, marks=() if file in SLICE else pytest.mark.slow)
    for file in FILES
    if not file.cannot_be_made
]
OTHER_SIZES = (3, 11)
UNOFFICIAL = "SimplifiedLayerNormalization"  # ONNX Runtime's own, yet it writes it into the default domain


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, so they needn't be printed
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("file", MADE)
def test_a_file_is_valid(file: File) -> None:
    path = make(file)
    if any(node.op_type == UNOFFICIAL and not node.domain for node in onnx.load(path).graph.node):
        with pytest.raises(onnx.checker.ValidationError, match=f"No Op registered for {UNOFFICIAL}"):
            onnx.checker.check_model(path, full_check=True)
    else:
        onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("file", MADE)
def test_a_file_computes_its_model(file: File) -> None:
    if file.runs == NOWHERE:
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
            session(make(file))
        return
    running, model = session(make(file)), FAMILIES[file.family].build(file.attention)
    tolerance = 2e-2 if "fp16" in file.variant else 1e-4
    for batch, sequence in {file.traced, OTHER_SIZES, (1, 1)}:
        values = inputs(file, batch, sequence, seed=sequence)
        assert {value.name for value in running.get_inputs()} == set(values)
        with torch.no_grad():
            expected = model(*map(torch.from_numpy, values.values()))
        for output, reference in zip(running.run(None, values), expected, strict=True):
            np.testing.assert_allclose(output, reference.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("file", [file for file in SLICE if file.runs in (TRACED, ONE_ROW)], ids=attrgetter("name"))
def test_a_file_that_runs_at_some_sizes_refuses_others(file: File) -> None:
    values = FAMILIES[file.family].inputs.draw(*OTHER_SIZES, np.random.default_rng(0))
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|Reshape"):
        session(make(file)).run(None, values)


@pytest.mark.parametrize("file", [file for file in FILES if file.cannot_be_made], ids=attrgetter("name"))
def test_a_file_that_cannot_be_made_fails_as_it_says(file: File) -> None:
    with pytest.raises(Exception, match=file.cannot_be_made):
        make(file)


def test_names_are_unique() -> None:
    assert len({file.name for file in FILES}) == len(FILES)


@pytest.mark.parametrize("field", ["family", "exporter", "opset", "attention", "post", "expected", "runs"])
def test_the_slice_covers(field: str) -> None:
    values = attrgetter(field)
    assert {values(file) for file in SLICE} == {values(file) for file in FILES if not file.cannot_be_made}


def test_the_slice_covers_variants() -> None:
    assert {part for file in SLICE for part in file.variant} == {part for file in FILES for part in file.variant}
