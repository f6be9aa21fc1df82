"""Every code block of the documentation runs, and prints what the page says it prints."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from growkit_specs import architectures
from tests.adapters.onnx.zoo import FILES, make
from tests.docs.pages import DOCS, PAGES, ROOT, Block, Runner, blocks_of

REAL = "minilm"
"""The name under which pages mention the real model; blocks without it need no download."""

ONNX = {"encoder.onnx": "bert-legacy17-eager", "decoder.onnx": "llama-cache-legacy17-eager"}
"""Files that pages mention, and which of the tests' files they are."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_with(page: Path, *, real: bool) -> list[Block]:
    return [block for block in blocks_of(page) if (REAL in block.text) == real]


@pytest.fixture(scope="session")
def small_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small``, the model that the tutorial makes in its first block, and the how-to guides use."""
    folder = tmp_path_factory.mktemp("tutorial")
    (block,) = blocks_of(DOCS / "tutorial/grow-your-first-model.md")[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Runner().run(block)
    return folder / "small"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's own folder, gone after it; architecture files that the page adds are forgotten again."""
    monkeypatch.chdir(tmp_path)
    known = dict(architectures())
    yield tmp_path
    architectures().clear()
    architectures().update(known)
    shutil.rmtree(tmp_path)  # a grown real model is large


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_with(page, real=False)], ids=name)
def test_the_blocks_of_a_page_run(page: Path, folder: Path, small_directory: Path) -> None:
    if "tutorial" not in page.parts:
        shutil.copytree(small_directory, folder / "small")
    for onnx, file in ONNX.items():
        if any(onnx in block.text for block in blocks_of(page)):
            shutil.copyfile(make(next(each for each in FILES if each.name == file)), folder / onnx)
    runner = Runner()
    for block in blocks_with(page, real=False):
        runner.run(block)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_with(page, real=True)], ids=name)
def test_the_blocks_on_a_real_model_run(page: Path, folder: Path, minilm_directory: Path) -> None:
    (folder / REAL).symlink_to(minilm_directory)
    runner = Runner()
    for block in blocks_with(page, real=True):
        runner.run(block)
