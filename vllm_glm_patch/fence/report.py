"""The fault report: which kernel, on which device, past which block, allocated where.

Three sources, none of which is always there: the core dump (coredump.py), the launch that was waited for (launches.py) and
the kernel's log (xid.py). Kernel: dump, else launch. Block: the faulting instruction's address, else that of the kernel's log,
else a register, else the blocks that the launch was given.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .coredump import CoreDump, read_core_dump
from .journal import Journal, Place, Row, read_journal
from .launches import Launch, launch_records, read_launch, watches
from .options import core_path, journal_path, launch_path, stacks_path
from .stacks import read_stacks
from .xid import KernelLog, Xid, of_process

INSTRUCTION, KERNEL_LOG, REGISTER = "the faulting instruction", "the kernel's log", "a register"


@dataclass(frozen=True)
class FaultReport:
    """One faulted process.

    Attributes:
        pid: the process.
        dump: what its core dump says.
        place: the block that was run past; None where neither dump nor kernel log points to one.
        certain: the address is that of the access, not just a value in a register.
        stack: Python frames of the block's allocation, innermost first; [] without --stacks.
        core: the core dump, None where there is none.
        problem: why parts are missing, "" where none are.
        source: what the block is known from: INSTRUCTION, KERNEL_LOG, REGISTER, or "".
        launch: the launch that faulted, None without --launches.
        launch_stack: Python frames of that launch, innermost first.
        xid: what the kernel's log says of the process.
        candidates: where `place` is None, the blocks that the launch was given, each with the frames of its allocation.
    """

    pid: int
    dump: CoreDump
    place: Place | None
    certain: bool
    stack: list[str]
    core: Path | None
    problem: str = ""
    source: str = ""
    launch: Launch | None = None
    launch_stack: list[str] = field(default_factory=list)
    xid: Xid | None = None
    candidates: list[tuple[Row, list[str]]] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        """Name of the kernel; "" where nothing tells it."""
        return self.dump.kernel or (self.launch.name if self.launch else "")

    def text(self) -> str:
        """The report for a person."""
        dump, launch = self.dump, self.launch
        what = dump.exception or (launch.error if launch else "") or ("MMU fault" if self.xid else "") or "unknown exception"
        shape = dump.launch or (launch.shape if launch and not dump.kernel else "")
        lines = [
            f"fence: process {self.pid} faulted: {what}",
            f"  kernel       {self.kernel or 'unknown'} {shape}".rstrip(),
            f"  device       {self._device()}",
        ]
        if dump.block:
            lines.append(f"  thread       block {dump.block}, thread {dump.thread}, SM {dump.sm}")
        if dump.instruction:
            lines.append(f"  instruction  {dump.instruction}")
        if launch:
            lines.append(f"  launch       number {launch.index}, {launch.function} in thread {launch.thread}")
            lines += [f"    {frame}" for frame in self.launch_stack]
        lines += self._block()
        if launch and launch.doubts():
            lines.append(f"  doubt        {launch.doubts()}")
        if self.problem:
            lines.append(f"  note         {self.problem}")
        if self.xid:
            lines.append(f"  kernel log   {self.xid.line}")
        if self.core:
            lines.append(f"  core dump    {self.core}")
        return "\n".join(lines)

    def _device(self) -> str:
        if self.dump.device is not None:
            return str(self.dump.device)
        rows = [self.place.row] if self.place else [row for row, _ in self.candidates]
        devices = {row.device for row in rows}
        return str(devices.pop()) if len(devices) == 1 else "unknown"

    def _block(self) -> list[str]:
        if self.place:
            how = "" if self.source == INSTRUCTION else f" (from {self.source})"
            if self.source == REGISTER:
                how = " (from a register: likely, not certain)"
            lines = [
                f"  access       {_access(self.place, self.source == KERNEL_LOG)}{how}",
                f"  block        {_describe(self.place.row)}",
                "  allocated    " + ("" if self.stack else "unknown; run again with --stacks"),
            ]
            return lines + [f"    {frame}" for frame in self.stack]
        if self.candidates:
            lines = ["  block        one of those that the launch was given:"]
            for row, stack in self.candidates:
                lines += [f"    {_describe(row)}", *(f"      {frame}" for frame in stack)]
            return lines
        if self.xid:
            return [f"  block        unknown: 0x{self.xid.address:x} lies behind no block of the fence"]
        if self.dump.kernel or self.dump.exception:
            return ["  block        unknown: no register of the faulting warp points to a guard page"]
        if self.launch and not self.launch.parameters_read:
            return ["  block        unknown: the launch's parameters could not be read"]
        return ["  block        unknown"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; registers and transcript are left to the core dump."""
        dump = {key: value for key, value in asdict(self.dump).items() if key not in ("registers", "transcript")}
        return {
            "pid": self.pid,
            "kernel": self.kernel,
            "fault": dump,
            "place": asdict(self.place) if self.place else None,
            "certain": self.certain,
            "source": self.source,
            "stack": self.stack,
            "candidates": [{"row": asdict(row), "stack": stack} for row, stack in self.candidates],
            "launch": asdict(self.launch) if self.launch else None,
            "launch_stack": self.launch_stack,
            "xid": asdict(self.xid) if self.xid else None,
            "core": str(self.core) if self.core else None,
            "problem": self.problem,
        }


def core_dumps(directory: Path) -> list[Path]:
    """The core dumps in a fence's directory, oldest first."""
    found = directory.glob(core_path("", "*").name)
    return sorted(found, key=lambda path: path.stat().st_mtime)


def process_of(core: Path) -> int:
    """The process whose core dump a file is; 0 where its name does not say."""
    return int(match.group(1)) if (match := re.search(r"core-(\d+)", core.name)) else 0


