"""The client of `bench serve` that stays: calls of `vllm` in children of one process that has imported it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_glm_patch.tools.bench.client import Call, Client, is_of_this_python, read_result

ROOT = Path(__file__).parents[2]
MODULE = (sys.executable, "-m", "vllm.entrypoints.cli.main")
_MAIN = """
import os, sys, time
def main():
    print(os.getpid(), os.getppid(), *sys.argv[1:])
    if sys.argv[1] == "slow":
        sys.stdout.flush()
        time.sleep(100)
    if sys.argv[1] == "broken":
        raise ValueError("no such thing")
    sys.exit(int(sys.argv[2]))
if __name__ == "__main__":
    main()
"""


def write_site(folder: Path, torch: str = "") -> None:
    """A small vLLM, and in place of the rest that is imported nothing."""
    package = folder / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    (package / "main.py").write_text(_MAIN)
    (folder / "transformers.py").touch()
    (folder / "torch.py").write_text(torch)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    write_site(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    with Client(MODULE, tmp_path / "client.log") as made:
        yield made


def ended(call: Call, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while (code := call.exit_code()) is None:
        assert time.monotonic() < deadline, "the call never ended"
        time.sleep(0.02)
    call.stop()
    return code


def test_calls_are_children_of_one_process_with_logs_and_exit_codes_of_their_own(client: Client, tmp_path: Path) -> None:
    codes = [ended(client.call(["bench", str(code)], tmp_path / f"{code}.log")) for code in (0, 3)]
    assert codes == [0, 3]
    (pid, parent, *said), (other_pid, other_parent, *other_said) = ((tmp_path / f"{c}.log").read_text().split() for c in (0, 3))
    assert parent == other_parent
    assert pid != other_pid
    assert (said, other_said) == (["bench", "0"], ["bench", "3"])


def test_an_exception_is_in_the_log_and_the_next_call_is_made(client: Client, tmp_path: Path) -> None:
    assert ended(client.call(["broken"], tmp_path / "broken.log")) == 1
    assert "ValueError: no such thing" in (tmp_path / "broken.log").read_text()
    assert ended(client.call(["bench", "0"], tmp_path / "next.log")) == 0


def test_a_call_that_is_stopped_leaves_no_process(client: Client, tmp_path: Path) -> None:
    log = tmp_path / "slow.log"
    call = client.call(["slow"], log)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    call.stop()
    child = Path("/proc", log.read_text().split()[0])
    while child.exists():
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.02)
    assert ended(client.call(["bench", "0"], tmp_path / "next.log")) == 0


def test_where_the_process_cannot_stay_each_call_starts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_site(tmp_path / "site", torch="import os; os._exit(1)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    with Client(MODULE, tmp_path / "client.log") as client:
        assert ended(client.call(["bench", "4"], tmp_path / "4.log")) == 4


def test_a_command_of_another_python_is_known_as_such() -> None:
    assert is_of_this_python(MODULE)
    assert is_of_this_python([str(Path(sys.executable).parent / "vllm")])
    assert not is_of_this_python(["/elsewhere/bin/vllm"])


def test_times_between_tokens_are_left_out_where_there_is_one_token(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    numbers = {"median_ttft_ms": 5.0, "median_tpot_ms": 0.0, "p99_itl_ms": 0.0, "mean_e2el_ms": float("inf")}
    file.write_text(json.dumps({"completed": 2, "duration": 2.0, "total_input_tokens": 100, **numbers}))
    assert read_result(file, 0).metrics == {"median_ttft_ms": 5.0, "input_throughput": 50.0}
