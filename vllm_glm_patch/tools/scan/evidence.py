"""Judges one vLLM: by the catalog's evidence rules where the source is there, else by the version it states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from ... import catalog
from ...upstream import Upstream
from ..output import version_range
from .files import matcher
from .target import Target

_C_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.DOTALL)
_PYTHON_COMMENT = re.compile(r"^[ \t]*#[^\n]*", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """What is known of one defect."""

    id: str
    present: bool | None
    """None where nothing tells."""
    why: str


def wanted_files(path: Path | None = None) -> tuple[str, ...]:
    """The glob patterns of all files that some rule of the catalog looks at."""
    return tuple(sorted({str(rule.get("file", "")) for patch in catalog.patches(path) for rule in patch.evidence} - {""}))


def judge(target: Target, path: Path | None = None) -> list[Finding]:
    """One finding for each defect of the catalog, in its order."""
    entries = [entry for entry in catalog.load(path) if isinstance(entry, catalog.Broken) or entry.defect]
    return [_judge(entry, target) for entry in entries]


def _judge(entry: catalog.Patch | catalog.Broken, target: Target) -> Finding:
    if isinstance(entry, catalog.Broken):
        return Finding(entry.id, None, f"its catalog entry is broken: {entry.reason}")
    by_version = _by_version(entry, target.version)
    if target.kind == "version":
        return by_version
    if not entry.evidence:
        return Finding(entry.id, by_version.present, f"{by_version.why}; no source shows it, this follows from the version")
    rules = [rule for rule in entry.evidence if target.has_kernel_source or _about_python(rule)]
    try:
        decided = _by_rules(rules, target.files)
    except (re.error, KeyError) as error:
        return Finding(entry.id, None, f"an evidence rule of its catalog entry is broken: {error!r}")
    if decided is not None:
        return Finding(entry.id, decided[0], decided[1] + _unlike_release(decided[0], by_version, target))
    if target.has_kernel_source:
        return Finding(entry.id, None, _why_undecided(rules, target.files))
    return Finding(entry.id, by_version.present, f"{by_version.why}; compiled kernels were not looked at")


def _by_version(patch: catalog.Patch, stated: str | None) -> Finding:
    if stated is None:
        return Finding(patch.id, None, "this vLLM states no version")
    release, why_unknown = catalog.known_release(Upstream(Path(), stated))
    if release is None:
        return Finding(patch.id, None, why_unknown)
    return Finding(patch.id, *_in_range(patch, release))


def _in_range(patch: catalog.Patch, release: Version) -> tuple[bool, str]:
    present = patch.affects.contains(release, prereleases=True)
    return (
        present,
        f"vLLM {release} is {'one' if present else 'none'} of the releases that have it ({version_range(patch.affects)})",
    )


def _by_rules(rules: Iterable[Mapping[str, Any]], files: Mapping[str, str]) -> tuple[bool, str] | None:
    for rule in rules:
        matches, pattern = matcher(rule["file"]), re.compile(rule["pattern"])
        for name in sorted(files):
            if matches(name) and pattern.search(_without_comments(name, files[name])):
                return bool(rule["present"]), f"{rule['why']} ({name})"
    return None


def _about_python(rule: Mapping[str, Any]) -> bool:
    file = str(rule.get("file", ""))
    return file.startswith("vllm/") and file.endswith(".py")


def _unlike_release(present: bool, by_version: Finding, target: Target) -> str:
    if by_version.present is None or by_version.present == present:
        return ""
    return f"; vLLM {target.version} as released {'has' if by_version.present else 'does not have'} it, so this one was changed"


def _why_undecided(rules: Iterable[Mapping[str, Any]], files: Mapping[str, str]) -> str:
    globs = list(dict.fromkeys(str(rule["file"]) for rule in rules))
    there = [glob for glob in globs if any(map(matcher(glob), files))]
    if not there:
        return f"the source lacks the files that would show it: {', '.join(globs)}"
    return f"neither the defect nor its correction is found in {', '.join(there)}"


def _without_comments(name: str, text: str) -> str:
    """The code alone: a line that is commented out shows nothing. Line breaks stay where they are."""
    if name.endswith(".py"):
        return _PYTHON_COMMENT.sub("", text)
    return _C_COMMENT.sub(lambda found: found.group() if found.group()[0] in "\"'" else "\n" * found.group().count("\n"), text)
