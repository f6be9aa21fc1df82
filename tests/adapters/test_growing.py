"""The larger model as a function of the operator: whatever way weights act, the dense equation's loss and gradients."""

from typing import Any

import pytest
import torch

import growkit
from growkit.loss import Batch, start_loss
from tests.adapters.fitting import batch_for, dense_loss, gradients, ready, tensors
from tests.adapters.tiny_models import tiny

CLASSES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "t5": "T5ForConditionalGeneration",
    "gpt_neox": "GPTNeoXForCausalLM",
}
WIDER = {"hidden": 36, "ffn": 60}
LARGER = WIDER | {"layers": 3}
UNEVEN = {"hidden": 32, "heads": 4, "head_dim": 8, "ffn": 55, "layers": 3}
EVERYTHING = ("depth", "width", "norms", "residual")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    "llama": ("llama", {}, LARGER | {"kv_heads": 3}, "lossless", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, UNEVEN, "lossless", {}),
    "llama-dense": ("llama", {}, LARGER, "lossless", {"structure": {"hidden": "dense", "ffn": "dense"}}),
    "llama-heads": ("llama", {}, WIDER | {"hidden": 48, "kv_heads": 4, "heads": 8, "layers": 3}, "lemon",
                    {"structure": {"(kv_heads group head_dim)": "dense", "(kv_heads head_dim)": "dense"}}),
    "llama-layers": ("llama", {}, LARGER, "lemon", {"per_layer": True, "structure": {"ffn": "source"}}),
    "llama-layers-tied": ("llama", {}, LARGER, "lemon", {"per_layer": True, "tied": True}),
    "llama-everything": ("llama", {}, LARGER, "width=net2net,depth=stack", {"learn": EVERYTHING}),
    "llama-source": ("llama", {}, LARGER, "lossless", {"learn": ("width", "source")}),
    "llama-residual": ("llama", {}, LARGER, "lossless", {"learn": ("residual",)}),
    "gpt2": ("gpt2", {}, {"hidden": 36, "layers": 3}, "lossless", {}),
    "gpt2-everything": ("gpt2", {}, {"hidden": 36, "layers": 3}, "width=net2net,depth=stack",
                        {"learn": EVERYTHING, "tied": True}),
    "gpt2-aki": ("gpt2", {}, {"hidden": 48, "layers": 3}, "aki", {"learn": ("depth", "norms")}),
    "gpt2-paper": ("gpt2", {}, {"hidden": 36, "layers": 3}, "ligo-paper", {}),
    "neox": ("gpt_neox", {}, {"hidden": 36, "ffn": 60, "heads": 6, "layers": 3}, "lemon", {}),
    "bert": ("bert", {}, {"hidden": 48, "ffn": 80, "layers": 3}, "width=net2net,depth=stack", {"learn": EVERYTHING}),
    "bert-fpi": ("bert", {}, {"hidden": 48, "ffn": 80, "layers": 3}, "fpi", {"structure": {"ffn": "source"}}),
    "bert-aki": ("bert", {}, {"hidden": 48, "ffn": 80, "layers": 3}, "aki", {"learn": ("depth", "residual")}),
    "bert-paper": ("bert", {}, LARGER, "ligo-paper", {}),
    "bert-paper-layers": ("bert", {}, LARGER, "ligo-paper", {"per_layer": True}),
    "vit": ("vit", {}, LARGER, "lemon", {"learn": EVERYTHING}),
    "vit-paper": ("vit", {}, LARGER, "ligo-paper", {}),
    "dinov2": ("dinov2", {}, {"hidden": 48, "layers": 3}, "width=net2net,depth=stack", {}),
    "dinov2-dense": ("dinov2", {}, {"hidden": 36, "layers": 3}, "lemon", {"structure": {"hidden": "dense"}}),
    "t5": ("t5", {}, {"hidden": 36, "ffn": 60, "layers": 4}, "lossless", {}),
}  # fmt: skip
WAYS = (("factored", 0.0), ("materialised", 0.0), ("auto", 0.5), ("factored", 1.0))


def source_of(architecture: str, **config: Any) -> growkit.Model:
    return growkit.read(tiny(architecture, CLASSES[architecture], **config))


def assert_close(found: torch.Tensor, expected: torch.Tensor, *, of: float, name: str) -> None:
    difference = (found - expected).detach().abs().max().item()
    assert difference <= 1e-10 * of, f"{name}: {difference:.1e} of {of:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_act_is_the_dense_equation(case: str) -> None:
    architecture, config, sizes, method, settings = CASES[case]
    source = source_of(architecture, **config)
    plan = growkit.plan(source, method=method, **sizes)
    batch = batch_for(source)
    expected: list[torch.Tensor] = []
    loss = torch.zeros(())
    for strategy, checkpointing in WAYS:
        fit = ready(source, plan, seed=1, strategy=strategy, checkpointing=checkpointing, precision="float64",
                    **settings)  # fmt: skip
        if not expected:
            loss = dense_loss(fit, source, batch)
            expected = gradients(fit, loss)
            largest = max(float(each.abs().max()) for each in expected)
            assert largest > 0
        ours = fit.growing(tensors(batch))
        assert_close(ours, loss, of=abs(loss.item()), name="loss")
        found = gradients(fit, ours)
        for name, mine, theirs in zip(fit.learned.learnable.names, found, expected, strict=True):
            assert_close(mine, theirs, of=largest, name=f"{strategy} {checkpointing} {name}")


@pytest.mark.parametrize(
    ("architecture", "sizes", "method"),
    [
        ("llama", LARGER | {"kv_heads": 3}, "lossless"),
        ("llama", LARGER, "lemon"),
        ("llama", {"layers": 4}, "llama_pro"),
        ("gpt2", {"hidden": 36, "layers": 3}, "lossless"),
        ("gpt2", {"hidden": 48}, "fpi"),
        ("bert", {"hidden": 48, "ffn": 80}, "lossless"),
        ("vit", LARGER, "lemon"),
        ("dinov2", {"hidden": 48, "layers": 3}, "lossless"),
        ("t5", {"hidden": 36, "ffn": 60, "layers": 4}, "lossless"),
    ],
)
@pytest.mark.parametrize("strategy", ["factored", "materialised"])
def test_an_exact_start_has_the_loss_of_the_source(
    architecture: str, sizes: dict[str, Any], method: str, strategy: str
) -> None:
    source = source_of(architecture)
    plan = growkit.plan(source, method=method, **sizes)
    assert plan.preserving
    batch = batch_for(source)
    learn = ("depth", "width", "norms", "residual")
    fit = ready(source, plan, strategy=strategy, precision="float64", checkpointing=0.0, learn=learn)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = start_loss(source, Batch(inputs, batch["labels"]), device="cpu")
    assert fit.growing(tensors(batch)).item() == pytest.approx(expected, rel=1e-10)


def test_what_is_run_again_sees_what_was_seen() -> None:
    """An encoder and a decoder have a configuration each, and caches would give the second run what the first kept."""
    source = source_of("t5")
    fit = ready(source, growkit.plan(source, layers=4), checkpointing=1.0)
    configs = [part.config for part in fit.growing.run.module.modules() if hasattr(part, "config")]
    assert len({id(config) for config in configs}) > 1
    assert not any(config.use_cache for config in configs)
