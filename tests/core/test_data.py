"""Data: what a batch holds, that it depends on the step alone, and what cannot be read."""

import gzip
import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import growkit
from growkit import text
from growkit.data import Data, Sampled, as_data, read_batch, read_data
from growkit.images import image_folder
from growkit.loss import IGNORED, Batch
from growkit.testing import memory_model, transformer
from growkit_specs import GrowkitError, LayerGraph, LayerPort, Port, Space

VOCAB = 300


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a model, with a tokenizer of bytes and of some words."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(_bytes()), merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|endoftext|>", "<mask>")])
    tokenizer.enable_truncation(5)  # as files of sentence encoders say
    path = tmp_path / "model"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _bytes() -> Iterator[tuple[str, int]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ((written, number) for number, written in enumerate([*letters, "th", "the"]))


def told(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, which cuts nothing off."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


def language_model(folder: Path | None = None, **features: Any) -> growkit.Model:
    """A model of 32 positions, that lies in ``folder``."""
    sizes = {"vocab": VOCAB, "positions": 32, "head": "tied", "causal": True}
    model = memory_model(transformer(**{**sizes, **features}))
    return replace(model, origin=SimpleNamespace(path=folder))


def image_model(size: int = 8, channels: int = 1, folder: Path | None = None, **config: Any) -> growkit.Model:
    """The description of a model of images with three classes; nothing here runs it."""
    graph = transformer(head="pooler")
    graph = graph.model_copy(
        update={
            "inputs": (Port(name="pixel_values", kind="image"),),
            "attributes": {"image_size": size},
            "spaces": (*graph.spaces, Space(name="channels", size=channels, kind="fixed")),
        }
    ).revalidated()
    return replace(memory_model(graph), origin=SimpleNamespace(path=folder, config=config))


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are one."""
    return np.array_equal(a.labels, b.labels) and all(
        np.array_equal(a.inputs[name], b.inputs[name]) for name in a.inputs
    )


def numbered(tmp_path: Path, count: int) -> Path:
    """An ``.npz`` whose examples are their numbers."""
    path = tmp_path / "numbers.npz"
    np.savez(path, ids=np.arange(count)[:, None].repeat(2, 1), labels=np.zeros((count, 2), dtype=int))
    return path


def numbers(batch: Batch) -> list[int]:
    return list(batch.inputs["ids"][:, 0].tolist())


# --- batches by step -------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_the_step_alone(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(topics["assert"] + topics["if"])
    model = language_model(folder, causal=False)
    first, second = (read_data(model, path, batch=4, objective="masked", seed=7) for _ in range(2))
    later = [second.batch(step) for step in (9, 3, 5)]
    for step in range(10):
        batch = first.batch(step)
        if step in (9, 3, 5):
            assert same(batch, later[(9, 3, 5).index(step)])
    assert not same(first.batch(3), first.batch(4))
    assert not same(first.batch(3), read_data(model, path, batch=4, objective="masked", seed=8).batch(3))
    assert all(same(a, b) for a, b in zip(first.validation(), second.validation(), strict=True))


@pytest.mark.parametrize("count", [2, 3, 7, 50, 61, 250])
@pytest.mark.parametrize("ordered", [True, False])
def test_an_epoch_is_every_example_that_is_not_held_out(tmp_path: Path, count: int, ordered: bool) -> None:
    examples = read_data(language_model(), numbered(tmp_path, count), batch=5).examples  # type: ignore[attr-defined]
    examples = type("Counted", (type(examples),), {"ordered": ordered})(examples.inputs, examples.labels)
    data = Sampled(examples, 5)
    held = [number for batch in data.validation() for number in numbers(batch)]
    assert len(held) == max(count // 20, min(5, count // 2)) == data.held_out
    size = min(5, data.trained_on)
    drawn = [number for step in range(2 * data.trained_on) for number in numbers(data.batch(step))]
    epochs = [drawn[at : at + data.trained_on] for at in range(0, size * data.trained_on, data.trained_on)]
    assert all(sorted([*epoch, *held]) == list(range(count)) for epoch in epochs)
    assert held == (list(range(count - len(held), count)) if ordered else sorted(held))
    if count == 250:
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0])
        assert ordered or max(np.diff(held)) <= 21


def test_one_example_is_trained_on(tmp_path: Path) -> None:
    data = read_data(language_model(), numbered(tmp_path, 1))
    assert numbers(data.batch(5)) == [0]
    assert list(data.validation()) == []


# --- text ------------------------------------------------------------------------------------------------------------


def test_texts_are_packed_token_by_token(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "deeper").mkdir(parents=True)
    (texts / "b.md").write_text(topics["while"])
    (texts / "a.txt").write_text(topics["lambda"])
    (texts / "deeper/c.txt").write_text(topics["pass"])
    (texts / "left-out.py").write_text("import nothing")
    tokenizer = told(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    expected: list[int] = []
    for topic in ("lambda", "while", "pass"):
        expected += [*([end] if expected else []), *tokenizer.encode(topics[topic]).ids]
    data = read_data(language_model(folder), texts, batch=3, length=16)
    rows = [row for step in range(len(expected)) for row in data.batch(step).inputs["ids"].tolist()]
    held = [row for batch in data.validation() for row in batch.inputs["ids"].tolist()]
    packed = [expected[at : at + 16] for at in range(0, len(expected) - 15, 16)]
    assert {tuple(row) for row in (*rows, *held)} == {tuple(row) for row in packed}
    assert held == packed[-len(held) :]
    batch = data.batch(0)
    assert np.array_equal(batch.labels[:, :-1], batch.inputs["ids"][:, 1:])
    assert set(batch.labels[:, -1]) == {IGNORED}
    assert batch.inputs["mask"].all()


@pytest.mark.parametrize("piece", [50, 1000, 10**7])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    whole = "".join(topics[name] for name in sorted(topics)[:20]) + "x" * 300 + "  \n\n end"
    path = tmp_path / "text.txt"
    path.write_text(whole)
    monkeypatch.setattr(text, "PIECE", piece)
    pieces = list(text.read_text(path))
    assert "".join(pieces) == whole
    assert (len(pieces) > 2) == (piece < len(whole))
    tokenizer = told(folder)
    ids = text.encoded(tokenizer, [pieces], end=None)
    assert ids.dtype == np.uint16
    assert ids.tolist() == tokenizer.encode(whole).ids


def test_the_end_of_a_document_is_what_the_tokenizers_config_says(folder: Path) -> None:
    model = language_model(folder)
    assert text.end_token(model, told(folder)) == told(folder).token_to_id("<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<mask>"}}))
    assert text.end_token(model, told(folder)) == told(folder).token_to_id("<mask>")


def test_an_exported_files_tokenizer_lies_above_it(folder: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").touch()
    assert language_model(folder / "onnx/model.onnx").beside("tokenizer.json") == folder / "tokenizer.json"
    (folder / "other.onnx").touch()
    assert language_model(folder / "other.onnx").beside("tokenizer.json") == folder / "tokenizer.json"
    assert language_model(folder / "onnx").beside("nothing.json") is None
    assert language_model().beside("tokenizer.json") is None


@pytest.mark.parametrize(("content", "problem"), [("{", "cannot be read as JSON"), ("[]", "expected a JSON object")])
def test_a_broken_file_beside_the_model_is_named(folder: Path, tmp_path: Path, content: str, problem: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    (tmp_path / "text.txt").write_text("text")
    assert f"tokenizer_config.json: {problem}" in refusal(language_model(folder), tmp_path / "text.txt")


def test_pictures_among_texts_are_left_out(folder: Path, pictures: Path) -> None:
    (pictures / "page.md").write_text(topics["if"])
    ids = read_data(language_model(folder), pictures).examples.ids  # type: ignore[attr-defined]
    assert ids.tolist() == told(folder).encode(topics["if"]).ids


def test_tokens_are_hidden_by_the_recipe_of_bert() -> None:
    ids = np.random.default_rng(0).integers(10, VOCAB, (400, 128))
    ids[:, 0] = 3
    shown, labels = text.masked(ids, 5, VOCAB, np.random.default_rng(1), special=(3,))
    chosen = labels != IGNORED
    assert (shown == ids)[~chosen].all()
    assert (labels == ids)[chosen].all()
    assert not chosen[:, 0].any()
    assert chosen[:, 1:].mean() == pytest.approx(0.15, abs=0.01)
    hidden, kept = (shown == 5)[chosen], (shown == ids)[chosen]
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    assert kept.mean() == pytest.approx(0.1, abs=0.02)
    others = shown[chosen][~hidden & ~kept]
    assert len(set(others.tolist())) > 200


def test_a_sequence_too_short_to_hide_by_chance_hides_one() -> None:
    for seed in range(20):
        _, labels = text.masked(np.array([[7, 8]]), 5, 10, np.random.default_rng(seed))
        assert (labels != IGNORED).any()


def test_what_a_model_learns_is_told_by_its_attention_or_by_running_it(folder: Path) -> None:
    assert text.objective_of(language_model()) == "causal"
    assert text.objective_of(language_model(causal=False)) == "masked"
    assert text.objective_of(language_model(head="bare")) is None
    for causal in (True, False):
        model = language_model(causal=causal)
        untold = _without_causal(model.graph)
        forward = model.adapter.forward(model)
        adapter = SimpleNamespace(forward=lambda model, device, forward=forward: forward)
        asked = replace(model, graph=untold, adapter=adapter)
        assert text.objective_of(asked) == ("causal" if causal else "masked")


def _without_causal(graph: LayerGraph) -> LayerGraph:
    def untold(layer: Any) -> Any:
        return layer.model_copy(update={"attributes": {k: v for k, v in layer.attributes.items() if k != "causal"}})

    stacks = tuple(s.model_copy(update={"layers": tuple(map(untold, s.layers))}) for s in graph.stacks)
    return graph.model_copy(update={"stacks": stacks}).revalidated()


def test_masked_batches_of_tokens_use_the_tokenizer_beside(folder: Path, tmp_path: Path) -> None:
    ids = np.arange(256, dtype=np.uint16)
    np.save(tmp_path / "tokens.npy", ids)
    data = read_data(language_model(folder, causal=False), tmp_path / "tokens.npy", length=32)
    batch = data.batch(0)
    mask = told(folder).token_to_id("<mask>")
    chosen = batch.labels != IGNORED
    assert (batch.inputs["ids"][chosen] == mask).mean() > 0.5
    assert not (batch.inputs["ids"][~chosen] == mask).any()


def test_a_bare_model_gets_text_without_labels(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(topics["assert"])
    assert read_data(language_model(folder, head="bare"), path).batch(0).labels is None
    with pytest.raises(GrowkitError, match="has no logits over its vocabulary"):
        read_batch(language_model(folder, head="bare"), path)


def test_inputs_beside_the_tokens_are_made_by_their_kind() -> None:
    graph = transformer(vocab=9, depths=(2,))
    ports = (
        Port(name="ids", kind="tokens", space="vocab"),
        Port(name="where", kind="positions"),
        Port(name="kinds", kind="types", space="labels"),
        Port(name="past.0"),
        Port(name="past.1"),
    )
    cache = LayerPort(stack="stack0", names=("past.0", "past.1"), axes=("", "heads", "", "head_dim"))
    graph = graph.model_copy(update={"inputs": ports, "layer_inputs": (cache,)}).revalidated()
    given = text.text_inputs(graph, np.ones((3, 4), dtype=np.int64))
    assert given["where"].tolist() == [[0, 1, 2, 3]] * 3
    assert not given["kinds"].any()
    assert given["past.1"].shape == (3, graph.sizes["heads"], 0, graph.sizes["head_dim"])
    odd = graph.model_copy(update={"inputs": (*ports, Port(name="flag"))}).revalidated()
    with pytest.raises(GrowkitError, match=r"input flag is neither tokens .* \.npz"):
        text.text_inputs(odd, np.ones((3, 4), dtype=np.int64))


# --- files of tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "vocab", "dtype"), [("bin", 300, "u2"), ("bin", 70000, "u4"), ("npy", 300, "i8")])
def test_tokens_are_mapped_not_loaded(tmp_path: Path, suffix: str, vocab: int, dtype: str) -> None:
    ids = (np.arange(4000) * 7 % vocab).astype(dtype)
    path = tmp_path / f"tokens.{suffix}"
    if suffix == "npy":
        np.save(path, ids.reshape(40, 100))
    else:
        ids.tofile(path)
    data = read_data(language_model(vocab=vocab), path, batch=2, length=10)
    held = data.examples.ids  # type: ignore[attr-defined]
    assert isinstance(held, np.memmap)
    assert not held.flags.owndata
    assert np.array_equal(held, ids)
    validation = [row for batch in data.validation() for row in batch.inputs["ids"]]
    assert np.array_equal(np.concatenate(validation), ids[-200:])


def test_a_start_loss_is_measured_on_the_first_sequences(tmp_path: Path) -> None:
    ids = np.arange(10_000) % VOCAB
    np.save(tmp_path / "tokens.npy", ids)
    batch = read_batch(language_model(), tmp_path / "tokens.npy")
    assert np.array_equal(batch.inputs["ids"], ids[: 8 * 32].reshape(8, 32))


# --- images ----------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_their_arrays(tmp_path: Path, suffix: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (45, 8, 8), dtype=np.uint8)
    labels = np.arange(45, dtype=np.uint8) % 3
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[:1])
    data = read_data(image_model(), tmp_path, batch=5)
    assert same(
        data.batch(4), read_data(image_model(), tmp_path / f"train-images-idx3-ubyte{suffix}", batch=5).batch(4)
    )
    if not suffix:
        assert isinstance(data.examples.load(3), np.memmap)  # type: ignore[attr-defined]
    seen = [(b.inputs["pixel_values"], b.labels) for b in (*map(data.batch, range(8)), *data.validation())]
    pixels, classes = (np.concatenate(each) for each in zip(*seen, strict=True))
    order = [int(np.argmin(np.abs(images / 255.0 - (image * 0.5 + 0.5)).sum((1, 2)))) for image in pixels[:, 0]]
    assert sorted(order) == list(range(45))
    assert np.allclose(pixels[:, 0], (images[order] / 255 - 0.5) / 0.5, atol=1e-6)
    assert pixels.dtype == np.float32
    assert np.array_equal(classes, labels[order])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of one colour each, in folders by the class."""
    from PIL import Image

    for name, color in (("ant", (255, 0, 0)), ("bee", (0, 255, 0)), ("cat", (0, 0, 255))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20 + number, 10), color).save(tmp_path / "pictures" / name / f"{number}.png")
        (tmp_path / "pictures" / name / "notes.csv").touch()
    return tmp_path / "pictures"


def test_image_folders_are_scaled_as_the_model_says(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.5, 0.25]})
    )
    data = read_data(image_model(6, 3, tmp_path), pictures, batch=4)
    batches = [*map(data.batch, range(3)), *data.validation()]
    for batch in batches:
        assert batch.inputs["pixel_values"].shape[1:] == (3, 6, 6)
        for image, label in zip(batch.inputs["pixel_values"], batch.labels, strict=True):
            expected = [
                (float(channel == label) - m) / s
                for channel, (m, s) in enumerate(zip((0.5, 0.25, 0.0), (0.5, 0.5, 0.25), strict=True))
            ]
            assert np.allclose(image, np.array(expected)[:, None, None], atol=1e-6)
    assert len(batches) == 4
    (held,) = data.validation()
    assert set(held.labels) == {0, 1, 2}  # from all over, although the files lie class by class


