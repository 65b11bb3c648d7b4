"""The command `vllm-glm-patch scan TARGET`."""

from __future__ import annotations

from typing import Optional

import typer

from ... import catalog
from ...errors import UserError
from ..output import Table, on_terminal, show, show_json
from . import evidence
from .target import Target, identify

WORDS = {True: "present", False: "absent", None: "unknown"}


def command(
    target: str = typer.Argument(
        ...,
        metavar="TARGET",
        help="A version (0.17.1), a wheel, an sdist (.tar.gz), a source tree, an environment (a venv or site-packages "
        "folder) or a folder of the package vllm.",
    ),
    only: Optional[list[str]] = typer.Option(None, "--only", metavar="ID", help="Look for this defect; may be repeated."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: version, defects with id, present and why; target, kind."),
) -> None:
    """Say which defects a vLLM carries, without importing or running it.

    A source tree or sdist is judged by its source alone, so that a correction somebody ported back is seen. Of a wheel
    or an environment only the Python files and the stated version are looked at, not the compiled kernels.

    Exit codes: 0 no defect is known to be present; 1 at least one is; 2 TARGET is not a vLLM or cannot be read.
    """
    unknown = sorted(set(only or []) - set(catalog.patch_ids()))
    if unknown:
        raise UserError(f"--only names the unknown defect {unknown[0]!r}; known are: {', '.join(catalog.patch_ids())}.")
    looked_at = identify(target, evidence.wanted_files())
    findings = [found for found in evidence.judge(looked_at) if not only or found.id in only]
    if as_json:
        show_json(as_dict(looked_at, findings))
    else:
        show(_table(looked_at, findings))
    if any(found.present for found in findings):
        raise typer.Exit(1)


def as_dict(target: Target, findings: list[evidence.Finding]) -> dict[str, object]:
    """What `--json` prints."""
    defects = [{"id": found.id, "present": found.present, "why": found.why} for found in findings]
    return {"version": target.version, "target": target.given, "kind": target.kind, "defects": defects}


def _table(target: Target, findings: list[evidence.Finding]) -> Table:
    version = f"vLLM {target.version}" if target.version else "vLLM, which states no version"
    given = "" if target.kind == "version" else f", {target.kind} {target.given}"
    rows = [(found.id, WORDS[found.present], found.why) for found in findings]
    title = version + given if on_terminal() else f"{version}{given}\n"
    return Table(title, ("defect", "here", "why"), rows)
