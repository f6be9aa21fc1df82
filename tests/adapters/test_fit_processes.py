"""Several processes that fit together give the numbers of one."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import growkit
from growkit.loss import Batch
from growkit.operator import GrowthOperator
from growkit_specs import FitSettings, GrowkitError
from growkit_torch.fit import Fit, joined
from tests.adapters.fitting import run
from tests.adapters.test_fit import arrays_of, assert_same, fitted, lame, llama, llama_plan, losses

TOLD = {"steps": 4, "lr": 0.02, "precision": "float64", "save_every": 2}
EVERYTHING = ("depth", "width", "norms", "residual", "source")
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-accumulate": {"accumulate": 2},
    "ddp-factored": {"strategy": "factored", "checkpointing": 1.0, "learn": EVERYTHING},
    "fsdp": {"sharded": True},
    "fsdp-accumulate": {"sharded": True, "accumulate": 2},
    "fsdp-factored": {"sharded": True, "strategy": "factored", "checkpointing": 1.0, "learn": EVERYTHING},
}


QUICK = {"ddp", "fsdp"}


def data() -> Any:
    """Batches, and for validation one that cannot be shared out."""
    alone = {name: value[:1] for name, value in lame()[0].items()}
    return growkit.as_data(lame(), validation=[alone])


def fit_all(folder: Path, cases: list[str]) -> None:
    """What each of the processes does: every case in full, and some that are broken off in the middle and go on."""
    rank = int(os.environ["RANK"])
    for name in cases:
        told = CASES[name]
        files = {"log": folder / f"{name}.jsonl", "checkpoint": folder / f"{name}.state"}
        operator, _ = fitted(data(), **files, **{**TOLD, **told})
        operator.save(folder / f"{name}.{rank}.operator")
    for name in sorted(QUICK.intersection(cases)):  # in the same order in every process
        told = {**TOLD, **CASES[name], "checkpoint": folder / f"{name}.half"}
        with contextlib.suppress(GrowkitError):
            fitted(BrokenOff(lame()), **told)
        operator, _ = fitted(lame(), resume=True, log=folder / f"{name}.rest.jsonl", **told)
        operator.save(folder / f"{name}.rest.{rank}.operator")
    if "fsdp" not in cases:
        return
    fit = Fit(llama(), llama_plan(), growkit.as_data(lame()), FitSettings.of(), run(sharded=True), joined(run()))
    shares = [(entry.to_local().numel(), entry.numel()) for entry in fit.parameters]
    (folder / f"shares.{rank}").write_text(json.dumps(shares))


class BrokenOff:
    """Batches of which the fourth cannot be had."""

    def __init__(self, given: list[Any]) -> None:
        self.given = growkit.as_data(given)

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        if step == 3:
            raise GrowkitError("broken off")
        return self.given.batch(step)

    def validation(self) -> Iterator[Batch]:
        """None."""
        return iter(())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left the results of the quick cases."""
    return launched(tmp_path_factory.mktemp("processes"), sorted(QUICK))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the other cases."""
    return launched(tmp_path_factory.mktemp("others"), sorted(CASES.keys() - QUICK))


def launched(path: Path, cases: list[str]) -> Path:
    """A folder that two processes that `torchrun` started have left their results in."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            _script(path),
            str(path),
            *cases,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return path


def _script(path: Path) -> str:
    script = path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.adapters.test_fit_processes import fit_all\n"
        "fit_all(Path(sys.argv[1]), sys.argv[2:])\n"
    )
    return str(script)


@cache
def alone(learn: tuple[str, ...] | None) -> tuple[GrowthOperator, list[Any]]:
    """The fit in one process."""
    return fitted(data(), **TOLD, **({} if learn is None else {"learn": learn}))


def told_by(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def assert_near(one: GrowthOperator, other: GrowthOperator) -> None:
    ours, theirs = arrays_of(one), arrays_of(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES.keys() - QUICK))
def test_however_processes_share_they_give_the_numbers_of_one(case: str, others: Path) -> None:
    assert_the_numbers_of_one(case, others)


@pytest.mark.parametrize("case", sorted(QUICK))
def test_processes_give_the_numbers_of_one(case: str, folder: Path) -> None:
    assert_the_numbers_of_one(case, folder)


def assert_the_numbers_of_one(case: str, folder: Path) -> None:
    """Losses, gradients and the operator."""
    operator, steps = alone(CASES[case].get("learn"))
    lines = told_by(folder / f"{case}.jsonl")  # one line for each step: only the first process tells
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == pytest.approx(losses(steps), rel=1e-9)
    assert [line["gradient"] for line in lines] == pytest.approx([each.gradient for each in steps], rel=1e-9)
    assert lines[-1]["validation"] == pytest.approx(steps[-1].validation, rel=1e-9)
    assert [line["tokens"] for line in lines] == [each.tokens for each in steps]
    for rank in (0, 1):
        assert_near(GrowthOperator.load(folder / f"{case}.{rank}.operator"), operator)


def test_processes_share_the_parameters_out(folder: Path) -> None:
    ours, theirs = (json.loads((folder / f"shares.{rank}").read_text()) for rank in (0, 1))
    assert all(mine + yours == size for (mine, size), (yours, _) in zip(ours, theirs, strict=True))
    assert all(0.3 < sum(mine for mine, _ in each) / sum(size for _, size in each) < 0.7 for each in (ours, theirs))


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_processes_that_are_broken_off_go_on(case: str, folder: Path) -> None:
    lines = told_by(folder / f"{case}.rest.jsonl")
    assert [line["step"] for line in lines] == [3, 4]
    assert_same(
        GrowthOperator.load(folder / f"{case}.rest.0.operator"), GrowthOperator.load(folder / f"{case}.0.operator")
    )


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_what_processes_leave_one_can_go_on_from(case: str, folder: Path) -> None:
    operator, steps = fitted(lame(), resume=True, checkpoint=folder / f"{case}.state", **TOLD)
    assert steps == []
    assert_near(operator, alone(None)[0])
