"""Prints tables: drawn by rich on a terminal, aligned plain text everywhere else, so that pipes get whole lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from packaging.specifiers import SpecifierSet
from packaging.version import Version


@dataclass(frozen=True)
class Table:
    """Rows of text under one title; the last column may be long."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        """One line a row, the columns aligned."""
        lines = [self.columns, *self.rows] if any(self.columns) else self.rows
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(self.columns))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join(([self.title] if self.title else []) + text)


def version_range(versions: SpecifierSet) -> str:
    """A range in the order people write it: ``>=0.10.0, <0.20.0``."""
    return ", ".join(map(str, sorted(versions, key=lambda one: (Version(one.version.rstrip(".*")), str(one)))))


def on_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def show(table: Table, *, plain: bool | None = None) -> None:
    """Print a table; plain unless stdout is a terminal, where `plain` does not say."""
    if plain if plain is not None else not on_terminal():
        typer.echo(table.plain())
        return
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(title=Text(table.title), title_justify="left", show_header=any(table.columns))
    for index, column in enumerate(table.columns):
        drawn.add_column(column, no_wrap=index == 0 and len(table.columns) > 1, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def show_json(value: Any) -> None:
    """Print JSON, and nothing else, to stdout."""
    typer.echo(json.dumps(value, indent=2))
