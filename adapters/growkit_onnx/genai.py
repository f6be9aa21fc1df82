"""``genai_config.json``: what onnxruntime-genai is told of a decoder, which follows its growth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growkit.operator import GrowthOperator
from growkit_specs import InvalidModel, LayerGraph

CONFIG = "genai_config.json"
"""The name of the file; there is one for a folder."""


def genai_config(path: Path | None, destination: Path, graph: LayerGraph, operator: GrowthOperator) -> str | None:
    """The config of a grown decoder as text.

    Args:
        path: The source's file.
        destination: The grown file.
        graph: The grown model.
        operator: What grew it.

    Returns:
        The config that stands beside the source, with the sizes it names and the file's name brought up to date; None
        where there is none, or it is another file's.

    Raises:
        InvalidModel: Where it is not JSON.
    """
    beside = path.with_name(CONFIG) if path is not None else None
    if path is None or beside is None or not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidModel(f"{beside}: not JSON: {error}; mend it, or move it away from the model") from None
    model = config.get("model", {}) if isinstance(config, dict) else {}
    parts = [part for part in model.values() if isinstance(part, dict) and part.get("filename") == path.name]
    if not parts:
        return None
    for part in parts:
        part.update({key: size for key, size in _sizes(part, graph, operator).items() if key in part})
        part["filename"] = destination.name
        _follow_layers(part.get("sliding_window"), graph, operator)
    return json.dumps(config, indent=4) + "\n"


def _sizes(part: Mapping[str, Any], graph: LayerGraph, operator: GrowthOperator) -> dict[str, int]:
    """Every size that a config may name; a model without kv_heads has as many as heads."""
    sizes = graph.sizes
    kv_heads = sizes.get("kv_heads", sizes.get("heads"))
    depths = [operator.depth(stack) for stack in graph.depths]
    known = {
        "hidden_size": sizes.get("hidden"),
        "num_attention_heads": sizes["kv_heads"] * sizes["group"] if "kv_heads" in sizes else sizes.get("heads"),
        "num_key_value_heads": kv_heads,
        "head_size": sizes.get("head_dim"),
        "num_hidden_layers": part.get("num_hidden_layers", 0) + sum(deep - shallow for deep, shallow in depths),
    }
    return {key: size for key, size in known.items() if size is not None}


def _follow_layers(window: Any, graph: LayerGraph, operator: GrowthOperator) -> None:
    """Layers with a sliding window, by number: copies have one where their source has."""
    if isinstance(window, dict) and "layers" in window and len(graph.stacks) == 1:
        copies = operator.layer_map(graph.stacks[0].name)
        window["layers"] = [t for t, j in enumerate(copies) if j in window["layers"]]
