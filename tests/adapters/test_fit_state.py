"""A fit that is broken off goes on where it was, bit for bit, and from nothing else."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import growkit
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError
from tests.adapters.test_fit import assert_same, batches, fitted, llama, llama_plan, losses

SHORT = {"steps": 8, "lr": 0.03, "warmup": 0.25, "save_every": 3}
KILLED_AT = 5

SCRIPT = """
import os, signal, sys
import growkit
from tests.adapters import test_fit_state as own
from tests.adapters.test_fit import batches, llama, llama_plan

def die(done):
    print(done.step, flush=True)
    if done.step == own.KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)

growkit.fit(llama(), llama_plan(), own.data(), device="cpu", checkpoint=sys.argv[1], progress=die, **own.SHORT)
"""


def data() -> Any:
    given = batches()
    return growkit.as_data(given, validation=given[:1])


def test_a_fit_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.safetensors"
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.split() == ["1", "2", "3", "4", "5"]
    resumed, steps = fitted(data(), checkpoint=checkpoint, resume=True, **SHORT)
    whole, all_steps = fitted(data(), **SHORT)
    assert [each.step for each in steps] == [4, 5, 6, 7, 8]  # the last state is that of step 3
    assert losses(steps) == losses(all_steps)[3:]
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    "told",
    [
        {"learn": ("depth", "width", "norms", "residual", "source")},
        pytest.param({"precision": "float64"}, marks=pytest.mark.slow),
    ],
)
def test_every_step_can_be_the_last(told: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = fitted(data(), **{**SHORT, **told})
    checkpoint = tmp_path / "state.safetensors"
    for step in range(1, 9):
        _stopped(checkpoint, step, **told)
    resumed, steps = fitted(data(), checkpoint=checkpoint, resume=True, **{**SHORT, **told})
    assert steps == []  # it is done
    assert_same(resumed, whole)


def _stopped(checkpoint: Path, step: int, **told: Any) -> None:
    """Go on for one step, and stop as an interrupted program does."""

    class Stop(Exception):
        pass

    def stop(done: Any) -> None:
        if done.step > step:
            raise Stop

    with contextlib.suppress(Stop):
        growkit.fit(
            llama(), llama_plan(), data(), device="cpu", checkpoint=checkpoint, resume=True, progress=stop,
            **{**SHORT, "save_every": 1, **told},
        )  # fmt: skip


def test_the_best_look_survives(tmp_path: Path) -> None:
    given = batches(2)
    split = growkit.as_data(given[:1], validation=given[1:])
    told = {"steps": 12, "lr": 0.05, "validate_every": 1, "patience": 4, "save_every": 1}
    whole, all_steps = fitted(split, **told)
    checkpoint = tmp_path / "state.safetensors"

    class Stop(Exception):
        pass

    def stop(done: Any) -> None:
        if done.step == len(all_steps) - 1:
            raise Stop

    with pytest.raises(Stop):
        growkit.fit(
            llama(), llama_plan(), split, device="cpu", warmup=0.0, checkpoint=checkpoint, progress=stop, **told
        )
    resumed, steps = fitted(split, checkpoint=checkpoint, resume=True, **told)
    assert len(all_steps) < 12
    assert [each.validation for each in steps] == [each.validation for each in all_steps][-len(steps) :]
    assert_same(resumed, whole)


def test_batches_that_come_only_once_can_have_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.safetensors"
    given = batches(8)
    whole, _ = fitted(given, **SHORT)
    once, _ = fitted((batch for batch in given), checkpoint=checkpoint, **{**SHORT, "save_every": 2})
    assert_same(once, whole)
    again, steps = fitted((batch for batch in given), checkpoint=checkpoint, resume=True, **SHORT)
    assert steps == []
    assert_same(again, whole)


def test_where_there_is_no_checkpoint_yet_the_fit_begins(tmp_path: Path) -> None:
    _, steps = fitted(checkpoint=tmp_path / "none.safetensors", resume=True)
    assert [each.step for each in steps] == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.safetensors"]  # and nothing half written


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The checkpoint of a fit."""
    path = tmp_path / "state.safetensors"
    fitted(checkpoint=path)
    return path


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"seed": 7}, r"is of a fit whose settings.seed is 0, here it is 7; ask for the same, or remove"),
        ({"steps": 4}, "whose settings.steps is 3, here it is 4"),
        (
            {"learn": ("width",)},
            r"whose settings.learn is \['depth', 'width', 'norms', 'source'\], here it is \['width'\]",
        ),
        ({"structure": {"hidden": "dense"}}, "whose settings.structure.hidden is None, here it is 'dense'"),
        ({"per_layer": True}, "whose settings.per_layer is False, here it is True"),
        ({"precision": "float64"}, "whose settings.precision is 'float32', here it is 'float64'"),
        ({"init": "lemon"}, "whose method is 'lossless', here it is 'lemon'"),
        ({"plan": "hidden"}, "whose target.hidden is '?36'?, here it is '?48'?"),
        ({"data": "others"}, "whose first batch is [0-9]+, here it is [0-9]+"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(told: dict[str, Any], problem: str, kept: Path) -> None:
    told = dict(told)
    if "plan" in told:
        told["plan"] = growkit.plan(llama(), hidden=48, ffn=60, layers=3)
    if told.get("data"):
        told["data"] = batches()[::-1]
    before = kept.read_bytes()
    with pytest.raises(GrowkitError, match=problem) as refusal:
        fitted(checkpoint=kept, resume=True, **told)
    assert str(kept) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    "how", [{"accumulate": 2}, {"strategy": "factored"}, {"checkpointing": 1.0}, {"validate_every": 1}]
)
def test_how_it_runs_may_differ(how: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    _stopped(path, 2)
    _, steps = fitted(data(), checkpoint=path, resume=True, **{**SHORT, **how})
    assert steps[-1].step == 8
    assert losses(steps) == pytest.approx(losses(fitted(data(), **SHORT)[1])[-len(steps) :], rel=1e-4)


@pytest.mark.parametrize("damage", ["cut", "empty", "no state", "folder", "an operator"])
def test_a_damaged_checkpoint_is_refused(damage: str, kept: Path) -> None:
    match damage:
        case "cut":
            kept.write_bytes(kept.read_bytes()[:-100])
        case "empty":
            kept.write_bytes(b"")
        case "no state":
            kept.write_bytes(b"something else altogether")
        case "folder":
            kept.unlink()
            kept.mkdir()
        case "an operator":
            operator, _ = fitted()
            operator.save(kept)
    with pytest.raises(GrowkitError, match="not the checkpoint of a fit") as refusal:
        fitted(checkpoint=kept, resume=True)
    assert str(kept) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_that_lacks_an_entry_is_refused(kept: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(str(kept), framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys() if name != "entry.1"}  # noqa: SIM118
        arrays["entry.0"] = np.zeros((1, 1), dtype=np.float32)
        told = file.metadata()
    save_file(arrays, kept, metadata=told)
    with pytest.raises(GrowkitError, match="not the checkpoint of a fit"):
        fitted(checkpoint=kept, resume=True)


@pytest.mark.parametrize("name", ["checkpoint", "log"])
def test_files_in_a_folder_that_is_not_there_are_refused_at_once(name: str, tmp_path: Path) -> None:
    steps: list[Any] = []
    with pytest.raises(GrowkitError, match="none is no directory; make it first"):
        growkit.fit(llama(), llama_plan(), data(), progress=steps.append, **{name: tmp_path / "none" / "file"})
    assert steps == []


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    fitted(checkpoint=path)
    before = path.read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GrowkitError, match=r"the checkpoint cannot be written \(No space left on device\)"):
        fitted(checkpoint=path, steps=4)
    assert [each.name for each in tmp_path.iterdir()] == ["state.safetensors"]
    assert path.read_bytes() == before  # the one before is whole


def test_the_operator_of_a_resumed_fit_is_an_operator(kept: Path, tmp_path: Path) -> None:
    operator, steps = fitted(checkpoint=kept, resume=True)
    assert steps == []
    operator.save(tmp_path / "operator.safetensors")
    assert_same(GrowthOperator.load(tmp_path / "operator.safetensors"), operator)
