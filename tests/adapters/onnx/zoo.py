"""The ONNX files of the tests: every combination of a model, an exporter and an optimiser that users meet.

``python -m tests.adapters.onnx.zoo`` makes them all and says how long each takes.
"""

import sys
import time
import traceback
from dataclasses import dataclass

import numpy as np

from tests.adapters.onnx import exports
from tests.adapters.onnx.exports import make
from tests.adapters.onnx.families import FAMILIES, Arrays, Stack

__all__ = ["FILES", "SLICE", "File", "inputs", "make"]

GROWS = "grows"


@dataclass(frozen=True)
class File:
    """One test file.

    Attributes:
        family: The model; files of one family compute the same function, whatever exporter wrote them.
        exporter: "legacy" (TorchScript) or "dynamo".
        opset: Its version of the default operator set.
        attention: "eager" or "sdpa".
        post: The optimiser that worked on the exported file: "", "fused", "basic", "extended", "onnxslim" or "onnxsim".
        variant: What else is particular: "nofold" (no constant folding), "static" (shapes fixed as traced),
            "external" (weights in a file beside).
        expected: "grows", or in short why it must be refused.
        cannot_be_made: Why no exporter makes it; "" where it is made.
    """

    family: str
    exporter: str
    opset: int
    attention: str = "eager"
    post: str = ""
    variant: tuple[str, ...] = ()
    expected: str = GROWS
    cannot_be_made: str = ""

    @property
    def name(self) -> str:
        """For example "llama-dynamo18-sdpa-onnxslim"."""
        parts = (self.family, f"{self.exporter}{self.opset}", *self.variant, self.attention, self.post)
        return "-".join(filter(None, parts))

    @property
    def recipe(self) -> str:
        """All that the file is made from, without what tests expect of it."""
        return repr((self.family, self.exporter, self.opset, self.attention, self.post, self.variant))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The sizes of its runs of equal blocks; an encoder comes before its decoder."""
        return FAMILIES[self.family].stacks

    @property
    def vocab(self) -> int | None:
        """Tokens of its vocabulary."""
        return FAMILIES[self.family].vocab

    @property
    def norm(self) -> str | None:
        """ "pre", "post" or None."""
        return FAMILIES[self.family].norm

    @property
    def static(self) -> bool:
        """Whether it runs only at the sizes it was traced with."""
        return "static" in self.variant


def inputs(file: File, batch: int, sequence: int, seed: int = 0) -> Arrays:
    """Valid inputs of `file`; one that runs only at the sizes it was traced with gets these, whatever is asked."""
    if file.static:
        batch, sequence = exports.BATCH, exports.SEQUENCE
    return FAMILIES[file.family].inputs.draw(batch, sequence, np.random.default_rng(seed))


FILES: tuple[File, ...] = tuple(
    File(family, exporter, opset)
    for family in ("bert", "gpt2", "llama", "vit", "t5")
    for exporter, opset in (("legacy", 17), ("dynamo", 18))
)
SLICE: tuple[File, ...] = FILES


def main(names: list[str]) -> None:
    """Makes the files whose name holds one of `names`, all without names; prints the seconds each takes."""
    for file in FILES:
        if file.cannot_be_made or (names and not any(name in file.name for name in names)):
            continue
        start = time.perf_counter()
        try:
            make(file)
            result = ""
        except Exception:
            result = traceback.format_exc().splitlines()[-1][:300]
        print(f"{time.perf_counter() - start:6.1f} s  {file.name} {result}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
