"""Targets and recipes: what a user asks for, parsed or refused in one line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit_specs import GrowkitError, InvalidTarget, Recipe, Target
from growkit_specs.recipe import SIZE_NAMES

ABSOLUTE = st.integers(1, 10**6)
RELATIVE = st.sampled_from(("1x", "2x", "1.5x", ".5x", "10.25x"))
TARGETS = st.dictionaries(st.sampled_from(SIZE_NAMES), ABSOLUTE | RELATIVE).map(lambda sizes: Target(**sizes))


@given(TARGETS)
def test_the_command_lines_form_gives_the_same_target(target: Target) -> None:
    text = ",".join(f"{name}={size}" for name, size in target.requested().items())
    assert Target.parse(text) == target
    assert Target.parse(text.replace(",", " , ").replace("=", " = ")) == target
    assert Target.of(**target.requested()) == target


@pytest.mark.parametrize(
    ("text", "requested"),
    [
        ("hidden=768,layers=12", {"hidden": 768, "layers": 12}),
        ("hidden=1.5x", {"hidden": "1.5x"}),
        (" heads = 12 ,, kv_heads=4,", {"heads": 12, "kv_heads": 4}),
        ("", {}),
    ],
)
def test_targets_that_parse(text: str, requested: dict[str, object]) -> None:
    assert Target.parse(text).requested() == requested


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hidden", "'hidden' is no size; expected NAME=SIZE, as in hidden=768,layers=1.5x"),
        ("width=768", "unknown size 'width'; sizes are hidden, heads, kv_heads"),
        ("hidden=768,hidden=1024", "the size 'hidden' is given twice"),
        ("hidden=", "hidden: a size is a whole number (768) or a ratio (1.5x), got ''"),
        ("hidden=many", "hidden: a size is a whole number (768) or a ratio (1.5x), got 'many'"),
        ("hidden=1.5", "hidden: a size is a whole number"),
        ("hidden=0", "hidden: a size is a whole number"),
        ("hidden=-768", "hidden: a size is a whole number"),
        ("hidden=0x", "hidden: a size is a whole number"),
        ("hidden=0.0x", "hidden: a size is a whole number"),
        ("hidden=1e3", "hidden: a size is a whole number"),
        ("hidden=2X", "hidden: a size is a whole number"),
        ("hidden=x", "hidden: a size is a whole number"),
        ("hidden=768;layers=12", "hidden: a size is a whole number"),
        ("=768", "unknown size ''"),
    ],
)
def test_targets_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(InvalidTarget) as caught:
        Target.parse(text)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [True, False, 1.5, 0, -1, [768], {"x": 1}, float("nan"), "768 tokens"])
def test_keywords_that_are_no_size_are_refused(size: object) -> None:
    with pytest.raises(InvalidTarget, match="hidden: a size is a whole number"):
        Target.of(hidden=size)


def test_none_is_a_size_that_is_not_named() -> None:
    assert Target.of(hidden=None, layers=4).requested() == {"layers": 4}


@given(TARGETS, st.sampled_from(("lossless", "width=net2net,depth=stack")), st.none() | st.floats(0, 4))
def test_a_recipe_is_kept_by_yaml(tmp_path_factory, target: Target, method: str, fresh: float | None) -> None:
    recipe = Recipe(source="small", destination="large", target=target, method=method, fresh=fresh, check=True)
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("source: small", "target: Field required"),
        ("source: small\ntarget: {hidden: wide}", "target.hidden: a size is a whole number"),
        ("source: small\ntarget: {width: 8}", "target.width: Extra inputs are not permitted"),
        ("source: small\ntarget: {}\nmethods: lossless", "methods: Extra inputs are not permitted"),
        ("source: small\ntarget: {}\nfresh: -1", "fresh: fresh is -1; expected a factor that is not negative"),
        ("source: [small", "while parsing a flow sequence"),
        ("", "the file: "),
        ("just text", "the file: "),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(GrowkitError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match=r"none\.yaml: No such file or directory"):
        Recipe.load(tmp_path / "none.yaml")