def test_classes_are_numbered_by_the_models_names(pictures: Path) -> None:
    named = image_folder(image_model(6, 3, label2id={"cat": 0, "ant": 2, "bee": 1}), pictures)
    assert named.labels.tolist() == [2] * 4 + [1] * 4 + [0] * 4
    assert image_folder(image_model(6, 3, label2id={"dog": 0}), pictures).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_an_image_becomes_as_large_and_as_grey_as_the_model(pictures: Path) -> None:
    grey = image_folder(image_model(5, 1), pictures).take(np.array([0, 4]), np.random.default_rng(0))
    assert grey.inputs["pixel_values"].shape == (2, 1, 5, 5)
    red, green = (round(each * 127.5 + 127.5) for each in grey.inputs["pixel_values"][:, 0, 0, 0].tolist())
    assert (red, green) == (76, 150)  # their luma


# --- datasets --------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, dict[str, list[Any]]] = {
    "text": {"text": [topics["if"], topics["pass"]]},
    "input_ids": {"input_ids": [list(range(40)), list(range(100, 190)), [7] * 31]},
}


class Rows:
    """As much of a dataset as is read, for where the library is not installed."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def select_columns(self, names: list[str]) -> "Rows":
        return Rows({name: self.columns[name] for name in names})

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        yield self.columns

    def __getitem__(self, key: Any) -> Any:
        return self.columns[key] if isinstance(key, str) else {n: column[key] for n, column in self.columns.items()}


@pytest.fixture(params=["library", "stand-in"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Saves columns as `datasets` does; without it a stand-in for its one function that is called."""

    def save(columns: dict[str, list[Any]], *, split: bool = False) -> Path:
        path = tmp_path / "dataset"
        if request.param == "library":
            datasets = pytest.importorskip("datasets")
            made = datasets.Dataset.from_dict(columns)
            (datasets.DatasetDict({"train": made}) if split else made).save_to_disk(str(path))
            return path
        path.mkdir()
        (path / ("dataset_dict.json" if split else "state.json")).touch()
        module = ModuleType("datasets")
        rows = Rows(columns)
        module.load_from_disk = lambda path: {"train": rows} if split else rows  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return path

    return save


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("column", COLUMNS)
def test_datasets_are_packed(folder: Path, saved: Callable[..., Path], column: str, split: bool) -> None:
    path = saved(COLUMNS[column], split=split)
    data = read_data(language_model(folder), path, length=10)
    tokenizer = told(folder)
    runs = {
        "input_ids": COLUMNS["input_ids"]["input_ids"],
        "text": [[*tokenizer.encode(topics["if"]).ids, tokenizer.token_to_id("<|endoftext|>")],
                 tokenizer.encode(topics["pass"]).ids],
    }[column]  # fmt: skip
    assert data.examples.ids.tolist() == [token for run in runs for token in run]  # type: ignore[attr-defined]


