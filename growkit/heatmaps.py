"""Heat maps of an operator's matrices and blends, as PNG files' bytes.

One colour scale serves all pictures of an operator. It is centred at zero and follows the signed square root, so that
the 1/d of a mean can be seen beside the 1 of a copy. A large matrix is reduced block by block to the entry of the
largest absolute value, with its sign: a single 1 among zeros stays a dot. The same operator gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from growkit.description import blend_matrices, row_blocks, same, single_entries
from growkit.matrices import Dense, Matrix
from growkit.operator import GrowthOperator
from growkit_specs import GrowkitError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = 256
"""How many cells the longer side of a picture has at most."""

INCHES = 4.2
"""The longer side of what is drawn inside the axes."""

DPI = 150
"""Pixels per inch: a cell is more than two pixels wide and high, so that a single one can be seen."""


@dataclass(frozen=True)
class HeatMap:
    """A matrix to be drawn.

    Attributes:
        title: Which it is: ``hidden: B``.
        part: What it belongs to: the space, or ``layers``.
        says: What the matrix does, and what its axes are.
        cells: Its entries, or the largest one of each block.
        block: How many rows and columns a cell stands for.
        shape: The matrix's own shape.
    """

    title: str
    part: str
    says: str
    cells: np.ndarray
    block: tuple[int, int]
    shape: tuple[int, int]

    @property
    def largest(self) -> float:
        """The finite entry of the largest absolute value."""
        finite = self.cells[np.isfinite(self.cells)]
        return float(finite[np.abs(finite).argmax()]) if finite.size else 0.0

    @property
    def caption(self) -> str:
        """What stands below the picture."""
        rows, columns = self.block
        reduced = (
            f" Each cell is a block of {rows} x {columns} entries, shown by the one of the largest absolute value."
            if self.block != (1, 1)
            else ""
        )
        broken = "" if np.isfinite(self.cells).all() else " Green cells are not finite."
        D, d = self.shape
        return f"{self.says} {D} x {d}; its largest entry is {self.largest:.4g}.{reduced}{broken}"

    @property
    def name(self) -> str:
        """Its title as part of a file's name."""
        return re.sub(r"[^\w.-]+", "-", self.title).strip("-")


def heat_maps(operator: GrowthOperator) -> list[HeatMap]:
    """Every matrix and blend of an operator that is not the identity; what is equal is drawn once."""
    return [*_matrices(operator), *_blends(operator)]


def scale_of(maps: list[HeatMap]) -> float:
    """The end of the colour scale that heat maps share: their largest absolute value, or 1 where all are zero."""
    return max((abs(each.largest) for each in maps), default=0.0) or 1.0


