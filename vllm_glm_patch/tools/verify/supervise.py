"""The parent's part of a run: starts the child, follows its journal, starts it anew where it died, ends it on Ctrl-C."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.markup import escape

from ...errors import UserError
from ..live import Live
from ..processes import Interrupted, Session, interruptible
from . import journal
from .child import AGAIN, REFUSED, Job, bury, how
from .journal import ALL, FAULT, WRONG, State

_GRACE = 20.0  # seconds over its time that a child gets to end its unit
# For the child: vLLM says little, and PyTorch's allocator is as it is without settings.
_LEFT_OUT = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING")


def supervise(job: Job, folder: Path, show: Show) -> tuple[State, bool]:
    """Run a job to its end.

    Args:
        job: what to run.
        folder: of this run; gets the job and the child's log.
        show: where progress is shown.

    Returns:
        What the journal says, and whether the run was interrupted.

    Raises:
        UserError: nothing can be checked here, or the child dies before it runs anything.
    """
    file = folder / "job.json"
    job.save(file)
    reader = journal.Reader(Path(job.journal))
    command = [sys.executable, "-m", "vllm_glm_patch.tools.verify", str(file)]
    try:
        with interruptible():
            while not _once(job, command, folder / "child.log", reader, show):
                pass
    except (Interrupted, KeyboardInterrupt):
        reader.read()
        return reader.state, True
    refused = reader.state.facts.get("refused")
    if refused and not reader.state.rows:
        raise UserError(str(refused))
    return reader.state, False


def _once(job: Job, command: list[str], log: Path, reader: journal.Reader, show: Show) -> bool:
    """One child from start to end; whether the run is over."""
    before = len(reader.state.rows)
    session = Session(command, log, _environment())
    late = False
    try:
        while (code := session.exit_code()) is None:
            if reader.read():
                show.update(reader.state)
            late = time.monotonic() > job.stop_at + _GRACE
            if late:
                break
            time.sleep(0.05)
    finally:
        session.stop()
    reader.read()
    show.update(reader.state)
    if late:  # a worker that hangs past the end of the run
        bury(Path(job.journal), f"it did not end within {_GRACE:.0f} s after the time of the run was over")
    if late or code in (0, REFUSED):
        reader.read()
        return True
    buried = bury(Path(job.journal), how(code or 0, False, 0)) if code != AGAIN else None
    reader.read()
    if buried is None and len(reader.state.rows) == before:
        raise UserError(f"The process that runs the kernels left with code {code}. It said:\n{session.last_lines()}")
    return False


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    package = str(Path(__file__).parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH", ""), package]))
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    return environment


class Show(Live):
    """Progress of a run: a bar on a terminal, a line a minute elsewhere. Use it in a `with` statement."""

    def __init__(self, every: float = 60.0) -> None:
        super().__init__(24, "starting")
        self._every, self._told = every, time.monotonic()

    def update(self, state: State) -> None:
        """Show how far a run is."""
        done = sum(item.guard == ALL for item in state.rows)
        faults = sum(item.guard == ALL and row["outcome"] == FAULT for item, row in state.rows.items())
        wrong = sum(item.guard == ALL and row["outcome"] == WRONG for item, row in state.rows.items())
        now = f"{state.open.unit}" if state.open else ""
        self._bar.update(
            self._task, completed=done, total=state.total, description=escape(f"{faults} faults, {wrong} wrong  {now}")
        )
        if not self._console.is_terminal and time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            self.say(f"{done} of {state.total} calls, {faults} faults, {wrong} wrong results")
