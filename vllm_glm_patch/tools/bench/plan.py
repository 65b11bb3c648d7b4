"""What is to be measured: the cases, their loads, and the order of the servers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UPSTREAM, PATCHED = "upstream", "patched"
ORDERS = {"ABBA": (UPSTREAM, PATCHED, PATCHED, UPSTREAM), "AB": (UPSTREAM, PATCHED)}
LEAST_PROMPTS = 16
PROMPTS_A_SLOT = 4  # so that the ramps at both ends of a run weigh little
SECONDS_AT_A_RATE = 60
_KEYS = {"name", "flags", "concurrency", "request_rate"}
_OURS_OF_SERVE = ("--host", "--port")
_OURS_OF_BENCH = (
    *("--host", "--port", "--base-url", "--model", "--max-concurrency", "--request-rate"),
    *("--result-dir", "--result-filename", "--percentile-metrics", "--metric-percentiles"),
)


@dataclass(frozen=True)
class Point:
    """One case under one load: what a single `vllm bench serve` measures."""

    case: str
    flags: tuple[str, ...]
    """Of `vllm bench serve`."""
    concurrency: Optional[int] = None
    """--max-concurrency; None: no limit."""
    request_rate: Optional[float] = None
    """Requests a second; None: all at once."""

    @property
    def label(self) -> str:
        """For people: ``prefill, concurrency 4``."""
        loads = [f"concurrency {self.concurrency}"] if self.concurrency else []
        loads += [f"{self.request_rate:g} requests/s"] if self.request_rate else []
        return ", ".join([self.case, *loads])

    @property
    def prompts(self) -> int:
        """How many requests are sent: as --num-prompts says, else enough for this load."""
        given = value_of(self.flags, "--num-prompts")
        if given is not None:
            return int(_number(given, "--num-prompts", int, 1))
        at_rate = round(self.request_rate * SECONDS_AT_A_RATE) if self.request_rate else 0
        return max(LEAST_PROMPTS, PROMPTS_A_SLOT * (self.concurrency or 1), at_rate)

    @property
    def seed(self) -> int:
        """The seed that those of the runs are counted from: as --seed says, else 0."""
        return int(_number(value_of(self.flags, "--seed") or 0, "--seed", int, 0))

    def as_dict(self) -> dict[str, Any]:
        """As the result file has it."""
        return {
            "case": self.case,
            "concurrency": self.concurrency,
            "request_rate": self.request_rate,
            "flags": list(self.flags),
        }


@dataclass(frozen=True)
class Plan:
    """The whole measurement."""

    model: str
    serve_flags: tuple[str, ...]
    points: tuple[Point, ...]
    order: str = "ABBA"
    repeats: int = 1
    """How often each server is measured at each point."""
    warmups: int = 1
    """Runs at each point whose numbers are thrown away, on each server."""
    start_limit: float = 1800.0
    """Seconds a server may take until it is ready."""

    @property
    def sides(self) -> tuple[str, ...]:
        """Which server is started when."""
        return ORDERS[self.order]

    @property
    def served_name(self) -> str:
        """The name that requests give the model."""
        return value_of(self.serve_flags, "--served-model-name") or "bench"


def make_points(
    bench_flags: Sequence[str], concurrency: Optional[str], request_rate: Optional[str], cases: Optional[Path]
) -> tuple[Point, ...]:
    """The points of the options, or of a file of cases.

    Args:
        bench_flags: flags of `vllm bench serve`, for all cases.
        concurrency: comma-separated; request_rate: likewise. Every rate is measured at every concurrency.
        cases: a TOML file of `[[case]]` tables with name, flags, concurrency and request_rate.

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
            [_number(text, "--concurrency", int, 1) for text in concurrency.split(",")] if concurrency else [],
            [_number(text, "--request-rate", float, 0) for text in request_rate.split(",")] if request_rate else [],
        )
    for point in points:
        check_bench_flags(point.flags)
        _ = point.prompts, point.seed
    labels = [point.label for point in points]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"The case {label!r} is there {labels.count(label)} times; give each a name or load of its own.")
    return points


def check_model_and_flags(model: str, serve_flags: Sequence[str]) -> None:
    """Refuse what cannot be served or is chosen by this command.

    Raises:
        UserError: it is.
    """
    if model.startswith("-"):
        raise UserError(f"MODEL is {model!r}, which is a flag. Give the model first: bench serve MODEL [vllm serve flags].")
    for flag in _OURS_OF_SERVE:
        if _has(serve_flags, flag):
            raise UserError(f"{flag} is chosen by this command, a free port of this machine; leave it out.")
    if (Path.cwd() / "vllm").is_dir():
        raise UserError(f"{Path.cwd()} holds a folder 'vllm', which Python may take for the package. Go to another folder.")


def check_bench_flags(flags: Sequence[str]) -> None:
    """Refuse flags of `vllm bench serve` that this command sets, and a data set that is not there.

    Raises:
        UserError: there is one.
    """
    for flag in _OURS_OF_BENCH:
        if _has(flags, flag):
            raise UserError(f"{flag} of `vllm bench serve` is set by this command; leave it out, or see --help for the loads.")
    name, path = value_of(flags, "--dataset-name") or "random", value_of(flags, "--dataset-path")
    if name == "sharegpt" and path is None:
        raise UserError("--dataset-name sharegpt needs --dataset-path FILE: a JSON file in ShareGPT's form.")
    if name == "sharegpt" and path is not None and not Path(path).is_file():
        raise UserError(f"--dataset-path {path} is no file; give the ShareGPT JSON file that is to be used.")


def value_of(flags: Sequence[str], name: str) -> Optional[str]:
    """The last value of a flag, given as `--flag value` or `--flag=value`; None where it is not given."""
    found = None
    for index, flag in enumerate(flags):
        if flag == name and index + 1 < len(flags):
            found = flags[index + 1]
        elif flag.startswith(f"{name}="):
            found = flag.partition("=")[2]
    return found


def _has(flags: Sequence[str], name: str) -> bool:
    return any(flag == name or flag.startswith(f"{name}=") for flag in flags)


def _tables(cases: Path) -> list[dict[str, Any]]:
    try:
        read = tomllib.loads(cases.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--cases {cases} cannot be read: {error}. Give a TOML file of [[case]] tables.") from None
    tables = read.get("case")
    if not isinstance(tables, list) or not tables or set(read) != {"case"}:
        raise UserError(f"--cases {cases} must hold [[case]] tables and nothing else; it holds {', '.join(read) or 'nothing'}.")
    return tables


def _points_of(table: dict[str, Any], bench_flags: Sequence[str], cases: Path) -> tuple[Point, ...]:
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
        (*bench_flags, *map(str, flags)),
        [_number(value, f"{cases}: concurrency of {name}", int, 1) for value in _listed(table.get("concurrency"))],
        [_number(value, f"{cases}: request_rate of {name}", float, 0) for value in _listed(table.get("request_rate"))],
    )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _product(case: str, flags: tuple[str, ...], levels: Sequence[Any], rates: Sequence[Any]) -> tuple[Point, ...]:
    if not levels and not rates:
        levels = [1]
    return tuple(Point(case, flags, level, rate) for level in levels or [None] for rate in rates or [None])


def _number(value: Any, name: str, kind: type, least: int) -> Any:
    try:
        number = kind(str(value))
    except ValueError:
        number = -1
    zero = number == 0 and kind is float  # a rate
    if not least <= number < 1_000_000 or zero:
        wanted = "a whole number from 0 on" if kind is int and least == 0 else "numbers above 0, such as 1,4,16"
        raise UserError(f"{name} is {value!r}; give {wanted}.")
    return number
