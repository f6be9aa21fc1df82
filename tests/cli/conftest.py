"""The command line called in this process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from growkit.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left behind: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Growkit = Callable[..., Result]


@pytest.fixture
def growkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Growkit:
    """Calls the command line as a user would, and returns its exit status and output."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["growkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return call
