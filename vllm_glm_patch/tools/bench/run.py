"""The measurement itself: server after server, point after point, and a result file that is whole after each."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from . import machine, result
from .client import Requests, drive, has_begun, refuse
from .plan import PATCHED, Plan, Point
from .progress import Teller
from .server import BenchServer

_SEEDS_A_POINT = 1000  # more than runs of one point, so that no two runs on a server send the same prompts
_USAGE_ERROR = 2  # what `vllm serve` leaves with for flags it does not take


class Measurement:
    """One `bench serve`. `result` is what is known so far, as the schema of the result file says."""

    def __init__(self, vllm: str, plan: Plan, folder: Path, teller: Teller) -> None:
        self._vllm, self._plan, self._folder, self._teller = vllm, plan, folder, teller
        self.file = folder / result.NAME
        described = {name: value for name, value in asdict(plan).items() if name != "start_limit"}
        facts = machine.facts()
        self.result: dict[str, Any] = {
            "kind": "bench serve",
            "schema_version": result.VERSION,
            "started": _now(),
            "finished": None,
            "complete": False,
            "machine": {"vllm": "unknown", **facts},
            "plan": {
                **described,
                "serve_flags": list(plan.serve_flags),
                "points": [point.as_dict() for point in plan.points],
            },
            "servers": [],
            "runs": [],
            "findings": [],
            "rows": [],
        }

    def make(self) -> None:
        """Measure everything. What is measured is in the file at any time, also where this is interrupted.

        Raises:
            UserError: a server or the client does not take its flags.
        """
        self._write()
        try:
            for leg, side in enumerate(self._plan.sides, start=1):
                self._leg(leg, side)
            self.result["complete"] = True
        finally:
            self.result["finished"] = _now()
            self._write()

    def _leg(self, leg: int, side: str) -> None:
        """One turn of one side: a server, and after a death a new one for the points that are left."""
        left = list(self._plan.points)
        life = 0
        while left:
            life += 1
            self._teller.now(f"{side}: starting (server {leg} of {len(self._plan.sides)})")
            log = self._folder / f"{leg}-{side}" / f"server-{life}.log"
            with BenchServer(self._vllm, self._plan, side, log) as server:
                facts = self._note_server(leg, server)
                try:
                    if not server.wait_until_ready():
                        self._did_not_start(server, facts)
                        self._teller.done(len(left) * self._plan.repeats)
                        return
                    self._ready(server, facts)
                    died = False
                    while left and not died:
                        died = self._point(leg, server, left.pop(0), facts)
                finally:
                    facts["kv_cache_tokens"] = server.kv_cache_tokens()
                    facts["peak_memory_mib"] = server.memory.peak_mib
            self._write()

    def _note_server(self, leg: int, server: BenchServer) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "leg": leg,
            "side": server.side,
            "status": "ended",
            "startup_s": None,
            "kv_cache_tokens": None,
            "peak_memory_mib": None,
            "memory_source": server.memory.source,
            "death": None,
            "log": self._relative(server.group.log),
        }
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
                f"{facts['log']}. Check `vllm-glm-patch doctor` in the Python of {self._vllm}, and VLLM_PLUGINS."
            )

    def _did_not_start(self, server: BenchServer, facts: dict[str, Any]) -> None:
        code = server.group.exit_code()
        if code == _USAGE_ERROR:
            raise UserError(
                f"`vllm serve` does not take these flags (exit code 2). The end of {server.group.log}:\n"
                f"{server.group.last_lines(8)}"
            )
        if code is None:
            why = f"not ready after {self._plan.start_limit:.0f} s"
            facts["death"] = {"error": why, "patch": None, "exit_code": None}
        else:
            facts["death"], why = server.death().as_dict(), server.death().text()
        facts["status"] = "did not start"
        self._find(f"{server.side} did not start: {why}. Its log: {facts['log']}")

    def _point(self, leg: int, server: BenchServer, point: Point, facts: dict[str, Any]) -> bool:
        """All runs of one point; whether the server died in one."""
        place = self._folder / f"{leg}-{server.side}" / _file_name(point)
        for number in range(self._plan.warmups):
            self._teller.now(f"{server.side}: warming up {point.label}")
            if self._one(leg, server, point, -number, place.with_name(f"{place.name}-warmup-{number + 1}.json"), facts):
                self._teller.done(self._plan.repeats)
                return True
        for repeat in range(1, self._plan.repeats + 1):
            self._teller.now(f"{server.side}: {point.label}, run {repeat} of {self._plan.repeats}")
            died = self._one(leg, server, point, repeat, place.with_name(f"{place.name}-{repeat}.json"), facts)
            self._teller.done(self._plan.repeats - repeat + 1 if died else 1)
            self._write()
            if died:
                return True
        return False

    def _one(self, leg: int, server: BenchServer, point: Point, repeat: int, file: Path, facts: dict[str, Any]) -> bool:
        """One run, `repeat` below 1 for a warm-up; whether the server died in it."""
        warming = repeat < 1
        seed = point.seed + self._plan.points.index(point) * _SEEDS_A_POINT + self._plan.warmups + repeat
        requested = min(point.prompts, max(2, point.concurrency or 8)) if warming else point.prompts
        measured = drive(self._vllm, self._plan, server, Requests(point, requested, seed), file)
        completed = measured.completed
        died = (completed is None or completed < requested) and server.has_died()
        if not died and completed is None:
            raise refuse(file.with_suffix(".log"))
        if died and completed is None and not has_begun(file.with_suffix(".log")):
            completed = 0
        status = result.DIED if died else result.OK if completed == requested else result.FAILED
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
                "metrics": measured.metrics if status == result.OK else {},
                "file": self._relative(file),
            }
            self.result["runs"].append(run)
            self._tell(run)
        if died:
            self._died(server, facts, point, completed, warming=warming)
        elif status == result.FAILED:
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
        self.result["findings"].append(text)
        self._teller.say(text)
        self._write()

    def _tell(self, run: dict[str, Any]) -> None:
        if run["status"] == result.OK:
            numbers = run["metrics"]
            said = f"{numbers.get('total_token_throughput', 0):.1f} tokens/s, TTFT {numbers.get('median_ttft_ms', 0):.1f} ms"
            self._teller.say(f"{run['side']}: {result.label_of(run)}, run {run['repeat']}: {said}")

    def _relative(self, file: Path) -> str:
        return str(file.relative_to(self._folder))

    def _write(self) -> None:
        result.write(self.result, self.file)


def _file_name(point: Point) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in point.label.replace("/", " per "))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
