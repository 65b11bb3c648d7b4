"""The command `vllm-glm-patch patches [ID]`: the catalog, one line each, or the whole story of one entry."""

from __future__ import annotations

import textwrap
from typing import Any, Optional

import typer

from .. import catalog
from ..errors import UserError
from ..settings import Settings
from ..upstream import Upstream, find_installed
from .output import Table, show, show_json, version_range

HERE = {
    catalog.APPLY: "needed, can be applied",
    catalog.NOT_NEEDED: "not needed",
    catalog.REFUSED: "refused",
    catalog.NOT_MADE: "not in this release",
}


def command(
    patch_id: Optional[str] = typer.Argument(None, metavar="[ID]", help="Tell the whole story of this patch."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: one object an entry, in a list."),
) -> None:
    """List the catalog of patches, one line each, or tell the whole story of one.

    Exit codes: 0 fine; 1 an entry of the catalog is broken; 2 there is no patch with this ID.
    """
    if patch_id is not None and patch_id not in catalog.patch_ids():
        raise UserError(f"There is no patch {patch_id!r}; known patches: {', '.join(catalog.patch_ids())}.")
    found = find_installed()
    entries = [entry for entry in catalog.load() if patch_id in (None, entry.id)]
    decisions = {d.id: d for d in catalog.decide(found, Settings())} if found else {}
    if as_json:
        show_json([as_dict(entry, decisions.get(entry.id)) for entry in entries])
    elif patch_id is None:
        show(Table("", ("patch", "vLLM", "this vLLM", "what"), [_row(entry, decisions.get(entry.id)) for entry in entries]))
    else:
        typer.echo(story(entries[0], found, decisions.get(patch_id)))
    if any(isinstance(entry, catalog.Broken) for entry in entries):
        raise typer.Exit(1)


def as_dict(entry: catalog.Patch | catalog.Broken, decision: catalog.Decision | None) -> dict[str, Any]:
    """What `--json` prints of one entry; `here` is null where no vLLM is installed."""
    here = {"state": decision.state, "reason": decision.reason} if decision else None
    if isinstance(entry, catalog.Broken):
        return {"id": entry.id, "broken": entry.reason, "here": here}
    return {
        "id": entry.id,
        "title": entry.title,
        "affects": version_range(entry.affects),
        "summary": entry.summary,
        "issues": issues(entry),
        "sites": [{"at": str(site), "versions": version_range(site.versions)} for site in entry.sites],
        "fix": entry.fix,
        "relies_on": list(entry.relies_on),
        "here": here,
    }


def issues(patch: catalog.Patch) -> list[str]:
    """The upstream issues and pull requests of a patch, as GitHub writes them."""
    return [f"vllm-project/vllm#{number}" for number in patch.issues]


def story(entry: catalog.Patch | catalog.Broken, found: Upstream | None, decision: catalog.Decision | None) -> str:
    """Everything the catalog says of one patch, and what the installed vLLM has, as plain text."""
    if isinstance(entry, catalog.Broken):
        return f"{entry.id}: its catalog entry is broken: {entry.reason}"
    parts = [
        f"{entry.id}: {entry.title}",
        entry.summary,
        _fields(
            ("releases", f"vLLM {version_range(entry.affects)}"),
            ("issues", ", ".join(issues(entry)) or "none"),
            ("relies on", ", ".join(entry.relies_on) or "no other patch"),
            ("corrected by", entry.fix or "nothing yet"),
            ("this vLLM", _what_is_here(found, decision)),
        ),
        "Replaces\n" + "\n".join(f"  {site}  ({version_range(site.versions)})" for site in entry.sites),
    ]
    if entry.evidence:
        rules = (f"  {'wrong' if rule['present'] else 'right'}: {rule['why']} ({rule['file']})" for rule in entry.evidence)
        parts.append("How the source shows it\n" + "\n".join(rules))
    return "\n\n".join(parts)


def _row(entry: catalog.Patch | catalog.Broken, decision: catalog.Decision | None) -> tuple[str, str, str, str]:
    here = HERE[decision.state] if decision else "none installed"
    if isinstance(entry, catalog.Broken):
        return entry.id, "?", here, f"its catalog entry is broken: {entry.reason}"
    return entry.id, version_range(entry.affects), here, entry.title


def _what_is_here(found: Upstream | None, decision: catalog.Decision | None) -> str:
    if found is None or decision is None:
        return "none is installed in this Python"
    what = "has this defect, and the patch can be applied" if decision.state == catalog.APPLY else HERE[decision.state]
    return f"{found.version} in {found.root}: {what}" + (f": {decision.reason}" if decision.reason else "")


def _fields(*rows: tuple[str, str]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    indent = " " * width
    return "\n".join(
        textwrap.fill(
            text, 120, initial_indent=name.ljust(width), subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        )
        for name, text in rows
    )  # fmt: skip
