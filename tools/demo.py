"""The demonstration: a real vLLM on this machine's CPU, patched, answers the prompts that the defect is about.

    make demo          or, once .venv is set up: .venv/bin/python -m tools.demo

Exit codes: 0 everything was answered; 1 something was not; 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tools.processes import Interrupted, interruptible
from tools.progress import console, doing
from tools.server import BUDGET, Answer, Server, ServerFailed, in_words, patch_table, varied_prompt, write_tiny_model

LENGTHS = (1, 4096, 8190, 8191, 8192, 8193, 16384)
FOLDER = Path(__file__).resolve().parent.parent / ".demo"
_QUESTION = "Why does vLLM crash at exactly 8192 tokens?"


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
    with doing("Making a tiny GLM-4.6"):
        write_tiny_model(model, folder / "model.log")
    with Server(model, folder) as server:
        console.print(f"The log of the server is {server.log}", soft_wrap=True)
        with doing("Starting vllm serve, which takes about a minute") as tick:
            server.wait_until_ready(tick)
        answers = {}
        for length in LENGTHS:
            with doing(f"Asking with {length} tokens"):
                answers[length] = server.complete(varied_prompt(length))
        chat = _chat(server)
        console.print(_answers(answers), _patches(server.log_text()))
        with doing("Stopping the server"):
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
            in_words(length, answer.steps),
            repr(answer.text),
        )
        table.add_row(*map(Text, row))
    return table


def _patches(log: str) -> Table:
    """The table that the plugin wrote into the log of the server."""
    title, rows = patch_table(log)
    table = Table(title=f"\n{title}", title_justify="left")
    for name in ("patch", "state", "what it is, or why not"):
        table.add_column(name)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


if __name__ == "__main__":
    sys.exit(main())
