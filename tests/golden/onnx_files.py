"""What becomes of every ONNX file of the tests: grown and run beside its source, or refused, and why.

python -m tests.golden.onnx_files [PART OF A NAME ...]     grows them all (many minutes) and writes the page anew
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import growkit
from growkit_specs import LayerGraph
from tests.adapters.onnx.zoo import FILES, NOWHERE, File, make

PAGE = Path(__file__).parents[2] / "docs/reference/onnx-files.md"
EXACT = 2e-5
"""The largest absolute difference that float32 makes of the same function in ONNX Runtime."""
ROUNDED = 5e-2
"""The same for files of half types."""


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        width: What hidden was multiplied by; "" where the file was refused.
        before: The depth of every stack.
        after: The grown depth of every stack.
        difference: The largest absolute difference of any output.
        refusal: Why it was refused, in the words of the error.
    """

    width: str = ""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    difference: float = 0.0
    refusal: str = ""

    @property
    def row(self) -> str:
        """The last columns of its row in the page."""
        depth = ", ".join(f"{b} to {a}" if a != b else f"{b}" for b, a in zip(self.before, self.after, strict=True))
        return f"| {self.width or '—'} | {depth or '—'} | {f'refused: {self.refusal}' if self.refusal else 'exact'} |"


def request(graph: LayerGraph, width: str) -> dict[str, str | int]:
    """Wider; and deeper by two blocks where a block that writes nothing is the identity."""
    sizes: dict[str, str | int] = {"hidden": width}
    post = any(layer.is_post_norm for stack in graph.stacks for layer in stack.layers)
    if graph.stacks and not post:
        first = graph.stacks[0].depth
        sizes["layers"] = first + 2 if len(graph.stacks) == 1 else "2x"
    return sizes


def outcome(file: File) -> Outcome:
    """Grow a file 1.5 times where its norms allow, else twice, and run it beside its source."""
    try:
        model = growkit.read(make(file))
        plans = (growkit.plan(model, **request(model.graph, width)) for width in ("1.5x", "2x"))
        plan, width = next((plan, width) for plan, width in zip(plans, ("1.5x", "2x"), strict=True) if plan.preserving)
        large = growkit.grow(model, plan)
        report = growkit.verify(model, large)
    except growkit.GrowkitError as error:
        return Outcome(refusal=str(error).replace(str(make(file)), "the file").replace("|", "/"))
    depths = model.graph.depths.values(), large.graph.depths.values()
    return Outcome(width, *map(tuple, depths), difference=report.max_abs_diff)


def limit(file: File) -> float:
    """The difference up to which a file counts as exact."""
    return ROUNDED if {"fp16", "bf16"} & set(file.variant) or file.runs == NOWHERE else EXACT


def page(rows: Iterable[str]) -> str:
    """The page of the documentation."""
    return (
        "# ONNX files\n\n"
        "Every file of the tests, and what becomes of it: made wider by 1.5 where its norms allow, twice else, and "
        "deeper by two\nblocks where its norms stand before the branches (encoders and decoders: twice). *Exact*: its "
        f"outputs are those of its\nsource in ONNX Runtime to {EXACT:g}, at batches and lengths that its axes were not "
        f"inferred at; half types to {ROUNDED:g}.\n\n"
        "This page is made by `python -m tests.golden.onnx_files`.\n\n"
        "| file | hidden | blocks | outcome |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def stored() -> dict[str, str]:
    """The rows of the page, by file."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    rows = (line.split(" | ", 1) for line in lines if line.startswith("| `"))
    return {name.strip("| `"): f"| {rest}" for name, rest in rows}


def main(parts: list[str]) -> None:
    """Renew the rows of some files, or of all."""
    rows = stored()
    for file in FILES:
        if file.cannot_be_made or (parts and not any(part in file.name for part in parts)):
            continue
        found = outcome(file)
        rows[file.name] = found.row
        sound = found.refusal or found.difference <= limit(file)
        print(file.name, found.row, f"{found.difference:.1e}", "" if sound else "WRONG", flush=True)
    known = [f"| `{file.name}` {rows[file.name]}" for file in FILES if file.name in rows]
    PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
