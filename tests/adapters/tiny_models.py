"""Tiny random models, one config for each architecture file.

No two sizes are equal where an axis could be taken for another, and no entry is left at zero or one: what a fresh model
has by its initialisation (biases of zero, scales of one) would hide what is lost or mixed up.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from growkit_specs import Architecture
from growkit_specs.architecture import architectures
from tests.adapters.timm_models import import_timm

_STACK = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_STACK, "intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 20}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
_IMAGE = {**_STACK, "image_size": 12, "patch_size": 4, "num_channels": 2}

TINY: dict[str, dict[str, Any]] = {
    "albert": {**_TEXT, "embedding_size": 10},
    "bert": _TEXT,
    "cait": {
        "embed_dim": 24, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "depth_token_only": 1, "mlp_ratio_token_only": 4,
        "qkv_bias": True, "img_size": 12, "patch_size": 4, "in_chans": 2, "num_classes": 3, "global_pool": "token",
    },
    "deit": {**_IMAGE, "intermediate_size": 40, "encoder_stride": 4},
    "dinov2": {**_IMAGE, "mlp_ratio": 2},
    "distilbert": {
        "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "vocab_size": 50, "max_position_embeddings": 20,
    },
    "gemma": {**_DECODER, "head_dim": 8},
    "gemma2": {**_DECODER, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 10},
    "gemma3": {
        **_DECODER, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 10,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20, "pad_token_id": 0},
    "gpt_neox": {**_TEXT, "pad_token_id": 0},
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 8},
    "opt": {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40, "vocab_size": 50,
        "max_position_embeddings": 20,
    },
    "phi3": _DECODER,
    "qwen2": {**_DECODER, **_WINDOWS},
    "qwen3": {**_DECODER, **_WINDOWS, "head_dim": 8},
    "roberta": _TEXT,
    "t5": {
        "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
        "vocab_size": 50, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
    },
    "vit": {**_IMAGE, "intermediate_size": 40, "encoder_stride": 4},
}  # fmt: skip
"""For each architecture file the config of its tiny model: 2 layers (T5's decoder 3), hidden 24, 4 heads."""


def tiny(
    architecture: str, class_name: str | None = None, *, options: dict[str, Any] | None = None, **config: Any
) -> Any:
    """A tiny model of an architecture file, every parameter random, always the same.

    Args:
        architecture: The architecture's name.
        class_name: The model's class; None takes the bare model.
        options: Further arguments of the class's constructor.
        config: Config keys that differ from :data:`TINY`.
    """
    file = architectures()[architecture]
    if file.library == "timm":
        timm = import_timm()
        (name, *_) = timm.list_models(list(file.model_types))
        return randomised(timm.create_model(name, **{**TINY[architecture], **config})).eval()
    cls = getattr(transformers, class_name or file.base_class)
    labels = {"num_labels": 3} if "Classification" in cls.__name__ else {}
    module = cls(cls.config_class(**{**TINY[architecture], **labels, **config}), **(options or {}))
    return randomised(module).eval()


def randomised(module: Any, seed: int = 0) -> Any:
    """`module` with every parameter drawn anew: around what it starts with where it scales, around zero elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                scales = "norm" in type(part).__name__.lower() and name == "weight"
                centre = parameter.mean() if scales else 0.0  # zero where the norm computes with 1 + scale
                centre = 1.0 if name in ("lambda1", "gamma_1", "gamma_2") else centre  # a layer scale starts near zero
                parameter.normal_(0.0, 0.2, generator=generator).add_(centre)
    return module


def directory(tmp_path: Path, module: Any, name: str = "source") -> Path:
    """`module`, saved by its library in a folder of `tmp_path`."""
    path = tmp_path / name
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(path)
    else:
        import_timm().models.save_for_hf(module, path, safe_serialization=True)
    return path


def loaded(module: Any, path: Path) -> Any:
    """What the library of `module` loads from `path`."""
    if hasattr(module, "from_pretrained"):
        return type(module).from_pretrained(path)
    return import_timm().create_model(f"local-dir:{path}", pretrained=True)


def hidden_and_layers(module: Any) -> tuple[int, int]:
    """The width and the depth that a module says it has."""
    if hasattr(module, "config"):
        return module.config.hidden_size, module.config.num_hidden_layers
    return module.embed_dim, len(module.blocks)


def library_class(file: Architecture, class_name: str) -> Any:
    """The class of that name in the library of an architecture file."""
    return getattr(import_timm().models if file.library == "timm" else transformers, class_name)


def library_defaults(file: Architecture) -> Any:
    """What a config means that says nothing, as attributes."""
    cls = library_class(file, file.base_class)
    if file.library == "transformers":
        return cls.config_class()
    return SimpleNamespace(**{name: p.default for name, p in inspect.signature(cls).parameters.items()})
