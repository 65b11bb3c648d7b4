"""The command `vllm-glm-patch diagnose FILE`: which known defect a vLLM log or a CUDA core dump shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from .. import catalog
from ..errors import UserError
from ..fence.diagnose import Diagnosis, Signature
from ..fence.diagnose import diagnose as read
from .output import show_json


def command(
    file: Path = typer.Argument(..., metavar="LOG|COREDUMP", help="A log of vLLM, or a CUDA core dump."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say which known defect a vLLM log or a CUDA core dump matches, or that none does.

    Exit codes: 0 none matches; 1 one does; 2 the file cannot be read.
    """
    try:
        diagnosis = of_its_version(read(file, signatures()))
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{file} cannot be read: {reason}. Give a vLLM log or a CUDA core dump.") from None
    if as_json:
        show_json(as_dict(diagnosis))
    else:
        typer.echo(diagnosis.text())
    if diagnosis.matches:
        raise typer.Exit(1)


def signatures() -> list[Signature]:
    """The signatures of every defect in the catalog."""
    return [Signature.from_table(patch.id, table) for patch in catalog.patches() for table in patch.signatures]


def of_its_version(diagnosis: Diagnosis) -> Diagnosis:
    """Without defects that the version named in the file does not have."""
    version = diagnosis.evidence.version
    if not version:
        return diagnosis
    affected = {p.id for p in catalog.patches() if p.affects.contains(version, prereleases=True)}
    return replace(diagnosis, matches=tuple(m for m in diagnosis.matches if m.signature.patch in affected))


def as_dict(diagnosis: Diagnosis) -> dict[str, object]:
    """What `--json` prints."""
    seen = diagnosis.evidence
    return {
        "file": str(diagnosis.path),
        "version": seen.version or None,
        "errors": list(seen.errors),
        "kernels": list(seen.kernels),
        "tokens": seen.tokens[-1] if seen.tokens else None,
        "matches": [
            {"id": match.signature.patch, "certain": match.certain, "unseen": list(match.unseen), "why": match.signature.why}
            for match in diagnosis.matches
        ],
    }
