"""A command in a process group of its own, which is ended as a whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

_GRACE = 10.0  # seconds to leave by itself after SIGTERM
_living: list[Group] = []
_starting = _interrupted = False


def interrupt() -> None:
    """Raise KeyboardInterrupt; while a command is being started, as soon as it can be ended."""
    global _interrupted
    if _starting:
        _interrupted = True
        return
    raise KeyboardInterrupt


def stop_all() -> None:
    """End every group that still runs."""
    for group in _living:
        group.stop()


class Group:
    """A running command and what it starts. What it prints goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        global _starting, _interrupted
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            _starting = True
            try:
                self._process = subprocess.Popen(
                    list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(environment),
                    start_new_session=True,
                )  # fmt: skip
                _living.append(self)
            finally:
                _starting = False
        if _interrupted:
            _interrupted = False
            raise KeyboardInterrupt

    def exit_code(self) -> Optional[int]:
        """The exit code of the command; None while it runs."""
        return self._process.poll()

    def members(self) -> list[int]:
        """The living processes of the session that the command began."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    state, _parent, _group, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(session) == self._process.pid and state not in "ZX":
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Ask all of it to leave, then end what is left. Returns once nothing is."""
        if self.exit_code() is None:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        while left := self.members():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.1)
        self._process.wait()
        if self in _living:
            _living.remove(self)

    def log_text(self) -> str:
        """Everything it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_lines(self, count: int = 15) -> str:
        """The end of what it has printed."""
        return "\n".join(self.log_text().splitlines()[-count:])

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
