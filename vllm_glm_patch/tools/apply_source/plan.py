"""Decides what each correction of the catalog does to each file of a tree, and makes the new text; changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import catalog
from ...errors import UserError
from . import blocks

CORRECTED, OURS, RIGHT, LEFT, TAKEN_OUT = "corrected", "already corrected", "right as it is", "left", "taken out"


@dataclass(frozen=True)
class Step:
    """What one correction does to one file."""

    correction: str
    """Patch and correction: ``scale-overread/copy``."""
    state: str
    """`CORRECTED`, `OURS`, `RIGHT`, `LEFT` or `TAKEN_OUT`."""
    why: str


@dataclass(frozen=True)
class FilePlan:
    """What becomes of one file."""

    path: Path
    name: str
    """Its path from the root of the tree."""
    before: bytes
    after: bytes
    steps: tuple[Step, ...]


def corrections(path: Path | None = None) -> list[tuple[str, Mapping[str, Any]]]:
    """All corrections of the catalog with their full names."""
    return [(f"{patch.id}/{table['id']}", table) for patch in catalog.patches(path) for table in patch.corrections]


def plan(tree: Path, *, reverse: bool = False) -> list[FilePlan]:
    """What becomes of every file of a tree that a correction looks at.

    Raises:
        UserError: this is not a tree that is known; nothing may be changed then.
    """
    if not tree.is_dir():
        raise UserError(f"TREE is {str(tree)!r}, which is no folder. Give the root of a source tree of vLLM.")
    wanted: dict[Path, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, table in corrections():
        found = [file for file in sorted(tree.glob(table["file"])) if file.is_file()]
        if not found:
            raise UserError(
                f"{tree} has no {table['file']}, so it is not a source tree of vLLM that this release knows. Nothing was "
                "changed. Give the root of a tree with csrc in it: an installed package has none."
            )
        for file in found:
            wanted.setdefault(file, []).append((name, table))
    return [_file(tree, file, wanted[file], reverse) for file in sorted(wanted)]


def _file(tree: Path, path: Path, tables: list[tuple[str, Mapping[str, Any]]], reverse: bool) -> FilePlan:
    name = path.relative_to(tree).as_posix()
    if path.is_symlink():
        raise UserError(f"{path} is a link. Nothing was changed. Run this on the tree that holds the file itself.")
    try:
        before = path.read_bytes()
        text = original = before.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Nothing was changed. Make it readable.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, so it is no file of a known vLLM. Nothing was changed.") from error
    if reverse:
        steps = tuple(Step(n, TAKEN_OUT, t["why"]) for n, t in tables if blocks.has(original, n))
        return FilePlan(path, name, before, blocks.remove(original).encode(), steps)
    done = []
    clean = blocks.code(blocks.remove(original))
    for correction, table in tables:
        step = _decide(correction, table, original, clean)
        done.append(step)
        if step.state == CORRECTED:
            text = _correct(path, text, correction, table)
    return FilePlan(path, name, before, text.encode(), tuple(done))


def _decide(name: str, table: Mapping[str, Any], original: str, clean: str) -> Step:
    if blocks.has(original, name):
        return Step(name, OURS, table["why"])
    if "leave" in table and re.search(table["leave"], clean):
        return Step(name, LEFT, table["leave_why"])
    if re.search(table["unless"], clean):
        return Step(name, RIGHT, table["why"])
    return Step(name, CORRECTED, table["why"])


def _correct(path: Path, text: str, name: str, table: Mapping[str, Any]) -> str:
    found = list(re.finditer(table["anchor"], blocks.code(text)))
    if len(found) != 1:
        raise UserError(
            f"{path}: the place of the correction {name} is found {len(found)} times instead of once, so this is not a file "
            "of a known vLLM. Nothing in the tree was changed. Correct it by hand, as docs/usage.md says."
        )
    try:
        return blocks.put(text, name, found[0], table["replacement"])
    except blocks.CannotMark as error:
        raise UserError(f"{path}: the correction {name} cannot be put in: {error}. Nothing in the tree was changed.") from error


def changed(plans: list[FilePlan]) -> Iterator[FilePlan]:
    """The files that would not stay as they are."""
    yield from (one for one in plans if one.before != one.after)
