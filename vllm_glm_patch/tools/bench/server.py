"""One `vllm serve`, with the patches or without: started on a free port, waited for, read, and ended."""

from __future__ import annotations

import os
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ...fence.diagnose import POSSIBLE, diagnose
from ..diagnose import of_its_version, signatures
from ..processes import Session, check_interrupted
from .memory import MemoryWatch
from .plan import PATCHED, Plan

_KV_CACHE = re.compile(r"KV cache size: ([\d,]+) tokens")
_VERSION = re.compile(r"(?:API server|[▀▄█] *) version (\d+\.\d+\.\d+\S*)")  # older releases, newer ones
_RAISED = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)\b: .+")
_DYING = 15.0  # seconds until an API server whose engine died has ended or says that it is not well
_POLL = 0.2
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business between us


@dataclass(frozen=True)
class Death:
    """How a server ended by itself."""

    error: str
    """From its log; empty where the log says nothing."""
    patch: Optional[str]
    """The defect of the catalog whose signature fits."""
    grade: Optional[str]
    """How well it fits: ``match`` or ``possible``, as `vllm-glm-patch diagnose` grades it."""
    exit_code: Optional[int]

    def as_dict(self) -> dict[str, Any]:
        """As the result file has it."""
        return {"error": self.error, "patch": self.patch, "grade": self.grade, "exit_code": self.exit_code}

    def text(self) -> str:
        """For people: ``an illegal memory access was encountered (scale-overread)``, or ``(possible: scale-overread)``."""
        said = self.error or f"exit code {self.exit_code}, and no error in its log"
        named = self.patch if self.grade != POSSIBLE else f"{POSSIBLE}: {self.patch}"
        return f"{said} ({named})" if self.patch else said


class BenchServer:
    """A running server of one side. Use it in a `with` statement."""

    def __init__(self, vllm: Sequence[str], plan: Plan, side: str, log: Path, cards: str = "") -> None:
        """Start it.

        Args:
            vllm: the command `vllm`.
            cards: CUDA_VISIBLE_DEVICES for it; empty: as in the environment.
        """
        self.side = side
        self.port = _free_port()
        self.startup_s: Optional[float] = None
        self.memory = MemoryWatch(cards)
        self._limit = plan.start_limit
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        if plan.served_name not in plan.serve_flags:
            where += ["--served-model-name", plan.served_name]
        environment = {**os.environ, "VLLM_GLM_PATCH": "1" if side == PATCHED else "0"}
        environment |= {"CUDA_VISIBLE_DEVICES": cards} if cards else {}
        self._started = time.monotonic()
        self.session = Session([*vllm, "serve", plan.model, *where, *plan.serve_flags], log, environment)
        self.memory.follow(self.session)

    def __enter__(self) -> BenchServer:
        self.memory.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.memory.__exit__(None, None, None)
        self.session.stop()

    def wait_until_ready(self, while_waiting: Callable[[], None] = lambda: None) -> bool:
        """Wait until it takes requests; False where it ended or took too long instead."""
        while not self.is_well():
            if self.session.exit_code() is not None or time.monotonic() - self._started > self._limit:
                return False
            check_interrupted()
            while_waiting()
            time.sleep(_POLL)
        self.startup_s = round(time.monotonic() - self._started, 2)
        return True

    def is_well(self) -> bool:
        """Whether it answers /health."""
        try:
            with _direct.open(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def has_died(self) -> bool:
        """Whether it ends, or is not well, within some seconds."""
        deadline = time.monotonic() + _DYING
        while self.session.exit_code() is None and self.is_well():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    def death(self) -> Death:
        """What its log says of its end."""
        return read_death(self.session.log, self.session.exit_code())

    def kv_cache_tokens(self) -> Optional[int]:
        """The size of its KV cache as its log says; None where it does not."""
        found = _KV_CACHE.findall(self.session.log_text())
        return int(found[-1].replace(",", "")) if found else None

    def vllm_version(self) -> Optional[str]:
        """As its log says; None where it does not."""
        found = _VERSION.search(self.session.log_text())
        return found.group(1) if found else None

    def has_table(self) -> bool:
        """Whether its log has the table of patches, so that the plugin ran in it."""
        return "vllm-glm-patch " in self.session.log_text()


def read_death(log: Path, exit_code: Optional[int]) -> Death:
    """The error in a server's log, and the known defect it is a sign of."""
    diagnosis = of_its_version(diagnose(log, signatures()))
    errors = diagnosis.evidence.errors or tuple(_RAISED.findall(log.read_text(encoding="utf-8", errors="replace")))
    match = diagnosis.matches[0] if diagnosis.matches else None
    patch, grade = (match.signature.patch, match.grade) if match else (None, None)
    return Death(errors[0].replace("CUDA error: ", "", 1)[:200] if errors else "", patch, grade, exit_code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
