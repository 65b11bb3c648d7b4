"""Tables: whole lines for pipes, drawn for people, nothing of a cell lost."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from vllm_glm_patch.tools.output import Table, show, version_range

TABLE = Table("A title", ("first", "second"), [("a", "[bold]no markup[/bold]"), ("longer", "x" * 300)])


def test_plain_has_one_aligned_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    show(TABLE)
    assert capsys.readouterr().out.splitlines() == [
        "A title", "first   second", "a       [bold]no markup[/bold]", "longer  " + "x" * 300,
    ]  # fmt: skip


def test_drawn_has_every_cell_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show(TABLE, plain=False)
    out = capsys.readouterr().out
    assert "A title" in out and "[bold]no markup[/bold]" in out and out.count("x") == 300


def test_a_range_is_written_from_its_oldest_release_on() -> None:
    assert version_range(SpecifierSet("<0.20.0,>=0.10.0")) == ">=0.10.0, <0.20.0"
    assert version_range(SpecifierSet("!=0.17.*,>=0.9")) == ">=0.9, !=0.17.*"


def test_drawn_keeps_all_of_a_table_with_one_long_column(capsys: pytest.CaptureFixture[str]) -> None:
    show(Table("", ("",), [("word " * 60,)]), plain=False)
    assert capsys.readouterr().out.count("word") == 60
