"""A process whose core dump is being written lives until it is whole."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vllm_glm_patch.fence import command, dumping
from vllm_glm_patch.fence.options import Options

# A "driver" as the real one is: a thread of the process, gone with it. The dump is 1000 bytes long.
DRIVER = """
import multiprocessing, os, signal, struct, sys, threading, time
import torch
def begin(seconds):
    core = os.environ["CUDA_COREDUMP_FILE"].replace("%p", str(os.getpid()))
    header = bytearray(64)
    header[:4] = b"\\x7fELF"
    struct.pack_into("<Q", header, 0x28, 872)
    struct.pack_into("<HH", header, 0x3A, 64, 2)
    with open(core, "wb") as file:
        file.write(header)
    def write():
        time.sleep(seconds)
        with open(core, "ab") as file:
            file.write(bytes(936))
    threading.Thread(target=write, daemon=True).start()
def fault(seconds):
    begin(seconds)
    raise SystemExit(3)
"""
ENDS = {
    "it ends": "fault(1.5)",
    "a forked child ends": """
child = multiprocessing.get_context("fork").Process(target=fault, args=(1.5,))
child.start(); child.join(); assert child.exitcode == 3, child.exitcode
""",
    "a forked child is terminated while it waits": """
child = multiprocessing.get_context("fork").Process(target=fault, args=(2,))
child.start(); time.sleep(1); child.terminate(); child.join()
""",
    "a forked child is killed": """
def work(): begin(2); time.sleep(60)
child = multiprocessing.get_context("fork").Process(target=work)
child.start(); time.sleep(0.5); child.kill(); child.join(); assert child.exitcode == -signal.SIGKILL
""",
}


def header(sections_at: int, entries: int) -> bytes:
    made = bytearray(64)
    made[:4] = b"\x7fELF"
    struct.pack_into("<Q", made, 0x28, sections_at)
    struct.pack_into("<HH", made, 0x3A, 64, entries)
    return bytes(made)


@pytest.mark.parametrize("how", list(ENDS))
def test_the_end_waits_for_the_dump(how: str, tmp_path: Path) -> None:
    environment = command.environment(Options(directory=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + ENDS[how]], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    (core,) = tmp_path.glob("core-*")
    assert dumping.complete(core), (core.stat().st_size, done.stderr)
    assert "Assertion" not in done.stderr


def test_without_a_fault_nothing_waits(tmp_path: Path) -> None:
    begin = time.monotonic()
    dumping.hold(tmp_path)
    assert not dumping.wait(tmp_path / "core-1.nvcudmp")
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("launches", [False, True])
def test_a_faulted_process_waits_only_where_a_dump_is_asked_for(launches: bool, tmp_path: Path) -> None:
    code = """
import torch
from vllm_glm_patch.fence import dumping
dumping.faulted = lambda: True
dumping._APPEARS = 0.1
"""
    environment = command.environment(Options(directory=str(tmp_path), launches=launches))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    assert ("it ends when its core dump is written" in done.stderr) is not launches


def test_a_dump_that_is_never_whole_is_waited_for_so_long(tmp_path: Path) -> None:
    core = tmp_path / "core-1.nvcudmp"
    core.write_bytes(header(175_389_142, 1315))
    begin = time.monotonic()
    assert not dumping.wait(core, limit=0.3)
    assert 0.2 < time.monotonic() - begin < 5


def test_a_dump_that_no_longer_grows_is_given_up_before_the_limit(tmp_path: Path) -> None:
    core = tmp_path / "core-1.nvcudmp"
    core.write_bytes(header(175_389_142, 1315))
    begin = time.monotonic()
    assert not dumping.wait(core, limit=30, still=0.3)
    assert 0.2 < time.monotonic() - begin < 10


def test_a_dump_that_grows_slowly_is_waited_for(tmp_path: Path) -> None:
    core = tmp_path / "core-1.nvcudmp"
    core.write_bytes(header(872, 2))

    def grow() -> None:
        for _ in range(9):
            time.sleep(0.2)
            with core.open("ab") as file:
                file.write(bytes(104))

    writer = threading.Thread(target=grow)
    writer.start()
    assert dumping.wait(core, limit=30, still=1)
    writer.join()


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (b"", False),
        (b"x" * 100, False),
        (header(872, 2), False),
        (header(872, 2) + bytes(935), False),
        (header(872, 2) + bytes(936), True),
        (header(0, 0), False),
    ],
)
def test_a_dump_is_whole_when_its_section_headers_are_there(content: bytes, whole: bool, tmp_path: Path) -> None:
    core = tmp_path / "core-1.nvcudmp"
    core.write_bytes(content)
    assert dumping.complete(core) is whole


def test_other_signals_are_sent_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    core = dumping.core_path(tmp_path, 5)
    core.write_bytes(header(872, 2))
    monkeypatch.setattr(dumping, "wait", lambda path: sent.append((0, 0)))
    kill = dumping._patient(lambda pid, number: sent.append((pid, number)), tmp_path)
    kill(5, signal.SIGTERM)
    assert sent == [(5, signal.SIGTERM)]
    kill(5, signal.SIGKILL)
    assert sent[1:] == [(0, 0), (5, signal.SIGKILL)]
    assert os.kill is not kill
