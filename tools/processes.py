"""Runs a command in a session of its own and ends all of it: no child outlives the one who started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

_GRACE = 5.0  # seconds to leave by itself: vLLM takes less than one once it serves, and never while it starts
_POLL = 0.1
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came. Like KeyboardInterrupt, it is no Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`; later ones are ignored, so that cleaning up ends."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in _STOPPING:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    before = [(number, signal.signal(number, interrupt)) for number in _STOPPING]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class Session:
    """One command and everything it starts."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        """Start `command`; what it prints goes to `log`, added at its end."""
        self.log = log
        _adopt_orphans()
        # Not `with Popen(...)`: its exit would wait for the command.
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment), cwd=folder, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process id of the command, which is also the id of its session."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """The exit code of the command; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for the command to end, at most `seconds`; its exit code, or None where it still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def members(self) -> list[int]:
        """The processes of the session that are alive."""
        return [pid for pid, state in self._everyone() if state not in "ZX"]

    def stop(self) -> None:
        """Ask the command to leave, then end whatever is left of its session. Returns once nothing is."""
        if self.exit_code() is None:
            self._process.send_signal(signal.SIGTERM)
            self.wait(_GRACE)
        while everyone := self._everyone():
            for pid, _ in everyone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                if pid != self.pid:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
            self._process.poll()
            time.sleep(_POLL)

    def _everyone(self) -> list[tuple[int, str]]:
        """Process id and state of all of the session, but for the dead whose parent is another: that one buries them."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    state, parent, _group, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(session) == self.pid and (state not in "ZX" or int(parent) == os.getpid()):
                        found.append((int(entry.name), state))
        return found

    def last_lines(self, count: int) -> str:
        """The end of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-count:])


def _adopt_orphans() -> None:
    """Become the parent of children's children that outlive them, so that they can be buried and not only ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
