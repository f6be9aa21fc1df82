"""The layer graph: kept by JSON, consistent or refused, resized; and its JSON Schema."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from growkit.testing import layer_graphs, transformer
from growkit_specs import LayerGraph, Recipe
from growkit_specs.architecture import architectures
from growkit_specs.schemas import schemas, write_schemas

SCHEMAS = Path(__file__).parents[2] / "docs" / "reference" / "schemas"


@given(layer_graphs())
def test_json_gives_the_same_graph(graph: LayerGraph) -> None:
    again = LayerGraph.model_validate_json(graph.model_dump_json())
    assert again == graph
    assert again.model_dump_json() == graph.model_dump_json()


@given(layer_graphs())
def test_every_tensor_appears_once_and_is_counted_once(graph: LayerGraph) -> None:
    tensors = list(graph.tensors())
    names = [tensor.name for tensor in tensors]
    assert len(names) == len(set(names))
    assert graph.parameter_count == sum(tensor.count for tensor in tensors)
    tied = {t.name for t in graph.tensors(tied=True)} - set(names)
    assert tied == {p.name for _, layer in graph.walk() for p in layer.parameters if p.tied_to}
    keys = [(tensor.key, tensor.layer) for tensor in graph.tensors(tied=True)]
    assert len(keys) == len(set(keys))


@given(layer_graphs(), st.integers(1, 3))
def test_resizing_changes_sizes_and_depths_only(graph: LayerGraph, factor: int) -> None:
    sizes = {space: factor * size for space, size in graph.sizes.items()}
    depths = {stack: factor * depth for stack, depth in graph.depths.items()}
    resized = graph.resized(sizes, depths)
    assert (resized.sizes, resized.depths) == (sizes, depths)
    assert resized.resized(graph.sizes, graph.depths) == graph


def test_resizing_unties_and_sets_epsilons() -> None:
    graph = transformer(head="tied", epsilon="own")
    resized = graph.resized({}, {}, untied=["lm_head.weight"], epsilons={"final_norm_eps": 0.5})
    assert [t.name for t in resized.tensors() if t.name == "lm_head.weight"] == ["lm_head.weight"]
    epsilons = {layer.name: layer.attributes["epsilon"] for _, layer in resized.walk() if layer.kind == "norm"}
    assert epsilons == {"attention_norm": 0.2, "mlp_norm": 0.2, "final_norm": 0.5}


@given(layer_graphs())
def test_nothing_can_be_changed_in_place(graph: LayerGraph) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        graph.spaces[0].size = 1000


@pytest.mark.parametrize(
    ("final_norm", "seen"), [("final_norm", "/final_norm"), ("attention_norm", "stack0/attention_norm")]
)
def test_a_stack_reads_through_its_own_norm_or_one_outside(final_norm: str, seen: str) -> None:
    """A decoder reads the encoder's stream through the norm that stands between the stacks."""
    data = transformer(final_norm=final_norm).model_dump()
    changed("stacks.0.layers.1.through", final_norm)(data)
    graph = LayerGraph.model_validate(data)
    assert {t.through for t in graph.tensors() if t.owner.name == "attention"} == {seen}


def test_layers_that_share_a_block_have_its_tensors_once() -> None:
    data = transformer(depths=(3,)).model_dump()
    for parameter in (p for layer in data["stacks"][0]["layers"] for p in layer["parameters"]):
        parameter["name"] = parameter["name"].replace("{layer}", "all")
    with pytest.raises(ValidationError, match="stands in the names of a stack's parameters, and only there; not where"):
        LayerGraph.model_validate(data)
    changed("stacks.0.shared", True)(data)
    graph = LayerGraph.model_validate(data)
    inside = [tensor for tensor in graph.tensors() if tensor.stack]
    assert len(inside) == len({tensor.name for tensor in inside}) == len({tensor.key for tensor in inside})
    assert {graph.layers_of(tensor) for tensor in inside} == {(0, 1, 2)}
    assert graph.resized({}, {"stack0": 5}).depths == {"stack0": 5}