def faulted(directory: Path) -> list[int]:
    """The processes of which there is a core dump, whole or not, or the record of a launch; in the order of the dumps."""
    return list(dict.fromkeys([*map(process_of, core_dumps(directory)), *launch_records(directory)]))


def report(core: Path, log: KernelLog | None = None) -> FaultReport:
    """Reads a core dump together with all that lies beside it. Never raises for what is missing."""
    return report_process(core.parent, process_of(core), log, core)


def report_process(directory: Path, pid: int, log: KernelLog | None = None, core: Path | None = None) -> FaultReport:
    """What is known of a process that faulted, from whatever there is. Never raises for what is missing.

    Args:
        directory: the fence's.
        pid: the process.
        log: the kernel's log since the run began.
        core: its core dump; looked for where it is not given.
    """
    problems = []
    dump = CoreDump()
    if core is None:
        core = next((path for path in core_dumps(directory) if process_of(path) == pid), None)
    if core is not None:
        try:
            dump = read_core_dump(core)
        except (OSError, RuntimeError) as error:
            problems.append(str(error))
    launch = None
    try:
        launch = read_launch(launch_path(directory, pid))
    except (OSError, ValueError) as error:
        problems.append(str(error))
    if launch is None and (watch := watches(directory).get(pid)) and watch.problem:
        problems.append(watch.missing())
    journal = None
    try:
        journal = read_journal(journal_path(directory, pid))
    except (OSError, ValueError) as error:
        problems.append(f"no list of blocks: {error}")
    xid = of_process(log.faults(), pid, processes(directory) - {pid}) if log else None
    place, source = find_block(dump, journal, xid)
    stacks = read_stacks(stacks_path(directory, pid))
    if place is None and log and not xid:
        problems.append(log.problem or "the kernel's log has no MMU fault (Xid 31) of this process since the run began")
    return FaultReport(
        pid=pid,
        dump=dump,
        place=place,
        certain=source in (INSTRUCTION, KERNEL_LOG),
        stack=stacks.get(place.row.stack, []) if place else [],
        core=core,
        problem="; ".join(problems),
        source=source,
        launch=launch,
        launch_stack=stacks.get(launch.stack, []) if launch else [],
        xid=xid,
        candidates=[(row, stacks.get(row.stack, [])) for row in launch.candidates] if launch and not place else [],
    )


def reports(directory: Path, log: KernelLog | None = None) -> list[FaultReport]:
    """Of every process of the run that is known to have faulted, be it from the kernel's log alone."""
    told = [report_process(directory, pid, log) for pid in faulted(directory)]
    seen = {one.pid for one in told}
    return told + [report_process(directory, pid, log) for pid in only_in_log(directory, log) if pid not in seen]


def only_in_log(directory: Path, log: KernelLog | None, without: Collection[int] = ()) -> list[int]:
    """Processes of the run of which the kernel's log alone tells that they faulted.

    They have neither dump nor record. Where no line has the number of one, as in a container, the only line is that of the one
    process whose guard pages hold its address. `without`: processes of an earlier run, whose lists still lie there.
    """
    known = [pid for pid in faulted(directory) if pid not in without]
    rest = [pid for pid in sorted(processes(directory)) if pid not in known and pid not in without]
    faults = log.faults() if log else []
    named = [pid for pid in rest if any(fault.pid == pid for fault in faults)]
    if named or known or len(faults) != 1:
        return named
    holding = [pid for pid in rest if _guards(journal_path(directory, pid), faults[0].address)]
    return holding if len(holding) == 1 else []


def processes(directory: Path) -> set[int]:
    """The processes that have a list of blocks."""
    names = [path.stem.partition("-")[2] for path in directory.glob(journal_path("", "*").name)]
    return {int(name) for name in names if name.isdigit()}


def _guards(journal: Path, address: int) -> bool:
    try:
        return read_journal(journal).is_guard(address)
    except (OSError, ValueError):
        return False


def find_block(dump: CoreDump, journal: Journal | None, xid: Xid | None) -> tuple[Place | None, str]:
    """The block that was run past, and what it is known from. A page that the kernel's log names goes before a register."""
    if journal is None:
        return None, ""
    place, certain = locate(dump, journal)
    if place and certain:
        return place, INSTRUCTION
    if xid and journal.is_guard(xid.address):
        return journal.locate(xid.address), KERNEL_LOG
    return place, REGISTER if place else ""


def locate(dump: CoreDump, journal: Journal) -> tuple[Place | None, bool]:
    """The block that the fault ran past, and whether the faulting instruction itself says so."""
    likely = [address for low in dump.low_addresses() for address in journal.behind(low)]
    for addresses, certain in ((dump.addresses(), True), (likely, False), (dump.pointers(), False)):
        places = [place for address in addresses if journal.is_guard(address) and (place := journal.locate(address))]
        if places:  # live blocks before freed ones, then the one that was missed by the fewest bytes
            return min(places, key=lambda place: (not place.row.live, place.distance)), certain
    return None, False


def _access(place: Place, of_page: bool) -> str:
    """`of_page`: the address is only the start of the page that was touched."""
    start = f"0x{place.address:x}" if not of_page else f"in the page at 0x{place.address:x}"
    if place.where == "in freed memory":
        return f"{start}, in memory that was freed"
    bound = ("at least " if place.where == "past the end" else "at most ") if of_page else ""
    return f"{start}, {bound}{place.distance} bytes {place.where} of the block"


def _describe(row: Row) -> str:
    kind = "live" if row.live else "freed"
    graph = ", of a CUDA graph's pool" if row.in_graph_pool else ""
    return f"{row.size} bytes at 0x{row.address:x} on device {row.device}, {kind}, allocation {row.sequence}{graph}"
