"""What the fence can be told, and how it travels to child processes: one environment variable a field."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

PREFIX = "VLLM_GLM_PATCH_FENCE"
GUARDS = ("end", "start")
POISONS = ("none", "fresh", "freed", "both")


@dataclass(frozen=True)
class Options:
    """How memory is fenced.

    Attributes:
        align: bytes, a power of two from 1 to 512. A block's size is rounded up to it, so an over-read of less than
            that may stay unseen. 16 keeps vector loads legal; 512 is what PyTorch's own allocator rounds to.
        guard: "end" puts a block's end before an unmapped page, "start" its start after one.
        poison: "fresh" fills new memory with 0xFF (NaN as a float, -1 as an integer), "freed" freed memory, "both", "none".
            Within a CUDA graph's capture nothing is filled.
        cache_mb: MiB of idle memory kept for reuse on each device. 0 never reuses: every freed block is unmapped as
            soon as its stream is done, so that a use after free faults too; slow.
        stacks: keep the Python stack of every allocation (some 20 µs each).
        directory: where journals, stacks and core dumps go. "" for none.
        only: (low, high) in bytes: only blocks of these sizes touch their guard; used by the search by rerun.
        slack: bytes between the other blocks and their guard.
        library: path of libglm_fence.so; "" for the one in this package.
        libcuda: name of the driver's library.
        launches: wait for every launch through CUPTI, so that the one that faults is named without a core dump; slow.
        cupti: path of CUPTI's library; "" for the one that torch uses.
    """

    align: int = 16
    guard: str = "end"
    poison: str = "none"
    cache_mb: int = 4096
    stacks: bool = False
    directory: str = ""
    only: tuple[int, int] = (0, 2**63 - 1)
    slack: int = 4096
    library: str = ""
    libcuda: str = "libcuda.so.1"
    launches: bool = False
    cupti: str = ""

    def __post_init__(self) -> None:
        if self.align < 1 or self.align > 512 or self.align & (self.align - 1):
            raise ValueError(f"fence align is {self.align}; it must be a power of two from 1 to 512, in bytes.")
        if self.guard not in GUARDS:
            raise ValueError(f"fence guard is {self.guard!r}; it must be one of {', '.join(GUARDS)}.")
        if self.poison not in POISONS:
            raise ValueError(f"fence poison is {self.poison!r}; it must be one of {', '.join(POISONS)}.")
        if self.cache_mb < 0 or self.slack < 0:
            raise ValueError(f"fence cache_mb is {self.cache_mb} and slack {self.slack}; neither may be negative.")
        if self.only[0] > self.only[1]:
            raise ValueError(f"fence only is {self.only}; the first size must not be above the second.")

    def to_environment(self) -> dict[str, str]:
        """The variables that make a child process run under this fence."""
        environment = {PREFIX: "1"}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                value = int(value)
            elif isinstance(value, tuple):
                value = "-".join(map(str, value))
            environment[f"{PREFIX}_{field.name.upper()}"] = str(value)
        return environment

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Options | None:
        """The options in the environment; None where VLLM_GLM_PATCH_FENCE is unset, empty or 0.

        Raises:
            ValueError: a variable holds what its option does not allow; the message names the variable.
        """
        if environment.get(PREFIX, "") in ("", "0"):
            return None
        values: dict[str, object] = {}
        for field in fields(cls):
            name = f"{PREFIX}_{field.name.upper()}"
            if name not in environment:
                continue
            text = environment[name]
            try:
                values[field.name] = _PARSERS[field.name](text)
            except ValueError as error:
                raise ValueError(f"{name} is {text!r}: {error}") from None
        return cls(**values)  # type: ignore[arg-type]


def _flag(text: str) -> bool:
    if text not in ("0", "1", ""):
        raise ValueError("set it to 0 or 1.")
    return text == "1"


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high)


_PARSERS: dict[str, Callable[[str], object]] = {
    "align": int,
    "guard": str,
    "poison": str,
    "cache_mb": int,
    "stacks": _flag,
    "directory": str,
    "only": _range,
    "slack": int,
    "library": str,
    "libcuda": str,
    "launches": _flag,
    "cupti": str,
}


def journal_path(directory: str | Path, pid: int | str) -> Path:
    return Path(directory) / f"blocks-{pid}.bin"


def core_path(directory: str | Path, pid: int | str) -> Path:
    """Where the driver puts its core dump; for CUDA_COREDUMP_FILE the process is %p."""
    return Path(directory) / f"core-{pid}.nvcudmp"


def launch_path(directory: str | Path, pid: int | str) -> Path:
    return Path(directory) / f"launch-{pid}.json"


def watch_path(directory: str | Path, pid: int | str) -> Path:
    return Path(directory) / f"watch-{pid}.json"


def stacks_path(directory: str | Path, pid: int | str) -> Path:
    return Path(directory) / f"stacks-{pid}.jsonl"
