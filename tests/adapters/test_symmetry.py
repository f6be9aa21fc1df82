"""What becomes of copied units in training: they part or they stay as they are, as the method's entry says (E12).

Copies that the model cannot tell apart get equal gradients for ever, under every optimizer that works entry by entry.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import growkit
from growkit.matrices import Matrix, Selection
from growkit.methods import Method, methods
from growkit.operator import Expansion, GrowthOperator, place, unchanged
from growkit_specs import Tensor
from growkit_torch.forward import build
from tests.adapters.tiny_models import tiny

NOISE, APART = 1e-9, 1e-5
"""Up to where a difference is float64's rounding, and from where on it is none."""
STEPS = 50

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "post-norm": ("bert", "BertForMaskedLM", {}),
    "pre-norm": ("gpt2", "GPT2LMHeadModel", {"bos_token_id": 0, "eos_token_id": 0}),
    "grouped queries": ("llama", "LlamaForCausalLM", {}),
}
WIDE = [m for m in methods() if m.width is not None]

every_model = pytest.mark.parametrize("model", MODELS)
every_width_method = pytest.mark.parametrize("method", WIDE, ids=lambda m: m.name)


@dataclass(frozen=True)
class Unit:
    """A unit of the grown model: an entry of a space; of one layer's, where the space is made anew in every layer."""

    space: str
    entry: int
    at: str | None


@dataclass(frozen=True)
class Trained:
    """A grown model after some steps of training."""

    plan: growkit.Plan
    weights: Mapping[str, np.ndarray]

    def partners(self, space: str) -> np.ndarray:
        """``(D,)``: the next copy of each entry's source entry, in a circle; itself where there is no other."""
        return next_copies(self.plan.operator.expansions[space].seen)

    def copies(self) -> Iterator[tuple[Unit, Unit]]:
        """Every pair of units of which one is a copy of the other."""
        for space, at in sorted({(s, at) for t in self.tensors() for s, at in places(self.plan, t)}, key=str):
            for i, j in enumerate(self.partners(space)):
                if i < j:
                    yield Unit(space, i, at), Unit(space, int(j), at)

    def tensors(self) -> list[Tensor]:
        return list(self.plan.target.tensors())

    def apart(self, a: Unit, b: Unit) -> tuple[float, float]:
        """How far two copies are from each other, in what writes them and in what reads them.

        The least over both ways in which they could be exchanged: alone, or together with all other copies at once,
        which is how the two halves of staged training are exchanged.
        """
        attached = [tensor for tensor in self.tensors() if (a.space, a.at) in places(self.plan, tensor)]
        readers = [tensor for tensor in attached if a.space in tensor.parameter.parsed.read_spaces()]
        writers = [tensor for tensor in attached if tensor not in readers]
        sides = [side for side in (writers, readers) if side]  # a tied head, which reads, is the table, which writes
        ways = [[self.differences(side, a, b, others) for side in sides] for others in (False, True)]
        least = min(ways)
        return least[0], least[-1]

    def differences(self, tensors: list[Tensor], a: Unit, b: Unit, others: bool) -> float:
        return max(self.difference(tensor, a, b, others) for tensor in tensors)

    def difference(self, tensor: Tensor, a: Unit, b: Unit, others: bool) -> float:
        """The largest difference of what two units have of a tensor, relative to its largest entry."""
        W = self.weights[tensor.name]
        first, second = self.part(tensor, W, a, False), self.part(tensor, W, b, others)
        return float(np.abs(first - second).max() / np.abs(W).max())

    def part(self, tensor: Tensor, W: np.ndarray, unit: Unit, others: bool) -> np.ndarray:
        """What belongs to a unit, the other spaces as they are or with their copies exchanged."""
        sizes = self.plan.target.sizes
        chosen = {s: alike(Selection(self.partners(s), d)) if others else unchanged(d) for s, d in sizes.items()}
        chosen[unit.space] = alike(Selection(np.array([unit.entry]), sizes[unit.space]))
        picking = GrowthOperator(chosen, {})
        for axis in range(W.ndim):
            W = picking.axis_matrix(tensor, axis).apply(W, axis)
        return W


def alike(matrix: Matrix) -> Expansion:
    return Expansion(matrix, matrix, matrix)


