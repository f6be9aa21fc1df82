"""The benchmark of starts, at its quickest: rows hold what they are called."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.sources import TASKS
from benchmarks.start import PAIRS, QUICK, STARTS, TRAINING, Bench, Start, differences, summary

KEYS = {"task", "method", "seed", "source_loss", "grown_loss", "fitted_loss", "final_loss"}
KEYS |= {"steps", "fit_steps", "fit_cost", "flops"}


@pytest.fixture(scope="module")
def bench() -> Bench:
    """A decoder of one layer, trained for a few steps."""
    return Bench.trained(TASKS["decoder"], QUICK, seed=0)


@pytest.fixture(scope="module")
def rows(bench: Bench) -> dict[str, dict[str, Any]]:
    """The rows of an exact start, with and without a fit, and of one that trains for longer instead."""
    starts = [start for start in STARTS if start.method == "lossless"]
    return {start.name: bench.row(start) for start in starts}


def test_rows_have_the_keys_that_are_promised(rows: dict[str, dict[str, Any]]) -> None:
    assert all(set(row) == KEYS for row in rows.values())


def test_an_exact_start_has_the_loss_of_its_source(rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        assert row["grown_loss"] == pytest.approx(row["source_loss"], abs=2e-4)
        assert row["final_loss"] != row["grown_loss"]


def test_a_fit_is_told_apart_with_its_cost(rows: dict[str, dict[str, Any]]) -> None:
    plain, fitted = rows["lossless"], rows["lossless, fitted"]
    assert (plain["fitted_loss"], plain["fit_steps"], plain["fit_cost"]) == (None, 0, 0.0)
    assert fitted["fitted_loss"] != fitted["grown_loss"]
    assert fitted["steps"] == plain["steps"]
    assert fitted["fit_steps"] == QUICK.fit_steps
    assert 0.5 < fitted["fit_cost"] / fitted["fit_steps"] < 2  # factors can take less than the matrix they make
    assert fitted["flops"] == pytest.approx(plain["flops"] * (1 + fitted["fit_cost"] / plain["steps"]), rel=0.05)


def test_training_for_longer_takes_what_the_fit_costs(rows: dict[str, dict[str, Any]]) -> None:
    extra = rows["lossless, longer"]["steps"] - rows["lossless"]["steps"]
    assert extra == round(rows["lossless, fitted"]["fit_cost"])
    assert rows["lossless, longer"]["fitted_loss"] is None


def test_a_row_is_the_same_again(bench: Bench, rows: dict[str, dict[str, Any]]) -> None:
    """So that nothing of one method's training is left in the source, or in the next one's."""
    (start,) = [start for start in STARTS if start.name == "lossless, fitted"]
    assert bench.row(start) == rows[start.name]


def test_every_method_sees_the_same_batches_and_no_other_seed_does(bench: Bench) -> None:
    first, again = bench.data(TRAINING).batch(1), bench.data(TRAINING).batch(1)
    other = replace(bench, seed=1).data(TRAINING).batch(1)
    assert np.array_equal(first.inputs["input_ids"], again.inputs["input_ids"])
    assert not np.array_equal(first.inputs["input_ids"], other.inputs["input_ids"])


def test_starting_anew_takes_nothing_of_the_source(bench: Bench) -> None:
    row = bench.row(Start("random", "random"))
    assert row["grown_loss"] == pytest.approx(np.log(QUICK.target.vocab), abs=0.2)


def test_summaries_are_of_seeds() -> None:
    finals = {"lossless": (3.0, 3.2), "lossless, fitted": (2.9, 3.0)}
    names = {name for pair in PAIRS for name in pair}
    rows = [
        {"task": "decoder", "method": name, "seed": seed, "source_loss": 4.0, "grown_loss": 4.0, "fitted_loss": 3.5}
        | {"final_loss": finals.get(name, (1.0, 1.0))[seed], "fit_steps": 5, "fit_cost": 6.0}
        for name in sorted(names)
        for seed in (0, 1)
    ]
    told = {row["method"]: row for row in summary(rows)}
    assert (told["lossless"]["final"], told["lossless"]["seed noise"]) == ("3.1000", "0.1414")
    apart = next(row for row in differences(rows) if row["minus"] == "lossless")
    assert (apart["final loss"], apart["seed noise"], apart["by seed"]) == ("-0.1500", "0.0707", "-0.1000 -0.2000")
