"""What is to be measured: the cases, their loads, and the order of the servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError

UPSTREAM, PATCHED = "upstream", "patched"
ORDERS = {"ABBA": (UPSTREAM, PATCHED, PATCHED, UPSTREAM), "AB": (UPSTREAM, PATCHED)}
LOAD, CASE = WARM_EACH = ("load", "case")
LEAST_PROMPTS = 16
PROMPTS_A_SLOT = 4  # so that the ramps at both ends of a run weigh little
SECONDS_AT_A_RATE = 60
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
    count: Optional[int] = None
    """Requests that are sent, unless --num-prompts among the flags says; None: enough for this load."""

    @property
    def label(self) -> str:
        """For people: ``prefill, concurrency 4``."""
        loads = [f"concurrency {self.concurrency}"] if self.concurrency else []
        loads += [f"{self.request_rate:g} requests/s"] if self.request_rate else []
        return ", ".join([self.case, *loads])

    @property
    def prompts(self) -> int:
        """How many requests are sent: as --num-prompts says, else as the case says, else enough for this load."""
        given = value_of(self.flags, "--num-prompts")
        if given is not None:
            return int(number(given, "--num-prompts", int, 1))
        if self.count is not None:
            return self.count
        at_rate = round(self.request_rate * SECONDS_AT_A_RATE) if self.request_rate else 0
        return max(LEAST_PROMPTS, PROMPTS_A_SLOT * (self.concurrency or 1), at_rate)

    @property
    def seed(self) -> int:
        """The seed that those of the runs are counted from: as --seed says, else 0."""
        return int(number(value_of(self.flags, "--seed") or 0, "--seed", int, 0))

    def as_dict(self) -> dict[str, Any]:
        """As the result file has it."""
        return {
            "case": self.case,
            "concurrency": self.concurrency,
            "request_rate": self.request_rate,
            "prompts": self.prompts,
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
    """Runs whose numbers are thrown away, on each server, before each point or case, as `warm_each` says."""
    start_limit: float = 1800.0
    """Seconds a server may take until it is ready."""
    minutes: Optional[float] = None
    """After this time no point is begun; each server has an equal share of it. None: no limit."""
    groups: tuple[str, ...] = ()
    """Values of CUDA_VISIBLE_DEVICES, one for each of the two servers that run at once; none: one server at a time."""
    warm_each: str = LOAD
    """``load``: before each point, with its own load. ``case``: once before each case, with its highest concurrency."""
    deaths: int = 2
    """So many servers of one leg may die in one case; then its other loads are left out there."""

    @property
    def sides(self) -> tuple[str, ...]:
        """Which server is started when."""
        return ORDERS[self.order]

    @property
    def rounds(self) -> tuple[tuple[tuple[int, str, str], ...], ...]:
        """What runs at once, round after round: number of the leg from 1 on, side, and group (empty: all cards).

        With two groups and the order ABBA each group serves each side once.
        """
        if not self.groups:
            return tuple(((leg, side, ""),) for leg, side in enumerate(self.sides, start=1))
        legs = [(leg, side, self.groups[(leg - 1) % 2]) for leg, side in enumerate(self.sides, start=1)]
        return tuple(tuple(legs[first : first + 2]) for first in range(0, len(legs), 2))

    def to_warm(self, point: Point) -> Point:
        """The point whose load warms up for this one."""
        if self.warm_each == LOAD:
            return point
        return max((one for one in self.points if one.case == point.case), key=lambda one: one.concurrency or 0)

    @property
    def served_name(self) -> str:
        """The name that requests give the model."""
        return value_of(self.serve_flags, "--served-model-name") or "bench"


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


def make_groups(text: Optional[str]) -> tuple[str, ...]:
    """``0-3,4-7`` as values of CUDA_VISIBLE_DEVICES: ``("0,1,2,3", "4,5,6,7")``. ``+`` joins cards that are not in a row.

    Raises:
        UserError: these are not two groups of different cards.
    """
    if text is None:
        return ()
    groups = []
    for group in text.split(","):
        cards: list[int] = []
        for part in group.split("+"):
            first, _, last = part.partition("-")
            if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
                raise UserError(f"--groups has {part!r}; give two groups of card numbers, such as 0-3,4-7 or 0+2,1+3.")
            cards += range(int(first), int(last or first) + 1)
        groups.append(cards)
    everything = [card for cards in groups for card in cards]
    if len(groups) != 2 or len(set(everything)) != len(everything):
        raise UserError(f"--groups is {text!r}; give two groups of different cards, such as 0-3,4-7.")
    if len(groups[0]) != len(groups[1]):
        raise UserError(f"--groups {text} has {len(groups[0])} and {len(groups[1])} cards; give both sides as many.")
    return tuple(",".join(map(str, cards)) for cards in groups)


def number(value: Any, name: str, kind: type, least: int) -> Any:
    """`value` as an int or a float from `least` on, where a float is above 0.

    Raises:
        UserError: it is not; the message has `name`.
    """
    try:
        read = kind(str(value))
    except ValueError:
        read = -1
    zero = read == 0 and kind is float  # a rate
    if not least <= read < 1_000_000 or zero:
        wanted = "a whole number from 0 on" if kind is int and least == 0 else "numbers above 0, such as 1,4,16"
        raise UserError(f"{name} is {value!r}; give {wanted}.")
    return read
