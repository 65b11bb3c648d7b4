"""The command `vllm-glm-patch fence -- COMMAND`: any command with an unmapped page behind every block of GPU memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Optional

import typer

from ..errors import UserError


def command(
    arguments: list[str] = typer.Argument(..., metavar="-- COMMAND [ARG]...", help="What to run, after two dashes."),
    align: int = typer.Option(16, help="Round a block up to this many bytes, 1 to 512; 512 is what PyTorch's allocator does."),
    guard: str = typer.Option("end", help="'end' finds reads past a block's end, 'start' those before its start."),
    poison: str = typer.Option("none", help="Fill 'fresh', 'freed' or 'both' kinds of memory with NaN; 'none' fills nothing."),
    stacks: bool = typer.Option(False, "--stacks", help="Keep the Python stack of every allocation, for the report."),
    launches: bool = typer.Option(
        False, "--launches", help="Wait for every launch, so that the one that faults is named without a core dump; slow."
    ),
    cache_mb: int = typer.Option(4096, help="MiB of freed memory kept for reuse; 0 also finds uses after free, slowly."),
    directory: Optional[Path] = typer.Option(None, help="Where core dumps and the report go; a new folder otherwise."),
    rerun: bool = typer.Option(
        False, "--rerun", help="Where a dump tells nothing, find the block by running the command again."
    ),
) -> None:
    """Run a command with a guard page behind every block of GPU memory: the first over-read faults, and is named.

    Exit codes: the command's own; 1 if it ended with 0 although a kernel faulted; 2 what you gave is wrong.
    """
    from ..fence import Options
    from ..fence import command as fenced
    from ..fence.options import PREFIX

    if shutil.which(arguments[0]) is None:
        raise UserError(f"There is no command {arguments[0]!r} on PATH; give the command to run after two dashes.")
    try:
        options = Options(
            align=align, guard=guard, poison=poison, stacks=stacks, launches=launches, cache_mb=cache_mb,
            directory=str(directory or ""), library=os.environ.get(f"{PREFIX}_LIBRARY", ""),
            cupti=os.environ.get(f"{PREFIX}_CUPTI", ""),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}") from None
    raise typer.Exit(fenced.run(arguments, options, rerun=rerun))
