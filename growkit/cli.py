"""The command line: verb, input, output. Progress on stderr, results on stdout, ``--json`` for other tools."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from growkit_specs.errors import GrowkitError
from growkit_specs.recipe import FitSettings

if TYPE_CHECKING:
    from growkit.fit import Progress
    from growkit.model import Model
    from growkit.operator import GrowthOperator
    from growkit.plan import Plan
    from growkit.verify import Report
    from growkit_specs import Recipe

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
FIT = FitSettings()
_OTHER_SETTINGS = sorted(set(FitSettings.model_fields) - {"steps", "lr", "batch", "learn", "loss", "seed"})
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
        saved = growkit.GrowthOperator.load(operator)
        large, made = growkit.grow(source, saved, dtype=dtype, **signature), None
        promised = saved.start is None  # what was learned keeps no function
    else:
        told = {"layers_from": layers_from, "residual_scale": residual_scale, "score_scale": score_scale}
        made = _planned(source, to, like, method=method, seed=seed, fresh=fresh, **told, **signature)
        made = replace(made, recipe=made.recipe.model_copy(update={"check": check, "dtype": dtype}))
        if not as_json and not quiet:
            _show_plan(made)
        large, promised = growkit.grow(source, made, dtype=dtype), made.preserving
    report = _written(source, large, out, check=check, promised=promised, quiet=quiet, device=device)
    result = {"out": str(out), **({} if made is None else {"plan": made.to_json()})}
    if as_json:
        print(json.dumps({**result, "verify": report.to_json() if report else None}))
    else:
        if report:
            _show_report(report)
        _console().print(f"wrote {out}: {large.graph.parameter_count:,} parameters, {large.bytes:,} bytes")


@app.command()
def fit(
    model: ModelArgument,
    operator: Annotated[Path, typer.Argument(metavar="OPERATOR", help="Where to save the operator, as safetensors.")],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="PATH", help="Text, .npy or .bin tokens, images, a directory of datasets, or an "
                     ".npz of named inputs and labels."),
    ],
    to: To = "",
    like: Like = None,
    init: Annotated[
        str, typer.Option("--init", metavar="METHOD", help="The method to begin with; ligo-paper is the published one.")
    ] = "lossless",
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = FIT.steps,
    lr: Annotated[float, typer.Option("--lr", help="The highest learning rate.")] = FIT.lr,
    batch: Annotated[int, typer.Option("--batch", help="Examples in a step.")] = FIT.batch,
    learn: Annotated[
        str, typer.Option("--learn", metavar="PARTS", help="What is learned: depth, width, norms, residual, source.")
    ] = ",".join(FIT.learn),
    loss: Annotated[
        str,
        typer.Option("--loss", help="auto, causal, masked, classification, output[:NAME], distill or module:function."),
    ] = FIT.loss,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting: " + ", ".join(_OTHER_SETTINGS) + "."),
    ] = None,
    seed: Seed = 0,
    fresh: FreshOption = None,
    layers_from: LayersFrom = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted fit left its checkpoint, OPERATOR.fit.")
    ] = False,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between two checkpoints.")] = 25,
    log: Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Add each step as a line of JSON.")] = None,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Under torchrun: share out the parameters too (FSDP).")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Learn the growth operator from data (LiGO), and save it; grow --operator applies it."""
    import growkit
    from growkit.adapters import refuse_existing
    from growkit.staging import staged_files

    refuse_existing(operator)
    checkpoint = operator.with_name(f"{operator.name}.fit")
    if checkpoint.exists() and not resume:
        raise GrowkitError(f"{checkpoint} is there, of a fit that was interrupted; go on with --resume, or remove it")
    told = dict(_assigned(each) for each in settings or ())
    made = growkit.FitSettings.of(
        **{"steps": steps, "lr": lr, "batch": batch, "learn": learn, "loss": loss, "seed": seed, **told}
    )
    source = growkit.read(model)
    plan = _planned(source, to, like, method=init, seed=seed, fresh=fresh, layers_from=layers_from)
    first = int(os.environ.get("RANK", "0")) == 0
    if first and not as_json and not quiet:
        _show_learning(plan, made)
    run = {"checkpoint": checkpoint, "resume": resume, "save_every": save_every, "log": log, "sharded": sharded}
    learned, losses = _fitted(source, plan, data, made, device=device, quiet=quiet or not first, **run)
    if not first:
        return
    with staged_files(operator, 0) as folder:
        learned.save(folder / operator.name)
    checkpoint.unlink(missing_ok=True)
    if as_json:
        print(json.dumps({"operator": str(operator), "plan": plan.to_json(), "loss": losses}))
    else:
        wrote = f"wrote {operator}: loss {_spelled_losses(losses)}; grow --operator {operator} applies it"
        _console().print(wrote, soft_wrap=True)


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
    if told.fit is not None:
        _run_fit(recipe, told, quiet=quiet, as_json=as_json)
        return
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
        typer.Option("--data", metavar="FILE", help="Measure start losses on it: text, .npy or .bin tokens, "
                     "images, or an .npz of named inputs and labels."),
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


