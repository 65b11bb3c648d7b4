"""Runs what a tool is for, says how it ended, and gives the exit code: of those that record what they see, one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.markup import escape

from tools.environment import SetUpFailed
from tools.processes import Interrupted, interruptible
from tools.progress import console


def exit_code_of(work: Callable[[], list[str]]) -> int:
    """Do the work, which SIGINT, SIGTERM and SIGHUP interrupt.

    Args:
        work: records what it sees, and returns what is wrong with it, a line each; raises SetUpFailed where it cannot see.

    Returns:
        0 all is well; 1 something is wrong, and has been told; 128 and its number where a signal came.
    """
    try:
        with interruptible():
            problems = work()
    except SetUpFailed as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted as error:
        console.print(f"\n[yellow]{error}.[/] What was recorded before is kept; no process is left.")
        return error.exit_code
    for problem in problems:
        console.print(f"[bold red]Failed.[/] {escape(problem)}", soft_wrap=True)
    return 1 if problems else 0
