"""Models on which a growth once went wrong."""

from typing import Any

import pytest
import torch

import growkit
from tests.adapters.tiny_models import tiny


@pytest.mark.parametrize("zeros", [slice(3, 4), slice(None)])
def test_a_layer_scale_may_hold_zeros(zeros: slice) -> None:
    """The writer's folded rows are divided by the grown scale, which must not be zero where they are read."""
    module = tiny("dinov2")
    with torch.no_grad():
        module.encoder.layer[0].layer_scale1.lambda1[zeros] = 0
    source = growkit.read(module)
    assert growkit.verify(source, growkit.grow(source, hidden=36)).preserved


@pytest.mark.parametrize(
    ("rope", "kept"),
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "yarn", "factor": 4.0}, False),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, True),
        ({"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}, False),  # longrope's first name
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}, False),
    ],
)
def test_rotary_frequencies_made_from_the_positions(rope: dict[str, Any], kept: bool) -> None:
    config = tiny("llama").config.to_dict()
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    from growkit_specs import architecture_for

    graph = architecture_for("llama").graph(config | {key: rope}, "LlamaForCausalLM")
    plan = growkit.plan(growkit.Model(graph, {}, _Planned()), positions=4096)  # type: ignore[arg-type]
    assert plan.preserving is kept


class _Planned:
    """An adapter of models that are only planned."""

    name = "planned"

    def resized(self, origin: Any, graph: Any, operator: Any, signature: Any) -> Any:
        return graph, origin


def test_a_scratch_model_of_the_same_size_is_told_for_what_it_is() -> None:
    plan = growkit.plan(growkit.read(tiny("llama")), layers=2, method="random")
    assert not plan.preserving
    assert not any("frequencies" in reason.detail for reason in plan.verdict.reasons)


@pytest.mark.parametrize("method", ["lossless", "stack"])
def test_training_a_grown_module_leaves_the_source_and_its_other_layers_alone(method: str) -> None:
    """What does not grow is the very array that the source's module holds, once for each layer made of it."""
    module = tiny("llama")
    source = growkit.read(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    grown = growkit.grow(source, layers=2 * source.graph.depths["layers"], method=method).to_torch()
    held = [tensor.untyped_storage().data_ptr() for tensor in grown.state_dict().values()]
    assert len(set(held)) == len(held)
    with torch.no_grad():
        for tensor in grown.parameters():
            tensor += 1
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
