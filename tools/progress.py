"""Says what is being done and how long it took: a clock on a terminal, a sign of life every now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_SAY_EVERY = 15.0  # seconds between two signs of life where there is no terminal
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Tick:
    """Called again and again while something is waited for; says every now and then that it still is."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()

    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._started

    def __call__(self) -> None:
        if not console.is_terminal and time.monotonic() - self._said >= _SAY_EVERY:
            self._said = time.monotonic()
            console.print(f" ... {self.seconds():.0f} s", end="")
            sys.stdout.flush()


@contextmanager
def doing(what: str) -> Iterator[Tick]:
    """Say what is being done, and afterwards how long it took."""
    tick = Tick()
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield tick
        console.print(what, end="")
    else:
        console.print(what, end="")
        sys.stdout.flush()
        yield tick
    console.print(f" ... {tick.seconds():.1f} s")
