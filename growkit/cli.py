"""The command line: verb, input, output. Progress on stderr, results on stdout, ``--json`` for other tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from growkit_specs.errors import GrowkitError

if TYPE_CHECKING:
    from growkit.model import Model
    from growkit.plan import Plan
    from growkit.verify import Report

app = typer.Typer(
    help="Grow a larger transformer out of a smaller trained one.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

InspectArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, an .onnx file, or a saved growth operator.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or an .onnx file.")]
To = Annotated[
    str,
    typer.Option("--to", metavar="SIZES", help="Sizes, absolute or relative: hidden=768,layers=1.5x. "
                 "One or more of hidden heads kv_heads head_dim ffn layers vocab positions."),
]  # fmt: skip
MethodOption = Annotated[str, typer.Option("--method", help="A method, or width=NAME,depth=NAME; NAME:option=value.")]
Like = Annotated[
    str | None, typer.Option("--like", metavar="CONFIG_OR_MODEL", help="Take the sizes of this config or model.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The seed of fresh entries.")]
FreshOption = Annotated[
    str | None,
    typer.Option("--fresh", metavar="SCALE", help="Scale of fresh entries: a factor, or decibels below, as 10dB."),
]
LayersFrom = Annotated[
    str | None,
    typer.Option(
        "--layers-from",
        metavar="MAP",
        help="Source layers instead of the method's: 0,1,2,2,3, or half-open "
        "ranges 0:4,2:6; for several stacks encoder=MAP;decoder=MAP.",
    ),
]
ResidualScale = Annotated[
    float | None, typer.Option("--residual-scale", help="A factor on what repeated layers write into the stream.")
]
ScoreScale = Annotated[
    float | None, typer.Option("--score-scale", help="A factor on the attention scores of repeated layers.")
]
Outputs = Annotated[
    str | None,
    typer.Option("--outputs", metavar="project|grow", help="Outputs of a space that grows: brought back to their size "
                 "(ONNX's default), or grown (PyTorch's)."),
]  # fmt: skip
KvCache = Annotated[
    str | None,
    typer.Option("--kv-cache", metavar="grow|refuse", help="Cached keys and values among an ONNX file's inputs: grow "
                 "them (the default), or refuse to."),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Dtype = Annotated[str, typer.Option("--dtype", help="keep, float32, float16 or bfloat16; ONNX files keep theirs.")]
Device = Annotated[str, typer.Option("--device", help="Where the check runs: auto, cpu or cuda.")]
Check = Annotated[bool, typer.Option("--check", help="Verify what was written before it is put in place.")]


_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException, which typer vendors or imports by version


def main() -> None:
    """Run the command line; every error a user can meet is one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except GrowkitError as error:
        _stop(str(error))
    except _USAGE_ERROR as error:
        _stop(f"{error.format_message()} See growkit --help.")
    except KeyboardInterrupt:
        _stop("interrupted; nothing was written", status=130)
    except MemoryError:
        _stop("out of memory; nothing was written")
    raise SystemExit(status if isinstance(status, int) else 0)


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"growkit: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("growkit"))
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def inspect(model: InspectArgument, as_json: Json = False) -> None:
    """Show what a model is: its spaces, stacks and every tensor's layout; or what a growth operator is."""
    import growkit
    from growkit.adapters import adapters

    path = Path(model)
    if path.is_file() and not any(adapter.matches(path) for adapter in adapters().values()):
        _inspect_operator(path, as_json)
        return
    read = growkit.read(model)
    tensors = [
        {
            "name": t.name,
            "shape": list(t.shape),
            "layout": t.parameter.layout,
            "slot": t.parameter.slot,
            "layer": t.layer,
        }
        for t in read.graph.tensors()
    ]
    facts = {
        "format": read.adapter.name,
        "architecture": read.graph.architecture,
        "class": read.graph.attributes.get("class"),
        "parameters": read.graph.parameter_count,
        "bytes": read.bytes,
        "spaces": read.graph.sizes,
        "stacks": read.graph.depths,
    }
    frozen = {space.name: space.frozen for space in read.graph.spaces if space.frozen}
    if as_json:
        print(json.dumps({**facts, "frozen": frozen, "tensors": tensors}))
        return
    table = _table("slot", "layout", "shape", "name")
    for t in read.graph.tensors(tied=True):
        if t.layer in (None, 0):
            tied = f" (tied to {t.parameter.tied_to})" if t.parameter.tied_to else ""
            table.add_row(t.parameter.slot, t.parameter.layout, " x ".join(map(str, t.shape)), t.parameter.name + tied)
    _print_facts((k, _spelled(v)) for k, v in facts.items() if v is not None)
    _print_facts(("cannot grow", f"{space}: {why}") for space, why in frozen.items())
    _console().print(table)