# --- fitting ---------------------------------------------------------------------------------------------------------


def _assigned(text: str) -> tuple[str, str | None]:
    """``NAME=VALUE``; the value ``none`` is none."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise GrowkitError(f"--set {text}: expected NAME=VALUE; settings are {', '.join(FitSettings.model_fields)}")
    return name, None if value.lower() == "none" else value


def _fitted(
    source: Model, plan: Plan, data: Path, settings: FitSettings, *, device: str, quiet: bool, **run: Any
) -> tuple[GrowthOperator, dict[str, float]]:
    """The operator of a plan, learned on some data, and the losses at the first step, the last one, and held out."""
    import growkit

    losses: dict[str, float] = {}
    read = growkit.read_data(source, data, batch=settings.batch, length=settings.length, seed=settings.seed)
    with _learning(settings.steps, quiet) as shown:

        def seen(step: Progress) -> None:
            losses.setdefault("first", step.loss)
            losses["last"] = step.loss
            if step.validation is not None:
                losses["validation"] = step.validation
            shown(step)

        learned = growkit.fit(source, plan, read, device=device, progress=seen, **run, **settings.model_dump())
    return learned, losses


def _run_fit(path: Path, told: Recipe, *, quiet: bool, as_json: bool) -> None:
    """A recipe whose operator is learned before it is applied."""
    import growkit
    from growkit.adapters import refuse_existing, refuse_misnamed

    assert told.fit is not None
    assert told.destination is not None
    if told.data is None:
        raise GrowkitError(f"{path}: the recipe has a fit and no data; add a line 'data: PATH'")
    out = path.parent / told.destination
    refuse_existing(out)
    source = growkit.read(str(path.parent / told.source))
    refuse_misnamed(out, source.adapter)
    plan = growkit.plan(
        source,
        told.target,
        method=told.method,
        seed=told.seed,
        fresh=told.fresh,
        layers_from=told.layers_from,
        residual_scale=told.residual_scale,
        score_scale=told.score_scale,
    )
    learned, losses = _fitted(source, plan, path.parent / told.data, told.fit, device="auto", quiet=quiet)
    large = growkit.grow(source, learned, dtype=told.dtype, outputs=told.outputs, kv_cache=told.kv_cache)
    report = _written(source, large, out, check=told.check, promised=False, quiet=quiet, device="auto")
    if as_json:
        verified = report.to_json() if report else None
        print(json.dumps({"out": str(out), "plan": plan.to_json(), "loss": losses, "verify": verified}))
    else:
        if report:
            _show_report(report)
        wrote = f"wrote {out}: {large.graph.parameter_count:,} parameters; loss {_spelled_losses(losses)}"
        _console().print(wrote, soft_wrap=True)


def _spelled_losses(losses: dict[str, float]) -> str:
    if "last" not in losses:
        return "as it was; no step was left"
    held_out = f", held out {losses['validation']:.4f}" if "validation" in losses else ""
    return f"{losses['first']:.4f} -> {losses['last']:.4f}{held_out}"


def _show_learning(plan: Plan, settings: FitSettings) -> None:
    learnable = plan.learnable(settings)
    kinds = dict.fromkeys(learnable.blends.values(), "w") | dict.fromkeys(learnable.residuals.values(), "Z")
    kinds |= dict.fromkeys(learnable.weights.values(), "the source's weights")
    parts: dict[str, int] = {}
    for i, (name, shape) in enumerate(zip(learnable.names, learnable.shapes, strict=True)):
        what = kinds.get(i) or name.partition("@")[0]
        parts[what] = parts.get(what, 0) + prod(shape)
    _console().print(f"begins as {plan.method}; {learnable.parameters:,} parameters are learned:")
    for what, count in parts.items():
        _console().print(f"  {what}: {count:,}", soft_wrap=True)


@contextmanager
def _learning(steps: int, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr: steps, the loss, tokens per second, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("fitting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=steps)

        def shown(step: Any) -> None:
            rate = step.tokens / max(step.seconds, 1e-9)
            bar.update(task, completed=step.step, description=f"loss {step.loss:.4f}, {rate:,.0f} tokens/s")

        yield shown


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
    learned = told["operator"]
    if learned["parameters"]:
        console.print(
            f"  to learn the operator (growkit fit): {learned['parameters']:,} parameters, {learned['bytes']:,} bytes, "
            f"{learned['flops']:,} flops to make the weights once",
            soft_wrap=True,
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
