"""What each method does to each architecture, measured, beside what its paper says of it.

python -m tests.golden.methods_table      writes the page anew; read the difference before it is committed
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import isclose
from pathlib import Path
from typing import Any

import yaml

import growkit
from growkit.methods import Method, methods
from growkit.methods import method as method_called
from growkit_specs import InvalidTarget, architectures
from tests.adapters.tiny_models import tiny

PAGE = Path(__file__).parents[2] / "docs/reference/methods-by-architecture.md"
CLAIMS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))

EXACT = 1e-10
"""The largest relative difference that float64 makes of the same function."""
TOLERANCE = 0.25
"""How far a measured number may be from the stored one: BLAS differ, and some methods fit or draw."""

SILENT, DEVIATES = "†", "‡"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is grown: tiny, random, four layers deep.

    Attributes:
        label: What the page calls it.
        architecture: Its architecture file.
        class_name: Its class in transformers.
        config: Where its config differs from the architecture file's ``tiny``.
    """

    label: str
    architecture: str
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether there is an architecture file for it."""
        return self.architecture in architectures()

    @cached_property
    def model(self) -> growkit.Model:
        """The model, in float64, so that rounded weights hide nothing."""
        return growkit.read(tiny(self.architecture, self.class_name, **self.config).double())

    @property
    def family(self) -> str:
        """Where its norms stand and what they do, as papers tell models apart."""
        norms = [layer for _, layer in self.model.graph.walk() if layer.kind == "norm"]
        where = "post" if any(norm.is_post_norm for norm in norms) else "pre"
        kind = "RMSNorm" if any(norm.attributes["norm"] == "rms" for norm in norms) else "LayerNorm"
        return f"{where}-norm {kind}"


@dataclass(frozen=True, eq=False)
class Way:
    """A way to grow.

    Attributes:
        label: The column's head.
        grows: ``width`` or ``depth``: what a method must grow.
        claim: The name that claims.yaml has for it.
        sizes: The request.
    """

    label: str
    grows: str
    claim: str
    sizes: Mapping[str, str]


SUBJECTS = (
    Subject("BERT", "bert", "BertForMaskedLM", {"num_hidden_layers": 4}),
    Subject("GPT-2", "gpt2", "GPT2LMHeadModel", {"n_layer": 4, "bos_token_id": 0, "eos_token_id": 0}),
    Subject("Llama", "llama", "LlamaForCausalLM", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    Subject("Qwen3", "qwen3", "Qwen3ForCausalLM", {"num_hidden_layers": 4}),
    Subject("Gemma", "gemma", "GemmaForCausalLM", {"num_hidden_layers": 4}),
    Subject("ViT", "vit", "ViTForImageClassification", {"num_hidden_layers": 4}),
    Subject("T5", "t5", "T5ForConditionalGeneration", {"num_layers": 4, "num_decoder_layers": 4}),
)
WAYS = (
    Way("2x width", "width", "2x width", {"hidden": "2x"}),
    Way("1.5x width", "width", "1.5x width", {"hidden": "1.5x"}),
    Way("1.5x depth", "depth", "depth", {"layers": "1.5x"}),
    Way("2x depth", "depth", "depth", {"layers": "2x"}),
)


@dataclass(frozen=True)
class Cell:
    """What one method made of one model in one way.

    Attributes:
        difference: The largest relative difference of any output; None where nothing was grown.
        promised: Whether the plan said that the function is kept.
        claim: What the paper says: ``exact``, ``changes`` or ``silent``.
        because: Why growkit measures something else than the paper says, where it does.
        absent: ``-`` where the method does not grow this way, ``refused`` where the request was refused.
        refusal: Why it was.
    """

    difference: float | None = None
    promised: bool = False
    claim: str = "silent"
    because: str | None = None
    absent: str | None = None
    refusal: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether nothing but float64's rounding was measured."""
        return self.difference is not None and self.difference < EXACT

    @property
    def agrees(self) -> bool:
        """Whether what was measured is what the paper says, as far as it says anything."""
        return self.claim == "silent" or (self.claim == "exact") == self.is_exact

    @property
    def text(self) -> str:
        """What stands in the table."""
        if self.absent is not None:
            return self.absent
        mark = SILENT if self.claim == "silent" else "" if self.agrees else DEVIATES
        return f"{'exact' if self.is_exact else f'{self.difference:#.2g}'} {mark}".strip()