def _inspect_operator(path: Path, as_json: bool) -> None:
    from growkit.description import describe
    from growkit.operator import GrowthOperator

    try:
        told = describe(GrowthOperator.load(path))
    except GrowkitError as error:
        raise GrowkitError(f"{error}; inspect takes a model directory, an .onnx file or a growth operator") from None
    size = path.stat().st_size
    if as_json:
        print(json.dumps({"format": "operator", "bytes": size, **told.to_json()}))
        return
    _print_facts([("format", "growth operator"), ("bytes", f"{size:,}"), *told.lines()])
    columns, *rows = told.table()
    table = _table(*columns)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


@app.command()
def show(
    operator: Annotated[Path, typer.Argument(metavar="OPERATOR", help="A saved growth operator.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Where to draw it; nothing may exist there. A name that ends in .html "
                       "becomes one page, any other a folder of PNG files."),
    ],
    as_json: Json = False,
) -> None:  # fmt: skip
    """Draw a growth operator: heat maps of its matrices and blends, as a page or as pictures."""
    from growkit.show import show as drawn

    names = drawn(operator, out)
    if as_json:
        print(json.dumps({"out": str(out), "pictures": names}))
    else:
        print(f"wrote {out}: {len(names)} pictures")


@app.command()
def plan(
    model: ModelArgument,
    to: To = "",
    like: Like = None,
    method: MethodOption = "lossless",
    seed: Seed = 0,
    fresh: FreshOption = None,
    layers_from: LayersFrom = None,
    residual_scale: ResidualScale = None,
    score_scale: ScoreScale = None,
    outputs: Outputs = None,
    kv_cache: KvCache = None,
    as_json: Json = False,
) -> None:
    """Tell what a growth would do, and whether it keeps the function, before any weight is touched."""
    import growkit

    told = {"layers_from": layers_from, "residual_scale": residual_scale, "score_scale": score_scale}
    signature = {"outputs": outputs, "kv_cache": kv_cache}
    made = _planned(growkit.read(model), to, like, method=method, seed=seed, fresh=fresh, **told, **signature)
    if as_json:
        print(json.dumps(made.to_json()))
    else:
        _show_plan(made)


