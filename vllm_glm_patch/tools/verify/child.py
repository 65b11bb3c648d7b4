"""The process that runs units: `python -m vllm_glm_patch.tools.verify JOB.json`.

It imports torch and vLLM once, stays off the card, and forks workers that use it. A worker that faults is replaced,
and the next one goes on behind the unit that it died of. Where a fork cannot use the card, it runs the units itself
and leaves with AGAIN after a fault; the parent then starts it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from . import backend as backends
from . import journal
from .cases import Grid, Kernel, Shape, Unit
from .journal import ALL, FAULT, Item, Outcome, State

AGAIN = 75  # a fault was written down; start me again
REFUSED = 76  # nothing can be checked here; why is in the journal as {"facts": {"refused": …}}
_DONE, _FAULTED, _TIME, _NO_START = 0, 3, 4, 5  # exit codes of a worker

# A fault costs the start of a new worker. How often the same kernel may fault before the rest is taken as known:
OFTEN, SELDOM = 1000, 1  # on the first shape under spread routing; elsewhere, on each shape


@dataclass(frozen=True)
class Job:
    """What a child is told, as JSON.

    Attributes:
        journal: path of the journal.
        backend: "module:Class".
        grid: see cases.Grid.
        options: for the backend.
        stop_at: time.monotonic() when to stop.
        unit_seconds: a unit that takes longer hangs.
    """

    journal: str
    backend: str
    grid: Grid
    options: dict[str, Any] = field(default_factory=dict)
    stop_at: float = float("inf")
    unit_seconds: float = 150.0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        values = json.loads(path.read_text())
        grid = values.pop("grid")
        shapes = tuple(Shape(**shape) for shape in grid.pop("shapes"))
        return cls(grid=Grid(shapes=shapes, **{name: tuple(value) for name, value in grid.items()}), **values)


def pending(state: State, units: list[Unit], first_shape: str) -> list[Item]:
    """What is still to be run, in order; items that need the same start of the card stand together.

    First which buffer the first fault of each kernel is about; then the units; then, for the other faults, whether it is
    the same buffer.
    """
    faulted = [unit for unit in units if state.outcome(unit.id) == FAULT]
    known: dict[tuple[str, str], list[str]] = {}
    begun: dict[tuple[str, str], str] = {}
    asked: list[Item] = []
    for unit in faulted:
        kernel = (unit.side, unit.kernel)
        begun.setdefault(kernel, unit.id)
        if begun[kernel] == unit.id:
            asked += [Item(unit.id, name) for name in state.buffers.get(unit.id, []) if Item(unit.id, name) not in state.rows]
            known[kernel] = state.culprits(unit.id)
    if asked:
        return asked
    left = [unit for unit in units if Item(unit.id) not in state.rows and not _known(faulted, unit, first_shape)]
    if left:
        return [Item(unit.id) for unit in left]
    repeated = [Item(unit.id, name) for unit in faulted for name in known[unit.side, unit.kernel]]
    return [item for item in repeated if item not in state.rows]


def _known(faulted: list[Unit], unit: Unit, first_shape: str) -> bool:
    """Whether a kernel has faulted so often that this unit would tell nothing new."""
    spread = unit.shape == first_shape and unit.routing == "spread"
    same = [
        one
        for one in faulted
        if (one.side, one.kernel, one.shape) == (unit.side, unit.kernel, unit.shape)
        and (one.routing == unit.routing if unit.shape == first_shape else True)
    ]
    return len(same) >= (OFTEN if spread else SELDOM)


class Server:
    """Runs a job to its end, or as far as this process can."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.path = Path(job.journal)
        self.backend = backends.load(job.backend)
        self.worker = 0
        self.forking = True
        self.parent = os.getppid()

    def run(self) -> int:
        """The exit code of this process."""
        try:
            facts = self.backend.prepare({**self.job.options, "grid": self.job.grid})
        except UserError as error:
            journal.write(self.path, {"facts": {"refused": str(error)}})
            return REFUSED
        kernels = self.backend.kernels()
        units = self.job.grid.units(kernels)
        journal.write(self.path, {"facts": facts})
        journal.write(self.path, {"kernels": [asdict(kernel) for kernel in kernels], "total": len(units)})
        self.forking = "no_fork" not in journal.read(self.path).facts
        signal.signal(signal.SIGTERM, self._leave)
        while True:
            items = self._next(units)
            if not items or time.monotonic() >= self.job.stop_at:
                return 0
            forking = self.forking and self.backend.can_fork()
            code = self._forked(items) if forking else self._work(items)
            if code == _TIME:
                return 0
            if code == _NO_START and forking:  # what was imported may have touched the card: then only this process can use it
                self.forking = False
                journal.write(self.path, {"facts": {"no_fork": True}})
            elif code == _NO_START:
                why = journal.read(self.path).facts["no_start"]
                journal.write(self.path, {"facts": {"refused": f"The card cannot be used: {why}"}})
                return REFUSED
            elif code not in (_DONE, _FAULTED):
                return code
            elif not forking:
                return AGAIN if self._next(units) else 0

    def _next(self, units: list[Unit]) -> list[Item]:
        items = pending(journal.read(self.path), units, self.job.grid.shapes[0].name)
        single = bool(items) and items[0].guard != ALL
        return [item for item in items if (item.guard != ALL) == single]

    def _forked(self, items: list[Item]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        self.worker = os.fork()
        if self.worker == 0:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                code = self._work(items)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status, hung = self._wait()
        code = os.waitstatus_to_exitcode(status)
        if code in (_DONE, _FAULTED, _TIME, _NO_START):
            return code
        return _FAULTED if bury(self.path, how(code, hung, self.job.unit_seconds)) else 1

    def _wait(self) -> tuple[int, bool]:
        hung = False
        while True:
            pid, status = os.waitpid(self.worker, os.WNOHANG)
            if pid:
                self.worker = 0
                return status, hung
            if os.getppid() != self.parent:  # nobody is left to read this
                self._leave()
            if not hung and time.time() - self.path.stat().st_mtime > self.job.unit_seconds:
                hung = True
                os.kill(self.worker, signal.SIGKILL)
            time.sleep(0.02)

    def _leave(self, *_: object) -> None:
        if self.worker:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker, signal.SIGKILL)
        os._exit(128 + signal.SIGTERM)

    def _work(self, items: list[Item]) -> int:
        started = False
        for item in items:
            if time.monotonic() >= self.job.stop_at:
                return _TIME
            if not started:
                try:
                    self.backend.start(backends.GUARDED_ALL if item.guard == ALL else backends.GUARDED_ONE)
                except Exception as error:
                    journal.write(self.path, {"facts": {"no_start": str(error)}})
                    return _NO_START
                started = True
            journal.begin(self.path, item)
            if self._run(item).outcome == FAULT:
                return _FAULTED
        return _DONE

    def _run(self, item: Item) -> Outcome:
        unit = Unit.from_id(item.unit)
        step = ""

        def note(line: dict[str, Any]) -> None:
            nonlocal step
            step = line.get("step", step)
            journal.write(self.path, {"unit": item.unit, "guard": item.guard, **line})

        outcome = self.backend.run(unit, self.job.grid.shape(unit.shape), item.guard, note)
        journal.end(self.path, item, outcome, step if outcome.outcome == FAULT else "")
        return outcome


def bury(path: Path, text: str) -> Optional[Item]:
    """Write down that the item which had begun killed its process; None where none had."""
    state = journal.read(path)
    if state.open is not None:
        journal.end(path, state.open, Outcome(FAULT, text), state.step)
    return state.open


def how(code: int, hung: bool, seconds: float) -> str:
    if hung:
        return f"it did not end within {seconds:.0f} s"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process left with exit code {code}"


def kernel_from(row: dict[str, Any]) -> Kernel:
    """A kernel as the journal has it."""
    return Kernel(**{**row, "routings": tuple(row["routings"])})