Change = Callable[[dict[str, Any]], None]


def changed(path: str, value: object) -> Change:
    """Sets the entry at a dotted path."""

    def change(data: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        at: Any = data
        for part in parents:
            at = at[part]
        at[last] = value

    return change


REFUSED: list[tuple[Change, str]] = [
    (lambda d: d["spaces"].append(d["spaces"][0]), "the space hidden is defined twice"),
    (lambda d: d["stacks"].append(d["stacks"][0]), "the stack stack0 is defined twice"),
    (changed("head.1.parameters.1.name", "table.weight"), "the parameter table.weight is defined twice"),
    (changed("stem.0.parameters.0.layout", "tokens -> hidden"), "unknown space 'tokens'; known: "),
    (changed("stem.0.parameters.0.layout", "vocab -> -> hidden"), "at character 10 of the layout"),
    (changed("head.1.parameters.0.tied_to", "tabel.weight"), "tied to 'tabel.weight', which is not a parameter"),
    (changed("stacks.0.layers.0.parameters.0.name", "norm.scale"), "'{layer}' stands in the names of a stack's"),
    (changed("head.1.parameters.1.name", "{layer}.bias"), "'{layer}' stands in the names of a stack's"),
    (changed("head.1.through", "mlp_norm"), "no norm layer is called 'mlp_norm'"),
    (changed("stacks.0.layers.1.through", "last_norm"), "no norm layer is called 'last_norm'"),
    (changed("stacks.0.layers.1.through", "mlp"), "no norm layer is called 'mlp'"),
    (changed("stacks.0.layers.1.added_through", "mlp"), "no norm layer is called 'mlp'"),
    (
        changed("stacks.0.layers.1.added_through", "mlp_norm"),
        "'attention' is added through the norm 'mlp_norm', whose position is not 'branch'",
    ),
    (changed("stacks.0.layers.0.parameters", []), "the norm 'attention_norm' has no parameter that says which space"),
    (changed("outputs.0.through", "mlp_norm"), "no norm layer is called 'mlp_norm'"),
    (changed("spaces.0.size", 0), "greater than or equal to 1"),
    (changed("spaces.0.kind", "elastic"), "Input should be 'residual'"),
    (changed("stacks.0.depth", 0), "greater than or equal to 1"),
    (changed("schema_version", 2), "Input should be 1"),
    (changed("stem.0.colour", "blue"), "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("change", "problem"), REFUSED)
def test_a_graph_that_contradicts_itself_is_refused(change: Change, problem: str) -> None:
    data = json.loads(transformer(head="tied").model_dump_json())
    change(data)
    with pytest.raises(ValidationError) as caught:
        LayerGraph.model_validate_json(json.dumps(data))
    assert problem in str(caught.value)


# --- JSON Schema ---------------------------------------------------------------------------------------------


def test_the_stored_schemas_are_fresh() -> None:
    stored = {path.name: path.read_text(encoding="utf-8") for path in SCHEMAS.glob("*.json")}
    assert stored == schemas(), "run: python -m growkit_specs.schemas"


def test_schemas_are_written_where_asked(tmp_path: Path) -> None:
    write_schemas(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(schemas())


@pytest.mark.parametrize("name", ["layer_graph", "recipe", "architecture"])
def test_a_schema_knows_every_field_and_refuses_others(name: str) -> None:
    schema = json.loads(schemas()[f"{name}.json"])
    example = {
        "layer_graph": transformer(),
        "recipe": Recipe(source="small", target={"hidden": 8}),
        "architecture": next(iter(architectures().values())),
    }[name]
    assert set(example.model_dump()) == set(schema["properties"])
    objects = [part for part in (schema, *schema["$defs"].values()) if part["type"] == "object"]
    assert all(part["additionalProperties"] is False for part in objects)
