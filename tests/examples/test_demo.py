"""The demo, at its quickest: what it prints, what it writes, and what it leaves alone."""

import json
from pathlib import Path
from typing import Any

import pytest

import growkit
from examples import demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quick demo ran."""
    out: Path = tmp_path_factory.mktemp("demo") / "out"
    demo.main(out=out, quick=True)
    return out


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_growth_was_promised_and_kept(result: dict[str, Any]) -> None:
    assert result["plan"]["preserving"]
    assert result["verify"]["preserved"]
    assert result["verify"]["max_rel_diff"] < 1e-5


def test_grown_starts_where_the_source_ended(result: dict[str, Any]) -> None:
    source, grown, scratch = result["runs"]
    assert grown["losses"][0] == pytest.approx(source["losses"][-1], abs=1e-4)
    assert scratch["losses"][0] == pytest.approx(source["losses"][0], rel=0.1)  # both knew nothing
    assert all(run["losses"][-1] < run["losses"][0] for run in result["runs"])


def test_both_large_models_cost_the_same(result: dict[str, Any]) -> None:
    source, grown, scratch = result["runs"]
    assert grown["parameters"] == scratch["parameters"] > source["parameters"]
    assert grown["flops"] == scratch["flops"]
    excluded, included = (result["saving"][f"source_{counted}"] for counted in ("excluded", "included"))
    assert excluded - included == pytest.approx(source["flops"][-1] / scratch["flops"][-1])


def test_grown_directory_loads_with_its_tokenizer(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(folder / "large")
    tokenizer = AutoTokenizer.from_pretrained(folder / "large")
    text = "The statement is executed."
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    assert module(**inputs).logits.shape == (*inputs["input_ids"].shape, demo.QUICK.vocab)


def test_what_was_written_verifies_again(folder: Path) -> None:
    assert growkit.verify(growkit.read(folder / "small"), growkit.read(folder / "large")).preserved


def test_plot_is_an_image(folder: Path) -> None:
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_held_out_is_trained_on() -> None:
    pages = list(demo.distinct_pages())
    paragraphs = [" ".join(text.split()) for page in pages for text in page.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_again_replaces_only_what_the_demo_made(tmp_path: Path) -> None:
    demo.clear(tmp_path)
    (tmp_path / "large").mkdir()
    (tmp_path / "result.json").touch()
    (tmp_path / "mine.txt").touch()
    demo.clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {demo.MARKER, "mine.txt"}


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with pytest.raises(SystemExit, match="small is not from an earlier demo; name another folder with --out"):
        demo.clear(tmp_path)
    assert (tmp_path / "small").is_dir()


@pytest.mark.parametrize(("loss", "flops"), [(9.0, 0.0), (5.0, 0.0), (4.5, 50.0), (3.0, 100.0), (2.0, None)])
def test_reached_lies_on_the_line_between_evaluations(loss: float, flops: float | None) -> None:
    run = demo.Run("grown", parameters=1, flops=[0.0, 100.0], losses=[5.0, 3.0] if loss != 4.5 else [5.0, 4.0])
    assert demo.reached(run, loss) == flops


def test_saving_tells_the_source_apart() -> None:
    source = demo.Run("source", 1, [0.0, 10.0], [6.0, 5.0])
    grown = demo.Run("grown", 2, [0.0, 100.0], [5.0, 3.0])
    scratch = demo.Run("from scratch", 2, [0.0, 100.0], [6.0, 4.0])
    assert demo.saving(source, grown, scratch) == {"loss": 4.0, "source_excluded": 0.5, "source_included": 0.4}
    assert demo.saving(source, scratch, grown) is None  # never gets there
