"""How a tool that records what it sees ends: what it says, and its exit code."""

from __future__ import annotations

import os
import signal

import pytest

from tools.environment import SetUpFailed
from tools.outcome import exit_code_of


def test_nothing_wrong_is_0_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(list) == 0
    assert capsys.readouterr() == ("", "")


def test_each_problem_is_told_as_it_is_and_the_code_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: ["0.26.0: [no] answer", "0.33.0: late"]) == 1
    assert capsys.readouterr().out == "Failed. 0.26.0: [no] answer\nFailed. 0.33.0: late\n"


def test_a_set_up_that_failed_is_told_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> list[str]:
        raise SetUpFailed("Installing failed.")

    assert exit_code_of(work) == 1
    assert capsys.readouterr() == ("", "Installing failed.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_with_its_code(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> list[str]:
        os.kill(os.getpid(), number)
        return ["it went on"]

    assert exit_code_of(work) == 128 + number
    assert f"stopped by {number.name}. What was recorded before is kept" in capsys.readouterr().out
