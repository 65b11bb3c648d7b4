"""The measurement itself: server after server, point after point, and a result file that is whole after each."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from ..processes import check_interrupted
from . import machine, result, schema
from .client import Client, Requests, drive, has_begun, refuse
from .plan import PATCHED, Plan, Point
from .progress import Teller
from .server import BenchServer

_SEEDS_A_POINT = 1000  # more than runs of one point, so that no two runs on a server send the same prompts
_USAGE_ERROR = 2  # what `vllm serve` leaves with for flags it does not take


class _GivenUp(Exception):
    """Another leg has failed, so that this one need not go on."""


class _Round:
    """The servers that run at once."""

    def __init__(self, legs: Sequence[tuple[int, str, str]], stop_at: Optional[float]) -> None:
        self.legs = legs
        self.stop_at = stop_at
        """On the clock of time.monotonic(): after it no point is begun."""
        self.failed = threading.Event()
        self._ready = {leg: threading.Event() for leg, _, _ in legs}

    def check(self) -> None:
        """Raise where there is a reason to end: `Interrupted` or `_GivenUp`."""
        check_interrupted()
        if self.failed.is_set():
            raise _GivenUp

    def wait_for_all(self, leg: int) -> None:
        """This leg's server is ready, or never will be; wait for the others, since a start disturbs what is measured."""
        self._ready[leg].set()
        while not all(ready.wait(0.1) for ready in self._ready.values()):
            self.check()

    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.stop_at is not None and time.monotonic() > self.stop_at


