"""The command `vllm-glm-patch apply-source TREE`."""

from __future__ import annotations

import difflib
from pathlib import Path

import typer

from ..output import Table, show, show_json
from .plan import CORRECTED, TAKEN_OUT, FilePlan, changed, plan
from .write import write


def command(
    tree: Path = typer.Argument(..., metavar="TREE", help="The root of a source tree of vLLM, with csrc in it."),
    check: bool = typer.Option(False, "--check", help="Say what would change and change nothing."),
    reverse: bool = typer.Option(False, "--reverse", help="Take our corrections out: every byte as it was before."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: tree, changed, diff, files with their corrections."),
) -> None:
    """Correct a source tree of vLLM in place, for a vLLM that you build yourself, and print the difference.

    The epilogues that read past their scales (0.10.0 to 0.19.1), and the guard for expert ids (0.10.2 on). What is right
    already stays as it is. A tree that is not known is refused as a whole and nothing is changed. Running it twice changes
    nothing more.

    Exit codes: 0 done, or nothing to do; 1 with --check: something would change; 2 TREE is not a known source tree.
    """
    plans = plan(tree, reverse=reverse)
    todo = list(changed(plans))
    if not check:
        write(todo)
    difference = "".join(_difference(one) for one in todo)
    if as_json:
        show_json(as_dict(tree, plans, todo, difference))
    else:
        typer.echo(difference, nl=False)
        show(_table(tree, plans, check))
    if check and todo:
        raise typer.Exit(1)


def as_dict(tree: Path, plans: list[FilePlan], todo: list[FilePlan], difference: str) -> dict[str, object]:
    """What `--json` prints."""
    files = [
        {"file": one.name, "changed": one in todo,
         "corrections": [{"id": s.correction, "state": s.state, "why": s.why} for s in one.steps]}
        for one in plans
    ]  # fmt: skip
    return {"tree": str(tree), "changed": len(todo), "files": files, "diff": difference}


def _table(tree: Path, plans: list[FilePlan], check: bool) -> Table:
    words = {CORRECTED: "would be corrected", TAKEN_OUT: "would be taken out"} if check else {}
    rows = [(s.correction, words.get(s.state, s.state), one.name, s.why) for one in plans for s in one.steps]
    return Table(f"{tree}\n", ("correction", "state", "file", "why"), rows or [("none", "nothing of ours is in it", "", "")])


def _difference(one: FilePlan) -> str:
    before, after = (text.decode().splitlines(keepends=True) for text in (one.before, one.after))
    return "".join(difflib.unified_diff(before, after, f"a/{one.name}", f"b/{one.name}"))
