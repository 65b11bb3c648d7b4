"""The command `vllm-glm-patch verify`."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Optional

import typer

from ...errors import UserError
from ..doctor import facts
from ..output import show, show_json
from . import supervise
from .cases import ROUTINGS, SHAPES, SIDES, TOKENS, Grid, Kernel, quick, seconds
from .child import Job
from .report import Result

BACKEND = "vllm_glm_patch.tools.verify.card:Card"
_LARGEST = 65536  # tokens; a step of vLLM is smaller, and its buffers fit a card


def command(
    upstream_only: bool = typer.Option(False, "--upstream-only", help="Only vLLM's kernels."),
    ours_only: bool = typer.Option(False, "--ours-only", help="Only the fused kernel of this package."),
    unpatched: bool = typer.Option(False, "--unpatched", help="vLLM as it is, as under VLLM_GLM_PATCH=0."),
    less: bool = typer.Option(False, "--quick", help="A minute: one shape and the most telling token counts."),
    shape: Optional[list[str]] = typer.Option(None, help="Only this shape, such as TP8 or EP8; may be given several times."),
    tokens: Optional[str] = typer.Option(None, help="Only these token counts, separated by commas."),
    minutes: Optional[float] = typer.Option(None, help="Stop after so many minutes; 6 by default, 1 with --quick."),
    as_json: Optional[Path] = typer.Option(None, "--json", metavar="FILE", help="Write JSON there; - is standard output."),
) -> None:
    """Check every kernel of the FP8 MoE path on this card: for reads past its buffers, and against float64.

    Each buffer ends at an unmapped page. Needs a Hopper card that nothing else uses, and takes up to 6 minutes. The
    patches are in place as they would be in vLLM, with the same VLLM_GLM_PATCH variables.

    Exit codes: 0 safe; 1 something that this vLLM would run is unsafe; 2 no card, a wrong option, or not everything
    could be called; 130 interrupted.
    """
    grid = chosen(upstream_only, ours_only, less, shape, tokens)
    limit = _minutes(minutes, less)
    if as_json and str(as_json) != "-" and not as_json.absolute().parent.is_dir():
        raise UserError(f"--json {as_json}: there is no folder {as_json.absolute().parent}; make it first.")
    _need_a_card()
    result = run(grid, limit * 60, {"unpatched": unpatched})
    if as_json and str(as_json) == "-":
        show_json(result.as_dict())
    else:
        tell(result)
        if as_json:
            as_json.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def chosen(upstream_only: bool, ours_only: bool, less: bool, shape: Optional[list[str]], tokens: Optional[str]) -> Grid:
    """The grid that the options ask for.

    Raises:
        UserError: two options exclude each other, or one has a value that is not allowed.
    """
    if upstream_only and ours_only:
        raise UserError("--upstream-only and --ours-only exclude each other; give one, or none for both.")
    sides = ("upstream",) if upstream_only else ("ours",) if ours_only else SIDES
    known = {one.name.lower(): one for one in SHAPES}
    for name in shape or []:
        if name.lower() not in known:
            raise UserError(f"--shape is {name!r}; known are {', '.join(one.name for one in SHAPES)}.")
    shapes = tuple(dict.fromkeys(known[name.lower()] for name in shape)) if shape else SHAPES
    counts = _counts(tokens) if tokens else TOKENS
    few = tuple(counts) if tokens else Grid().few
    grid = Grid(shapes, counts, few, sides)
    return quick(grid) if less else grid


def _counts(text: str) -> tuple[int, ...]:
    counts = []
    for part in text.split(","):
        if not part.strip().isdigit() or not 0 < int(part) <= _LARGEST:
            raise UserError(f"--tokens has {part.strip()!r}; give numbers from 1 to {_LARGEST}, separated by commas.")
        counts.append(int(part))
    return tuple(dict.fromkeys(counts))


def _minutes(minutes: Optional[float], less: bool) -> float:
    if minutes is None:
        return 1.0 if less else 6.0
    if not 0 < minutes <= 24 * 60:
        raise UserError(f"--minutes is {minutes:g}; it must be above 0, and at most a day.")
    return minutes


def _need_a_card() -> None:
    cards, why = facts.cards()
    if not cards:
        raise UserError(
            f"verify needs a Hopper card, and none is here: {why}. "
            "`vllm-glm-patch doctor` and `vllm-glm-patch scan` say what they can without one."
        )


def run(grid: Grid, limit: float, options: dict[str, object], backend: str = BACKEND) -> Result:
    """Run a grid for at most `limit` seconds, with progress on standard error."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glm-verify-") as made, supervise.Show() as progress:
        folder = Path(made)
        progress.say(estimate(grid, limit))
        job = Job(str(folder / "journal.jsonl"), backend, grid, options, stop_at=start + limit)
        state, interrupted = supervise.supervise(job, folder, progress)
    return Result(state, grid, interrupted, time.monotonic() - start)


def estimate(grid: Grid, limit: float) -> str:
    """What is said before it begins. How many kernels there are is not known yet; most releases of vLLM have eight."""
    usual = [Kernel("upstream", str(i)) for i in range(6)]
    usual += [Kernel("upstream", "layer", ROUTINGS), Kernel("upstream", "router", ("spread", "nan"))]
    usual += [Kernel("ours", name, ROUTINGS) for name in ("layer", "steps")]
    wanted = 20 + seconds(grid.units(usual))
    shapes = ", ".join(shape.name for shape in grid.shapes)
    counts = f"{len(grid.tokens)} token counts" if len(grid.tokens) > 1 else f"{grid.tokens[0]} tokens"
    told = f"{wanted:.0f} s" if wanted < 90 else f"{wanted / 60:.0f} minutes"
    return (
        f"Checking {' and '.join(grid.sides)}: {shapes}; {counts}. About {told} on an H100, more where something faults, "
        f"at most {limit / 60:g} minutes. Ctrl-C ends it and keeps what was found."
    )


def tell(result: Result) -> None:
    """Print a result for a person."""
    typer.echo(result.head())
    for table in result.tables():
        typer.echo()
        show(table)
    typer.echo()
    typer.echo(result.verdict())
