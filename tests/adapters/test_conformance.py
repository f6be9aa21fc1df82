"""The torch adapter is held to the laws that `growkit.testing` holds everybody's adapter to."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from growkit.testing import architecture_names, assert_adapter_conforms, assert_preserves_function
from growkit_specs import architectures
from growkit_torch import TorchAdapter
from growkit_torch.read import Origin
from growkit_torch.testing import architecture_models
from tests.adapters.tiny_models import directory, tiny


@pytest.mark.parametrize("name", architecture_names())
def test_directories_of_every_architecture_conform(name: str, tmp_path: Path) -> None:
    assert assert_adapter_conforms(TorchAdapter(), directory(tmp_path, tiny(name)), tmp_path) == ()


@settings(max_examples=settings().max_examples // 4)
@given(architecture_models())
def test_drawn_modules_conform(module: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        skipped = assert_adapter_conforms(TorchAdapter(), module, folder)
    assert all(reason.startswith("growth of ") for reason in skipped), skipped


def test_drawn_modules_are_of_every_architecture_and_random() -> None:
    drawn = []

    @settings(max_examples=200)
    @given(architecture_models(["bert", "llama"]))
    def draw(module: Any) -> None:
        drawn.append(module)

    draw()
    classes = {*architectures()["bert"].classes, *architectures()["llama"].classes}
    assert {type(module).__name__ for module in drawn} == classes
    assert not any(torch.isin(p, torch.tensor([0.0, 1.0])).any() for module in drawn for p in module.parameters())


def test_a_parameter_that_a_converter_scales_in_place(tmp_path: Path) -> None:
    class InPlace(TorchAdapter):
        def read(self, source: Any) -> Any:
            with torch.no_grad():
                source.state_dict()["wte.weight"].mul_(2)
            return super().read(source)

    with pytest.raises(AssertionError, match=r"'source unmodified' is broken by wte\.weight"):
        assert_adapter_conforms(InPlace(), tiny("gpt2"), tmp_path)


def test_a_config_key_that_does_not_follow_the_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchanged_epsilon(origin: Origin, graph: Any, operator: Any) -> Any:
        grown = resized(origin, graph, operator)
        return Origin({**grown.config, "rms_norm_eps": 0.5}, grown.class_name, grown.architecture, module=grown.module)

    resized = Origin.resized
    monkeypatch.setattr(Origin, "resized", unchanged_epsilon)
    with pytest.raises(AssertionError, match="'identity' is broken by output logits, entry"):
        assert_adapter_conforms(TorchAdapter(), tiny("llama", "LlamaForCausalLM"), tmp_path)


def test_modules_and_directories_are_compared_as_they_are(tmp_path: Path) -> None:
    module = tiny("llama", "LlamaForCausalLM")
    assert_preserves_function(module, directory(tmp_path, module))
    with torch.no_grad():
        module.lm_head.weight[3] *= 1.01
    with pytest.raises(AssertionError, match="'function preserved' is broken by output logits, 2 x 16 x 50"):
        assert_preserves_function(module, tmp_path / "source")