@cache
def cell(subject: Subject, name: str, way: Way) -> Cell:
    """Grow by the method called ``name``, and measure with `verify`."""
    if way.grows not in method_called(name).grows:
        return Cell(absent="-")
    entry = CLAIMS[name]
    claim = entry.get("claims", {}).get(subject.family, {}).get(way.claim, "silent")
    because = entry.get("because", {}).get(subject.family, {}).get(way.claim)
    try:
        plan = growkit.plan(subject.model, method=name, **way.sizes)
    except InvalidTarget as refusal:
        return Cell(absent="refused", refusal=str(refusal))
    report = growkit.verify(subject.model, growkit.grow(subject.model, plan), device="cpu")
    return Cell(report.max_rel_diff, plan.preserving, claim, because)


def cells(subject: Subject) -> Iterator[tuple[Method, Way, Cell]]:
    """Every cell of a model's table."""
    for method in methods():
        for way in WAYS:
            yield method, way, cell(subject, method.name, way)


# --- the page ---------------------------------------------------------------------------------------------------------

HEAD = f"""\
# Methods by architecture

What every method does to a model, measured. Each model is a tiny random one of its class, of 4 layers, 24 channels and
4 heads, in float64, every parameter drawn from a normal distribution with seed 0. It is grown to twice and to one and a
half times its width, `hidden=2x` and `hidden=1.5x`, which heads and MLP follow; and likewise its depth. Then `verify`
runs both models on the same inputs.

- **exact**: the plan said that the function is kept, and the outputs differ by less than {EXACT:g} of their largest
  entry;
- a number: the plan said that it is not kept, and this is the largest difference of an output, over its largest entry.
  It tells how far a random model is thrown off, not how well a trained one goes on;
- **refused**: the method does not do this ratio, and says which it does; or the format has no config for what it makes,
  such as T5 without its tied head, which copies in unequal numbers would need;
- **-**: the method does not grow this way;
- {SILENT}: the paper says nothing of this case. Everything else is as the paper says, unless it has
- {DEVIATES}: the paper says otherwise, for the reason told at the end.

A method that grows in one way combines with one of the other way, and keeps the function where both do. The page is
written by `python -m tests.golden.methods_table`; a test measures all of it anew.
"""


def page(subjects: Iterable[Subject]) -> str:
    """The whole page."""
    subjects = list(subjects)
    return "\n".join([HEAD, *map(section, subjects), deviations(subjects)])


def section(subject: Subject) -> str:
    """One model's table."""
    rows = {method.name: [f"`{method.name}`"] for method in methods()}
    for method, _, found in cells(subject):
        rows[method.name].append(found.text)
    head = ["method", *(way.label for way in WAYS)]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows.values())]
    tied = any(t.parameter.tied_to for t in subject.model.graph.tensors(tied=True))
    about = f"`{subject.class_name}`: {subject.family}{', tied head' if tied else ''}."
    return "\n".join([f"## {subject.label}\n", f"{about}\n", *lines, ""])


def deviations(subjects: Iterable[Subject]) -> str:
    """Why growkit measures something else than a paper says, each reason once."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for subject in subjects:
        for method, way, found in cells(subject):
            if not found.agrees:
                reasons.setdefault((method.name, subject.family, str(found.because)), []).append(way.label)
    lines = [
        f"- {DEVIATES} `{name}`, {family}, {', '.join(ways)}: {why}." for (name, family, why), ways in reasons.items()
    ]
    return "\n".join(["## Where a paper says otherwise\n", *lines, ""])


_NUMBER = re.compile(r"(?<=\| )\d[\d.e+-]*(?= )")


def is_current(stored: str, measured: str) -> bool:
    """Whether two pages have the same words, and numbers as near as :data:`TOLERANCE`."""
    if _NUMBER.sub("#", stored) != _NUMBER.sub("#", measured):
        return False
    pairs = zip(_NUMBER.findall(stored), _NUMBER.findall(measured), strict=True)
    return all(isclose(float(a), float(b), rel_tol=TOLERANCE) for a, b in pairs)


def known_subjects() -> list[Subject]:
    """The models that can be grown; what has no architecture file is left out, and told."""
    for subject in SUBJECTS:
        if not subject.is_known:
            print(f"NOT MEASURED: {subject.label}, no architecture file '{subject.architecture}'", file=sys.stderr)
    return [subject for subject in SUBJECTS if subject.is_known]


if __name__ == "__main__":
    PAGE.write_text(page(known_subjects()), encoding="utf-8")
    print(f"{PAGE}: written", file=sys.stderr)
