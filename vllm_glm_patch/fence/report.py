"""The fault report: which kernel, on which device, past which block, allocated where."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .coredump import CoreDump, read_core_dump
from .journal import Journal, Place, Row, read_journal
from .options import journal_path, stacks_path
from .stacks import read_stacks

CORE_PATTERN = "core-%p.nvcudmp"  # %p: the driver puts the process id there


@dataclass(frozen=True)
class FaultReport:
    """One faulted process.

    Attributes:
        pid: the process.
        dump: what its core dump says.
        place: the block that was run past; None where no register points to one.
        certain: the address is that of the faulting instruction, not just a value in a register.
        stack: Python frames of the block's allocation, innermost first; [] without --stacks.
        core: the core dump.
        problem: why parts are missing, "" where none are.
    """

    pid: int
    dump: CoreDump
    place: Place | None
    certain: bool
    stack: list[str]
    core: Path
    problem: str = ""

    def text(self) -> str:
        """The report for a person."""
        dump, place = self.dump, self.place
        lines = [
            f"fence: process {self.pid} faulted: {dump.exception or 'unknown exception'}",
            f"  kernel       {dump.kernel or 'unknown'} {dump.launch}".rstrip(),
            f"  device       {dump.device if dump.device is not None else 'unknown'}",
        ]
        if dump.block:
            lines.append(f"  thread       block {dump.block}, thread {dump.thread}, SM {dump.sm}")
        if dump.instruction:
            lines.append(f"  instruction  {dump.instruction}")
        if place:
            lines += [
                f"  access       {_access(place)}{'' if self.certain else ' (from a register: likely, not certain)'}",
                f"  block        {_describe(place.row)}",
            ]
            lines.append("  allocated    " + ("" if self.stack else "unknown; run again with --stacks"))
            lines += [f"    {frame}" for frame in self.stack]
        else:
            lines.append("  block        unknown: no register of the faulting warp points to a guard page")
        if self.problem:
            lines.append(f"  note         {self.problem}")
        lines.append(f"  core dump    {self.core}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; registers and transcript are left to the core dump."""
        dump = {key: value for key, value in asdict(self.dump).items() if key not in ("registers", "transcript")}
        place = asdict(self.place) if self.place else None
        return {
            "pid": self.pid,
            "fault": dump,
            "place": place,
            "certain": self.certain,
            "stack": self.stack,
            "core": str(self.core),
            "problem": self.problem,
        }


def core_dumps(directory: Path) -> list[Path]:
    """The core dumps in a fence's directory, oldest first."""
    found = directory.glob(CORE_PATTERN.replace("%p", "*"))
    return sorted(found, key=lambda path: path.stat().st_mtime)


def report(core: Path) -> FaultReport:
    """Reads a core dump together with the journal and the stacks that lie beside it. Never raises for what is missing."""
    pid = int(match.group(1)) if (match := re.search(r"core-(\d+)", core.name)) else 0
    try:
        dump, problem = read_core_dump(core), ""
    except (FileNotFoundError, RuntimeError) as error:
        return FaultReport(pid, CoreDump(), None, False, [], core, str(error))
    path = journal_path(core.parent, pid)
    try:
        journal = read_journal(path)
    except (OSError, ValueError) as error:
        return FaultReport(pid, dump, None, False, [], core, f"no list of blocks: {error}")
    place, certain = locate(dump, journal)
    stack = read_stacks(stacks_path(core.parent, pid)).get(place.row.stack, []) if place else []
    return FaultReport(pid, dump, place, certain, stack, core, problem)


def locate(dump: CoreDump, journal: Journal) -> tuple[Place | None, bool]:
    """The block that the fault ran past, and whether the faulting instruction itself says so."""
    likely = [address for low in dump.low_addresses() for address in journal.behind(low)]
    for addresses, certain in ((dump.addresses(), True), (likely, False), (dump.pointers(), False)):
        places = [place for address in addresses if journal.is_guard(address) and (place := journal.locate(address))]
        if places:  # live blocks before freed ones, then the one that was missed by the fewest bytes
            return min(places, key=lambda place: (not place.row.live, place.distance)), certain
    return None, False


def _access(place: Place) -> str:
    if place.where == "in freed memory":
        return f"0x{place.address:x}, in memory that was freed"
    return f"0x{place.address:x}, {place.distance} bytes {place.where} of the block"


def _describe(row: Row) -> str:
    kind = "live" if row.live else "freed"
    graph = ", of a CUDA graph's pool" if row.in_graph_pool else ""
    return f"{row.size} bytes at 0x{row.address:x} on device {row.device}, {kind}, allocation {row.sequence}{graph}"
