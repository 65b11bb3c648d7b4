"""The rows of `bench serve`: medians of both sides for each case, load and metric, and their ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from . import schema
from .client import METRICS
from .plan import PATCHED, UPSTREAM
from .schema import LOAD, OK

SERVER_METRICS = ("startup_s", "kv_cache_tokens", "peak_memory_mib")


def make_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each case, load and metric: medians over the runs, their ratio, and its spread.

    `ratio` is patched ÷ upstream; `ratio_low` and `ratio_high` are the lowest and highest that any two runs give.
    Rows of the case ``server`` are about the servers themselves.
    """
    version = result["machine"]["vllm"]
    rows = []
    for point in result["plan"]["points"]:
        load = {name: point[name] for name in LOAD}
        there = [run for run in result["runs"] if run["status"] == OK and all(run[name] == load[name] for name in LOAD)]
        for metric in METRICS:
            values = {
                side: [r["metrics"][metric] for r in there if r["side"] == side and metric in r["metrics"]]
                for side in (UPSTREAM, PATCHED)
            }
            rows.append({"vllm": version, **load, "metric": metric, **_compared(values[UPSTREAM], values[PATCHED])})
    for metric in SERVER_METRICS:
        values = {
            side: [s[metric] for s in result["servers"] if s["side"] == side and s[metric] is not None]
            for side in (UPSTREAM, PATCHED)
        }
        nowhere = {"case": "server", "concurrency": None, "request_rate": None}
        rows.append({"vllm": version, **nowhere, "metric": metric, **_compared(values[UPSTREAM], values[PATCHED])})
    return [row for row in rows if row["upstream"] is not None or row["patched"] is not None]


def _compared(upstream: Sequence[float], patched: Sequence[float]) -> dict[str, Any]:
    ratio = low = high = None
    if upstream and patched and min(upstream) > 0:
        ratio = _rounded(statistics.median(patched) / statistics.median(upstream))
        low, high = _rounded(min(patched) / max(upstream)), _rounded(max(patched) / min(upstream))
    return {
        "upstream": _rounded(statistics.median(upstream)) if upstream else None,
        "patched": _rounded(statistics.median(patched)) if patched else None,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "upstream_runs": len(upstream),
        "patched_runs": len(patched),
    }


def _rounded(value: float) -> Optional[float]:
    """To six digits, which is more than any of it is good for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def write(result: dict[str, Any], file: Path) -> None:
    """Fill in the rows, validate, and put the file in place."""
    result["rows"] = make_rows(result)
    schema.write(result, file)


def label_of(item: dict[str, Any]) -> str:
    """The case and load of a run, a row or a point, for people."""
    loads = [f"concurrency {item['concurrency']}"] if item["concurrency"] else []
    loads += [f"{item['request_rate']:g} requests/s"] if item["request_rate"] else []
    return ", ".join([item["case"], *loads])
