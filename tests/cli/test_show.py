"""`inspect` and `show` on a saved operator: what they say and draw, and what they refuse."""

import json
import re
import sys
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import save_file

import growkit as library
from growkit.description import describe
from growkit.matrices import Dense, MeanFill, pad
from growkit.operator import Expansion, Fresh, GrowthOperator, unchanged
from tests.cli.conftest import Growkit


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved operator with everything in it; the key of a space and a parameter's name would be HTML."""
    B, A = (Dense(np.random.default_rng(seed).standard_normal((6, 4))) for seed in (0, 1))
    w = np.array([[1, 0], [0.5, 0.5], [0, 1]])
    path = tmp_path_factory.mktemp("operators") / "operator.safetensors"
    GrowthOperator(
        {
            "hidden": Expansion(MeanFill(6, 4), pad(6, 4), pad(6, 4), gain=1.5, variance=0.5, fresh="read"),
            "heads[q]": Expansion(B, A, B),
            "ffn@layers/3": Expansion(B, B, B, terms=((B, A), (pad(6, 4), A))),
            "vocab": unchanged(9),
        },
        {"layers": np.eye(2), "layers/mlp/down_proj.weight": w[:2], "layers/mlp/<up>.weight": w[:2]},
        norm_factors={"/norm": 0.25},
        untied=("lm_head.weight",),
        fresh=Fresh(seed=7, scale=0.1, reference="init"),
    ).save(path)
    return path


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, its text, and whether every element is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_inspect_describes_an_operator(growkit: Growkit, operator: Path) -> None:
    told = growkit("inspect", operator, "--json").json
    facts = describe(GrowthOperator.load(operator)).to_json()
    assert told == {"format": "operator", "bytes": operator.stat().st_size, **json.loads(json.dumps(facts))}
    assert told["fresh"] == {"seed": 7, "scale": 0.1, "reference": "init", "init_std": 0.02, "anew": False}
    printed = growkit("inspect", operator).out
    for words in (
        "growth operator",
        "heads[q]",
        "4 -> 6",
        "mean-fill: the source, then its mean in 2",
        "dense 6 x 4, float64",
        "gain 1.5, variance 0.5, fresh: read",
        "layers/mlp/<up>.weight, layers/mlp/down_proj.weight: 2 layers from 0,0, mixes up to 2 source layers",
        "/norm: 0.25",
        "lm_head.weight",
        "seed 7, scale 0.1 of the initialisation's deviation (0.02)",
        f"{operator.stat().st_size:,}",
    ):
        assert words in printed
    assert re.search(r"vocab +9 +B = A +identity", printed)


def test_the_operator_beside_a_grown_model(growkit: Growkit, llama: Path, tmp_path: Path) -> None:
    growkit("grow", llama, tmp_path / "large", "--to", "hidden=36,layers=3")
    told = growkit("inspect", tmp_path / "large" / "growkit_operator.safetensors", "--json").json
    assert (told["spaces"]["hidden"]["source"], told["spaces"]["hidden"]["target"]) == (24, 36)
    assert (told["stacks"]["layers"]["source"], told["stacks"]["layers"]["target"]) == (2, 3)
    assert growkit("inspect", tmp_path / "large", "--json").json["format"] == "torch"


