"""The result file of `bench serve`: its schema, its rows, and how it is written and read."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from .client import METRICS
from .plan import PATCHED, UPSTREAM

NAME = "serve.json"
KIND = "bench serve"
VERSION = 1
OK, FAILED, DIED = "ok", "requests failed", "server died"
SERVER_METRICS = ("startup_s", "kv_cache_tokens", "peak_memory_mib")

_TEXT, _NUMBER = {"type": "string"}, {"type": ["number", "null"]}
_SIDE = {"enum": [UPSTREAM, PATCHED]}
_COUNT = {"type": ["integer", "null"], "minimum": 0}
_LOAD = {"case": _TEXT, "concurrency": _COUNT, "request_rate": _NUMBER}


def _table(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


_DEATH = {
    "anyOf": [
        {"type": "null"},
        _table(error=_TEXT, patch={"type": ["string", "null"]}, exit_code={"type": ["integer", "null"]}),
    ]
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "vllm-glm-patch bench serve",
    **_table(
        kind={"const": KIND},
        schema_version={"const": VERSION},
        started=_TEXT,
        finished={"type": ["string", "null"]},
        complete={"type": "boolean"},
        machine={
            "type": "object",
            "required": ["cpu", "python", "vllm", "vllm_glm_patch"],
            "additionalProperties": _TEXT,
        },
        plan=_table(
            model=_TEXT,
            serve_flags=_list(_TEXT),
            order=_TEXT,
            repeats={"type": "integer", "minimum": 1},
            warmups={"type": "integer", "minimum": 0},
            minutes=_NUMBER,
            groups=_list(_TEXT),
            points=_list(_table(**_LOAD, prompts={"type": "integer", "minimum": 1}, flags=_list(_TEXT))),
        ),
        servers=_list(
            _table(
                leg={"type": "integer"},
                side=_SIDE,
                cards={"type": ["string", "null"]},
                status={"enum": ["ended", "died", "did not start"]},
                startup_s=_NUMBER,
                kv_cache_tokens=_COUNT,
                peak_memory_mib=_NUMBER,
                memory_source=_TEXT,
                death=_DEATH,
                log=_TEXT,
            )
        ),
        runs=_list(
            _table(
                leg={"type": "integer"},
                side=_SIDE,
                **_LOAD,
                repeat={"type": "integer", "minimum": 1},
                seed={"type": "integer"},
                status={"enum": [OK, FAILED, DIED]},
                requested={"type": "integer", "minimum": 1},
                completed=_COUNT,
                metrics={"type": "object", "additionalProperties": {"type": "number"}},
                file=_TEXT,
            )
        ),
        findings=_list(_TEXT),
        rows=_list(
            _table(
                vllm=_TEXT,
                **_LOAD,
                metric=_TEXT,
                upstream=_NUMBER,
                patched=_NUMBER,
                ratio=_NUMBER,
                ratio_low=_NUMBER,
                ratio_high=_NUMBER,
                upstream_runs={"type": "integer"},
                patched_runs={"type": "integer"},
            )
        ),
    ),
}


def make_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each case, load and metric: medians over the runs, their ratio, and its spread.

    `ratio` is patched ÷ upstream; `ratio_low` and `ratio_high` are the lowest and highest that any two runs give.
    Rows of the case ``server`` are about the servers themselves.
    """
    version = result["machine"]["vllm"]
    rows = []
    for point in result["plan"]["points"]:
        load = {name: point[name] for name in _LOAD}
        there = [run for run in result["runs"] if run["status"] == OK and all(run[name] == load[name] for name in _LOAD)]
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
    """Fill in the rows, validate, and put the file in place at once, so that there is a whole one at any time."""
    result["rows"] = make_rows(result)
    problem = problem_of(result)
    assert problem is None, problem
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def read(place: Path) -> dict[str, Any]:
    """A result file, or the one in a folder.

    Raises:
        UserError: there is none, or it is not as the schema says.
    """
    file = place / NAME if place.is_dir() else place
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {file}; give a folder that `bench serve --out` wrote, or its {NAME}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Give a {NAME} that `bench serve` wrote.") from None
    if isinstance(result, dict) and result.get("schema_version", VERSION) != VERSION:
        raise UserError(
            f"{file} has schema_version {result['schema_version']!r}; this release reads {VERSION}. "
            "Use the release that wrote it."
        )
    problem = problem_of(result)
    if problem:
        raise UserError(f"{file} is not a result of `bench serve`: {problem}. Give one that was not edited.")
    return result


def problem_of(result: Any) -> Optional[str]:
    """Where and how a result departs from the schema; None where it does not."""
    from jsonschema import Draft202012Validator

    for error in Draft202012Validator(SCHEMA).iter_errors(result):
        where = "/".join(map(str, error.absolute_path)) or "the top"
        return f"at {where}: {error.message[:200]}"
    return None


def label_of(item: dict[str, Any]) -> str:
    """The case and load of a run, a row or a point, for people."""
    loads = [f"concurrency {item['concurrency']}"] if item["concurrency"] else []
    loads += [f"{item['request_rate']:g} requests/s"] if item["request_rate"] else []
    return ", ".join([item["case"], *loads])
