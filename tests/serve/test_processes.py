"""No process outlives the one who started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import Rooms

from tools.server import ServerFailed
from vllm_glm_patch.tools.processes import Interrupted, Session, interruptible, stop_all

ROOT = Path(__file__).parents[2]
# A command that ignores SIGTERM and has a child that does too.
_STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) < 2:
    subprocess.Popen([sys.executable, __file__, "child"])
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn(tmp_path: Path) -> Path:
    file = tmp_path / "stubborn.py"
    file.write_text(_STUBBORN)
    return file


def wait_until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "this never came about"
        time.sleep(0.05)


def living_in(folder: Path) -> list[int]:
    """The processes whose working directory is `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
    return found


def test_stopping_ends_children_that_ignore_sigterm(stubborn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_glm_patch.tools.processes._GRACE", 0.5)
    session = Session([sys.executable, stubborn], tmp_path / "log", folder=tmp_path)
    wait_until(lambda: session.last_lines(9).count("up") == 2)
    assert len(session.members()) == 2
    session.stop()
    assert session.members() == []
    assert living_in(tmp_path) == []


def test_stopping_ends_children_of_a_command_that_has_ended(stubborn: Path, tmp_path: Path) -> None:
    session = Session([sys.executable, stubborn], tmp_path / "log", folder=tmp_path)
    wait_until(lambda: session.last_lines(9).count("up") == 2)
    os.kill(session.pid, signal.SIGKILL)
    session.wait(5)
    assert len(session.members()) == 1
    session.stop()
    assert living_in(tmp_path) == []


def test_the_set_up_has_it_on_a_python_without_any_package(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tools.environment import Session; from tools import processes\n"
        "assert 'vllm_glm_patch' not in sys.modules and 'packaging' not in sys.modules\n"
        f"session = Session(['sleep', '600'], pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "session.stop()\nprint(session.members())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_while_a_command_starts_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Popen has a process by then that nobody knows yet."""

    class SlowPopen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", SlowPopen)
    with pytest.raises(Interrupted) as stopped, interruptible():
        Session(["sleep", "600"], tmp_path / "log", folder=tmp_path)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert living_in(tmp_path) == []


def test_an_interruption_ends_the_sessions_of_other_threads_and_starts_none_more(tmp_path: Path) -> None:
    refused = []

    def work() -> None:
        try:  # the signal may come while the first is being started
            Session(["sleep", "600"], tmp_path / "log", folder=tmp_path).wait(60)
            Session(["sleep", "600"], tmp_path / "log", folder=tmp_path)
        except Interrupted:
            refused.append(True)

    thread = threading.Thread(target=work)
    with pytest.raises(Interrupted), interruptible():
        thread.start()
        wait_until(lambda: living_in(tmp_path))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            stop_all()
            thread.join(60)
    assert refused == [True]
    assert living_in(tmp_path) == []


@pytest.mark.serve
def test_server_that_ends_by_itself_is_told_with_the_end_of_its_log(rooms: Rooms) -> None:
    with rooms.server("wrong-flag", more_flags=["--no-such-flag"]) as server, pytest.raises(ServerFailed) as failed:
        server.wait_until_ready()
    assert "ended with exit code 2" in str(failed.value)
    assert "--no-such-flag" in str(failed.value)
    assert str(server.log) in str(failed.value)


@pytest.mark.serve
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_demonstration_that_is_stopped_leaves_no_process(rooms: Rooms, number: signal.Signals) -> None:
    folder = rooms.new_folder("stopped")
    command = [sys.executable, "-m", "tools.demo", "--folder", str(folder)]
    demo = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log = folder / "server.log"
        wait_until(lambda: log.exists() and "EngineCore" in log.read_text())  # vLLM has its children by now
        assert len(living_in(folder)) > 1
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 128 + number
    assert f"stopped by {number.name}" in output
    assert living_in(folder) == []
