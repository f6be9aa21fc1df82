"""Small legal configs and graphs of every architecture file, drawn by the file's own rules.

Nothing here knows an architecture by name: the file's ``tiny`` config is the start, its ``grown`` rules say how other
sizes are written into it, and its ``when`` rules which switches there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from hypothesis import strategies as st

from growkit_specs import Architecture, GrowkitError, LayerGraph, architectures, evaluate, parse_layout
from growkit_specs.architecture import LayerRule


@dataclass(frozen=True)
class SmallConfig:
    """A legal config of an architecture, at small sizes.

    Attributes:
        architecture: The architecture's name.
        class_name: The model's class.
        config: The config.
        optional: Whether the layers are there that no config key tells of (BERT's pooler).
    """

    architecture: str
    class_name: str
    config: Mapping[str, Any]
    optional: bool = True

    def graph(self) -> LayerGraph:
        """The layer graph, in float64."""
        file = architectures()[self.architecture]
        graph = file.graph(self.config, self.class_name, has_tensor=lambda name: self.optional)
        return graph.with_dtypes(lambda key: "float64")


def architecture_names() -> list[str]:
    """The architecture files that small models can be drawn of: those with a ``tiny`` config."""
    return [name for name, file in architectures().items() if file.tiny]


@st.composite
def small_configs(
    draw: st.DrawFn, names: Sequence[str] | None = None, has_class: Callable[[str], bool] = lambda name: True
) -> SmallConfig:
    """Configs of every class of every architecture file: sizes, depths, and each switch both ways.

    Args:
        draw: Given by hypothesis.
        names: The architectures; None takes all that have a ``tiny`` config.
        has_class: Whether a model class is wanted; of each architecture one has to be.

    Raises:
        GrowkitError: Where a named architecture has no ``tiny`` config.
    """
    file = architectures()[draw(st.sampled_from(names or architecture_names()))]
    if not file.tiny:
        raise GrowkitError(f"the architecture '{file.architecture}' has no tiny config; add 'tiny' to its file")
    class_name = draw(st.sampled_from([name for name in file.classes if has_class(name)]))
    config = {**file.tiny, **_labels(file, class_name), **draw(st.fixed_dictionaries(_switches(file)))}
    bare = file.graph(config, None)
    config = file.grown_config(
        config, draw(_small_sizes(file, config, bare)), draw(_layer_maps(bare)), epsilons={}, untied=False
    )
    # A head may read what an optional layer writes, so only the bare model lacks some.
    optional = draw(st.booleans()) or class_name != file.base_class
    return SmallConfig(file.architecture, class_name, config, optional)


def architecture_graphs(names: Sequence[str] | None = None) -> st.SearchStrategy[LayerGraph]:
    """Layer graphs of every architecture file, in float64, without any framework.

    Args:
        names: The architectures; None takes all that have a ``tiny`` config.
    """
    return small_configs(names).map(SmallConfig.graph)


# --- what a file leaves open -------------------------------------------------------------------------------------


def _labels(file: Architecture, class_name: str) -> dict[str, int]:
    """Three labels where the class has any: two could be taken for something else."""
    heads = (file.head[name] for name in file.classes[class_name].layers)
    layouts = [parse_layout(parameter.layout) for head in heads for parameter in head.parameters.values()]
    return {"num_labels": 3} if any("labels" in layout.spaces for layout in layouts) else {}


def _switches(file: Architecture) -> dict[str, st.SearchStrategy[Any]]:
    """The config keys that decide which parameters exist, with the values that are understood."""
    whens = [when for rule in _layers(file) for when in (rule.when, *(p.when for p in rule.parameters.values()))]
    keys = {key for when in whens if when is not None for key in re.findall(r"\w+", when)} | {"tie_word_embeddings"}
    switches = sorted(key for key in keys if isinstance(file.config.defaults.get(key), bool))
    return {key: st.sampled_from(file.config.supported.get(key, (False, True))) for key in switches}


def _layers(file: Architecture) -> Iterator[LayerRule]:
    for rules in (file.stem, *(stack.layers for stack in file.stacks.values()), file.head):
        yield from rules.values()


@st.composite
def _small_sizes(draw: st.DrawFn, file: Architecture, config: Mapping[str, Any], bare: LayerGraph) -> dict[str, int]:
    """A size for every space: drawn where the config has a key for it, else what follows, else the tiny config's."""
    sizes = file.sizes(config)
    said = set(re.findall(r"\w+", " ".join(file.config.grown.values())))
    reserved = int(bare.attributes.get("reserved_positions") or 0)
    ranges = {
        **dict.fromkeys(("heads", "kv_heads", "group"), st.integers(1, 3)),
        # In steps of the tiny model's own, which suits what is not said here (rotary parts of a head).
        "head_dim": st.sampled_from((sizes.get("head_dim", 1), 2 * sizes.get("head_dim", 1))),
        "hidden": st.integers(2, 16),
        "ffn": st.integers(2, 9),
        "vocab": st.integers(4, 9),
        "positions": st.integers(reserved + 2, reserved + 6),
    }
    drawn = {name: draw(sizes_of) for name, sizes_of in ranges.items() if name in sizes and name in bare.sizes}
    drawn = {name: size for name, size in drawn.items() if name in said or _is_shared_out(file, name)}
    sizes |= drawn
    if _is_shared_out(file, "head_dim"):
        sizes["hidden"] = (sizes.get("heads") or sizes["kv_heads"] * sizes["group"]) * sizes["head_dim"]
    for name, unit in file.config.divisible:
        sizes[name] += -sizes[name] % int(evaluate(unit, sizes))
    grown = {key: evaluate(rule, sizes) for key, rule in file.config.grown.items() if " or " not in rule}
    for name, rule in file.spaces.items():
        value = evaluate(rule.follows or rule.size, {**config, **grown, **sizes})
        if name not in {*drawn, "hidden"} and value is not None:  # None: a key that the tiny config leaves out
            sizes[name] = int(value)
    return sizes


def _is_shared_out(file: Architecture, name: str) -> bool:
    """Whether ``name`` has no config key of its own: hidden is shared out among the heads."""
    return name == "head_dim" and name in file.spaces and file.spaces[name].follows is not None


def _layer_maps(bare: LayerGraph) -> st.SearchStrategy[dict[str, list[int]]]:
    """For each layer of each stack the tiny model's layer it is like; every stack in the same ratio."""
    step = gcd(*bare.depths.values())
    return st.integers(1, 2).map(
        lambda steps: {
            stack: [layer % depth for layer in range(steps * depth // step)] for stack, depth in bare.depths.items()
        }
    )