def test_a_dataset_of_images(saved: Callable[..., Path]) -> None:
    from PIL import Image

    images = [Image.new("RGB", (9, 9), color) for color in ((0, 0, 255), (255, 0, 0), (0, 255, 0))]
    data = read_data(image_model(6, 3), saved({"image": images, "label": [2, 0, 1]}))
    (held,) = data.validation()
    assert held.labels.tolist() == [1]
    assert np.allclose(held.inputs["pixel_values"][0], np.array([-1, 1, -1])[:, None, None])


def test_a_dataset_of_other_columns_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(GrowkitError, match="its columns are sentence; expected input_ids, text, or image and label"):
        read_data(language_model(), saved({"sentence": ["a"]}))


def test_without_datasets_its_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GrowkitError, match=r"needs datasets; pip install 'growkit\[datasets\]'"):
        read_data(language_model(), tmp_path)


# --- named arrays ----------------------------------------------------------------------------------------------------


def test_named_arrays_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "named.npz"
    np.savez(path, ids=np.arange(60).reshape(30, 2), mask=np.arange(60).reshape(30, 2) + 100, labels=np.arange(30) % 3)
    model = language_model(head="pooler")
    batch = read_data(model, path, batch=4).batch(11)
    assert np.array_equal(batch.inputs["mask"], batch.inputs["ids"] + 100)
    assert np.array_equal(batch.labels, batch.inputs["ids"][:, 0] // 2 % 3)
    assert len(read_batch(model, path).labels) == 30
    np.savez(path, ids=np.arange(60).reshape(30, 2))
    assert read_data(model, path).batch(0).labels is None


def test_labels_that_the_model_takes_are_an_input_too(tmp_path: Path) -> None:
    graph = transformer(vocab=VOCAB)
    own = graph.model_copy(update={"inputs": (*graph.inputs, Port(name="labels"))}).revalidated()
    batch = read_data(memory_model(own), numbered(tmp_path, 4)).batch(0)
    assert np.array_equal(batch.inputs["labels"], batch.labels)


# --- batches that somebody makes -------------------------------------------------------------------------------------


def made(count: int) -> list[dict[str, np.ndarray]]:
    return [{"ids": np.full((1, 2), number), "labels": np.zeros((1, 2))} for number in range(count)]


def steps(data: Data, *asked: int) -> list[int]:
    return [numbers(data.batch(step))[0] for step in asked]


class Again:
    """What can be iterated over again, and has no length."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(made(3))


def test_a_list_of_batches_starts_again() -> None:
    assert steps(as_data(made(3)), 0, 4, 2, 1) == [0, 1, 2, 1]
    held = as_data(made(3), validation=made(2))
    assert [numbers(batch) for batch in held.validation()] == [[0], [1]] == [numbers(b) for b in held.validation()]
    batch = Batch({"ids": np.ones((1, 2))}, None)
    assert as_data([batch]).batch(3) is batch
    assert as_data(held) is held


def test_an_iterable_passes_over_what_comes_before_a_step() -> None:
    assert steps(as_data(Again()), 1, 2, 3, 7) == [1, 2, 0, 1]
    generator = as_data(iter(made(4)))
    assert steps(generator, 0, 2) == [0, 2]
    with pytest.raises(GrowkitError, match="the batch of step 1 was asked for after that of step 2"):
        generator.batch(1)
    assert steps(generator, 3) == [3]
    with pytest.raises(GrowkitError, match="the batches ran out at step 4, on the way to step 6"):
        generator.batch(6)


@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        ([], "there are no batches"),
        (3, "batches of type int; expected a path, or batches to iterate over"),
        ([(1, 2)], "a batch is of type tuple; expected arrays or tensors by the names of inputs"),
        ([{"ids": [1, 2]}], "the batch's ids is of type list; expected an array or a tensor"),
    ],
)
def test_batches_that_are_none(batches: Any, problem: str) -> None:
    with pytest.raises(GrowkitError, match=problem):
        as_data(batches).batch(0)


# --- what cannot be read ---------------------------------------------------------------------------------------------


def refusal(model: growkit.Model, path: Path, **options: Any) -> str:
    with pytest.raises(GrowkitError) as told:
        read_data(model, path, **options)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK", 100)
    path = tmp_path / "tokens.npy"
    ids = np.zeros(1000, dtype=np.int64)
    for wrong in (VOCAB, -1):
        ids[777] = wrong
        np.save(path, ids)
        message = refusal(language_model(), path)
        assert message.startswith(f"{path}: the data holds the token {wrong}; expected ids below {VOCAB}")
        assert message.endswith("it stands at entry 777")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("empty.txt", b"", "empty.txt: is empty; expected text or tokens"),
        ("empty.bin", b"", "empty.bin: is empty"),
        ("odd.bin", b"123", "odd.bin: cannot be read as .bin"),
        ("few.bin", b"1\x002\x003\x004\x00", "few.bin: the data holds 4 tokens; expected at least one sequence of 32"),
        ("torn.npy", b"\x93NUMPY", "torn.npy: cannot be read as .npy"),
        ("picture.txt", b"\xff\xfe\x00\x80", "picture.txt: cannot be read as text"),
        ("torn.npz", b"PK", "torn.npz: not an .npz file"),
        ("a-images-idx3-ubyte", b"\x00\x00\x08\x01", "not an IDX file of 3 axes of bytes"),
        ("a-images-idx3-ubyte.gz", b"nothing", "a-images-idx3-ubyte.gz: cannot be read"),
        ("a-images-idx3-ubyte", struct.pack(">BBBB3I", 0, 0, 8, 3, 5, 8, 8), "holds 0 bytes; expected 5 x 8 x 8"),
    ],
)
def test_files_that_hold_something_else(folder: Path, tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert problem in refusal(language_model(folder), tmp_path / name)


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros(100))
    assert "floats.npy: holds float64; expected tokens, which are integers" in refusal(
        language_model(), tmp_path / "floats.npy"
    )


def test_places_without_data(tmp_path: Path) -> None:
    assert "no such file; expected text, .npy" in refusal(language_model(), tmp_path / "nowhere")
    assert "holds no data; expected .txt or .md files" in refusal(language_model(), tmp_path)


def test_a_tokenizer_that_is_not_the_models(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(topics["if"])
    assert "the tokenizer has 260 tokens, the model 100; expected the tokenizer that the model was trained with" in (
        refusal(language_model(folder, vocab=100), path)
    )
    assert "the model: no tokenizer.json beside the weights; give the data as tokens" in refusal(language_model(), path)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: cannot be read as a tokenizer" in refusal(language_model(folder), path)


def test_sequences_longer_than_the_model(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros(100, dtype=int))
    for length in (33, 1):
        assert f"sequences of {length} tokens were asked for; the model takes 2 to 32" in refusal(
            language_model(), tmp_path / "tokens.npy", length=length
        )
    assert "batches of 0 examples" in refusal(language_model(), tmp_path / "tokens.npy", batch=0)


def test_models_that_tokens_are_not_enough_for(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros(100, dtype=int))
    graph = transformer(vocab=VOCAB)
    both = graph.model_copy(update={"inputs": (*graph.inputs, Port(name="decoder_ids", kind="tokens", space="vocab"))})
    assert "needs both sides: give named inputs" in refusal(memory_model(both.revalidated()), tmp_path / "tokens.npy")
    assert "none of the model's inputs (pixel_values) is known to take tokens" in refusal(
        image_model(), tmp_path / "tokens.npy"
    )


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"other": np.zeros((2, 2))}, "holds other; the model's inputs are ids, mask"),
        ({"ids": np.zeros((2, 2), int), "labels": np.zeros(3, int)}, "of several lengths, or empty (ids 2, labels 3)"),
        ({"ids": np.array([[1, 2], [3, VOCAB]])}, f"ids[1, 1] is {VOCAB}; expected ids below {VOCAB}"),
        ({"ids": np.zeros((2, 2), int), "labels": np.array([0, 3])}, "labels[1] is 3; expected numbers below 3"),
    ],
)
def test_named_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], problem: str) -> None:
    np.savez(tmp_path / "named.npz", **arrays)
    assert problem in refusal(language_model(head="pooler"), tmp_path / "named.npz")


def test_images_that_do_not_fit(pictures: Path, tmp_path: Path) -> None:
    for number in range(2):
        (pictures / f"more{number}").mkdir()
        (pictures / f"more{number}/0.png").write_bytes((pictures / "ant/0.png").read_bytes())
    message = refusal(image_model(6, 3), pictures)
    assert "5 classes (ant, bee, cat, more0, more1); the model has 3; expected one folder for each" in message
    assert "images have 2 channels; expected 1 or 3" in refusal(image_model(6, 2), _idx(tmp_path, [0, 1, 2]))
    assert "image 1 is of class 9; expected classes below 3" in refusal(image_model(), _idx(tmp_path, [0, 9, 1]))
    assert "2 labels for 3 images" in refusal(image_model(), _idx(tmp_path, [0, 1]))
    (tmp_path / "a-labels-idx1-ubyte").unlink()
    assert "expected the labels beside it, in a-labels-idx1-ubyte" in refusal(
        image_model(), tmp_path / "a-images-idx3-ubyte"
    )


def _idx(folder: Path, labels: list[int]) -> Path:
    write_idx(folder / "a-images-idx3-ubyte", np.zeros((3, 8, 8), dtype=np.uint8))
    write_idx(folder / "a-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    return folder / "a-images-idx3-ubyte"


def test_an_image_that_is_broken_is_named(pictures: Path) -> None:
    (pictures / "bee/1.png").write_bytes(b"nothing")
    images = image_folder(image_model(6, 3), pictures)
    with pytest.raises(GrowkitError, match=r"bee/1\.png: cannot be read as an image"):
        images.take(np.arange(12), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("package", "name", "problem"),
    [("tokenizers", "text.txt", "reading text needs tokenizers"), ("PIL", "pictures", "reading images needs pillow")],
)
def test_a_missing_package_is_named(
    folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, problem: str
) -> None:
    (pictures.parent / "text.txt").write_text("text")
    monkeypatch.setitem(sys.modules, package, None)
    model = image_model(6, 3) if package == "PIL" else language_model(folder)
    assert f"{problem}; pip install 'growkit[data]'" in refusal(model, pictures.parent / name)
