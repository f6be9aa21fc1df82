"""The tables of the documentation that come from the code: methods, architectures, the command line's options.

``conf.py`` puts them into the site while it is built. The README holds a copy of two of them between comments;
``python docs/tables.py`` writes it anew, and ``tests/docs/test_readme.py`` fails while it is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from growkit.cli import app
from growkit.methods import Method, methods
from growkit_specs import Architecture, architectures
from growkit_specs.architecture import COMMON_IGNORED

README = Path(__file__).parents[1] / "README.md"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


METHOD_COLUMNS: dict[str, Callable[[Method], str]] = {
    "method": lambda m: f"`{m.name}`",
    "grows": lambda m: ", ".join(m.grows),
    "for": lambda m: m.use,
    "what it does": lambda m: m.summary,
    "exact when": lambda m: m.exact_when,
    "ratios": lambda m: m.ratios if m.width else "",
    "copies": lambda m: m.copies if m.width else "",
    "options": lambda m: ", ".join(f"`{name}={value}`" for name, value in m.options.items()),
    "source": lambda m: linked(m.paper),
}
IN_SHORT = ("method", "grows", "for", "what it does", "exact when", "source")


def methods_table(columns: Iterable[str] = tuple(METHOD_COLUMNS)) -> str:
    """Every registered method."""
    columns = list(columns)
    return table(columns, ([METHOD_COLUMNS[column](m) for column in columns] for m in methods()))


def methods_in_short() -> str:
    """Every registered method, as the README shows it."""
    return methods_table(IN_SHORT)


def linked(paper: str | None) -> str:
    """``Authors, venue, URL; ...`` as Markdown links."""
    found = re.findall(r"(.+?),? (https?://\S+?)(?:; |$)", paper or "")
    return "; ".join(f"[{who}]({url})" for who, url in found) or paper or "none"


def architectures_table() -> str:
    """Every architecture file."""
    return table(
        ("architecture", "what it is", "`model_type`", "classes"),
        (
            (f"`{a.architecture}`", a.about, ", ".join(f"`{t}`" for t in a.model_types), classes(a))
            for a in architectures().values()
        ),
    )


def classes(architecture: Architecture) -> str:
    """The classes of an architecture, what their names share said once."""
    names = list(architecture.classes)
    shared = architecture.base_class.removesuffix("Model")
    if not all(name.startswith(shared) for name in names):
        shared = ""
    return f"`{shared}*`: " * bool(shared) + ", ".join(name.removeprefix(shared) for name in names)


def ignored_keys() -> str:
    """The patterns of config keys that are ignored in every architecture."""
    return ", ".join(f"`{pattern}`" for pattern in COMMON_IGNORED)


def options_table(command: str) -> str:
    """The arguments and options of one command."""
    parameters = typer.main.get_command(app).commands[command].params
    return table(
        ("argument", "default", "meaning"),
        (
            (f"`{spelled(p)}`", "required" if p.required else default(p), (p.help or "").replace("|", "/"))
            for p in parameters
            if p.name != "help"
        ),
    )


def spelled(parameter: Any) -> str:
    """A parameter as it is written: ``MODEL``, ``--to SIZES``, ``--quiet, -q``."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    names = ", ".join(parameter.opts)
    return names if parameter.is_flag else f"{names} {parameter.metavar or parameter.name.upper()}"


def default(parameter: Any) -> str:
    """A parameter's default, where it has one that says anything."""
    return "" if parameter.default in (None, "") or parameter.default is False else f"`{parameter.default}`"


TABLES: dict[str, Callable[..., str]] = {
    "methods": methods_table,
    "methods-in-short": methods_in_short,
    "architectures": architectures_table,
    "ignored-keys": ignored_keys,
    "options": options_table,
}


def with_tables(text: str) -> str:
    """A Markdown text with the tables between its comments written anew."""
    for name in ("methods-in-short", "architectures"):
        start, end = f"<!-- {name}: written by docs/tables.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n\n{TABLES[name]()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README}: tables written", file=sys.stderr)
