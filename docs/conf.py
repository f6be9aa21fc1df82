"""Sphinx: ``make docs`` builds the site into docs/_build, where a warning is an error."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
from tables import TABLES

project = "growkit"
author = "The growkit authors"
copyright = author
version = release = installed("growkit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"growkit {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
    "exclude-members": "model_config, model_post_init",
}
autodoc_typehints_format = "short"
autodoc_mock_imports = ["hypothesis"]  # growkit.testing needs it, the documentation does not
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A name of ours that leads nowhere is a mistake; names of others are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!growkit).*|growkit[\w.]*\._\w+")]  # private: validators, bases


class Generated(SphinxDirective):
    """A table of docs/tables.py, made anew in every build: ``{generated} options plan``."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        name, *arguments = self.arguments
        return self.parse_text_to_nodes(TABLES[name](*arguments))


def keep_the_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Show an indented block as it stands; and no colon in a property's sentence is a type (napoleon's habit)."""
    blocks = [
        i
        for i in range(2, len(lines))
        if lines[i].startswith("    ")
        and not lines[i - 1].strip()
        and lines[i - 2][:1].strip()
        and lines[i - 2][-2:] != "::"
    ]
    for i in reversed(blocks):
        lines[i:i] = ["::", ""]
    if what in ("property", "attribute", "data"):
        lines.insert(0, "")


def spell_models(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """A pydantic model is made from keywords; their types stand below."""
    if what == "class" and isinstance(obj, type) and issubclass(obj, BaseModel):
        return (f"(*, {', '.join(obj.model_fields)})" if obj.model_fields else "", None)
    return None


def setup(app: Sphinx) -> None:
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", keep_the_text, priority=400)  # before napoleon, which has 500
    app.connect("autodoc-process-signature", spell_models)
