"""A stream that something looks at in a way that growth would change stays as it is, and the reason is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import growkit
from growkit_specs import InvalidTarget
from tests.adapters.onnx import exports

HIDDEN, UNITS = 24, 40


class Residual(nn.Module):
    """Two blocks, each of which adds to the stream what it makes of it."""

    def __init__(self, seen: Callable[[Tensor], Tensor], added: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.added = seen, added
        self.table = nn.Embedding(50, HIDDEN)
        self.up = nn.ModuleList(nn.Linear(HIDDEN, UNITS) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(UNITS, HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = self.added(x, down(torch.relu(up(self.seen(x)))))
        return self.head(x)


def plain(x: Tensor) -> Tensor:
    return x


def total(x: Tensor, branch: Tensor) -> Tensor:
    return x + branch


def bare_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def spread(x: Tensor) -> Tensor:
    return x / x.abs().sum(-1, keepdim=True)


HAZARDS = {
    "a norm without a scale": (bare_norm, total, "a norm without a scale for each entry"),
    "another norm": (spread, total, "ReduceSum over it"),
    "an activation before what reads": (torch.tanh, total, "it is read through Tanh"),
    "entries multiplied": (plain, lambda x, branch: x + branch * x, "entries are multiplied one by one"),
}


def exported(path: Path, module: nn.Module) -> growkit.Model:
    with exports.quiet():
        torch.onnx.export(
            module.eval(),
            (torch.ones(2, 7, dtype=torch.int64),),
            path,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_axes={"ids": {0: "batch", 1: "sequence"}},
            opset_version=17,
            dynamo=False,
        )
    return growkit.read(path)


@pytest.mark.parametrize("name", HAZARDS)
def test_a_stream_stays(name: str, tmp_path: Path) -> None:
    seen, added, reason = HAZARDS[name]
    model = exported(tmp_path / "small.onnx", Residual(seen, added))
    with pytest.raises(InvalidTarget, match=f"hidden cannot grow from 24 to 36: .*{reason}.*ask for hidden=24"):
        growkit.plan(model, hidden=36)


@pytest.mark.parametrize("name", HAZARDS)
def test_what_is_inside_still_grows(name: str, tmp_path: Path) -> None:
    seen, added, _ = HAZARDS[name]
    model = exported(tmp_path / "small.onnx", Residual(seen, added))
    large = growkit.grow(model, ffn=2 * UNITS)
    assert growkit.verify(model, large).max_abs_diff < 2e-5


def test_without_a_hazard_it_grows(tmp_path: Path) -> None:
    model = exported(tmp_path / "small.onnx", Residual(plain, total))
    plan = growkit.plan(model, hidden=36)
    assert plan.preserving
    assert growkit.verify(model, growkit.grow(model, plan)).max_abs_diff < 2e-5