class Measurement:
    """One `bench serve`. `result` is what is known so far, as the schema of the result file says."""

    def __init__(self, vllm: Sequence[str], plan: Plan, folder: Path, teller: Teller) -> None:
        """`vllm` is the command; `folder` gets everything that is written."""
        self._vllm, self._plan, self._folder, self._teller = tuple(vllm), plan, folder, teller
        self._lock = threading.RLock()
        self.file = folder / schema.NAMES[schema.SERVE]
        described = {name: value for name, value in asdict(plan).items() if name != "start_limit"}
        facts = machine.facts()
        self.result: dict[str, Any] = {
            "kind": schema.SERVE,
            "schema_version": schema.VERSION,
            "started": _now(),
            "finished": None,
            "complete": False,
            "machine": {"vllm": "unknown", **facts},
            "plan": {
                **described,
                "serve_flags": list(plan.serve_flags),
                "groups": list(plan.groups),
                "points": [point.as_dict() for point in plan.points],
            },
            "servers": [],
            "runs": [],
            "findings": [],
            "rows": [],
        }
        self._out_of_time = False
        self._come_to: set[Point] = set()
        """The points that there was time for so far."""
        self._wanted: Sequence[Point] = plan.points
        """The points of the next round: what the first had no time for need not be measured any more."""

    def make(self) -> None:
        """Measure everything. What is measured is in the file at any time, also where this is interrupted.

        Raises:
            UserError: a server or the client does not take its flags.
            Interrupted: a signal came.
        """
        self._write()
        end = None if self._plan.minutes is None else time.monotonic() + 60 * self._plan.minutes
        try:
            rounds = self._plan.rounds
            for number, legs in enumerate(rounds):
                now = time.monotonic()
                together = _Round(legs, None if end is None else now + (end - now) / (len(rounds) - number))
                self._round(together)
                if any(server["startup_s"] is not None for server in self.result["servers"]):
                    self._wanted = [point for point in self._plan.points if point in self._come_to]
            self.result["complete"] = not self._out_of_time
        finally:
            self.result["finished"] = _now()
            self._write()

    def _round(self, together: _Round) -> None:
        if len(together.legs) == 1:
            self._leg(together, *together.legs[0])
            return
        with concurrent.futures.ThreadPoolExecutor(len(together.legs)) as pool:
            running = [pool.submit(self._leg_of_several, together, *leg) for leg in together.legs]
            errors = [one.exception() for one in concurrent.futures.as_completed(running)]
        for error in errors:
            if error is not None and not isinstance(error, _GivenUp):
                raise error

    def _leg_of_several(self, together: _Round, leg: int, side: str, cards: str) -> None:
        try:
            self._leg(together, leg, side, cards)
        except BaseException:
            together.failed.set()
            raise

    def _leg(self, together: _Round, leg: int, side: str, cards: str) -> None:
        """One turn of one side: a server, and after a death a new one for the points that are left."""
        left = list(self._wanted)
        place = self._folder / f"{leg}-{side}"
        life = 0
        deaths: list[str] = []
        with Client(self._vllm, place / "client.log") as client:
            while left and not together.is_over():
                life += 1
                self._teller.now(f"{side}: starting (server {leg} of {len(self._plan.sides)})")
                with BenchServer(self._vllm, self._plan, side, place / f"server-{life}.log", cards) as server:
                    facts = self._note_server(leg, server, cards)
                    try:
                        is_ready = server.wait_until_ready(together.check)
                        check_interrupted()
                        if not is_ready:
                            self._did_not_start(server, facts)
                            self._teller.done(len(left) * self._plan.repeats)
                            together.wait_for_all(leg)
                            return
                        self._ready(server, facts)
                        together.wait_for_all(leg)
                        died = False
                        warmed: set[Point] = set()
                        while left and not died and not together.is_over():
                            together.check()
                            point = left.pop(0)
                            self._come_to.add(point)
                            died = self._point(leg, server, client, point, warmed, facts)
                        if died:
                            deaths.append(point.case)
                            left = self._without_deadly_case(side, left, point.case, deaths.count(point.case))
                    finally:
                        facts["kv_cache_tokens"] = server.kv_cache_tokens()
                        facts["peak_memory_mib"] = server.memory.peak_mib
                self._write()
        if left:
            self._teller.done(len(left) * self._plan.repeats)
            self._out_of_time = True
            self._find(f"{side}, server {leg}: no time was left for {'; '.join(point.label for point in left)}.")

    def _without_deadly_case(self, side: str, left: list[Point], case: str, deaths: int) -> list[Point]:
        """What is left after a server has died in a case; the loads of that case no more, if they have killed enough."""
        dropped = [point for point in left if point.case == case]
        if deaths < self._plan.deaths or not dropped:
            return left
        self._come_to.update(dropped)  # the other side may live
        self._teller.done(len(dropped) * self._plan.repeats)
        labels = "; ".join(point.label for point in dropped)
        self._find(f"{side}: left out, since {case} has killed {deaths} of its servers: {labels}.")
        return [point for point in left if point.case != case]

    def _note_server(self, leg: int, server: BenchServer, cards: str) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "leg": leg,
            "side": server.side,
            "cards": cards or None,
            "status": "ended",
            "startup_s": None,
            "kv_cache_tokens": None,
            "peak_memory_mib": None,
            "memory_source": server.memory.source,
            "death": None,
            "log": self._relative(server.session.log),
        }
        with self._lock:
            self.result["servers"].append(facts)
        return facts

    def _ready(self, server: BenchServer, facts: dict[str, Any]) -> None:
        facts["startup_s"] = server.startup_s
        facts["kv_cache_tokens"] = server.kv_cache_tokens()
        self.result["machine"]["vllm"] = server.vllm_version() or self.result["machine"]["vllm"]
        self._teller.say(f"{server.side}: ready after {server.startup_s:.0f} s")
        if server.side == PATCHED and not server.has_table():
            self._find(
                f"The log of the patched server has no table of vllm-glm-patch, so the plugin may not have run in it: "
                f"{facts['log']}. Check `vllm-glm-patch doctor` in the Python of `{' '.join(self._vllm)}`, and VLLM_PLUGINS."
            )

    def _did_not_start(self, server: BenchServer, facts: dict[str, Any]) -> None:
        code = server.session.exit_code()
        if code == _USAGE_ERROR:
            raise UserError(
                f"`vllm serve` does not take these flags (exit code 2). The end of {server.session.log}:\n"
                f"{server.session.last_lines(8)}"
            )
        if code is None:
            why = f"not ready after {self._plan.start_limit:.0f} s"
            facts["death"] = {"error": why, "patch": None, "grade": None, "exit_code": None}
        else:
            facts["death"], why = server.death().as_dict(), server.death().text()
        facts["status"] = "did not start"
        self._find(f"{server.side} did not start: {why}. Its log: {facts['log']}")

    def _point(
        self, leg: int, server: BenchServer, client: Client, point: Point, warmed: set[Point], facts: dict[str, Any]
    ) -> bool:
        """All runs of one point; whether the server died in one.

        Args:
            warmed: the points whose load this server has seen; added to.
        """
        place = self._folder / f"{leg}-{server.side}" / _file_name(point)
        to_warm = self._plan.to_warm(point)
        for number in range(0 if to_warm in warmed else self._plan.warmups):
            self._teller.now(f"{server.side}: warming up {to_warm.label}")
            file = place.with_name(f"{place.name}-warmup-{number + 1}.json")
            if self._one(leg, server, client, to_warm, -number, file, facts):
                self._teller.done(self._plan.repeats)
                return True
        warmed.add(to_warm)
        for repeat in range(1, self._plan.repeats + 1):
            self._teller.now(f"{server.side}: {point.label}, run {repeat} of {self._plan.repeats}")
            died = self._one(leg, server, client, point, repeat, place.with_name(f"{place.name}-{repeat}.json"), facts)
            self._teller.done(self._plan.repeats - repeat + 1 if died else 1)
            self._write()
            if died:
                return True
        return False

    def _one(
        self, leg: int, server: BenchServer, client: Client, point: Point, repeat: int, file: Path, facts: dict[str, Any]
    ) -> bool:
        """One run, `repeat` below 1 for a warm-up; whether the server died in it."""
        warming = repeat < 1
        seed = point.seed + self._plan.points.index(point) * _SEEDS_A_POINT + self._plan.warmups + repeat
        requested = min(point.prompts, max(2, point.concurrency or 8)) if warming else point.prompts
        measured = drive(client, self._plan, server, Requests(point, requested, seed, warming), file)
        completed = measured.completed
        died = (completed is None or completed < requested) and server.has_died()
        check_interrupted()
        if not died and completed is None:
            raise refuse(file.with_suffix(".log"))
        if died and completed is None and not has_begun(file.with_suffix(".log")):
            completed = 0
        status = schema.DIED if died else schema.OK if completed == requested else schema.FAILED
        if died or not warming:
            run: dict[str, Any] = {
                "leg": leg,
                "side": server.side,
                "case": point.case,
                "concurrency": point.concurrency,
                "request_rate": point.request_rate,
                "repeat": max(repeat, 1),
                "seed": seed,
                "status": status,
                "requested": requested,
                "completed": completed,
                "metrics": measured.metrics if status == schema.OK else {},
                "file": self._relative(file),
            }
            with self._lock:
                self.result["runs"].append(run)
            self._tell(run)
        if died:
            self._died(server, facts, point, completed, warming=warming)
        elif status == schema.FAILED:
            self._find(f"{server.side}: {requested - (completed or 0)} of {requested} requests failed in {point.label}.")
        return died

    def _died(
        self, server: BenchServer, facts: dict[str, Any], point: Point, completed: Optional[int], *, warming: bool
    ) -> None:
        death = server.death()
        facts["status"], facts["death"] = "died", death.as_dict()
        where = f"at request {completed + 1}" if completed is not None else "under load"
        self._find(f"{server.side} died {where} of {point.label}{' while it was warmed up' if warming else ''}: {death.text()}")

    def _find(self, text: str) -> None:
        with self._lock:
            self.result["findings"].append(text)
        self._teller.say(text)
        self._write()

    def _tell(self, run: dict[str, Any]) -> None:
        if run["status"] == schema.OK:
            numbers = run["metrics"]
            said = f"{numbers.get('total_token_throughput', 0):.1f} tokens/s, TTFT {numbers.get('median_ttft_ms', 0):.1f} ms"
            self._teller.say(f"{run['side']}: {result.label_of(run)}, run {run['repeat']}: {said}")

    def _relative(self, file: Path) -> str:
        return str(file.relative_to(self._folder))

    def _write(self) -> None:
        with self._lock:
            result.write(self.result, self.file)


def _file_name(point: Point) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in point.label.replace("/", " per "))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
