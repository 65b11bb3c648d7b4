"""The cases to measure: those that are known by name, those of a file, and those of the options."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from .plan import Point, check_bench_flags, number, value_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# `prompts` bounds the time: at 92 layers of one TP8 rank on an H100 (a step of 8192 tokens takes some 0.3 s, a decode step
# 10 to 50 ms) all three take about 3.5 minutes a server.
PRESETS: dict[str, dict[str, Any]] = {
    "prefill": {
        "flags": "--random-input-len 8192 --random-output-len 1",
        "concurrency": [1, 4, 16],
        "prompts": [8, 16, 32],
    },
    "decode": {
        "flags": "--random-input-len 128 --random-output-len 512 --ignore-eos",
        "concurrency": [1, 16, 64, 256],
        "prompts": [2, 16, 64, 256],
    },
    "mixed": {
        "flags": "--random-input-len 4096 --random-output-len 256 --ignore-eos",
        "request_rate": [0.5, 1, 2, 4],
        "prompts": [8, 16, 24, 32],
    },
}
_KEYS = {"name", "flags", "concurrency", "request_rate", "prompts"}


def make_points(
    bench_flags: Sequence[str], concurrency: Optional[str], request_rate: Optional[str], cases: Optional[str]
) -> tuple[Point, ...]:
    """The points of the options, or of the cases.

    Args:
        bench_flags: flags of `vllm bench serve`, for all cases.
        concurrency: comma-separated; request_rate: likewise. Every rate is measured at every concurrency.
        cases: comma-separated names in `PRESETS`, or a TOML file of `[[case]]` tables with name, flags, concurrency,
            request_rate and prompts.

    Raises:
        UserError: a value is wrong.
    """
    if cases is not None:
        if concurrency or request_rate:
            raise UserError(f"--cases {cases} has the loads in it; leave --concurrency and --request-rate out.")
        points = tuple(point for table in _tables(cases) for point in _points_of(table, bench_flags, cases))
    else:
        points = _product(
            value_of(bench_flags, "--dataset-name") or "random",
            tuple(bench_flags),
            [number(text, "--concurrency", int, 1) for text in concurrency.split(",")] if concurrency else [],
            [number(text, "--request-rate", float, 0) for text in request_rate.split(",")] if request_rate else [],
        )
    for point in points:
        check_bench_flags(point.flags)
        _ = point.prompts, point.seed
    labels = [point.label for point in points]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"The case {label!r} is there {labels.count(label)} times; give each a name or load of its own.")
    return points


def _tables(cases: str) -> list[dict[str, Any]]:
    names = cases.split(",")
    if all(name in PRESETS for name in names):
        return [{"name": name, **PRESETS[name]} for name in names]
    file = Path(cases)
    try:
        read = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"--cases {cases} cannot be read: {error}. Give a TOML file of [[case]] tables, or some of {','.join(PRESETS)}."
        ) from None
    tables = read.get("case")
    if not isinstance(tables, list) or not tables or set(read) != {"case"}:
        raise UserError(f"--cases {cases} must hold [[case]] tables and nothing else; it holds {', '.join(read) or 'nothing'}.")
    return tables


def _points_of(table: dict[str, Any], bench_flags: Sequence[str], cases: str) -> tuple[Point, ...]:
    unknown = set(table) - _KEYS
    if unknown:
        raise UserError(f"{cases}: a case has the key {min(unknown)!r}; known keys are {', '.join(sorted(_KEYS))}.")
    name, flags = table.get("name"), table.get("flags", "")
    if not isinstance(name, str) or not name:
        raise UserError(f"{cases}: a case has the name {name!r}; give each a name of its own.")
    if isinstance(flags, str):
        flags = shlex.split(flags)
    return _product(
        name,
        (*map(str, flags), *bench_flags),
        [number(value, f"{cases}: concurrency of {name}", int, 1) for value in _listed(table.get("concurrency"))],
        [number(value, f"{cases}: request_rate of {name}", float, 0) for value in _listed(table.get("request_rate"))],
        [number(value, f"{cases}: prompts of {name}", int, 1) for value in _listed(table.get("prompts"))],
    )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _product(
    case: str, flags: tuple[str, ...], levels: Sequence[Any], rates: Sequence[Any], prompts: Sequence[int] = ()
) -> tuple[Point, ...]:
    if not levels and not rates:
        levels = [1]
    loads = [(level, rate) for level in levels or [None] for rate in rates or [None]]
    counts: Sequence[Optional[int]] = prompts if len(prompts) > 1 else [*prompts, None][:1] * len(loads)
    if len(counts) != len(loads):
        raise UserError(f"The case {case!r} has {len(loads)} loads and {len(counts)} prompts; give one number, or one a load.")
    return tuple(Point(case, flags, level, rate, count) for (level, rate), count in zip(loads, counts))
