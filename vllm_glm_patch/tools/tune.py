"""The command `vllm-glm-patch tune`: times the MoE kernels on the card at hand and keeps the fastest in a table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.moe.problem import GLM_SHAPES, Problem
from vllm_glm_patch.settings import Settings

if TYPE_CHECKING:
    from vllm_glm_patch.moe.dispatch import Card

_KEYS = {"E": "experts", "N": "intermediate_size", "K": "hidden_size", "top_k": "top_k", "G": "global_experts"}
DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"


def command(
    shapes: list[str] = typer.Option(
        ["TP8"],
        "--shape",
        help=f"GLM-4.6's layer on one rank of a deployment: {', '.join(GLM_SHAPES)}; or numbers, E=160,N=192 with K=5120, "
        "top_k=8 and G=E unless given: experts on this rank, their width, hidden size, experts a token, experts in all. May be "
        "given several times.",
    ),
    tokens: str = typer.Option(DEFAULT_TOKENS, help="Token counts, separated by commas; each serves half to twice its own."),
    minutes: float = typer.Option(10.0, help="Time limit. What was tuned by then is kept; the next run goes on from it."),
    out: Optional[Path] = typer.Option(None, help="The table's file. [default: a file for this card in the user's folder]"),
    seed: int = typer.Option(0, help="Of the random weights and tokens."),
    backends: str = typer.Option("triton,hopper", help="Whose kernels are tried: hopper are the native ones."),
    source: Optional[Path] = typer.Option(
        None,
        "--from",
        help="A result of `bench kernel`: tune nothing, enter at each count the faster of our kernel and vLLM's. No card.",
    ),
) -> None:
    """Tune the fused MoE kernels on this card, and keep the table where `vllm serve` finds it.

    Nothing else should run on the card. Only configurations whose results agree with a float64 reference are kept.

    Exit codes: 0 a table was written; 1 nothing could be tuned in the time; 2 no card, or an option is wrong.
    """
    if source is not None:
        from vllm_glm_patch.tools import tune_from_bench

        path, entered, left = tune_from_bench.write(source, out, Settings.from_environment().tables())
        typer.echo(f"{entered} counts entered, {left} of them left to vLLM's own kernel; the table is {path}")
        return
    problems = [problem_of(shape).with_tokens(count) for shape in shapes for count in counts_of(tokens)]
    if not minutes > 0:
        raise UserError(f"--minutes is {minutes}; it must be more than 0.")
    card = _card()
    path = table_file(out, card.name, Settings.from_environment().tables())
    console = Console(stderr=True)
    found = _tune(problems, minutes, path, seed, console, kinds_of(backends))
    if not found:
        typer.echo(f"Nothing was tuned in {minutes:g} minutes; give --minutes more, or fewer --tokens.", err=True)
        raise typer.Exit(1)
    typer.echo(f"{found} of {len(problems)} counts tuned for {card.name}; the table is {path}")
    if out is not None and path.parent != Settings.from_environment().tables():
        typer.echo(f"To serve with it: VLLM_GLM_PATCH_TUNED_DIR={path.parent.resolve()} vllm serve …")


def problem_of(shape: str) -> Problem:
    """The layer that a value of --shape names, with one token.

    Raises:
        UserError: it is neither a name nor numbers.
    """
    if shape.upper() in GLM_SHAPES:
        return GLM_SHAPES[shape.upper()]
    numbers: dict[str, int] = {}
    for part in shape.split(","):
        found = re.fullmatch(r"\s*(E|N|K|G|top_k)=([1-9]\d*)\s*", part)
        if found is None or _KEYS[found.group(1)] in numbers:
            raise UserError(
                f"--shape is {shape!r}; it must be one of {', '.join(GLM_SHAPES)}, or numbers like E=160,N=192,K=5120,top_k=8."
            )
        numbers[_KEYS[found.group(1)]] = int(found.group(2))
    if not {"experts", "intermediate_size"} <= set(numbers):
        raise UserError(f"--shape is {shape!r}; it must give E (local experts) and N (their width).")
    problem = Problem(1, **{"global_experts": numbers["experts"], **numbers})
    if not max(problem.experts, problem.top_k) <= problem.global_experts:
        raise UserError(f"--shape is {shape!r}; G, the experts in all, must be at least E and top_k ({problem.top_k}).")
    return problem


def kinds_of(text: str) -> list[str]:
    """The backends of --backends.

    Raises:
        UserError: one is not among those that can be tuned.
    """
    known = ("triton", "hopper")
    for part in (found := [part.strip() for part in text.split(",")]):
        if part not in known:
            raise UserError(f"--backends has {part!r}; it must be {' or '.join(known)}, or both separated by a comma.")
    return found


def counts_of(text: str) -> list[int]:
    """The token counts of --tokens, largest first: that is where most time is to be won.

    Raises:
        UserError: one is not a count from 1 to 131072.
    """
    found = set()
    for part in text.split(","):
        if not part.strip().isdigit() or not 1 <= int(part) <= 131072:
            raise UserError(f"--tokens has {part.strip()!r}; it must be counts from 1 to 131072, separated by commas.")
        found.add(int(part))
    return sorted(found, reverse=True)


def _card() -> Card:
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError(f"Tuning needs torch and triton ({error}). Run it in the Python that runs vLLM.") from error
    if not torch.cuda.is_available():
        raise UserError("Tuning needs an NVIDIA Hopper card, and torch sees none here. Run it on the machine that serves.")
    from vllm_glm_patch.moe.dispatch import read_card

    card = read_card(torch.cuda.current_device())
    if card.capability != (9, 0):
        raise UserError(
            f"Tuning needs a Hopper card (compute capability 9.0); {card.name} has {'.'.join(map(str, card.capability))}. "
            "On other cards vLLM's own kernel serves, and there is nothing to tune."
        )
    return card


def table_file(out: Path | None, card: str, folder: Path | None) -> Path:
    """The file of a card's table: `out`, or one in the user's folder.

    Raises:
        UserError: there is no such folder, or what is there is no table.
    """
    from vllm_glm_patch.moe import tables

    if out is None and folder is None:
        raise UserError("This user has no home folder for the table; give --out FILE, or set VLLM_GLM_PATCH_TUNED_DIR.")
    path = out if out is not None or folder is None else tables.file_of(card, folder)
    assert path is not None
    if path.suffix != ".json":
        raise UserError(f"--out is {path}; it must be a file that ends in .json, since only such files are read as tables.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            tables.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"The table {path} cannot be extended: {error}. Remove it, or give another --out.") from error
    return path


def _tune(problems: list[Problem], minutes: float, path: Path, seed: int, console: Console, kinds: list[str]) -> int:
    """Tune, with a bar; how many counts got a configuration."""
    from vllm_glm_patch.moe import tune

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[best]}"), TimeElapsedColumn())
    found = 0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Compiling kernels", total=len(problems), best="")

        def report(row: dict[str, Any]) -> None:
            nonlocal found
            if "done" in row:
                found += row["found"]
                bar.advance(task)
            elif "us" in row:
                bar.update(task, description=f"{row['tokens']} tokens, {row['group']}", best=f"{row['us']:.1f} us")

        tune.tune(problems, seconds=60 * minutes, report=report, seed=seed, path=path, kinds=kinds)
    return found
