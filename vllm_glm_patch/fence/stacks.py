"""Python stacks of allocations: each different one is written once, so that it can be read after a crash."""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
from pathlib import Path

from .options import stacks_path

DEPTH = 24  # frames kept, innermost first


class StackRecorder:
    """Gives every different Python stack a number and writes it to `directory`, a file a process."""

    def __init__(self, directory: str):
        self._directory = directory
        self._lock = threading.Lock()
        self._numbers: dict[tuple[tuple[str, int, str], ...], int] = {}
        self._pid = 0

    def number(self, size: int, device: int) -> int:
        """The number of the caller's stack; 0 where there is none. Called for each allocation; never raises."""
        try:
            frame = sys._getframe(1)
            key: list[tuple[str, int, str]] = []
            while frame is not None and len(key) < DEPTH:
                key.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
                frame = frame.f_back  # type: ignore[assignment]
            return self._number(tuple(key)) if key else 0
        except Exception:  # an allocation must not fail for its stack's sake
            return 0

    def _number(self, key: tuple[tuple[str, int, str], ...]) -> int:
        with self._lock:
            if self._pid != os.getpid():  # a fork starts its own file
                self._pid, self._numbers = os.getpid(), {}
            if key in self._numbers:
                return self._numbers[key]
            number = self._numbers[key] = len(self._numbers) + 1
            lines = [f"{file}:{line} in {name}: {linecache.getline(file, line).strip()}" for file, line, name in key]
            with stacks_path(self._directory, self._pid).open("a") as out:
                out.write(json.dumps({"stack": number, "frames": lines}) + "\n")
            return number


def read_stacks(path: Path) -> dict[int, list[str]]:
    """Number → frames, innermost first; a line cut off by a crash is left out."""
    stacks: dict[int, list[str]] = {}
    if not path.exists():
        return stacks
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            stacks[row["stack"]] = row["frames"]
    return stacks
