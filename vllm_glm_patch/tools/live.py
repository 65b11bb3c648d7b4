"""What a long command says while it works: a live line on a terminal, whole lines elsewhere; all of it on standard error."""

from __future__ import annotations

from typing import Optional, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_Self = TypeVar("_Self", bound="Live")  # typing.Self is there from Python 3.11 on


class Live:
    """The line is there while this is used in a `with` statement, and gone afterwards; subclasses say what stands in it."""

    def __init__(self, width: int, text: str = "", total: Optional[int] = None) -> None:
        """Nothing is shown yet.

        Args:
            width: of the bar, in characters.
            text: stands behind the bar at first.
            total: how much there is to do; None where that is not known yet.
        """
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(width),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(text, total=total)

    def __enter__(self: _Self) -> _Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(escape(text), soft_wrap=True)
