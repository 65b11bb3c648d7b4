"""What a long command says while it works, on a terminal and elsewhere."""

from __future__ import annotations

import pytest

from vllm_glm_patch.tools.bench.progress import Teller
from vllm_glm_patch.tools.verify.journal import State
from vllm_glm_patch.tools.verify.supervise import Show


def test_elsewhere_there_are_whole_lines_and_no_live_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with Teller(3) as teller:
        teller.now("going on")
        teller.done()
        teller.say("a line with [red]brackets[/], " + "long " * 50)
    with Show(every=0.0) as show:
        show.update(State(total=7))
    assert capfd.readouterr() == (
        "",
        "a line with [red]brackets[/], " + "long " * 50 + "\n0 of 7 calls, 0 faults, 0 wrong results\n",
    )


def test_on_a_terminal_the_live_line_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Teller(3) as teller:
        teller.done(2)
        teller.now("now [here]")
    assert "2/3" in (told := capfd.readouterr().err)
    assert "now [here]" in told
    with Show(every=0.0) as show:
        assert "starting" in capfd.readouterr().err
        show.update(State(total=7))
    assert "0/7" in (told := capfd.readouterr().err)
    assert "0 faults, 0 wrong" in told
    assert "calls" not in told
