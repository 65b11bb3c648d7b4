"""What `bench serve` says while it works: a live line on a terminal, whole lines elsewhere; all of it on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Teller:
    """Use it in a `with` statement."""

    def __init__(self, runs: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=runs)

    def __enter__(self) -> Teller:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def now(self, text: str) -> None:
        """What is going on; seen on a terminal only."""
        self._bar.update(self._task, description=escape(text))

    def done(self, runs: int = 1) -> None:
        """So many runs are over, measured or not."""
        self._bar.advance(self._task, runs)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(escape(text), soft_wrap=True)
