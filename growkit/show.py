"""Showing a growth operator: a page of heat maps that needs nothing else, or a folder of pictures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from growkit.adapters import refuse_existing
from growkit.description import describe
from growkit.heatmaps import HeatMap, heat_maps, png, refuse_without_matplotlib, scale_of
from growkit.operator import GrowthOperator
from growkit.staging import staged_directory, staged_files
from growkit_specs import GrowkitError


def show(operator: str | Path, out: str | Path) -> list[str]:
    """Draw a saved operator.

    Args:
        operator: The file.
        out: Where to: a name that ends in ``.html`` becomes one page with everything in it, any other a folder of PNG
            files. Nothing may exist there, and nothing appears there unless the whole of it is right.

    Returns:
        The names of the pictures, in their order.

    Raises:
        GrowkitError: Where the file is no operator, ``out`` exists or cannot be written, or matplotlib is missing.
    """
    source, out = Path(operator), Path(out)
    refuse_existing(out)
    if out.suffix.lower() in (".png", ".htm", ".svg", ".pdf"):
        raise GrowkitError(
            f"{out}: several pictures are drawn; name a page that ends in .html, or a folder for PNG files"
        )
    refuse_without_matplotlib()
    loaded = GrowthOperator.load(source)
    maps = heat_maps(loaded)
    scale = scale_of(maps)
    names = [f"{i:03}-{each.name}.png" for i, each in enumerate(maps, start=1)]
    if out.suffix.lower() == ".html":
        with staged_files(out) as folder:
            text = page(source.name, loaded, source.stat().st_size)
            (folder / out.name).write_text(text, encoding="utf-8", newline="\n")
    else:
        with staged_directory(out) as folder:
            for name, each in zip(names, maps, strict=True):
                (folder / name).write_bytes(png(each, scale))
    return names


def page(title: str, operator: GrowthOperator, size: int) -> str:
    """One HTML page about an operator, pictures and style included: it loads nothing and runs nothing.

    Args:
        title: What the operator is called.
        operator: The operator.
        size: Its file's size in bytes.

    Raises:
        GrowkitError: Where matplotlib is missing.
    """
    facts, maps = describe(operator), heat_maps(operator)
    scale = scale_of(maps)
    columns, *rows = facts.table()
    parts = {part: [each for each in maps if each.part == part] for part in dict.fromkeys(each.part for each in maps)}
    still = [key for key, space in facts.spaces.items() if key not in parts]
    drawn = [
        f"<section><h2>{escape(part)}</h2><div class=maps>{''.join(_figure(each, scale) for each in members)}</div>"
        "</section>"
        for part, members in parts.items()
    ]
    return _PAGE.format(
        title=escape(title),
        facts=_definitions([("bytes", f"{size:,}"), *facts.lines()]),
        table=_table(columns, rows),
        scale=escape(_scale_said(scale) if maps else "Every matrix and every blend is the identity."),
        still=escape(f"Not drawn, the identity: {', '.join(still)}." if still and maps else ""),
        sections="\n".join(drawn),
    )


def _scale_said(scale: float) -> str:
    return (
        f"All pictures share one colour scale, from {-scale:.4g} (blue) over 0 (white) to {scale:.4g} (red). Colours "
        "follow the signed square root of an entry, so that small entries can be seen."
    )


def _figure(heat_map: HeatMap, scale: float) -> str:
    data = b64encode(png(heat_map, scale)).decode("ascii")
    return (
        f'<figure><img alt="{escape(f"Heat map of {heat_map.title}")}" src="data:image/png;base64,{data}">'
        f"<figcaption><strong>{escape(heat_map.title)}</strong> {escape(heat_map.caption)}</figcaption></figure>\n"
    )


def _definitions(lines: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in lines)
    return f"<table>\n{rows}</table>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --paper: #fafafa; --line: #d5d5d5; --soft: #5c5c5c; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e6e6; --paper: #161616; --line: #3a3a3a; --soft: #a5a5a5; }}
}}
body {{ margin: 0 auto; padding: 1rem; max-width: 75rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.4rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }}
.wide {{ overflow-x: auto; overflow-wrap: normal; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }}
.wide td:nth-child(-n+3) {{ white-space: nowrap; }}
.maps {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
img {{ display: block; max-width: 100%; max-height: 26rem; height: auto; background: #fff; border-radius: .3rem; }}
figcaption, .note {{ font-size: .9rem; color: var(--soft); }}
figcaption strong {{ color: var(--ink); display: block; }}
</style>
</head>
<body>
<h1>Growth operator {title}</h1>
<p>W' = sum over r and j of w[r,t,j] B_r W_j A_r<sup>T</sup> + Z: B writes into a space, A reads from it, C is what
readers see of it, w blends layers, Z is fresh.</p>
{facts}
<h2>Spaces</h2>
<div class=wide>{table}</div>
<p class=note>{scale} {still}</p>
{sections}
</body>
</html>
"""
