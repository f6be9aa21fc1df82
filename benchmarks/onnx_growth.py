"""Growing an ONNX file of some gigabytes, against reading and writing one of the result's size and nothing else.

    python -m benchmarks.onnx_growth [--quick] [--json FILE]

The model is a decoder with RMS norms, gated feed-forwards and random weights, in float32 with external data, made anew
each time; it is grown to 1.5 times its width, and with it its heads and feed-forwards. `ratio_to_load_save` compares
the wall time with that of onnx-ir, which reads a model as large as the grown one and writes it again; unlike growkit,
it does not wait until the disk has it.

What growing cannot do without is drawing the fresh entries, 0.65 of the 1.73 billion in the full form: about 7 s of one
core at the 90 to 100 million float32 normals that numpy draws a second. They are drawn while others are written.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer

from benchmarks.report import measured, report
from growkit_onnx.files import save, sidecar, weight_bytes

GIGABYTES, QUICK_GIGABYTES = 3.0, 0.3
FACTOR = 1.5  # of the hidden size; heads and feed-forwards follow it where nobody says otherwise

LOAD_SAVE = """
import sys, onnx_ir as ir
ir.save(ir.load(sys.argv[1]), sys.argv[2], external_data=sys.argv[2].rpartition("/")[2] + ".data")
"""
GROWKIT_LOAD_SAVE = """
import sys
from pathlib import Path
from growkit_onnx.files import load, save
save(load(Path(sys.argv[1])), Path(sys.argv[2]), external=True)
"""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model."""

    layers: int
    hidden: int = 1024
    heads: int = 16
    head_dim: int = 64
    ffn: int = 2816
    vocab: int = 16_384

    @property
    def layer_bytes(self) -> int:
        """The size of a layer's matrices."""
        return 4 * self.hidden * (4 * self.heads * self.head_dim + 3 * self.ffn)

    @property
    def grown(self) -> Sizes:
        """The sizes that the growth gives."""
        return replace(self, **{name: round(FACTOR * getattr(self, name)) for name in ("hidden", "heads", "ffn")})


class Decoder:
    """Builds a decoder whose weights are drawn when they are written."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.tape = ir.tape.Tape()
        self.drawn = 0

    def model(self) -> ir.Model:
        """The whole model."""
        tokens = _value("input_ids", ir.DataType.INT64, "batch", "sequence")
        stream = self.tape.op("Gather", [self.weight("embed", self.sizes.vocab, self.sizes.hidden), tokens])
        for layer in range(self.sizes.layers):
            stream = self.layer(stream, f"layers.{layer}")
        logits = self.project(self.norm(stream, "norm"), "lm_head", self.sizes.hidden, self.sizes.vocab)
        logits.name = "logits"
        logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", self.sizes.vocab])
        graph = ir.Graph(
            [tokens],
            [logits],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": 23},
            name="decoder",
        )
        return ir.Model(graph, ir_version=11)

    def layer(self, stream: ir.Value, name: str) -> ir.Value:
        """Attention and a gated feed-forward, each beside the residual stream."""
        sizes, op = self.sizes, self.tape.op
        width = sizes.heads * sizes.head_dim
        normed = self.norm(stream, f"{name}.input_norm")
        query, key, value = (self.project(normed, f"{name}.{part}", sizes.hidden, width) for part in "qkv")
        heads = {"q_num_heads": sizes.heads, "kv_num_heads": sizes.heads, "is_causal": 1}
        mixed = op("Attention", [query, key, value], heads)
        stream = op("Add", [stream, self.project(mixed, f"{name}.o", width, sizes.hidden)])
        normed = self.norm(stream, f"{name}.post_norm")
        gate, up = (self.project(normed, f"{name}.{part}", sizes.hidden, sizes.ffn) for part in ("gate", "up"))
        gated = op("Mul", [op("Mul", [gate, op("Sigmoid", [gate])]), up])
        return op("Add", [stream, self.project(gated, f"{name}.down", sizes.ffn, sizes.hidden)])

    def norm(self, stream: ir.Value, name: str) -> ir.Value:
        """An RMS norm."""
        return self.tape.op("RMSNormalization", [stream, self.weight(name, self.sizes.hidden)], {"epsilon": 1e-5})

    def project(self, value: ir.Value, name: str, width_in: int, width_out: int) -> ir.Value:
        """A matrix."""
        return self.tape.op("MatMul", [value, self.weight(name, width_in, width_out)])

    def weight(self, name: str, *shape: int) -> ir.Value:
        """A weight, drawn by its number."""
        self.drawn += 1
        seed, scale = self.drawn, prod(shape[:1]) ** -0.5

        def draw() -> ir.Tensor:
            drawn = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
            return ir.tensor(1 + 0.1 * drawn if len(shape) == 1 else drawn * np.float32(scale))

        return self.tape.initializer(ir.LazyTensor(draw, ir.DataType.FLOAT, ir.Shape(shape), name=f"{name}.weight"))


def _value(name: str, dtype: ir.DataType, *shape: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the size.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there, too.")] = None,
) -> None:
    """Measure the growth of an ONNX file."""
    wanted = (QUICK_GIGABYTES if quick else GIGABYTES) * 1e9
    sizes = Sizes(layers=max(1, round(wanted / Sizes(layers=1).layer_bytes)))
    with TemporaryDirectory(prefix="onnx_growth.") as name:
        folder = Path(name)
        source, alike, out = (folder / f"{kind}.onnx" for kind in ("source", "alike", "out"))
        save(Decoder(sizes).model(), source, external=True)
        save(Decoder(sizes.grown).model(), alike, external=True)
        python = [sys.executable, "-c"]
        tools = {
            "onnx-ir load + save": [*python, LOAD_SAVE, str(alike), str(out)],
            "growkit load + save": [*python, GROWKIT_LOAD_SAVE, str(alike), str(out)],
            "growkit grow": [
                *(sys.executable, "-m", "growkit.cli", "grow", str(source), str(out), "--quiet"),
                *("--to", f"hidden={FACTOR}x"),
            ],
        }
        costs = {}
        for tool, command in tools.items():
            costs[tool] = measured(command)
            size, expected = (sidecar(path).stat().st_size for path in (out, alike))
            if round(size / expected, 3) != 1:  # tools lay out the file differently, a little
                raise SystemExit(f"{tool} wrote {size:,} bytes; expected about {expected:,}")
            for path in (out, sidecar(out)):
                path.unlink(missing_ok=True)  # before the next: the disk must hold three such models, not five
    plain = costs["onnx-ir load + save"]
    rows = [
        {
            "tool": tool,
            "gigabytes": round(weight_bytes(Decoder(sizes.grown).model()) / 1e9, 2),
            **asdict(cost),
            "ratio_to_load_save": round(cost.wall_s / plain.wall_s, 2),
        }
        for tool, cost in costs.items()
    ]
    report("onnx_growth", rows, json)


if __name__ == "__main__":
    typer.run(main)
