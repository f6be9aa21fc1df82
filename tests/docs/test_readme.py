"""The README's tables say what the code says, its example is short, its links lead somewhere."""

import re
import sys
from types import ModuleType

import pytest

from growkit.methods import methods
from growkit_specs import architectures
from tests.docs.pages import DOCS, PAGES, ROOT, blocks_of

README = ROOT / "README.md"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """docs/tables.py, which is no package's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        import tables

        sys.modules.pop("tables")
        return tables


def test_the_tables_are_those_of_the_code(tables: ModuleType) -> None:
    text = README.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "the README's tables are stale; run: python docs/tables.py"


def test_the_tables_have_every_method_and_every_architecture() -> None:
    first_cells = re.findall(r"^\| `([^`]+)` \|", README.read_text(encoding="utf-8"), re.M)
    assert first_cells == [m.name for m in methods()] + list(architectures())


def test_the_example_has_ten_lines_and_its_output() -> None:
    example = blocks_of(README)[0]
    assert example.language == "python"
    assert len([line for line in example.text.splitlines() if line.strip()]) <= 10
    assert example.output


def test_the_links_of_the_pages_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in PAGES
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not broken