def reduced(matrix: Matrix, cells: int = CELLS) -> tuple[np.ndarray, tuple[int, int]]:
    """A matrix as a picture's cells, each the entry of a block with the largest absolute value.

    Args:
        matrix: The matrix; it is never dense in memory.
        cells: How many cells the longer side of the picture has at most; the other has fewer in proportion.

    Returns:
        The cells, and how many rows and columns each stands for; the last ones may stand for fewer.
    """
    D, d = matrix.shape
    rows, columns = (ceil(size / max(int(cells * side), 1)) for size, side in zip((D, d), _sides(D, d), strict=True))
    picked = np.zeros((-(-D // rows), -(-d // columns)))
    single = single_entries(matrix)
    if single is not None:
        index, values = single
        order = np.argsort(np.abs(values), kind="stable")  # the largest one is written last, and stays
        order = order[index[order] >= 0]
        picked[order // rows, index[order] // columns] = values[order]
        return picked, (rows, columns)
    start = 0
    for dense in row_blocks(matrix, rows):
        height, width = -(-len(dense) // rows), picked.shape[1]
        whole = np.zeros((height * rows, width * columns))
        whole[: len(dense), :d] = dense
        blocks = whole.reshape(height, rows, width, columns).swapaxes(1, 2).reshape(height, width, -1)
        largest = np.abs(blocks).argmax(axis=-1)  # of a block with NaN, that
        picked[start : start + height] = np.take_along_axis(blocks, largest[..., None], -1)[..., 0]
        start += height
    return picked, (rows, columns)


def png(heat_map: HeatMap, scale: float) -> bytes:
    """A heat map as a PNG file, light paper and dark ink.

    Args:
        heat_map: What to draw.
        scale: The end of the colour scale.

    Raises:
        GrowkitError: Where matplotlib is not installed.
    """
    refuse_without_matplotlib()
    from matplotlib import style

    with style.context("default"):  # whatever the user's own settings are
        figure = _figure(heat_map, scale)
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=DPI, metadata={"Software": None})
    return written.getvalue()


def refuse_without_matplotlib() -> None:
    """Refuse to draw where there is nothing to draw with.

    Raises:
        GrowkitError: Naming the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GrowkitError("drawing needs matplotlib; pip install 'growkit[show]'") from None


def _matrices(operator: GrowthOperator) -> Iterator[HeatMap]:
    for key, e in operator.expansions.items():
        named = [("B", "writes into", e.write), ("A", "reads from", e.read)]
        if same(e.write, e.read):
            named = [("B = A", "writes into and reads from", e.write)]
        if not same(e.write, e.seen):
            named.append(("C", "is what readers see of", e.seen))
        for r, (write, read) in enumerate(e.terms):
            named += [(f"B_{r}", f"in term {r} writes into", write), (f"A_{r}", f"in term {r} reads from", read)]
        for letter, does, matrix in named:
            if not matrix.is_identity:
                says = f"{letter} {does} {key}. Rows: target entries; columns: source entries."
                yield HeatMap(f"{key}: {letter}", key, says, *reduced(matrix), matrix.shape)


def _blends(operator: GrowthOperator) -> Iterator[HeatMap]:
    drawn: dict[tuple[Any, ...], tuple[np.ndarray, list[str]]] = {}
    for key, w in operator.blend.items():
        for r, term in enumerate(blend_matrices(w)):
            letter = f"w_{r}" if w.ndim == 3 else "w"
            drawn.setdefault((key.partition("/")[0], letter, term.tobytes()), (term, []))[1].append(key)
    for (_, letter, _), (w, keys) in drawn.items():
        if w.shape[0] == w.shape[1] and np.array_equal(w, np.eye(len(w))) and len(keys) == 1 and "/" not in keys[0]:
            continue
        stack, _, slot = keys[0].partition("/")
        of = f" of {len(keys)} slots" if len(keys) > 1 else f" of {slot}" if slot else ""
        says = f"{letter} of {', '.join(keys)}. Rows: target layers; columns: source layers."
        yield HeatMap(f"{stack}: {letter}{of}", "layers", says, *reduced(Dense(w)), w.shape)


def _figure(heat_map: HeatMap, scale: float) -> Figure:
    from matplotlib import colormaps
    from matplotlib.colors import FuncNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    (D, d), (rows, columns) = heat_map.shape, heat_map.block
    height, width = (INCHES * side for side in _sides(D, d))
    left, right, below, above = 0.75, 1.05, 0.6, 0.4
    whole = (left + width + right, below + height + above)
    figure = Figure(figsize=whole, facecolor="white")
    axes = figure.add_axes((left / whole[0], below / whole[1], width / whole[0], height / whole[1]))
    norm = FuncNorm((_root, _square), vmin=-scale, vmax=scale)
    colours = colormaps["RdBu_r"].with_extremes(bad="#2ca02c")
    extent = (-0.5, heat_map.cells.shape[1] * columns - 0.5, heat_map.cells.shape[0] * rows - 0.5, -0.5)
    cells = np.ma.masked_invalid(heat_map.cells)
    image = axes.imshow(cells, cmap=colours, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
    axes.set_xlim(-0.5, d - 0.5)
    axes.set_ylim(D - 0.5, -0.5)
    layers = heat_map.part == "layers"
    axes.set_xlabel(f"source {'layer' if layers else 'entry'}")
    axes.set_ylabel(f"target {'layer' if layers else 'entry'}")
    axes.set_title(_cut(heat_map.title, int((width + right) * 11)), fontsize=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = figure.add_axes(((left + width + 0.15) / whole[0], below / whole[1], 0.15 / whole[0], height / whole[1]))
    ticks = [scale * share for share in (-1, -0.25, 0, 0.25, 1)]
    figure.colorbar(image, cax=bar, ticks=ticks, format=lambda value, _: f"{value:.3g}")
    return figure


def _sides(D: int, d: int) -> tuple[float, float]:
    """Height and width of a picture, of which the longer is 1: in the matrix's own ratio, unless it is a strip."""
    ratio = min(max(D / d, 1 / 3), 3.0)
    return (1.0, 1 / ratio) if ratio > 1 else (ratio, 1.0)


def _cut(title: str, length: int) -> str:
    return title if len(title) <= length else f"{title[: length - 3]}..."


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)
