"""The test files are what they claim to be: valid, and the model they were made from at every size."""

from operator import attrgetter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.adapters.onnx.families import FAMILIES
from tests.adapters.onnx.zoo import FILES, SLICE, File, inputs, make


@pytest.mark.parametrize("file", SLICE, ids=attrgetter("name"))
def test_a_file_is_valid_and_computes_its_model(file: File) -> None:
    path = make(file)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == set(inputs(file, 1, 1))
    model = FAMILIES[file.family].build(file.attention).eval()
    for batch, sequence in ((2, 7), (3, 11)):  # the first is what was traced
        values = inputs(file, batch, sequence)
        with torch.no_grad():
            expected = model(*map(torch.from_numpy, values.values()))
        for output, reference in zip(session.run(None, values), expected, strict=True):
            np.testing.assert_allclose(output, reference.numpy(), rtol=1e-4, atol=1e-4)


def test_names_are_unique() -> None:
    assert len({file.name for file in FILES}) == len(FILES)
