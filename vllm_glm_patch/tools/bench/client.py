"""One run of vLLM's own `vllm bench serve` against a server of ours, and its numbers."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from .plan import Plan, Point, value_of
from .processes import Group
from .server import BenchServer

LATENCIES = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "median", "p90", "p99")
THROUGHPUTS = ("request_throughput", "input_throughput", "output_throughput", "total_token_throughput")
METRICS = (*THROUGHPUTS, *(f"{statistic}_{latency}_ms" for latency in LATENCIES for statistic in STATISTICS))
_LAST_WORDS = 20.0  # seconds for a client whose server has died to write down what it has
_BEGUN = "Starting main benchmark run"  # what every release prints then
_MISSING = re.compile(r"No module named '([\w.]+)'|Please install (vllm\[\w+\])")


@dataclass(frozen=True)
class Requests:
    """What one run sends."""

    point: Point
    count: int
    seed: int
    """The same for both sides; another for each run on a server, since its prefix cache knows the prompts of the others."""


@dataclass(frozen=True)
class Measured:
    """What one run gave."""

    completed: Optional[int]
    """Requests answered; None where the client wrote nothing."""
    metrics: dict[str, float]
    exit_code: Optional[int]


def drive(vllm: str, plan: Plan, server: BenchServer, requests: Requests, file: Path) -> Measured:
    """Send the requests of one run, until they are answered or the server has died.

    Args:
        file: where the client's own result goes; its log goes beside it.
    """
    file.unlink(missing_ok=True)
    group = Group(command_of(vllm, plan, server.port, requests, file), file.with_suffix(".log"), os.environ)
    try:
        dead_since = None
        while group.exit_code() is None:
            if server.group.exit_code() is not None:
                dead_since = dead_since or time.monotonic()
                if time.monotonic() - dead_since > _LAST_WORDS:
                    break
            time.sleep(0.1)
    finally:
        code = group.exit_code()
        group.stop()
    return read_result(file, code)


def command_of(vllm: str, plan: Plan, port: int, requests: Requests, file: Path) -> list[str]:
    """The command line of the client. Only flags that every vLLM from 0.10.0 on has."""
    point = requests.point
    chosen: list[str] = []
    if value_of(point.flags, "--dataset-name") is None:
        chosen += ["--dataset-name", "random"]
    if point.concurrency:
        chosen += ["--max-concurrency", str(point.concurrency)]
    if point.request_rate:
        chosen += ["--request-rate", f"{point.request_rate:g}"]
    if value_of(point.flags, "--tokenizer") is None and (tokenizer := value_of(plan.serve_flags, "--tokenizer")):
        chosen += ["--tokenizer", tokenizer]
    return [
        *(vllm, "bench", "serve", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", plan.model, "--served-model-name", plan.served_name),
        *("--percentile-metrics", ",".join(LATENCIES), "--metric-percentiles", "90,99"),
        *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
        *chosen,
        *point.flags,
        *("--num-prompts", str(requests.count), "--seed", str(requests.seed)),
    ]


def read_result(file: Path, exit_code: Optional[int]) -> Measured:
    """The numbers in the client's file."""
    try:
        read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Measured(None, {}, exit_code)
    if read.get("duration"):
        read["input_throughput"] = read.get("total_input_tokens", 0) / read["duration"]
    numbers = {name: float(read[name]) for name in METRICS if isinstance(read.get(name), (int, float))}
    finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return Measured(int(read.get("completed", 0)), finite, exit_code)


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
