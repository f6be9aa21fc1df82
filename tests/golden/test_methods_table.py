"""Methods by architecture: the verdict is what is measured, papers say the same, and the page shows it."""

from collections.abc import Iterator

import pytest

from growkit.methods import Method, methods
from tests.golden.methods_table import (
    CLAIMS,
    PAGE,
    SUBJECTS,
    WAYS,
    Cell,
    Subject,
    Way,
    cells,
    is_current,
    known_subjects,
    page,
)

FAMILIES = {"post-norm LayerNorm", "pre-norm LayerNorm", "pre-norm RMSNorm"}

every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.label)


def table(subject: Subject) -> Iterator[tuple[Method, Way, Cell]]:
    if not subject.is_known:
        pytest.skip(f"{subject.label} IS NOT MEASURED: there is no architecture file '{subject.architecture}'")
    return cells(subject)


def measured(subject: Subject) -> Iterator[tuple[str, Cell]]:
    """What was grown, and where it stands."""
    for method, way, found in table(subject):
        if found.absent is None:
            yield f"{method.name}, {subject.label}, {way.label}", found


@every_subject
def test_the_verdict_is_what_is_measured(subject: Subject) -> None:
    wrong = [(where, found.difference) for where, found in measured(subject) if found.promised != found.is_exact]
    assert not wrong


@every_subject
def test_papers_say_what_is_measured_or_it_is_told_why_not(subject: Subject) -> None:
    wrong = [(where, found) for where, found in measured(subject) if found.agrees != (found.because is None)]
    assert not wrong, "measured otherwise without a reason in claims.yaml, or a reason that nothing needs"


@every_subject
def test_what_is_refused_is_a_ratio_that_the_method_does_not_do_or_a_config_that_is_none(subject: Subject) -> None:
    for method, way, found in table(subject):
        does_not = way.label == "1.5x width" and method.width is not None and method.ratios != "any"
        assert (found.absent == "refused") >= does_not
        if found.absent == "refused":
            told = f"the method '{method.name}'" if does_not or way.grows == "depth" else "with an untied head, which"
            assert found.refusal.startswith(told)


def test_the_page_is_what_is_measured() -> None:
    stored = PAGE.read_text(encoding="utf-8")
    assert is_current(stored, page(known_subjects())), "if this is meant: python -m tests.golden.methods_table"


def test_a_page_is_current_within_a_quarter_and_no_further() -> None:
    row = "| `stack` | - | exact | 0.80 † |"
    assert is_current(row, row.replace("0.80", "0.95"))
    assert not is_current(row, row.replace("0.80", "0.50"))
    assert not is_current(row, row.replace("exact", "0.01"))
    assert not is_current(row, row.replace(" †", " ‡"))


def test_every_method_has_its_claims_and_each_its_source() -> None:
    assert set(CLAIMS) == {m.name for m in methods()}
    assert all(entry["source"] for entry in CLAIMS.values())


def test_claims_are_of_what_the_table_knows() -> None:
    ways = {way.claim: way.grows for way in WAYS}
    by_name = {m.name: m for m in methods()}
    for name, entry in CLAIMS.items():
        assert set(entry) <= {"source", "claims", "because"}
        for part in ("claims", "because"):
            assert set(entry.get(part, {})) <= FAMILIES, name
            assert {ways[way] for said in entry.get(part, {}).values() for way in said} <= set(by_name[name].grows)
        assert {claim for said in entry.get("claims", {}).values() for claim in said.values()} <= {"exact", "changes"}
