"""The most memory that a server took: of the cards where nvidia-smi tells, else of its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Optional

from ..processes import Session

_EVERY = 1.0  # seconds
_MIB = 1024**2


class MemoryWatch:
    """Looks every second while in its `with` statement."""

    def __init__(self, cards: str = "") -> None:
        """`cards`: numbers of the cards to look at, comma-separated; empty: all."""
        self._cards = cards
        before = _card_mib(cards)
        self.source = "nvidia-smi" if before is not None else "process RSS"
        self.peak_mib: Optional[float] = None
        self._before = before or 0.0
        self._session: Optional[Session] = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def follow(self, session: Session) -> None:
        """The processes to look at."""
        self._session = session

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            used = self._now()
            if used:
                self.peak_mib = max(self.peak_mib or 0.0, round(used, 1))

    def _now(self) -> float:
        if self.source == "nvidia-smi":
            return max(0.0, (_card_mib(self._cards) or 0.0) - self._before)
        return sum(map(_rss_mib, self._session.members())) if self._session else 0.0


def _card_mib(cards: str) -> Optional[float]:
    """MiB in use on these cards together; None where nvidia-smi is not there or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    command += [f"--id={cards}"] if cards else []
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return sum(map(float, answer.stdout.split()))
    return None


def _rss_mib(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / _MIB
    return 0.0
