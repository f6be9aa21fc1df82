"""Every file grows and computes what it did, or is refused with its reason: there is no third outcome."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import growkit
from growkit_onnx.execute import Executor
from growkit_onnx.files import load
from growkit_onnx.normalise import normalise
from growkit_specs import Layer
from tests.adapters.onnx.zoo import FILES, GROWS, NOWHERE, SLICE, File, inputs, make
from tests.golden import onnx_files

MADE = [
    pytest.param(file, id=file.name, marks=() if file in SLICE else pytest.mark.slow)
    for file in FILES
    if not file.cannot_be_made
]
STORED = onnx_files.stored()


@pytest.mark.parametrize("file", MADE)
def test_a_file_grows_or_is_refused(file: File) -> None:
    outcome = onnx_files.outcome(file)
    if file.expected == GROWS:
        assert not outcome.refusal
    assert outcome.difference <= onnx_files.limit(file)
    assert outcome.row == STORED[file.name], "run python -m tests.golden.onnx_files, and read the difference"


@pytest.mark.parametrize("file", [param for param in MADE if param.values[0].expected == GROWS])
def test_a_file_says_its_sizes_and_grows_by_nothing(file: File) -> None:
    """Whatever exporter and optimiser wrote a model, its spaces are the same; growth by nothing changes nothing."""
    model = growkit.read(make(file))
    assert expected_sizes(file).items() <= model.graph.sizes.items()
    large = growkit.grow(model)
    surgery = large.origin.surgery()
    grown = surgery.model_with(large.weights)
    assert surgery.patches == 0
    before = {name: value.const_value.numpy() for name, value in model.origin.load().graph.initializers.items()}
    after = {name: value.const_value.numpy() for name, value in grown.graph.initializers.items()}
    assert all(before[name].tobytes() == after[name].tobytes() for name in before.keys() & after.keys())


def expected_sizes(file: File) -> dict[str, int]:
    """The sizes of the model that a file was made of."""
    stack = file.stacks[0]
    sizes = {"hidden": stack.hidden, "head_dim": stack.head_dim, "ffn": stack.ffn}
    if stack.kv_heads != stack.heads and stack.kv_heads > 1:
        return sizes | {"kv_heads": stack.kv_heads, "group": stack.heads // stack.kv_heads}
    return sizes | {"heads": stack.heads}


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_equal_sizes_confuse_nothing(family: str) -> None:
    """A model whose every size is the same is told from its dataflow like one whose sizes differ."""
    clear, equal = (
        growkit.read(make(next(file for file in SLICE if file.name.startswith(f"{name}-legacy17-eager")))).graph
        for name in (family, f"{family}-equal")
    )
    assert list(clear.sizes) == list(equal.sizes)
    assert clear.depths == equal.depths
    assert [lines(layer) for _, layer in clear.walk()] == [lines(layer) for _, layer in equal.walk()]


def lines(layer: Layer) -> list[str]:
    """The layer's slots and their layouts, kernels and grids aside."""
    return [f"{p.slot}: {re.sub('[0-9]+', 'n', p.layout)}" for p in layer.parameters]


@pytest.mark.parametrize("file", [param for param in MADE if param.values[0].runs != NOWHERE])
def test_torch_computes_what_onnx_runtime_does(file: File) -> None:
    model = load(make(file))
    normalise(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(make(file), options, providers=["CPUExecutionProvider"])
    values = inputs(file, 2, 5)
    computed = Executor(model)(values)
    for output, expected in zip(session.get_outputs(), session.run(None, values), strict=True):
        np.testing.assert_allclose(computed[output.name].numpy(), expected, atol=onnx_files.limit(file), rtol=1e-4)


def test_a_signature_stays(tmp_path: Path) -> None:
    """Names, types and shapes of inputs and outputs, opset, IR version and metadata are those of the source."""
    path = make(next(file for file in SLICE if file.family == "bert"))
    growkit.write(growkit.grow(growkit.read(path), hidden="2x"), tmp_path / "large.onnx")
    small, large = onnx.load(path), onnx.load(tmp_path / "large.onnx")
    for side in ("input", "output"):
        before, after = ([(v.name, v.type.SerializeToString()) for v in getattr(m.graph, side)] for m in (small, large))
        assert before == after
    assert {o.domain: o.version for o in small.opset_import} == {o.domain: o.version for o in large.opset_import}
    assert small.ir_version == large.ir_version
    assert {p.key: p.value for p in small.metadata_props} == {p.key: p.value for p in large.metadata_props}
    onnx.checker.check_model(large, full_check=True)