def test_a_page_holds_every_picture_and_nothing_from_elsewhere(
    growkit: Growkit, operator: Path, tmp_path: Path
) -> None:
    out = tmp_path / "operator.html"
    told = growkit("show", operator, out, "--json").json
    assert told["out"] == str(out)
    assert len(told["pictures"]) == 11
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == len(told["pictures"])
    for image in images:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/png;base64"
        assert imread(BytesIO(b64decode(data))).ndim == 3
        assert str(image["alt"]).startswith("Heat map of ")
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base", "source"}
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", re.sub(r"base64,[\w+/=]+", "", out.read_text()))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    for words in ("layers/mlp/<up>.weight", "heads[q]", "seed 7", "Not drawn, the identity: vocab.", "color-scheme"):
        assert words in page.text
    largest = max(np.abs(GrowthOperator.load(operator).expansions["heads[q]"].write.as_matrix()).max(), 1)
    assert f"from {-largest:.4g} (blue) over 0 (white) to {largest:.4g} (red)" in page.text
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_folder_holds_the_same_pictures(growkit: Growkit, operator: Path, tmp_path: Path) -> None:
    told = growkit("show", operator, tmp_path / "page.html", "--json").json
    assert growkit("show", operator, tmp_path / "maps").out == f"wrote {tmp_path / 'maps'}: 11 pictures\n"
    files = sorted((tmp_path / "maps").iterdir())
    assert [file.name for file in files] == told["pictures"]
    assert "004-heads-q-B.png" in told["pictures"]
    page = (tmp_path / "page.html").read_text()
    inlined = [b64decode(data) for data in re.findall(r"base64,([\w+/=]+)", page)]
    assert inlined == [file.read_bytes() for file in files]


def test_the_same_operator_gives_the_same_bytes(
    growkit: Growkit, operator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert growkit("show", operator, tmp_path / "one.html").status == 0
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.setattr("time.time", lambda: 1.0)
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "image.cmap": "gray", "savefig.dpi": 10}):  # a user's own settings
        assert growkit("show", operator, tmp_path / "two.html").status == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_an_operator_that_changes_nothing_has_a_page(growkit: Growkit, tmp_path: Path) -> None:
    path = tmp_path / "still.safetensors"
    GrowthOperator({"vocab": unchanged(9)}, {"layers": np.eye(2)}).save(path)
    assert growkit("show", path, tmp_path / "still.html", "--json").json["pictures"] == []
    assert "Every matrix and every blend is the identity." in (tmp_path / "still.html").read_text()


# --- what is refused -------------------------------------------------------------------------------------------------


def weights(path: Path, operator: Path) -> None:
    save_file({"w": np.ones(3)}, path)


def cut(path: Path, operator: Path) -> None:
    path.write_bytes(operator.read_bytes()[:-7])


def text(path: Path, operator: Path) -> None:
    path.write_text("# notes\n")


def empty(path: Path, operator: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("made", [weights, cut, text, empty])
@pytest.mark.parametrize("command", ["inspect", "show"])
def test_a_file_that_is_no_operator_is_one_line(
    growkit: Growkit, operator: Path, tmp_path: Path, command: str, made: Callable[[Path, Path], None]
) -> None:
    path = tmp_path / "odd.safetensors"
    made(path, operator)
    result = growkit(command, path, *([tmp_path / "out.html"] if command == "show" else []))
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(r"growkit: .*odd\.safetensors: not a growth operator that growkit saved \(.+\).*\n", result.err)
    assert ("inspect takes a model directory" in result.err) == (command == "inspect")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_nothing_is_overwritten(growkit: Growkit, operator: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "page.html", tmp_path / "maps"):
        out.write_text("mine")
        result = growkit("show", operator, out)
        assert result.status == 2
        assert "exists; growkit overwrites nothing" in result.err
        assert out.read_text() == "mine"
    assert "is no directory; make it first" in growkit("show", operator, tmp_path / "no" / "page.html").err


def test_one_picture_is_too_few(growkit: Growkit, operator: Path, tmp_path: Path) -> None:
    result = growkit("show", operator, tmp_path / "operator.png")
    assert result.status == 2
    assert "several pictures are drawn; name a page that ends in .html, or a folder" in result.err


def test_without_matplotlib_the_extra_is_named(
    growkit: Growkit, operator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = growkit("show", operator, tmp_path / "page.html")
    assert (result.status, result.out) == (2, "")
    assert result.err == "growkit: drawing needs matplotlib; pip install 'growkit[show]'\n"
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_nothing(operator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from growkit import show

    monkeypatch.setattr(show, "png", lambda heat_map, scale: (_ for _ in ()).throw(OSError(28, "No space left")))
    for out in (tmp_path / "page.html", tmp_path / "maps"):
        with pytest.raises(library.GrowkitError, match="No space left; nothing was written"):
            show.show(operator, out)
    assert not list(tmp_path.iterdir())
