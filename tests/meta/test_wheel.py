"""The wheel holds the four packages, whole, and nothing else."""

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NAMES = {package.rpartition("/")[2]: package for package in PACKAGES}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from the working tree."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("growkit-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def wheel(archive: zipfile.ZipFile) -> set[str]:
    """The names of the files in the wheel."""
    return set(archive.namelist())


def source_files(package: str) -> set[str]:
    """The files of `package` that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


def test_top_level_holds_the_packages_only(wheel: set[str]) -> None:
    top = {name.partition("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_typed(wheel: set[str], name: str) -> None:
    assert f"{name}/py.typed" in wheel


@pytest.mark.parametrize("name", NAMES)
def test_every_file_ships(wheel: set[str], name: str) -> None:
    sources = {file.replace(NAMES[name], name, 1) for file in source_files(NAMES[name])}
    assert {file for file in wheel if file.startswith(f"{name}/")} == sources


def test_the_architecture_files_ship(wheel: set[str]) -> None:
    sources = {Path(file).name for file in source_files("specs/growkit_specs/architectures")}
    shipped = {Path(file).name for file in wheel if file.startswith("growkit_specs/architectures/")}
    assert {"bert.yaml", "llama.yaml"} <= sources
    assert sources <= shipped


def test_no_tests_ship(wheel: set[str]) -> None:
    assert not [name for name in wheel if "tests/" in name or Path(name).name.startswith(("test_", "conftest"))]


def test_entry_points(archive: zipfile.ZipFile, wheel: set[str]) -> None:
    (name,) = (name for name in wheel if name.endswith(".dist-info/entry_points.txt"))
    declared = archive.read(name).decode().splitlines()
    assert "growkit = growkit.cli:main" in declared
    assert "torch = growkit_torch:TorchAdapter" in declared
