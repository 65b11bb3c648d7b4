"""The command `vllm-glm-patch diagnose FILE`: which known defect a vLLM log or a CUDA core dump shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import typer
from packaging.version import InvalidVersion, Version

from .. import catalog, upstream
from ..errors import UserError
from ..fence.diagnose import Diagnosis, Match, Signature
from ..fence.diagnose import diagnose as read
from ..settings import Settings
from .output import show_json


def command(
    file: Path = typer.Argument(..., metavar="LOG|COREDUMP", help="A log of vLLM (.gz too), or a CUDA core dump."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say which known defect a vLLM log or a CUDA core dump matches, whether the vLLM here has it, and what to do next.

    A match names the defect; "possible" fits what the file says, and comes with what would settle it.

    Exit codes: 0 nothing fits; 1 a defect matches or is possible; 2 the file cannot be read.
    """
    try:
        diagnosis = of_its_version(read(file, signatures()))
    except FileNotFoundError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}. Give a vLLM log or a CUDA core dump.") from None
    except RuntimeError as error:  # a core dump that tells nothing
        raise UserError(str(error)) from None
    here = {match.signature.patch: advice(match, diagnosis) for match in diagnosis.matches}
    if as_json:
        show_json(as_dict(diagnosis, here))
    else:
        typer.echo(diagnosis.text())
        for patch, told in here.items():
            typer.echo(f"{patch}: {told.here} Next: {told.next}")
        if diagnosis.evidence.errors and not diagnosis.matches:
            typer.echo("Next: `vllm-glm-patch verify` checks the FP8 MoE kernels on the card itself.")
    if diagnosis.matches:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Advice:
    """What a match means on this machine.

    Attributes:
        installed: the version of vLLM here; "" where there is none.
        has_it: whether that version has the defect; None where nothing is installed or its version is not known.
        patch: what becomes of the patch when that vLLM starts, as `vllm-glm-patch doctor` calls it; "" without vLLM.
        here: a sentence of it.
        next: what to do.
    """

    installed: str
    has_it: bool | None
    patch: str
    here: str
    next: str


def signatures() -> list[Signature]:
    """The signatures of every defect in the catalog."""
    return [Signature.from_table(patch.id, table) for patch in catalog.patches() for table in patch.signatures]


def of_its_version(diagnosis: Diagnosis) -> Diagnosis:
    """Without defects that the version named in the file does not have; all where it names none that can be read."""
    try:
        version = Version(diagnosis.evidence.version)
    except InvalidVersion:
        return diagnosis
    affected = {p.id for p in catalog.patches() if p.affects.contains(version.base_version, prereleases=True)}
    return replace(diagnosis, matches=tuple(m for m in diagnosis.matches if m.signature.patch in affected))


def advice(match: Match, diagnosis: Diagnosis) -> Advice:
    """Whether the vLLM of this Python has the defect, and what to do about it."""
    patch = match.signature.patch
    found = upstream.find_installed()
    state, has_it = "", None
    if found is None:
        here = "No vLLM is installed in this Python."
    else:
        decision = next((one for one in catalog.decide(found, _settings()) if one.id == patch), None)
        state = decision.state if decision else ""
        has_it = _has(patch, found.release)
        verb = {True: "has this defect", False: "does not have this defect", None: "is not known"}[has_it]
        becomes = "is applied when it starts" if state == catalog.APPLY else f"is {state} here"
        here = f"vLLM {found.version} of this Python {verb}" + (f"; the patch {becomes}." if has_it else ".")
    return Advice(found.version if found else "", has_it, state, here, _next(match, diagnosis, has_it, state))


def _settings() -> Settings:
    try:
        return Settings.from_environment()
    except UserError:
        return Settings()


def _has(patch: str, release: str) -> bool | None:
    known = next((one for one in catalog.patches() if one.id == patch), None)
    try:
        return known.affects.contains(Version(release), prereleases=True) if known else None
    except InvalidVersion:
        return None


def _next(match: Match, diagnosis: Diagnosis, has_it: bool | None, state: str) -> str:
    in_log = dict(diagnosis.evidence.patches).get(match.signature.patch)
    if in_log == "applied":
        return (
            "by this log the patch was in place, so it is likely something else: "
            "`vllm-glm-patch fence -- COMMAND` names the kernel."
        )
    if has_it is False:
        return "nothing, where this vLLM is the one that serves."
    if has_it and state == catalog.APPLY:
        if in_log is None:
            return "start vLLM again; its log must then show the table of patches. `vllm-glm-patch doctor` says if not."
        return f"the log says {in_log!r}; start vLLM again and see that it says 'applied'."
    if has_it:
        return "`vllm-glm-patch doctor` says why the patch is not applied."
    if has_it is None and not state:
        return "install vllm-glm-patch beside the vLLM that serves, and start that again."
    return "`vllm-glm-patch verify` checks the kernels on the card itself."


def as_dict(diagnosis: Diagnosis, here: dict[str, Advice]) -> dict[str, object]:
    """What `--json` prints."""
    seen = diagnosis.evidence
    return {
        "file": str(diagnosis.path),
        "version": seen.version or None,
        "errors": list(seen.errors),
        "kernels": list(seen.kernels),
        "tokens": seen.tokens[-1] if seen.tokens else None,
        "patches": dict(seen.patches),
        "surfaced": seen.surfaced or None,
        "matches": [
            {
                "id": match.signature.patch,
                "certain": match.certain,
                "grade": match.grade,
                "unseen": list(match.unseen),
                "why": match.signature.why,
                "settle": None if match.certain else match.signature.settle or None,
                "installed": here[match.signature.patch].installed or None,
                "installed_has_it": here[match.signature.patch].has_it,
                "patch_here": here[match.signature.patch].patch or None,
                "next": here[match.signature.patch].next,
            }
            for match in diagnosis.matches
        ],
    }
