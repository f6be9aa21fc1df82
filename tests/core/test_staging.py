"""Staging: all or nothing, and nothing that stood there is touched."""

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from growkit.staging import staged_directory, staged_files
from growkit_specs import GrowkitError


def write(folder: Path, *names: str | None) -> None:
    for name in names:
        (folder / name).write_text(f"new {name}")


def test_a_set_of_files_appears_at_once_and_the_main_one_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: order.append(target.name) or rename(self, target))
    with staged_files(tmp_path / "m", beside=["m.data"]) as folder:
        write(folder, "m", "a", "z", "m.data")
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert order == ["a", "m.data", "z", "m"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: f"new {name}" for name in order}
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "a").stat().st_mode


@pytest.mark.parametrize("existing", ["m", "m.data", "unforeseen"])
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).symlink_to("nowhere")  # even a link that leads nowhere is somebody's
    with (
        pytest.raises(GrowkitError, match=f"{existing} .*growkit overwrites nothing"),
        staged_files(tmp_path / "m", beside=["m.data"]) as folder,
    ):
        write(folder, "m", "m.data", "unforeseen")
    assert [path.name for path in tmp_path.iterdir()] == [existing]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_where_a_rename_fails_the_others_are_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    rename, left = Path.rename, [failing]

    def limited(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "the cable is out")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", limited)
    with (
        pytest.raises(GrowkitError, match="m: the cable is out; nothing was written"),
        staged_files(tmp_path / "m") as folder,
    ):
        write(folder, "a", "b", "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("staged", [staged_directory, staged_files])
def test_whatever_goes_wrong_nothing_is_left(
    tmp_path: Path, staged: Callable[..., AbstractContextManager[Path]]
) -> None:
    with pytest.raises(TypeError), staged(tmp_path / "m") as folder:
        write(folder, "m", None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(GrowkitError, match="is no directory; make it first"), staged(tmp_path / "none" / "m"):
        raise AssertionError
    with pytest.raises(GrowkitError, match="no space left"), staged(tmp_path / "m", 1 << 60):
        raise AssertionError
    assert not list(tmp_path.iterdir())
