"""Plans as they are stored: what `growkit plan --json` says of published models does not change unnoticed."""

import json

import pytest

from tests.golden.plans import CASES, FOLDER


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_as_it_was_stored(name: str) -> None:
    stored = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert json.loads(CASES[name].text()) == stored, "if this is meant: python -m tests.golden.plans"


def test_nothing_else_is_stored() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CASES)


@pytest.mark.parametrize(
    ("name", "preserving"),
    [
        ("smollm2-135m", True),
        ("llama-1b-net2net", True),
        ("minilm", True),
        ("minilm-inexact", False),
        ("bert-base-deeper", False),
        ("gpt2-medium", True),
    ],
)
def test_whether_the_function_is_kept(name: str, preserving: bool) -> None:
    assert CASES[name].plan().preserving == preserving


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("llama-1b-net2net", 1_235_814_400), ("gpt2-medium", 124_439_808)],
)
def test_the_published_models_have_their_published_number_of_parameters(name: str, parameters: int) -> None:
    assert CASES[name].plan().source.parameter_count == parameters
