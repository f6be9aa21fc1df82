"""The reference names everything there is: fields of architecture files and recipes, commands, JSON keys, the API."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from pydantic import BaseModel

import growkit
from growkit.cli import app
from growkit_specs import Recipe, UnsupportedModel, architecture_for
from growkit_specs.architecture import (
    Architecture,
    ClassRule,
    ConfigRules,
    LayerRule,
    OutputRule,
    ParameterRule,
    SpaceRule,
    StackRule,
)
from tests.docs.pages import DOCS, ROOT, Runner, blocks_of

COMMAND_LINE = DOCS / "reference/command-line.md"
FIELDS = DOCS / "reference/architecture-file.md"


def first_cells(text: str) -> set[str]:
    """The names in code font in the first column of the tables of ``text``."""
    return {name for cell in re.findall(r"^\|([^|]*)\|", text, re.M) for name in re.findall(r"`([^`]+)`", cell)}


def section(page: Path, title: str) -> str:
    """The part of ``page`` under the heading ``title``, up to the next heading that is not below it."""
    found = re.search(rf"^(#+) {re.escape(title)}$(.*?)(?=^#{{1,2}} |\Z)", page.read_text(), re.M | re.S)
    assert found, f"{page.name} has no section '{title}'"
    return found[2]


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("The whole file", Architecture),
        ("`classes`", ClassRule),
        ("`config`", ConfigRules),
        ("`spaces`", SpaceRule),
        ("Layers", LayerRule),
        ("Parameters", ParameterRule),
        ("`stacks`", StackRule),
        ("`inputs` and `outputs`", OutputRule),
    ],
)
def test_every_field_of_an_architecture_file_is_explained(title: str, model: type[BaseModel]) -> None:
    named = first_cells(section(FIELDS, title))
    assert set(model.model_fields) <= named
    if title not in ("The whole file", "Layers"):  # these list attributes or the parts below as well
        assert named <= set(model.model_fields)


def test_every_field_of_a_recipe_is_explained() -> None:
    assert first_cells(section(DOCS / "how-to/use-recipes.md", "The fields")) == set(Recipe.model_fields)


def test_every_command_has_its_section_and_its_options() -> None:
    text = COMMAND_LINE.read_text()
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^## (\w+)$", text, re.M)) - {"Sizes", "Examples"} == commands
    assert set(re.findall(r"^```\{generated\} options (\w+)$", text, re.M)) == commands


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each command prints under ``--json``, on the model of the tutorial."""
    monkeypatch.chdir(tmp_path)
    runner = Runner()
    runner.run(blocks_of(DOCS / "tutorial/grow-your-first-model.md")[0])
    np.save("tokens.npy", np.arange(1024) % 256)
    commands = {
        "inspect": "inspect small",
        "plan": "plan small --to hidden=96",
        "grow": "grow small large --to hidden=96 --check",
        "fit": "fit small op.safetensors --to hidden=96 --data tokens.npy --steps 1 --batch 2",
        "verify": "verify small large",
        "methods": "methods",
        "show": "show large/growkit_operator.safetensors maps",
    }
    return {name: json.loads(runner.growkit([*line.split(), "--json"])) for name, line in commands.items()}


def test_the_json_keys_are_those_that_are_printed(printed: dict[str, Any]) -> None:
    for command, told in printed.items():
        told = told[0] if command == "methods" else told
        tables = section(COMMAND_LINE, command).partition("### An operator as JSON")[0]
        assert first_cells(tables) == set(told), command
    assert set(printed["inspect"]["tensors"][0]) == {"name", "shape", "layout", "slot", "layer"}
    assert set(printed["plan"]["source"]) == {"spaces", "stacks", "parameters", "bytes", "flops_per_token"}
    assert set(printed["plan"]["operator"]) == {"parameters", "bytes", "flops"}
    assert set(printed["fit"]["loss"]) == {"first", "last", "validation"}
    assert set(printed["plan"]["reasons"][0]) == {"condition", "holds", "detail"}
    assert set(printed["verify"]["outputs"][0]) == {"name", "shape", "max_abs_diff", "max_rel_diff", "space"}


def test_the_json_keys_of_an_operator_are_those_that_are_printed(printed: dict[str, Any]) -> None:
    operator = "large/growkit_operator.safetensors"  # `printed` has grown it here
    told = json.loads(Runner().growkit(["inspect", operator, "--json"]))
    text = section(COMMAND_LINE, "show").partition("### An operator as JSON")[2]
    assert first_cells(text) == set(told)
    keys = [set(re.findall(r"\w+", listed)) for listed in re.findall(r"`\{(.*?)\}`", text, re.S)]
    space, stack = told["spaces"]["hidden"], told["stacks"]["layers"]
    assert keys == [set(each) for each in (space, stack, told["fresh"], space["write"])]


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference/api/index.md").read_text()
    assert not [name for name in growkit.__all__ if not re.search(rf"\b{name}`|`{name} <", text)]


def test_the_page_that_an_error_names_exists() -> None:
    with pytest.raises(UnsupportedModel) as refused:
        architecture_for("no-such-model")
    (page,) = re.findall(r"docs/\S+\.md", str(refused.value))
    assert (ROOT / page).is_file()
