"""What an architecture file can say: conditions, and lists with one entry per layer."""

from typing import Any

import pytest

from growkit_specs import Architecture, InvalidModel, UnsupportedModel
from growkit_specs.architecture import architectures


def small(layers: dict[str, Any] | None = None, **config: Any) -> Architecture:
    """A file of one linear layer for each of two blocks, and what is given."""
    weight = {"w.weight": {"name": "w.weight", "layout": "hidden <- embed"}}
    return Architecture.model_validate(
        {
            "architecture": "small",
            "about": "",
            "model_types": ["small"],
            "classes": {"Small": {"layers": []}},
            "spaces": {
                "hidden": {"kind": "residual", "size": "hidden"},
                "embed": {"kind": "linear", "size": "embed or hidden"},
            },
            "config": {
                "defaults": {"hidden": 4, "embed": None, "depth": 6, "period": 3, "early": True, "late": False},
                "grown": {"hidden": "hidden", "depth": "layers"},
                **config,
            },
            "stem": layers or {},
            "stacks": {
                "layers": {
                    "depth": "layers",
                    "prefix": "{layer}.",
                    "layers": {"linear": {"kind": "linear", "parameters": weight}},
                }
            },
            "inputs": [],
            "outputs": [],
        },
        strict=False,
    )


@pytest.mark.parametrize(
    ("when", "config", "exists"),
    [
        ("early", {}, True),
        ("not early", {}, False),
        ("early and not late", {}, True),
        ("early and late", {}, False),
        ("embed == hidden", {}, True),
        ("embed == hidden", {"embed": 3}, False),
        ("embed != hidden", {"embed": 3}, True),
        ("embed != hidden and early", {"embed": 3, "early": False}, False),
        ("depth == 6", {"depth": 6}, True),
    ],
)
def test_a_layer_exists_where_its_condition_holds(when: str, config: dict[str, Any], exists: bool) -> None:
    norm = {"kind": "norm", "when": when, "parameters": {"scale": {"name": "norm.weight", "layout": "* hidden"}}}
    reader = {
        "kind": "linear",
        "through": "norm",
        "added_through": "norm",
        "parameters": {"r.weight": {"name": "r.weight", "layout": "2 <- hidden"}},
    }
    norm["attributes"] = {"norm": "rms", "position": "branch", "epsilon": 0.1}
    stem = small({"norm": norm, "reader": reader}).graph(config, None).stem
    assert [layer.name for layer in stem] == (["norm"] if exists else []) + ["reader"]
    assert stem[-1].through == stem[-1].added_through == ("norm" if exists else None)


def test_a_condition_over_something_unknown_is_refused() -> None:
    layer = {"kind": "linear", "when": "embeb == hidden", "parameters": {}}
    with pytest.raises(UnsupportedModel, match="'embeb == hidden' compares what is neither a config key"):
        small({"linear": layer}).graph({}, None)


PERIODIC = {
    "per_layer": ["kinds"],
    "periods": {"kinds": {"length": "period", "usual": "near", "last": "far"}},
    "supported": {"kinds": [None, "near", "far"]},
}


def grown(config: dict[str, Any], layer_map: list[int]) -> dict[str, Any]:
    sizes = {"hidden": 4, "embed": 4}
    return small(**PERIODIC).grown_config(config, sizes, {"layers": layer_map}, epsilons={}, untied=False)


def test_a_period_is_written_out_only_where_the_depth_changes() -> None:
    assert "kinds" not in grown({"depth": 3}, [0, 1, 2])
    assert grown({"depth": 3}, [0, 0, 1, 2, 2])["kinds"] == ["near", "near", "near", "far", "far"]
    assert grown({"depth": 2, "period": 2}, [0, 1, 1])["kinds"] == ["near", "far", "far"]


def test_a_list_comes_before_its_period() -> None:
    assert grown({"depth": 2, "kinds": ["far", "near"]}, [0, 1, 1])["kinds"] == ["far", "near", "near"]
    with pytest.raises(InvalidModel, match="kinds has 1 entries, expected one for each layer"):
        grown({"depth": 2, "kinds": ["far"]}, [0, 1])


def test_an_entry_that_is_not_supported_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"kinds is 'round' for some layer; .* supports None or 'near' or 'far'"):
        small(**PERIODIC).graph({"depth": 2, "kinds": ["near", "round"]}, None)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_has_norms_on_both_sides_of_its_branches(name: str) -> None:
    (stack,) = architectures()[name].graph({}, None).stacks
    branches = [layer for layer in stack.layers if layer.kind in ("attention", "mlp")]
    assert [(b.through, b.added_through) for b in branches] == [
        ("attention_norm", "attention_branch_norm"),
        ("mlp_norm", "mlp_branch_norm"),
    ]
