"""The commands `vllm-glm-patch bench serve` and `vllm-glm-patch bench report`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Optional

import typer
from typer.core import TyperCommand

from ...errors import UserError
from ..output import Table, show, show_json
from ..processes import Interrupted, interruptible

_BENCH_FLAGS = "flags of vllm bench serve"
_SHOWN = ("input_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "median_e2el_ms")
_INTERRUPTED = 130

app = typer.Typer(help="Measure serving with the patches and without, and report it.", no_args_is_help=True)


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
    order: str = typer.Option("ABBA", help="ABBA: upstream, patched, patched, upstream. AB: one server each."),
    groups: Optional[str] = typer.Option(
        None, help="Two groups of cards, 0-3,4-7: both servers at once, and with ABBA once on each group."
    ),
    minutes: Optional[float] = typer.Option(
        None, min=0.1, help="No run is begun after this time, of which each server has its share; what is left out is told."
    ),
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
    from .plan import ORDERS, Plan, check_model_and_flags, make_groups
    from .progress import Teller
    from .run import Measurement

    serve_flags = tuple(ctx.args)
    check_model_and_flags(model, serve_flags)
    if order not in ORDERS:
        raise UserError(f"--order is {order!r}; give one of {', '.join(ORDERS)}.")
    points = make_points(ctx.meta.get(_BENCH_FLAGS, []), concurrency, request_rate, cases)
    cards = make_groups(groups)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already and not an empty folder; name a new one.")
    _need("jsonschema")
    vllm = find_vllm()
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    plan = Plan(model, serve_flags, points, order, repeats, warmups, start_limit, minutes, cards)
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


@app.command("report")
def report(
    results: list[Path] = typer.Argument(..., metavar="DIR...", help="Folders that `bench serve` wrote, or their serve.json."),
    out: Optional[Path] = typer.Option(None, help="Folder for report.html and the PNG files; by default the first DIR."),
    as_json: bool = typer.Option(False, "--json", help="Print the names of the files and all rows as JSON."),
) -> None:
    """Draw one or several results: a page that needs no network, and PNG plots.

    Exit codes: 0 written; 2 a result cannot be read.
    """
    from . import result as results_module
    from .report import write_report

    for name in ("jsonschema", "matplotlib"):
        _need(name)
    read = [(place, results_module.read(place)) for place in results]
    named = [(_name(place, result, len(read)), result) for place, result in read]
    first = results[0]
    written = write_report(named, out or (first if first.is_dir() else first.parent))
    if as_json:
        show_json({"files": [str(file) for file in written], "rows": {name: result["rows"] for name, result in named}})
    else:
        for file in written:
            typer.echo(file)


def _name(place: Path, result: dict[str, Any], count: int) -> str:
    """What tells a result from the others: vLLM, card, and the folder where there are several."""
    machine = result["machine"]
    name = f"vLLM {machine['vllm']} on {machine.get('card') or machine['cpu']}"
    return f"{place.name}: {name}" if count > 1 else name


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
