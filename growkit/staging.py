"""Staging: what is written stands beside its destination until the whole of it is right, and then takes its name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from growkit.adapters import refuse_existing
from growkit_specs import GrowkitError

T = TypeVar("T")


def made_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items of an iterable in order, each made by a second thread while the one before it is in use.

    Args:
        items: What is iterated over, in that thread only; it is one item ahead, so two of them are in memory.

    Yields:
        Each item; an error in making one is raised in its turn.
    """
    source = iter(items)

    def following() -> list[T]:
        return list(islice(source, 1))

    with ThreadPoolExecutor(1, thread_name_prefix="made_ahead") as thread:
        coming = thread.submit(following)
        while made := coming.result():
            coming = thread.submit(following)
            yield made.pop()


@contextmanager
def staged_directory(destination: Path, needed: int = 0) -> Iterator[Path]:
    """A folder beside ``destination`` that takes its name when all has gone well, and vanishes otherwise.

    Args:
        destination: A path at which nothing exists.
        needed: How much will be written, in bytes; refused at once where there is less space.

    Yields:
        The folder to write in.

    Raises:
        GrowkitError: Where something exists at ``destination``, or it cannot be written; nothing is left behind.
    """
    with _staged(destination, needed) as folder:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _put_in_place(folder, {folder: destination})


@contextmanager
def staged_files(destination: Path, needed: int = 0, beside: Iterable[str] = ()) -> Iterator[Path]:
    """A folder whose files move beside ``destination`` when all has gone well, and vanish otherwise.

    Every file keeps its name. The one named as ``destination`` comes last: where it stands, the others do.

    Args:
        destination: The path of the main file, at which nothing exists.
        needed: How much will be written, in bytes; refused at once where there is less space.
        beside: Names of other files known beforehand; refused at once where something exists there.

    Yields:
        The folder to write in.

    Raises:
        GrowkitError: Where something exists at any file's place, or it cannot be written; nothing is left behind.
    """
    for name in beside:
        refuse_existing(destination.with_name(name))
    with _staged(destination, needed) as folder:
        yield folder
        written = sorted(folder.iterdir(), key=lambda path: (path.name == destination.name, path.name))
        _put_in_place(folder, {path: destination.with_name(path.name) for path in written})


@contextmanager
def _staged(destination: Path, needed: int) -> Iterator[Path]:
    """A folder beside ``destination`` that vanishes at the end unless it was renamed; the disk's errors in one line."""
    refuse_existing(destination)
    parent = destination.absolute().parent
    try:
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise GrowkitError(f"{parent}: no space left: {needed:,} bytes needed, {free:,} free; nothing was written")
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise GrowkitError(f"{parent}: {error.strerror}; nothing was written") from None
    try:
        yield folder
    except OSError as error:
        raise GrowkitError(f"{destination}: {error.strerror or error}; nothing was written") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, moves: Mapping[Path, Path]) -> None:
    """Rename every path to its target, all or none, once what ``folder`` holds is safely on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    for target in moves.values():
        if os.path.lexists(target):
            raise GrowkitError(f"{target} appeared meanwhile; growkit overwrites nothing; nothing was written")
    placed: list[Path] = []
    try:
        for path, target in moves.items():
            path.rename(target)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink()
        raise
    _sync(folder.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
