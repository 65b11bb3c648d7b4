"""Keeps a faulted process alive until the driver has written its CUDA core dump.

The driver writes it beside the running program, which hears of the fault at once and may end before. So the end of a process
waits here, and so does a SIGKILL that another process of the same command sends it. For vLLM's engine it was not enough: its
dump, 175 MB by its own header, stopped at 68 KiB also where the process was kept for 120 s (H100, driver 580.159.04).
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .options import core_path

LIMIT = 120.0
"""Seconds that a process is kept at most."""
STILL = 20.0
"""Seconds without growth after which a dump is given up: those that broke off never went on (5 of 5, driver 580.159.04)."""
_APPEARS = 10.0  # seconds after a fault within which the driver must have begun
_ELF = b"\x7fELF"
_state: dict[str, Any] = {}


def complete(core: Path) -> bool:
    """Whether a dump is whole: its ELF header, written first, says where the section headers end, written last."""
    try:
        with core.open("rb") as file:
            header = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(header) < 64 or header[:4] != _ELF:
        return False
    (sections_at,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    return bool(sections_at > 0 and size >= sections_at + entry_size * entries)


def wait(core: Path, limit: float = LIMIT, still: float = STILL) -> bool:
    """Wait until a dump that was begun is whole; give up after `limit` seconds, or `still` seconds without growth.

    Returns:
        Whether it is whole; at once if there is none.
    """
    begin = grown = time.monotonic()
    size = -1
    while not complete(core):
        try:
            now = core.stat().st_size
        except OSError:
            return False
        if now != size:
            size, grown = now, time.monotonic()
        if time.monotonic() > begin + limit or time.monotonic() > grown + still:
            return False
        time.sleep(0.05)
    return True


def faulted() -> bool:
    """Whether a kernel of this process has faulted: CUDA then fails every call."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def hold(directory: Path, limit: float = LIMIT) -> None:
    """At the end of this process: where it faulted, wait for its dump, deaf to SIGTERM and SIGINT."""
    core = core_path(directory, os.getpid())
    if not core.exists() and not faulted():
        return
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    end = time.monotonic() + min(limit, _APPEARS)
    while not core.exists() and time.monotonic() < end:
        time.sleep(0.05)
    print(f"fence: process {os.getpid()} faulted; it ends when its core dump is written.", file=sys.stderr, flush=True)
    wait(core, limit)


def install(directory: Path) -> None:
    """Make the end of this process, and of those it forks, wait; and its SIGKILLs to others wait for their dumps.

    Nothing where no dump is asked for: there is none to wait for.
    """
    if "directory" in _state or os.environ.get("CUDA_ENABLE_COREDUMP_ON_EXCEPTION") == "0":
        return
    _state["directory"] = directory
    atexit.register(hold, directory)
    _at_end_of_child(directory)
    # A process that multiprocessing forks forgets the finalisers of its parent, and never comes to atexit.
    multiprocessing.util.register_after_fork(_state_owner, lambda _: _at_end_of_child(directory))
    os.kill = _patient(os.kill, directory)


class _Owner:
    """register_after_fork holds what it is given weakly."""


_state_owner = _Owner()


def _at_end_of_child(directory: Path) -> None:
    multiprocessing.util.Finalize(None, hold, args=(directory,), exitpriority=1000)


def _patient(kill: Callable[[int, int], None], directory: Path) -> Callable[[int, int], None]:
    def patient_kill(pid: int, number: int) -> None:
        if number == signal.SIGKILL:
            with contextlib.suppress(OSError):
                wait(core_path(directory, pid))
        kill(pid, number)

    return patient_kill
