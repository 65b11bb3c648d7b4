"""Runs a command in a session of its own and ends all of it: no child outlives the one who started it.

Only the standard library, and nothing of this package: `tools.environment` reads this file before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Optional, Union

_GRACE = 10.0  # seconds to leave by itself: vLLM takes less than one once it serves, and never while it starts
_POLL = 0.1
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came. Like KeyboardInterrupt, it is no Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class _Everything:
    """What runs in this process, so that an interruption ends it and nothing more is started."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.living: list[Session] = []
        self.starting = False
        """The main thread is between starting a command and knowing it: it cannot be ended yet."""
        self.came: Optional[int] = None
        """The signal that interrupts; once it is set, no command is started."""


_all = _Everything()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`; later ones are ignored, so that cleaning up ends.

    A signal that is ignored stays so: nohup asks for that, and a shell for its background jobs. Where one comes while a
    command is being started, it waits until that one can be ended. Sessions of other threads are ended before it is raised.
    """
    numbers = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(number: int, frame: Optional[FrameType]) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        _all.came = number
        if not _all.starting:
            raise Interrupted(number)

    before = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield
    finally:
        try:
            if _all.came is not None:
                stop_all()
        finally:
            _all.came = None
            for number, handler in before:
                signal.signal(number, handler)


def check_interrupted() -> None:
    """Raise `Interrupted` in any thread once a signal has come: what ended then did not end by itself."""
    if _all.came is not None:
        raise Interrupted(_all.came)


def stop_all() -> None:
    """End every session that still runs."""
    with _all.lock:
        living = list(_all.living)
    for session in living:
        session.stop()


class Session:
    """One command and everything it starts."""

    def __init__(
        self,
        command: Sequence[Union[str, Path]],
        log: Path,
        environment: Optional[Mapping[str, str]] = None,
        folder: Optional[Path] = None,
    ) -> None:
        """Start `command`; what it prints goes to `log`, added at its end.

        Args:
            environment: all variables; those of this process where None.
            folder: the working directory; that of this process where None.

        Raises:
            Interrupted: a signal came meanwhile, and the command has been ended again.
        """
        check_interrupted()
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        _adopt_orphans()
        in_main = threading.current_thread() is threading.main_thread()
        # Not `with Popen(...)`: its exit would wait for the command.
        with log.open("ab") as output:
            _all.starting = in_main or _all.starting
            try:
                self._process = subprocess.Popen(
                    [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env=None if environment is None else dict(environment), cwd=folder, start_new_session=True,
                )  # fmt: skip
                with _all.lock:
                    _all.living.append(self)
            finally:
                _all.starting = False if in_main else _all.starting
        if _all.came is not None:
            self.stop()
            check_interrupted()

    @property
    def pid(self) -> int:
        """The process id of the command, which is also the id of its session."""
        return self._process.pid

    def exit_code(self) -> Optional[int]:
        """The exit code of the command; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: Optional[float] = None) -> Optional[int]:
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
        with _all.lock, contextlib.suppress(ValueError):
            _all.living.remove(self)

    def log_text(self) -> str:
        """Everything it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_lines(self, count: int = 15) -> str:
        """The end of what it has printed."""
        return "\n".join(self.log_text().splitlines()[-count:])

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


def _adopt_orphans() -> None:
    """Become the parent of children's children that outlive them, so that they can be buried and not only ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
