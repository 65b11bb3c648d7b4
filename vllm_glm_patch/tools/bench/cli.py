"""The commands `vllm-glm-patch bench serve`, `bench kernel` and `bench report`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import typer
from typer.core import TyperCommand

from ...errors import UserError
from ..output import Table, show, show_json
from ..processes import Interrupted, interruptible

_BENCH_FLAGS = "flags of vllm bench serve"
_SHOWN = ("input_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "median_e2el_ms")
_KERNEL_TIMES = (
    "ours_us",
    "cutlass_us",
    "triton_us",
    "triton_tuned_us",
)
_INTERRUPTED = 130

app = typer.Typer(help="Measure serving with the patches and without, and the MoE layer; report it.", no_args_is_help=True)


class _SplitAtDashes(TyperCommand):
    """Keeps what follows the first `--` apart: click would mix it with what is before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            place = args.index("--")
            args, ctx.meta[_BENCH_FLAGS] = args[:place], args[place + 1 :]
        return super().parse_args(ctx, args)


@app.command(
    "serve",
    cls=_SplitAtDashes,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},  # they are for `vllm serve`
)
def serve(
    ctx: typer.Context,
    model: str = typer.Argument(..., metavar="MODEL [VLLM SERVE FLAGS] -- [VLLM BENCH SERVE FLAGS]", help="As for vllm serve."),
    out: Path = typer.Option(Path("bench-serve"), help="Folder for the result, logs and vLLM's own results; new or empty."),
    concurrency: Optional[str] = typer.Option(None, help="Concurrent requests, one or several: 1,4,16. Default 1."),
    request_rate: Optional[str] = typer.Option(None, help="Requests a second, one or several: 0.5,1,2. Default: all at once."),
    cases: Optional[str] = typer.Option(
        None, help="Known cases, one or several of prefill,decode,mixed; or a TOML file of cases with name, flags and loads."
    ),
    repeats: int = typer.Option(1, min=1, max=500, help="Measured runs at each case and load, on each server."),
    warmups: int = typer.Option(1, min=0, max=100, help="Runs before those whose numbers are thrown away."),
    warm_each: str = typer.Option("load", help="load: warm up for each load. case: once for a case, with its highest load."),
    order: str = typer.Option("ABBA", help="ABBA: upstream, patched, patched, upstream. AB: one server each."),
    groups: Optional[str] = typer.Option(
        None, help="Two groups of cards, 0-3,4-7: both servers at once, and with ABBA once on each group."
    ),
    minutes: Optional[float] = typer.Option(
        None, min=0.1, help="No run is begun after this time, of which each server has its share; what is left out is told."
    ),
    deaths: int = typer.Option(2, min=1, help="Servers a case may kill in a turn before its other loads are left out."),
    start_limit: float = typer.Option(1800.0, min=1, help="Seconds a server may take until it is ready."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Compare upstream's and the patched server under `vllm bench serve`, one after the other on this machine.

    Example: bench serve MODEL -tp 8 --concurrency 1,16 -- --random-input-len 8192 --random-output-len 1

    Exit codes: 0 measured, also where a server died, which is a result; 2 what you gave is wrong; 130 interrupted, and
    what was measured until then is kept.
    """
    from .cases import make_points
    from .client import find_vllm
    from .plan import ORDERS, WARM_EACH, Plan, check_model_and_flags, make_groups
    from .progress import Teller
    from .run import Measurement

    serve_flags = tuple(ctx.args)
    check_model_and_flags(model, serve_flags)
    if order not in ORDERS:
        raise UserError(f"--order is {order!r}; give one of {', '.join(ORDERS)}.")
    if warm_each not in WARM_EACH:
        raise UserError(f"--warm-each is {warm_each!r}; give one of {', '.join(WARM_EACH)}.")
    points = make_points(ctx.meta.get(_BENCH_FLAGS, []), concurrency, request_rate, cases)
    cards = make_groups(groups)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already and not an empty folder; name a new one.")
    _need("jsonschema")
    vllm = find_vllm()
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    plan = Plan(model, serve_flags, points, order, repeats, warmups, start_limit, minutes, cards, warm_each, deaths)
    interrupted = False
    with Teller(len(plan.sides) * len(points) * repeats) as teller:
        measurement = Measurement(vllm, plan, out.absolute(), teller)
        try:
            with interruptible():
                measurement.make()
        except Interrupted:
            interrupted = True
    if as_json:
        show_json(measurement.result)
    else:
        _show(measurement.result)
        typer.echo(f"Result: {measurement.file}")
    if interrupted:
        typer.echo("Interrupted; what was measured is kept.", err=True)
        raise typer.Exit(_INTERRUPTED)


@app.command("kernel")
def kernel(
    out: Path = typer.Option(Path("kernel.json"), help="Result file, or a folder for it; one that is there is gone on with."),
    shapes: str = typer.Option("TP8", help="Ranks of GLM-4.6, one or several of TP8,TP4,TP2,TP1,EP8."),
    tokens: Optional[str] = typer.Option(None, help="Token counts: 1,64,8192. [default: 1 to 16384 by powers of two]"),
    backends: str = typer.Option("auto", help="auto: as the tables choose. Or one or several of this package's: triton,…"),
    check: bool = typer.Option(True, help="Compare with float64 first, at tile edges and under bad expert ids."),
    time_it: bool = typer.Option(True, "--time/--no-time", help="Time it."),
    upstream: bool = typer.Option(True, help="Also time what the installed vLLM has."),
    minutes: Optional[float] = typer.Option(None, min=0.1, help="Nothing is begun after this time; the same command goes on."),
    seed: int = typer.Option(0, min=0, help="Of weights, tokens and routings."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Check the fused MoE layer of this package on this card, and time it against upstream's, floor and ratio beside it.

    Example: bench kernel --shapes TP8,EP8 --tokens 1,64,1024,8192 --minutes 8 --out kernel.json

    Exit codes: 0 measured, or the time was up; 1 a check failed; 2 no card, or what you gave is wrong; 130 interrupted,
    and what was measured until then is kept.
    """
    from . import schema
    from .kernel import TIMED
    from .kernel_run import work
    from .plan import number

    _need("jsonschema")
    counts = [number(text, "--tokens", int, 1) for text in tokens.split(",")] if tokens else list(TIMED)
    file = out / schema.NAMES[schema.KERNEL] if out.is_dir() else out
    try:
        result = work(
            file,
            shapes.split(","),
            counts if time_it else [],
            asked=backends.split(","),
            checked=check,
            with_upstream=upstream,
            minutes=minutes,
            seed=seed,
            say=lambda text: typer.echo(text, err=True),
        )
    except Interrupted:
        typer.echo(f"Interrupted; what was measured is kept in {file}.", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    if as_json:
        show_json(result)
    else:
        _show_kernel(result)
        typer.echo(f"Result: {file}")
    if any(not found["good"] for found in result["checks"]):
        raise typer.Exit(1)


@app.command("report")
def report(
    results: list[Path] = typer.Argument(
        ..., metavar="DIR...", help="Folders with serve.json or kernel.json, or such files, of one or several runs and cards."
    ),
    out: Optional[Path] = typer.Option(None, help="Folder for report.html and the PNG files; by default the first DIR."),
    rows: Optional[Path] = typer.Option(None, help="Also write all rows, and what they were measured on, to this JSON file."),
    as_json: bool = typer.Option(False, "--json", help="Print the names of the files and all rows as JSON."),
) -> None:
    """Draw one or several results: a page that needs no network, and PNG plots.

    Exit codes: 0 written; 2 a result cannot be read.
    """
    import json

    from . import schema
    from .report import write_report

    for name in ("jsonschema", "matplotlib"):
        _need(name)
    read = [(place, result) for place in results for result in schema.read_all(place)]
    named = _named(read)
    first = results[0]
    written = write_report(named, out or (first if first.is_dir() else first.parent))
    if rows is not None:
        content = {
            "rows": [row for _, result in named for row in result["rows"]],
            "measured": [
                {"name": name, **{key: value for key, value in result.items() if key not in ("rows", "runs", "checks")}}
                for name, result in named
            ],
        }
        rows.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        written.append(rows)
    if as_json:
        show_json({"files": [str(file) for file in written], "rows": {name: result["rows"] for name, result in named}})
    else:
        for file in written:
            typer.echo(file)


def _named(read: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Each result under a name of its own: vLLM and card, with the folder or file before it where that is not enough."""
    names = [f"vLLM {result['machine']['vllm']} on {_card_of(result)}" for _, result in read]
    named = []
    for (place, result), name in zip(read, names):
        alike = [other for (_, other), same in zip(read, names) if same == name and other["kind"] == result["kind"]]
        named.append((f"{place.resolve().name}: {name}" if len(alike) > 1 else name, result))
    return named


def _card_of(result: dict[str, Any]) -> str:
    """The card without its number, driver and memory."""
    machine = result["machine"]
    cards = [part.split(",")[0].partition(": ")[2] or part for part in machine.get("card", "").split("; ") if part]
    if not cards:
        return str(machine["cpu"])
    return f"{len(cards)} × {cards[0]}" if len(cards) > 1 else cards[0]


def _show_kernel(result: dict[str, Any]) -> None:
    rows = [
        (
            row["shape"],
            str(row["tokens"]),
            row["backend"],
            *("–" if row[name] is None else f"{row[name]:.1f}" for name in _KERNEL_TIMES),
            f"{row['floor_us']:.1f}",
            "–" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['ratio_low']:.2f} – {row['ratio_high']:.2f})",
        )
        for row in result["rows"]
    ]
    head = ("shape", "tokens", "backend", "ours, µs", "cutlass", "triton", "triton, tuned", "floor", "ratio (spread)")
    show(Table(f"{result['machine']['card']}, vLLM {result['machine']['vllm']}", head, rows))
    good = sum(found["good"] for found in result["checks"])
    typer.echo(f"{good} of {len(result['checks'])} checks are good.")
    for finding in result["findings"]:
        typer.echo(finding)


def _show(result: dict[str, Any]) -> None:
    from .plots import name_of
    from .result import label_of

    wanted = [row for row in result["rows"] if row["metric"] in _SHOWN or row["case"] == "server"]
    rows = [
        (
            label_of(row),
            name_of(row["metric"]),
            *("–" if row[side] is None else f"{row[side]:.6g}" for side in ("upstream", "patched")),
            "–" if row["ratio"] is None else f"{row['ratio']:.3f} ({row['ratio_low']:.3f} – {row['ratio_high']:.3f})",
        )
        for row in wanted
    ]
    show(Table(f"vLLM {result['machine']['vllm']}", ("case", "metric", "upstream", "patched", "ratio (spread)"), rows))
    for finding in result["findings"]:
        typer.echo(finding)


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"`bench` needs {package}, which is not installed. Run: pip install 'vllm-glm-patch[bench]'")
