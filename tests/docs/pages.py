"""The pages of the documentation as blocks of code, and how each kind of block is run.

A page's blocks run in order, in one namespace and one folder of their own:

- ``python``: run; what it prints is the ``text`` block right after it, and it prints nothing where there is none.
- ``console``: lines that start with ``$`` are run, the lines below are what they print. A command succeeds, unless what
  it prints is growkit's one line of error, or ``$ echo $?`` asks for its status.
- a block with a caption: written to the file of that name. An architecture file is read from then on.
- ``yaml`` and ``json`` without a caption: parsed.

In what is printed, ``...`` stands for anything, white space counts as one blank, and a number in scientific notation
stands for every difference that is as good as none.
"""

import contextlib
import doctest
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from growkit.cli import main
from growkit_specs import architectures, load_architecture

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

NO_DIFFERENCE = 1e-5
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.M | re.S)
_SMALL = re.compile(r"\b\d+(?:\.\d+)?e-\d+")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is (where it has a caption), its text, where it stands."""

    page: Path
    line: int
    language: str
    caption: str | None
    text: str
    output: str | None = None  # the text block right after it

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, with the output that stands below it."""
    source = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(source))
    blocks = []
    for match, follower in pairwise([*found, None]):
        language, _, argument = match["info"].strip().partition(" ")
        text, caption = match["text"], None
        if language == "{code-block}":
            language = argument
            if captioned := re.match(r":caption: (\S+)\n+", text):
                caption, text = captioned[1], text[captioned.end() :]
        adjacent = follower is not None and not source[match.end() : follower.start()].strip()
        output = follower["text"] if adjacent and follower["info"].strip() == "text" else None
        line = source.count("\n", 0, match.start("text")) + 1
        blocks.append(Block(page, line, language, caption, text, output))
    return blocks


class Runner:
    """Runs the blocks of one page in the current folder."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.status = 0

    def run(self, block: Block) -> None:
        if block.caption is not None:
            self.write(block)
        elif block.language == "python":
            self.python(block)
        elif block.language == "console":
            self.console(block)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "json":
            json.loads(block.text)
        else:
            known = ("text", "{generated}", "{toctree}", "{eval-rst}")
            assert block.language in known, f"{block.where}: no test runs a block of '{block.language}'"

    def write(self, block: Block) -> None:
        path = Path(block.caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        if path.parent.name == "architectures":  # as if it lay in the package; the test takes it out again
            architectures()[path.stem] = load_architecture(path)

    def python(self, block: Block) -> None:
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, self.namespace)
        check(block.where, block.output or "", printed.getvalue())

    def console(self, block: Block) -> None:
        commands = list(commands_of(block.text))
        for (command, expected), follower in pairwise([*commands, ("", "")]):
            where = f"{block.where}: {command}"
            printed = self.command(shlex.split(command, comments=True), where)
            check(where, expected, printed)
            if follower[0] != "echo $?":
                wanted = 2 if expected.startswith("growkit: ") else 0
                assert self.status == wanted, f"{where}: status {self.status}, expected {wanted}\n{printed}"
                self.status = 0

    def command(self, words: list[str], where: str) -> str:
        match words:
            case ["growkit", *arguments]:
                return self.growkit(arguments)
            case ["echo", "$?"]:
                status, self.status = self.status, 0
                return f"{status}\n"
            case ["cat" | "ls", *_]:
                return subprocess.run(words, capture_output=True, text=True, check=True).stdout
            case ["make", target]:
                assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.M), where
            case ["pip", "install", *wanted]:
                asked = re.fullmatch(r"(?:growkit|\.)\[(\w+)\]", wanted[-1])
                assert asked, where
                assert asked[1] in EXTRAS, where
            case ["python" | ".venv/bin/python", *arguments]:  # what the repository runs elsewhere: it has to be there
                files = [word for word in arguments if "/" in word]
                assert files, where
                assert all((ROOT / file).exists() for file in files), where
            case _:
                raise AssertionError(f"{where}: no test runs this command")
        return ""

    def growkit(self, arguments: list[str]) -> str:
        """The command in this process, which has torch already; it prints as it does into a pipe."""
        printed, before = io.StringIO(), sys.argv
        sys.argv = ["growkit", *arguments]
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                main()
            self.status = 0
        except SystemExit as stopped:
            self.status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        finally:
            sys.argv = before
        return printed.getvalue()


def commands_of(text: str) -> Iterator[tuple[str, str]]:
    """``(command, what it prints)`` for each command of a console block; a backslash continues a line."""
    for part in re.split(r"^\$ ", text.replace("\\\n", ""), flags=re.M)[1:]:
        command, _, expected = part.partition("\n")
        yield command.strip(), expected


def check(where: str, expected: str, got: str) -> None:
    """Refuse printed output other than the page's; a command whose output is not shown may print anything."""
    if not expected.strip() and ": growkit" in where:
        return
    for number in _SMALL.findall(got):
        assert float(number) <= NO_DIFFERENCE or number in expected, f"{where}: {number} is a difference\n{got}"
    want, have = (_SMALL.sub("SMALL", text).strip() + "\n" for text in (expected, got))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(want, have, flags):
        raise AssertionError(f"{where}: the page shows\n{expected}\nand this was printed:\n{got}")