@app.command()
def grow(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write; nothing may exist there.")],
    to: To = "",
    like: Like = None,
    method: MethodOption = "lossless",
    operator: Annotated[
        Path | None, typer.Option("--operator", metavar="FILE", help="A saved growth operator.")
    ] = None,
    seed: Seed = 0,
    fresh: FreshOption = None,
    layers_from: LayersFrom = None,
    residual_scale: ResidualScale = None,
    score_scale: ScoreScale = None,
    outputs: Outputs = None,
    kv_cache: KvCache = None,
    check: Check = False,
    device: Device = "auto",
    dtype: Dtype = "keep",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Grow a model and write the larger one."""
    import growkit
    from growkit.adapters import refuse_existing, refuse_misnamed

    refuse_existing(out)
    source = growkit.read(model)
    refuse_misnamed(out, source.adapter)
    signature = {"outputs": outputs, "kv_cache": kv_cache}
    if operator is not None:
        if to or like or layers_from:
            raise GrowkitError("a saved operator settles the sizes; leave out --to, --like and --layers-from")
        large, made = growkit.grow(source, growkit.GrowthOperator.load(operator), dtype=dtype, **signature), None
    else:
        told = {"layers_from": layers_from, "residual_scale": residual_scale, "score_scale": score_scale}
        made = _planned(source, to, like, method=method, seed=seed, fresh=fresh, **told, **signature)
        made = replace(made, recipe=made.recipe.model_copy(update={"check": check, "dtype": dtype}))
        if not as_json and not quiet:
            _show_plan(made)
        large = growkit.grow(source, made, dtype=dtype)
    report = _written(
        source, large, out, check=check, promised=made is None or made.preserving, quiet=quiet, device=device
    )
    result = {"out": str(out), **({} if made is None else {"plan": made.to_json()})}
    if as_json:
        print(json.dumps({**result, "verify": report.to_json() if report else None}))
    else:
        if report:
            _show_report(report)
        _console().print(f"wrote {out}: {large.graph.parameter_count:,} parameters, {large.bytes:,} bytes")


@app.command()
def verify(
    small: Annotated[str, typer.Argument(metavar="SMALL", help="The source model.")],
    large: Annotated[str, typer.Argument(metavar="LARGE", help="The grown model.")],
    atol: Annotated[float | None, typer.Option("--atol", min=0, help="Largest absolute difference allowed.")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="The seed of the inputs.")] = 0,
    as_json: Json = False,
) -> None:
    """Run both models on the same inputs; exit status 1 where their outputs differ."""
    import growkit

    with _console(stderr=True).status("running both models"):  # shown on a terminal only
        report = growkit.verify(growkit.read(small), growkit.read(large), atol=atol, seed=seed, device=device)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        _show_report(report)
    raise typer.Exit(0 if report.preserved else 1)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do what a recipe says."""
    from growkit_specs import Recipe

    told = Recipe.load(recipe)
    if told.destination is None:
        raise GrowkitError(f"{recipe}: the recipe names no destination; add a line 'destination: DIRECTORY'")
    grow(
        str(recipe.parent / told.source),
        recipe.parent / told.destination,
        to=",".join(f"{name}={size}" for name, size in told.target.requested().items()),
        method=told.method,
        seed=told.seed,
        fresh=told.fresh,  # type: ignore[arg-type]
        layers_from=told.layers_from,  # type: ignore[arg-type]
        residual_scale=told.residual_scale,
        score_scale=told.score_scale,
        outputs=told.outputs,
        kv_cache=told.kv_cache,
        check=told.check,
        dtype=told.dtype,
        quiet=quiet,
        as_json=as_json,
    )


@app.command()
def methods(
    model: Annotated[
        str | None, typer.Option("--for", metavar="MODEL", help="Compare the methods on this model.")
    ] = None,
    to: To = "",
    like: Like = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Measure start losses on it: text, .npy or .bin tokens, or an .npz "
                     "of named inputs and labels."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """List every method: what it grows, when it is exact, its paper; or with --for what each makes of a model."""
    if model is not None:
        _compare(model, to, like, data, seed, device, as_json)
        return
    if to or like or data:
        raise GrowkitError("--to, --like and --data compare methods on a model; name it with --for MODEL")
    from growkit.methods import methods as registered

    rows = [
        {
            "name": m.name,
            "grows": list(m.grows),
            "exact_when": m.exact_when,
            "paper": m.paper,
            "summary": m.summary,
            "use": m.use,
            "ratios": m.ratios,
            "copies": m.copies,
            "options": dict(m.options),
            "training": list(m.training),
        }
        for m in registered()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = _table("method", "grows", "for", "what it does", "exact when", "paper")
    for m in registered():
        table.add_row(m.name, ", ".join(m.grows), _USES[m.use], m.summary, m.exact_when, m.paper or "")
    _console().print(table)


_USES = {"keep": "keeping the function", "train": "training on"}


def _compare(name: str, to: str, like: str | None, data: Path | None, seed: int, device: str, as_json: bool) -> None:
    import growkit
    from growkit.adapters import read_graph
    from growkit.compare import compare

    _refuse_no_sizes(to, like)
    source = growkit.read(name)
    target, shape = growkit.Target.parse(to), read_graph(like) if like else None
    with _console(stderr=True).status("comparing methods") as status:  # shown on a terminal only
        candidates = []
        for candidate in compare(source, target, data=data, seed=seed, like=shape, device=device):
            status.update(f"comparing methods: {candidate.method}")
            candidates.append(candidate)
    if as_json:
        print(json.dumps([candidate.to_json() for candidate in candidates]))
        return
    table = _table(
        "method", "for", "keeps the function", "parameters", "trained at first", "FLOPs per token", "start loss"
    )
    for c in candidates:
        if c.refused is not None:
            table.add_row(c.method, _USES[c.use], f"cannot: {c.refused}")
            continue
        verdict = "yes" if c.preserving else f"no: {c.broken[0]}" + (" (and more)" if len(c.broken) > 1 else "")
        loss = "" if c.start_loss is None else f"{c.start_loss:.4f}"
        numbers = (f"{n:,}" for n in (c.parameters, c.trained_parameters, c.flops_per_token))
        table.add_row(c.method, _USES[c.use], verdict, *numbers, loss)
    _console().print(table)


# --- what commands share ---------------------------------------------------------------------------------------------


def _planned(model: Model, to: str, like: str | None, **options: Any) -> Plan:
    import growkit
    from growkit.adapters import read_graph

    if options["layers_from"] is None:
        _refuse_no_sizes(to, like)
    return growkit.plan(model, growkit.Target.parse(to), like=read_graph(like) if like else None, **options)


def _refuse_no_sizes(to: str, like: str | None) -> None:
    if not to and like is None:
        raise GrowkitError("no sizes asked for; give --to hidden=768,layers=12 or --like MODEL")


def _written(
    source: Model, large: Model, out: Path, *, check: bool, promised: bool, quiet: bool, device: str
) -> Report | None:
    """Write ``large``, verified first where asked; a promise that is not kept leaves nothing behind."""
    import growkit

    reports: list[Report] = []

    def verified(written: Model) -> None:
        reports.append(growkit.verify(source, written, device=device))
        if promised and not reports[0].preserved:
            _show_report(reports[0], stderr=True)
            _stop("the outputs differ although the plan says they should not; nothing was written", status=1)

    with _progress(large.bytes, quiet) as progress:
        growkit.write(large, out, progress=progress, check=verified if check else lambda written: None)
    return reports[0] if reports else None


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr: bytes written, per second, time left."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("growing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("growing", total=total)
        yield lambda written: bar.update(task, advance=written)


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 200  # a pipe has no width
    return Console(stderr=stderr, width=width, highlight=False, markup=False)  # heads[q] is a name


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {size}" for name, size in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_facts(facts: Iterable[tuple[str, str]]) -> None:
    for name, value in facts:
        _console().print(f"{name:<13} {value}", soft_wrap=True)


def _show_plan(made: Plan) -> None:
    from growkit.description import ranges

    told = made.to_json()
    table = _table("", "source", "target")
    for row in ("parameters", "bytes", "flops_per_token"):
        table.add_row(row.replace("_", " "), f"{told['source'][row]:,}", f"{told['target'][row]:,}")
    for group in ("spaces", "stacks"):
        for name, size in told["source"][group].items():
            if told["target"][group][name] != size:
                table.add_row(name, str(size), str(told["target"][group][name]))
    console = _console()
    console.print(table)
    console.print(
        f"\n{'keeps the function' if made.preserving else 'does not keep the function'} (method {made.method})"
    )
    for reason in made.verdict.reasons:
        console.print(f"  {'yes' if reason.holds else 'NO '}  {reason.condition}: {reason.detail}", soft_wrap=True)
    for output in told["outputs"]:
        what = "grows with" if output["policy"] == "grow" else "keeps its size, by the read matrix of"
        console.print(f"  the output {output['name']} {what} {output['space']}")
    _show_caches(**told["kv_cache"])
    for stack, new in told["new_layers"].items():
        console.print(
            f"  {stack} from {ranges(told['layers_from'][stack])}; new: {ranges(new) or 'none'}", soft_wrap=True
        )
    if made.trainable:
        console.print("  train the new layers alone at first (their tensors are in --json, trainable)")
    for rule in made.training:
        console.print(f"  training: {rule}", soft_wrap=True)
    console.print()


def _show_caches(inputs: list[str], outputs: list[str], spaces: list[str]) -> None:
    console = _console()
    if spaces:
        console.print(f"  cached keys and values grow with {', '.join(spaces)}")
    for what, names in (("inputs", inputs), ("outputs", outputs)):
        if names:
            console.print(f"  new {what}: {', '.join(names)}", soft_wrap=True)


def _show_report(report: Report, *, stderr: bool = False) -> None:
    table = _table("output", "shape", "largest difference", "relative", "compared")
    for o in report.outputs:
        compared = f"through the read matrix of {o.space}" if o.space else "directly"
        table.add_row(o.name, " x ".join(map(str, o.shape)), f"{o.max_abs_diff:.3g}", f"{o.max_rel_diff:.3g}", compared)
    console = _console(stderr=stderr)
    console.print(table)
    tolerance = (
        f"absolute tolerance {report.atol:g}" if report.atol is not None else f"relative tolerance {report.rtol:g}"
    )
    console.print(f"\n{'preserved' if report.preserved else 'NOT preserved'} ({tolerance})")


if __name__ == "__main__":
    main()
