"""One run of vLLM's own `vllm bench serve` against a server of ours, and its numbers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

from ...errors import UserError
from ..processes import Session, check_interrupted
from .plan import Plan, Point, value_of
from .server import BenchServer

LATENCIES = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "median", "p90", "p99")
THROUGHPUTS = ("request_throughput", "input_throughput", "output_throughput", "total_token_throughput")
METRICS = (*THROUGHPUTS, *(f"{statistic}_{latency}_ms" for latency in LATENCIES for statistic in STATISTICS))
WARM_UP_TOKENS = 32  # of an answer while warming up: every kernel has run by then
_MODULE = (sys.executable, "-m", "vllm.entrypoints.cli.main")
_LAST_WORDS = 20.0  # seconds for a client whose server has died to write down what it has
_BEGUN = "Starting main benchmark run"  # what every release prints then
_RESIDENT_LIMIT = 300.0  # seconds for its imports
_MISSING = re.compile(r"No module named '([\w.]+)'|Please install (vllm\[\w+\])")


@dataclass(frozen=True)
class Requests:
    """What one run sends."""

    point: Point
    count: int
    seed: int
    """The same for both sides; another for each run on a server, since its prefix cache knows the prompts of the others."""
    warming: bool = False
    """Only so that the server has seen these shapes: no waiting between requests, short answers."""


@dataclass(frozen=True)
class Measured:
    """What one run gave."""

    completed: Optional[int]
    """Requests answered; None where the client wrote nothing."""
    metrics: dict[str, float]
    exit_code: Optional[int]


class Call(Protocol):
    """A running call of `vllm`."""

    def exit_code(self) -> Optional[int]:
        """None while it runs."""

    def stop(self) -> None:
        """End it where it still runs."""


class Client:
    """Calls `vllm bench serve`. Use it in a `with` statement.

    Where the command belongs to this Python, the calls are made by children of one process, which imports vLLM while the
    server starts.
    """

    def __init__(self, vllm: Sequence[str], log: Path) -> None:
        """`log` is of the process that stays."""
        self._vllm = tuple(vllm)
        self._folder: Optional[Path] = None
        self._resident: Optional[Session] = None
        if is_of_this_python(vllm):
            self._folder = Path(tempfile.mkdtemp(prefix="glm-patch-bench-"))
            command = [sys.executable, "-m", "vllm_glm_patch.tools.bench.resident", str(self._folder / "socket")]
            self._resident = Session(command, log)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._resident is not None:
            self._resident.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, arguments: Sequence[str], log: Path) -> Call:
        """Begin `vllm` with these arguments; what it prints goes to `log`."""
        log.unlink(missing_ok=True)
        if self._resident is not None and self._folder is not None:
            deadline = time.monotonic() + _RESIDENT_LIMIT
            while self._resident.exit_code() is None and time.monotonic() < deadline:
                check_interrupted()
                with contextlib.suppress(OSError):
                    return _ResidentCall(self._folder / "socket", [str(log.absolute()), *arguments])
                time.sleep(0.1)
            self._resident.stop()
            self._resident = None
        return Session([*self._vllm, *arguments], log, os.environ)


class _ResidentCall:
    """One call in a child of the process that stays."""

    def __init__(self, place: Path, message: list[str]) -> None:
        self._code: Optional[int] = None
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(str(place))
            self._connection.sendall(f"{json.dumps(message)}\n".encode())
            self._connection.setblocking(False)
        except OSError:
            self._connection.close()
            raise

    def exit_code(self) -> Optional[int]:
        """None while it runs."""
        if self._code is None:
            with contextlib.suppress(BlockingIOError):
                answer = self._connection.recv(64)
                self._code = int(answer) if answer else 1
        return self._code

    def stop(self) -> None:
        """End it where it still runs."""
        self._connection.close()


def drive(client: Client, plan: Plan, server: BenchServer, requests: Requests, file: Path) -> Measured:
    """Send the requests of one run, until they are answered or the server has died.

    Args:
        file: where the client's own result goes; its log goes beside it.

    Raises:
        Interrupted: a signal came.
    """
    file.unlink(missing_ok=True)
    call = client.call(arguments_of(plan, server.port, requests, file), file.with_suffix(".log"))
    try:
        dead_since = None
        while (code := call.exit_code()) is None:
            check_interrupted()
            if server.session.exit_code() is not None:
                dead_since = dead_since or time.monotonic()
                if time.monotonic() - dead_since > _LAST_WORDS:
                    break
            time.sleep(0.1)
    finally:
        call.stop()
    check_interrupted()  # what ended then did not end by itself
    return read_result(file, code)


def find_vllm() -> tuple[str, ...]:
    """The command `vllm`: on PATH, beside this Python, or of its module.

    Raises:
        UserError: there is none.
    """
    beside = Path(sys.executable).parent / "vllm"
    found = shutil.which("vllm") or (str(beside) if beside.exists() else None)
    if found is not None:
        return (found,)
    if (Path.cwd() / "vllm").is_dir() or importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"There is no `vllm` on PATH, and {sys.executable} has none. Install vLLM, or activate its environment."
        )
    return _MODULE


def is_of_this_python(vllm: Sequence[str]) -> bool:
    """Whether this command is that of the vLLM which this Python imports."""
    return tuple(vllm) == _MODULE or Path(vllm[0]).parent == Path(sys.executable).parent


def arguments_of(plan: Plan, port: int, requests: Requests, file: Path) -> list[str]:
    """The arguments of `vllm` for one run. Only flags that every vLLM from 0.10.0 on has."""
    point = requests.point
    chosen: list[str] = []
    if value_of(point.flags, "--dataset-name") is None:
        chosen += ["--dataset-name", "random"]
    if point.concurrency:
        chosen += ["--max-concurrency", str(point.concurrency)]
    if point.request_rate and not requests.warming:
        chosen += ["--request-rate", f"{point.request_rate:g}"]
    if value_of(point.flags, "--tokenizer") is None and (tokenizer := value_of(plan.serve_flags, "--tokenizer")):
        chosen += ["--tokenizer", tokenizer]
    answer = value_of(point.flags, "--random-output-len") or ""
    shorter = ["--random-output-len", str(WARM_UP_TOKENS)] if requests.warming and _above(answer, WARM_UP_TOKENS) else []
    return [
        *("bench", "serve", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", plan.model, "--served-model-name", plan.served_name),
        *("--percentile-metrics", ",".join(LATENCIES), "--metric-percentiles", "90,99"),
        *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
        *chosen,
        *point.flags,
        *shorter,
        *("--num-prompts", str(requests.count), "--seed", str(requests.seed)),
    ]


def _above(text: str, limit: int) -> bool:
    return text.isdigit() and int(text) > limit


def read_result(file: Path, exit_code: Optional[int]) -> Measured:
    """The numbers in the client's file."""
    try:
        read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Measured(None, {}, exit_code)
    if read.get("duration"):
        read["input_throughput"] = read.get("total_input_tokens", 0) / read["duration"]
    numbers = {name: float(read[name]) for name in METRICS if isinstance(read.get(name), (int, float))}
    known = {name: value for name, value in numbers.items() if math.isfinite(value) and not _is_of_nothing(name, value)}
    return Measured(int(read.get("completed", 0)), known, exit_code)


def _is_of_nothing(name: str, value: float) -> bool:
    """Answers of one token have no time between two, and the client then says 0."""
    return value == 0 and name.endswith(("_tpot_ms", "_itl_ms"))


def has_begun(log: Path) -> bool:
    """Whether the client was past the one request that it tries first."""
    return _BEGUN in log.read_text(encoding="utf-8", errors="replace")


def refuse(log: Path, command: Sequence[str] = ("vllm", "bench", "serve")) -> UserError:
    """The error for a client that failed although the server is well: it cannot do what it was asked."""
    text = log.read_text(encoding="utf-8", errors="replace")
    missing = _MISSING.search(text)
    name = " ".join(command)
    if missing:
        package = missing.group(1) or missing.group(2)
        return UserError(f"`{name}` needs {package}, which is not installed. Run: pip install '{package}'. Its log: {log}")
    end = "\n".join(text.splitlines()[-8:])
    return UserError(f"`{name}` failed although the server runs; correct the flags after `--`. The end of {log}:\n{end}")
