"""What `bench serve` says while it works."""

from __future__ import annotations

from rich.markup import escape

from ..live import Live


class Teller(Live):
    """How many of all runs are over, and what is going on. Use it in a `with` statement."""

    def __init__(self, runs: int) -> None:
        super().__init__(20, total=runs)

    def now(self, text: str) -> None:
        """What is going on; seen on a terminal only."""
        self._bar.update(self._task, description=escape(text))

    def done(self, runs: int = 1) -> None:
        """So many runs are over, measured or not."""
        self._bar.advance(self._task, runs)
