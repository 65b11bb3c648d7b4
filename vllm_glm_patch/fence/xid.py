"""The address that faulted, as the driver tells it to the kernel's log: an "Xid 31" line for each fault of the card's MMU."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

KMSG = Path("/dev/kmsg")
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<card>[0-9a-fA-F:.]+)[^)]*\): 31,(?P<rest>.*)")
_PID = re.compile(r"\bpid='?(\d+)")
_NAME = re.compile(r"\bname='?([^,']+)")
_ADDRESS = re.compile(r"faulted @ 0x([0-9a-fA-F]+)_([0-9a-fA-F]{8})|faulted @ 0x([0-9a-fA-F]+)")
_ACCESS = re.compile(r"\bACCESS_TYPE_(?:VIRT_|PHYS_)?(\w+)")


@dataclass(frozen=True)
class Xid:
    """A fault of the MMU.

    Attributes:
        pid: the process as the host counts them, which a container may not; None where the driver does not know it.
        name: of the process; "" where the driver does not know it.
        card: its PCI address.
        address: start of the page that was touched: the access was there or behind it.
        access: "read", "write", "atomic" …
        line: what the log says.
    """

    pid: int | None
    name: str
    card: str
    address: int
    access: str
    line: str


def parse_xids(lines: Iterable[str]) -> list[Xid]:
    """The MMU faults among lines of the kernel's log, as /dev/kmsg or dmesg have them."""
    found = []
    for line in lines:
        xid = _XID.search(line)
        address = _ADDRESS.search(xid["rest"]) if xid else None
        if not xid or not address:
            continue
        high, low, whole = address.groups()
        pid, name, access = _PID.search(xid["rest"]), _NAME.search(xid["rest"]), _ACCESS.search(xid["rest"])
        found.append(
            Xid(
                pid=int(pid.group(1)) if pid else None,
                name=name.group(1).strip() if name and "<unknown>" not in name.group(1) else "",
                card=xid["card"],
                address=int(whole, 16) if whole else int(high, 16) << 32 | int(low, 16),
                access=access.group(1).lower() if access else "",
                line=line[xid.start() :].strip(),
            )
        )
    return found


class KernelLog:
    """What the kernel's log says from now on. Never raises: `problem` says why it cannot be read."""

    def __init__(self, kmsg: Path = KMSG, dmesg: Callable[[], str] | None = None) -> None:
        self.problem = ""
        self._dmesg = dmesg or _dmesg
        self._file: int | None = None
        self._text = b""
        self._old: set[str] = set()
        try:
            self._file = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            self.close()
            try:
                self._old = set(self._dmesg().splitlines())  # its lines have times, so that none comes twice
            except (OSError, subprocess.SubprocessError) as other:
                self.problem = f"the kernel's log, which has the address, cannot be read: {error}; {other}"

    def faults(self) -> list[Xid]:
        """Every MMU fault since this object was made, oldest first."""
        if self.problem:
            return []
        if self._file is None:
            try:
                return parse_xids(line for line in self._dmesg().splitlines() if line not in self._old)
            except (OSError, subprocess.SubprocessError):
                return []
        while True:
            try:
                record = os.read(self._file, 65536)
            except BrokenPipeError:  # records were overwritten before they were read; the next is there
                continue
            except OSError:  # BlockingIOError: that was all
                break
            if not record:
                break
            self._text += record
        return parse_xids(self._text.decode(errors="replace").splitlines())

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _dmesg() -> str:
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=20, check=False)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"dmesg ended with {done.returncode}"])[-1])
    return done.stdout


def of_process(faults: list[Xid], pid: int, others: Iterable[int] = ()) -> Xid | None:
    """The first fault of a process; where no line has its number, as in a container, the only fault there is.

    Args:
        faults: since the run began.
        pid: the process, which is known to have faulted.
        others: further processes of the run; a line with one of their numbers is theirs.
    """
    own = [fault for fault in faults if fault.pid == pid]
    if own:
        return own[0]
    rest = [fault for fault in faults if fault.pid not in set(others)]
    return rest[0] if len(rest) == 1 else None