def next_copies(matrix: Matrix) -> np.ndarray:
    pattern = matrix.pattern
    found = np.arange(matrix.shape[0])
    if isinstance(pattern, Selection):
        for j in np.flatnonzero(pattern.counts > 1):
            same = np.flatnonzero(pattern.index == j)
            found[same] = np.roll(same, -1)
    return found


def places(plan: growkit.Plan, tensor: Tensor) -> Iterator[tuple[str, str | None]]:
    """The spaces of a tensor, each with the layer it lives in; the stream, and what is no unit, lives in none."""
    for space in tensor.parameter.parsed.spaces:
        kind = plan.source.kinds[space]
        if kind != "fixed" and space != "head_dim":
            yield space, None if kind == "residual" else place(tensor)


@cache
def source_of(model: str) -> growkit.Model:
    architecture, class_name, config = MODELS[model]
    return growkit.read(tiny(architecture, class_name, **config).double())


def planned(model: str, method: str, ratio: str, fresh: float | None = None) -> growkit.Plan:
    return growkit.plan(source_of(model), hidden=ratio, method=method, fresh=fresh)


def trained(model: str, method: str, ratio: str, fresh: float | None = None) -> Trained:
    """A tiny model grown in float64, and trained with AdamW on the next tokens of random text."""
    plan = planned(model, method, ratio, fresh)
    module = build(growkit.grow(source_of(model), plan))  # in evaluation mode: no dropout
    tokens = torch.randint(1, 50, (STEPS, 4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for batch in tokens:
        logits = module(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Trained(plan, {name: parameter.detach().numpy() for name, parameter in module.named_parameters()})


def ratio_of(method: Method) -> str:
    """The ratio that asks most of a method."""
    return "1.5x" if method.ratios == "any" else "2x"


def parted(grown: Trained) -> list[bool]:
    """For every pair of copies whether it has parted, in what writes it and in what reads it, or stayed as it was."""
    differences = np.array([grown.apart(a, b) for a, b in grown.copies()]).reshape(-1, 2)
    least, most = differences.min(axis=1), differences.max(axis=1)
    assert ((most < NOISE) | (least > APART)).all(), "neither parted nor as it was"
    found: list[bool] = (least > APART).tolist()
    return found


# --- what the entries say --------------------------------------------------------------------------------------------


@every_model
@every_width_method
def test_copies_do_in_training_what_the_entry_says(model: str, method: Method) -> None:
    grown = trained(model, method.name, ratio_of(method))
    found = parted(grown)
    if method.copies == "none":
        assert not found
    else:
        assert set(found) <= {method.copies == "part"}


@every_width_method
def test_only_methods_that_say_so_make_copies(method: Method) -> None:
    """`lossless` copies where nothing else keeps the function: where a LayerNorm comes after the addition."""
    made = {model for model in MODELS if any(True for _ in Trained(planned(model, method.name, "2x"), {}).copies())}
    assert bool(made) == (method.copies != "none")


@every_width_method
def test_entries_whose_copies_stay_say_what_parts_them(method: Method) -> None:
    told = any("part" in rule for rule in method.training)
    assert told == (method.copies == "stay")


# --- what parts them -------------------------------------------------------------------------------------------------


@every_model
def test_without_noise_copies_stay(model: str) -> None:
    grown = trained(model, "hypercloning", "2x", fresh=0.0)
    assert set(parted(grown)) == {False}


def test_noise_parts_the_copies_of_a_method_that_has_none() -> None:
    assert set(parted(trained("grouped queries", "fpi", "2x", fresh=0.05))) == {True}


@pytest.mark.parametrize("ratio", ["2x", "3x"])
def test_the_next_layer_alone_does_not_part_everything(ratio: str) -> None:
    """The last layer has no next one, and of three copies two come from the same one: AKI takes some noise."""
    assert set(parted(trained("grouped queries", "aki", ratio))) == {True}
    bare = trained("grouped queries", "aki", ratio, fresh=0.0)
    stayed = {a.at for (a, _), apart in zip(bare.copies(), parted(bare), strict=True) if not apart}
    assert stayed == {"layers/1"} if ratio == "2x" else stayed == {"layers/0", "layers/1", None}
