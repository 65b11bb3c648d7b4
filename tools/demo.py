"""The demonstration: a real vLLM on this machine's CPU, patched, answers the prompts that the defect is about.

    make demo          or, once .venv is set up: .venv/bin/python -m tools.demo

Exit codes: 0 everything was answered; 1 something was not; 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tools.processes import Interrupted, interruptible
from tools.server import BUDGET, Answer, Server, ServerFailed, varied_prompt, write_tiny_model

LENGTHS = (1, 4096, 8190, 8191, 8192, 8193, 16384)
FOLDER = Path(__file__).resolve().parent.parent / ".demo"
_QUESTION = "Why does vLLM crash at exactly 8192 tokens?"
_SAY_EVERY = 15.0  # seconds between two signs of life where there is no terminal
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main() -> int:
    """Run the demonstration; the exit code of the process."""
    parser = argparse.ArgumentParser(prog="tools.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where model and logs go; emptied first [default: .demo]")
    folder = parser.parse_args().folder.absolute()
    try:
        with interruptible():
            demonstrate(folder)
    except ServerFailed as error:
        console.print(f"[bold red]Failed.[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except Interrupted as error:
        console.print(f"\n[yellow]Demonstration {error}.[/] No process of it is left.")
        return error.exit_code
    return 0


def demonstrate(folder: Path) -> None:
    """Make a model in `folder`, serve it, ask, and show what came back.

    Raises:
        ServerFailed: something was not answered.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = folder / "model"
    with _doing("Making a tiny GLM-4.6"):
        write_tiny_model(model, folder / "model.log")
    with Server(model, folder) as server:
        console.print(f"The log of the server is {server.log}", soft_wrap=True)
        with _doing("Starting vllm serve, which takes about a minute") as tick:
            server.wait_until_ready(tick)
        answers = {}
        for length in LENGTHS:
            with _doing(f"Asking with {length} tokens"):
                answers[length] = server.complete(varied_prompt(length))
        chat = _chat(server)
        console.print(_answers(answers), _patches(server.log_text()))
        with _doing("Stopping the server"):
            server.stop()
    unanswered = [str(length) for length, answer in answers.items() if not answer.text]
    if unanswered or not chat:
        raise ServerFailed(f"Empty answers: {', '.join([*unanswered, *([] if chat else ['the chat'])])}.")
    console.print(f"[bold green]All {len(LENGTHS)} prompts and the chat were answered.[/]")


def _chat(server: Server) -> str:
    console.print(f"Streamed chat: {_QUESTION}\n  ", end="")
    answer = ""
    for piece in server.chat(_QUESTION):
        answer += piece
        console.print(piece, end="", markup=False)
    console.print()
    return answer


def _answers(answers: dict[int, Answer]) -> Table:
    table = Table(title=f"\nvllm serve --enable-chunked-prefill --max-num-batched-tokens {BUDGET}", title_justify="left")
    for name in ("prompt tokens", "steps", "time"):
        table.add_column(name, justify="right")
    for name in ("tokens in each step", "answer"):
        table.add_column(name)
    for length, answer in answers.items():
        row = (
            f"{length}",
            f"{len(answer.steps)}",
            f"{answer.seconds:.2f} s",
            _in_words(length, answer.steps),
            repr(answer.text),
        )
        table.add_row(*map(Text, row))
    return table


def _in_words(length: int, steps: Sequence[int]) -> str:
    """«8192 + 1, then 3 × 1» for a prompt of 8193 tokens and steps of 8192, 1, 1, 1, 1."""
    sums = list(accumulate(steps))
    if length not in sums:
        return f"{', '.join(map(str, steps))} (they do not add up to the prompt)"
    count = sums.index(length) + 1
    rest = len(steps) - count
    return " + ".join(map(str, steps[:count])) + (f", then {rest} × 1" if rest else "")


_STATES = "applied|not needed|switched off|refused|not in this release"


def _patches(log: str) -> Table:
    """The table that the plugin wrote into the log of the server."""
    found = re.search(rf"(vllm-glm-patch \S+ on vLLM .*)((?:\n.*?  [a-z-]+ +(?:{_STATES})\b.*)+)", log)
    if found is None:
        raise ServerFailed("The log of the server holds no table of patches: the plugin did not run.")
    table = Table(title=f"\n{found[1]}", title_justify="left")
    for name in ("patch", "state", "what it is, or why not"):
        table.add_column(name)
    for line in found[2].strip().splitlines():
        row = re.search(rf"  ([a-z-]+) +({_STATES}) *(.*)", line)
        assert row is not None
        table.add_row(*map(Text, row.groups()))
    return table


@contextmanager
def _doing(what: str) -> Iterator[_Tick]:
    """Say what is being done, and afterwards how long it took; between, a clock on a terminal and a sign of life elsewhere."""
    tick = _Tick()
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield tick
        console.print(what, end="")
    else:
        console.print(what, end="")
        sys.stdout.flush()
        yield tick
    console.print(f" ... {tick.seconds():.1f} s")


class _Tick:
    """Called again and again while something is waited for; says every now and then that it still is."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def __call__(self) -> None:
        if not console.is_terminal and time.monotonic() - self._said >= _SAY_EVERY:
            self._said = time.monotonic()
            console.print(f" ... {self.seconds():.0f} s", end="")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
