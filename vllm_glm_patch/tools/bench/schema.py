"""The result files of `bench`: one schema with a part for each kind, and how a file is checked, written and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from .plan import PATCHED, UPSTREAM

VERSION = 1
SERVE, KERNEL = "bench serve", "bench kernel"
NAMES = {SERVE: "serve.json", KERNEL: "kernel.json"}
OK, FAILED, DIED = "ok", "requests failed", "server died"

_TEXT, _NUMBER, _FLAG = {"type": "string"}, {"type": ["number", "null"]}, {"type": "boolean"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_SIDE = {"enum": [UPSTREAM, PATCHED]}
_COUNT = {"type": ["integer", "null"], "minimum": 0}
_WHOLE = {"type": "integer", "minimum": 0}
LOAD = {"case": _TEXT, "concurrency": _COUNT, "request_rate": _NUMBER}


def _table(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}


def _with_optional(table: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {**table, "properties": {**table["properties"], **properties}}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _map(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": of}


_DEATH = {
    "anyOf": [
        {"type": "null"},
        _table(error=_TEXT, patch=_TEXT_OR_NULL, grade=_TEXT_OR_NULL, exit_code={"type": ["integer", "null"]}),
    ]
}
_COMMON: dict[str, Any] = {
    "schema_version": {"const": VERSION},
    "started": _TEXT,
    "finished": _TEXT_OR_NULL,
    "complete": _FLAG,
    "machine": {"required": ["cpu", "python", "vllm", "vllm_glm_patch"], **_map(_TEXT)},
    "findings": _list(_TEXT),
}
_SERVE = _table(
    kind={"const": SERVE},
    **_COMMON,
    plan=_table(
        model=_TEXT,
        serve_flags=_list(_TEXT),
        order=_TEXT,
        repeats={"type": "integer", "minimum": 1},
        warmups=_WHOLE,
        minutes=_NUMBER,
        groups=_list(_TEXT),
        warm_each=_TEXT,
        deaths=_WHOLE,
        points=_list(_table(**LOAD, prompts={"type": "integer", "minimum": 1}, flags=_list(_TEXT))),
    ),
    servers=_list(
        _table(
            leg={"type": "integer"},
            side=_SIDE,
            cards=_TEXT_OR_NULL,
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
            **LOAD,
            repeat={"type": "integer", "minimum": 1},
            seed={"type": "integer"},
            status={"enum": [OK, FAILED, DIED]},
            requested={"type": "integer", "minimum": 1},
            completed=_COUNT,
            metrics=_map({"type": "number"}),
            file=_TEXT,
        )
    ),
    rows=_list(
        _table(
            vllm=_TEXT,
            **LOAD,
            metric=_TEXT,
            upstream=_NUMBER,
            patched=_NUMBER,
            ratio=_NUMBER,
            ratio_low=_NUMBER,
            ratio_high=_NUMBER,
            upstream_runs=_WHOLE,
            patched_runs=_WHOLE,
        )
    ),
)
_KERNEL = _table(
    kind={"const": KERNEL},
    **_COMMON,
    plan=_table(
        shapes=_list(_TEXT),
        tokens=_list(_WHOLE),
        seed=_WHOLE,
        rounds=_WHOLE,
        replays=_WHOLE,
        method=_TEXT,
        l2=_TEXT,
    ),
    roofline=_table(copy_tb_s={"type": "number"}, read_tb_s={"type": "number"}, fp8_tf_s={"type": "number"}),
    checks=_list(
        _with_optional(
            _table(
                shape=_TEXT,
                tokens=_WHOLE,
                asked=_TEXT,
                routing=_TEXT,
                backend=_TEXT,
                error=_NUMBER,
                error_to_fp8_steps=_NUMBER,
                repeats=_FLAG,
                good=_FLAG,
            ),
            failure=_table(type=_TEXT, message=_TEXT),
        )
    ),
    rows=_list(
        _table(
            vllm=_TEXT,
            shape=_TEXT,
            tokens=_WHOLE,
            asked=_TEXT,
            backend=_TEXT,
            ours_us=_NUMBER,
            cutlass_us=_NUMBER,
            triton_us=_NUMBER,
            triton_tuned_us=_NUMBER,
            best_upstream=_TEXT_OR_NULL,
            ratio=_NUMBER,
            ratio_low=_NUMBER,
            ratio_high=_NUMBER,
            error=_NUMBER,
            upstream_error=_NUMBER,
            floor_us={"type": "number"},
            floor_by={"enum": ["memory", "arithmetic"]},
            inputs=_WHOLE,
            weights_mb={"type": "number"},
            experts_used=_WHOLE,
            most_tokens=_WHOLE,
            workspace_mb={"type": "number"},
            config={"type": "object"},
            failed=_map(_TEXT),
        )
    ),
)
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "vllm-glm-patch bench",
    "oneOf": [_SERVE, _KERNEL],
}
_PARTS = {SERVE: _SERVE, KERNEL: _KERNEL}


def problem_of(result: Any) -> Optional[str]:
    """Where and how a result departs from the schema of its kind; None where it does not."""
    from jsonschema import Draft202012Validator

    kind = result.get("kind") if isinstance(result, dict) else None
    if kind not in _PARTS:
        return f"at kind: {str(kind)[:40]!r} is none of {', '.join(map(repr, _PARTS))}"
    for error in Draft202012Validator(_PARTS[kind]).iter_errors(result):
        where = "/".join(map(str, error.absolute_path)) or "the top"
        return f"at {where}: {error.message[:200]}"
    return None


def write(result: dict[str, Any], file: Path) -> None:
    """Validate, and put the file in place at once, so that there is a whole one at any time."""
    problem = problem_of(result)
    assert problem is None, problem
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def read(file: Path) -> dict[str, Any]:
    """The result in a file.

    Raises:
        UserError: there is none, or it is not as the schema says.
    """
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {file}; give a folder or file that `bench serve` or `bench kernel` wrote.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Give a file that `bench serve` or `bench kernel` wrote.") from None
    if isinstance(result, dict) and result.get("schema_version", VERSION) != VERSION:
        raise UserError(
            f"{file} has schema_version {result['schema_version']!r}; this release reads {VERSION}. "
            "Use the release that wrote it."
        )
    problem = problem_of(result)
    if problem:
        raise UserError(f"{file} is not a result of `bench serve` or `bench kernel`: {problem}. Give one that was not edited.")
    return result


def read_all(place: Path) -> list[dict[str, Any]]:
    """The results in a folder, at least one, or the one in a file.

    Raises:
        UserError: as `read`.
    """
    if not place.is_dir():
        return [read(place)]
    there = [place / name for name in NAMES.values() if (place / name).exists()]
    if not there:
        raise UserError(f"{place} has none of {', '.join(NAMES.values())}; give a folder that `bench serve --out` wrote.")
    return [read(file) for file in there]
