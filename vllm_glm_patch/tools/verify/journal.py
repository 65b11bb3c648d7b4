"""The file through which the processes of a run speak: one JSON object a line, on the disk before anything can crash.

Lines of a unit, told apart by `unit` and `guard` ("all" buffers before an unmapped page, or the name of one):
    {"unit", "guard", "begin": time}   it is about to run; whoever dies now died of it
    {"unit", "guard", "buffers": [..]} the names of its buffers
    {"unit", "guard", "step": ".."}    the step that is about to run
    {"unit", "guard", "outcome", "text", "error", "limit", "step"}
Others: {"facts": {..}}, {"kernels": [..]}, {"total": n}.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

ALL = "all"
OK, WRONG, FAULT, ERROR, SKIPPED = "ok", "wrong", "fault", "error", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Attributes:
        outcome: OK; WRONG: it differs from float64; FAULT: the card or the process faulted; ERROR: it could not be
            called; SKIPPED: it was not tried.
        text: what happened, for a person.
        error: the largest relative error of a row; None where nothing was compared.
        limit: the largest error that is right.
    """

    outcome: str
    text: str = ""
    error: Optional[float] = None
    limit: Optional[float] = None


@dataclass(frozen=True)
class Item:
    """A unit and what of it is guarded."""

    unit: str
    guard: str = ALL


def write(path: Path, line: dict[str, Any]) -> None:
    """Add a line, in one write."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


def begin(path: Path, item: Item) -> None:
    write(path, {"unit": item.unit, "guard": item.guard, "begin": round(time.time(), 3)})


def end(path: Path, item: Item, outcome: Outcome, step: str = "") -> None:
    values = asdict(outcome)
    for name in ("error", "limit"):
        if values[name] is not None and not values[name] < float("inf"):
            values[name] = None  # JSON has no infinity
    write(path, {"unit": item.unit, "guard": item.guard, "step": step, **values})


@dataclass
class State:
    """What a journal says so far."""

    facts: dict[str, Any] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    total: Optional[int] = None
    rows: dict[Item, dict[str, Any]] = field(default_factory=dict)
    """Ended items, in order."""
    buffers: dict[str, list[str]] = field(default_factory=dict)
    open: Optional[Item] = None
    """The item that began and has not ended."""
    step: str = ""
    """The last step of the open item."""

    def take(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        self.facts.update(line.get("facts", {}))
        self.kernels = line.get("kernels", self.kernels)
        self.total = line.get("total", self.total)
        if "unit" not in line:
            return
        item = Item(line["unit"], line["guard"])
        if "outcome" in line:
            self.rows[item] = line
            self.open, self.step = None, ""
        elif "begin" in line:
            self.open, self.step = item, ""
        elif "buffers" in line:
            self.buffers[item.unit] = line["buffers"]
        elif "step" in line:
            self.step = line["step"]

    def outcome(self, unit: str, guard: str = ALL) -> Optional[str]:
        row = self.rows.get(Item(unit, guard))
        return row["outcome"] if row else None

    def culprits(self, unit: str) -> list[str]:
        """The buffers of a unit that are run past: alone before an unmapped page, each makes it fault."""
        return [
            item.guard for item, row in self.rows.items() if item.unit == unit and item.guard != ALL and row["outcome"] == FAULT
        ]

    def attributed(self, unit: str) -> bool:
        """Whether any buffer of a unit was guarded alone."""
        return any(item.unit == unit and item.guard != ALL for item in self.rows)


class Reader:
    """Reads a journal as it grows; a line that is not whole yet is left for later."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self.state = path, 0, State()

    def read(self) -> int:
        """Take in what is new; how many lines there were."""
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        if not newline:
            return 0
        self._at += len(whole) + 1
        lines = whole.split(b"\n")
        for line in lines:
            if line:
                self.state.take(json.loads(line))
        return len(lines)


def read(path: Path) -> State:
    """What a whole journal says."""
    reader = Reader(path)
    reader.read()
    return reader.state
