"""`fence -- COMMAND`: environment, exit codes, and reports as core dumps appear."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_glm_patch.fence import command
from vllm_glm_patch.fence import report as report_module
from vllm_glm_patch.fence.coredump import parse
from vllm_glm_patch.fence.library import FenceError
from vllm_glm_patch.fence.options import Options
from vllm_glm_patch.fence.xid import Xid

from .transcripts import RECORD, transcript


@pytest.fixture
def options(libraries: tuple[Path, Path], tmp_path: Path) -> Options:
    return Options(library=str(libraries[0]), directory=str(tmp_path / "out"))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("raise SystemExit(7)", 7)])
def test_the_exit_code_is_the_commands(options: Options, code: str, expected: int) -> None:
    assert command.run(python(code), options) == expected


def test_death_by_signal_is_128_and_the_signal(options: Options) -> None:
    assert command.run(python("import os; os.abort()"), options) == 128 + signal.SIGABRT


def test_the_environment_carries_options_hook_and_core_dumps(options: Options) -> None:
    env = command.environment(options, {"PYTHONPATH": "/theirs", "PATH": "/bin"})
    assert env["PYTHONPATH"].split(os.pathsep) == [str(command.HOOK), "/theirs"]
    assert Options.from_environment(env) == options
    assert env["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] == "1"
    assert env["CUDA_COREDUMP_FILE"] == f"{options.directory}/core-%p.nvcudmp"
    assert env["PATH"] == "/bin"
    assert env["CUDA_COREDUMP_SHOW_PROGRESS"] == "1"


def test_launches_that_are_waited_for_leave_no_core_dump(options: Options) -> None:
    env = command.environment(replace(options, launches=True), {})
    assert env["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] == "0"


def test_what_the_user_says_of_core_dumps_stays(options: Options) -> None:
    env = command.environment(options, {"CUDA_COREDUMP_SHOW_PROGRESS": "0", "CUDA_COREDUMP_GENERATION_FLAGS": "mine"})
    assert (env["CUDA_COREDUMP_SHOW_PROGRESS"], env["CUDA_COREDUMP_GENERATION_FLAGS"]) == ("0", "mine")


def test_a_core_dump_is_reported_and_turns_success_into_failure(
    options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_SETTLED", 0)
    monkeypatch.setattr(report_module, "read_core_dump", lambda path: parse(transcript([1 << 40])))
    code = "import os; name = os.environ['CUDA_COREDUMP_FILE'].replace('%p', '77'); open(name, 'w').write('x')"
    assert command.run(python(code), options) == 1
    assert "process 77 faulted: Warp Illegal Address" in capfd.readouterr().err
    (told,) = json.loads((Path(options.directory) / "report.json").read_text())
    assert told["fault"]["device"] == 0


@pytest.mark.parametrize("rerun", [False, True])
def test_a_core_dump_that_tells_nothing_leads_to_the_search_or_says_how(
    rerun: bool, options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def unreadable(path: Path) -> object:
        raise RuntimeError(f"{path} (69 KiB) holds no device")

    searched: list[int] = []
    monkeypatch.setattr(command, "_SETTLED", 0)
    monkeypatch.setattr(report_module, "read_core_dump", unreadable)
    monkeypatch.setattr(command, "_find_by_rerun", lambda run, options, fault: searched.append(fault.pid))
    code = "import os; name = os.environ['CUDA_COREDUMP_FILE'].replace('%p', '77'); open(name, 'w').write('x')"
    assert command.run(python(code), options, rerun=rerun) == 1
    told = capfd.readouterr().err
    assert "holds no device" in told
    assert searched == ([77] if rerun else [])
    assert ("CUDA_LAUNCH_BLOCKING=1" in told) != rerun
    assert ("--launches" in told) != rerun


def test_the_record_of_a_launch_is_a_fault_without_a_core_dump(
    options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_SETTLED", 0)
    code = f"open({options.directory!r} + '/launch-77.json', 'w').write({json.dumps(RECORD)!r})"
    assert command.run(python(code), options) == 1
    told = capfd.readouterr().err
    assert "process 77 faulted: CUDA_ERROR_ILLEGAL_ADDRESS" in told
    assert "kernel       reads_past(float*) <<<(1,1,1),(32,1,1)>>>" in told
    assert "--launches" not in told  # the advice for those who do not know the kernel


NO_CUPTI = {
    "pid": 77, "cupti": "libcupti.so.12", "looked": "/site/libcupti.so.12, /toolkit/libcupti.so.12*", "loaded": False,
    "problem": "CUPTI cannot be loaded: libcupti.so.12: cannot open shared object file: No such file or directory",
}  # fmt: skip
HELD = {**NO_CUPTI, "cupti": "/site/libcupti.so.12", "loaded": True, "problem": "cuptiSubscribe answers 39 (…)"}
WATCHED = {**HELD, "problem": ""}


@pytest.mark.parametrize(
    ("watch", "expected"),
    [
        (NO_CUPTI, ("CUPTI cannot be loaded: libcupti.so.12", "/site/libcupti.so.12, /toolkit/libcupti.so.12*",
                    "pip install nvidia-cuda-cupti-cu12", "VLLM_GLM_PATCH_FENCE_CUPTI")),
        (HELD, ("cuptiSubscribe answers 39", "leave out other profilers")),
        (WATCHED, ("watched through /site/libcupti.so.12, and none was seen to fault", "CUDA_LAUNCH_BLOCKING=1")),
        (None, ("it allocated nothing under the fence", "not be installed")),
    ],
)  # fmt: skip
def test_where_launches_told_nothing_it_says_what_is_missing_and_not_to_use_launches(
    watch: dict[str, object] | None,
    expected: tuple[str, ...],
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "KernelLog", lambda: FakeLog(77, 1))
    code = f"open({options.directory!r} + '/blocks-77.bin', 'w')"
    if watch:
        code += f"; open({options.directory!r} + '/watch-77.json', 'w').write({json.dumps(watch)!r})"
    assert command.run(python(code), replace(options, launches=True)) == 1
    told = capfd.readouterr().err
    assert "process 77 faulted: MMU fault" in told
    for part in expected:
        assert part in told
    assert "again with --launches" not in told
    assert command._WITHOUT_DUMP not in told
    (kept,) = json.loads((Path(options.directory) / "report.json").read_text())
    assert bool(watch and watch["problem"]) == ("launches were not watched" in kept["problem"])


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_that_ends_badly_is_told_that_nothing_was_watched(
    code: int, options: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(options.directory).mkdir()
    (Path(options.directory) / "watch-5.json").write_text(json.dumps({**HELD, "pid": 5}))  # of an earlier run
    write = "; ".join(
        f"open({options.directory!r} + '/watch-{pid}.json', 'w').write({json.dumps({**NO_CUPTI, 'pid': pid})!r})"
        for pid in (77, 78)
    )
    assert command.run(python(f"{write}; raise SystemExit({code})"), replace(options, launches=True)) == code
    assert capfd.readouterr().err.count("launches were not watched") == code


class FakeLog:
    """The kernel's log with one fault; `pid` as the host counts."""

    problem = ""

    def __init__(self, pid: int | None, address: int) -> None:
        self._fault = Xid(pid, "python", "0000:1b:00", address, "read", "NVRM: Xid …")

    def faults(self) -> list[Xid]:
        return [self._fault]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("pid", "address", "ours"), [(77, 1, True), (5, 0x400000, True), (None, 0x400000, True), (5, 1, False)]
)
def test_the_kernels_log_alone_makes_a_fault(
    pid: int | None,
    address: int,
    ours: bool,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "KernelLog", lambda: FakeLog(pid, address))
    header = struct.pack("<8sIIQQIIQQQ", b"GLMFENCE", 1, 1, 77, 2 << 20, 512, 0, 0, 0, 0)
    row = struct.pack("<QQQQQQiIII", 0x3FFE00, 512, 0x200000, 0x400000, 0, 1, 0, 1, 0, 0)
    code = f"open({options.directory!r} + '/blocks-77.bin', 'wb').write({header + row!r})"
    assert command.run(python(code), options) == int(ours)
    told = capfd.readouterr().err
    assert ("process 77 faulted: MMU fault" in told) is ours
    assert ("block        512 bytes at 0x3ffe00" in told) is (ours and address == 0x400000)


def test_old_records_and_lists_are_not_reported_again(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(options.directory).mkdir()
    (Path(options.directory) / "launch-1.json").write_text(json.dumps(RECORD))
    (Path(options.directory) / "blocks-2.bin").touch()
    monkeypatch.setattr(command, "KernelLog", lambda: FakeLog(2, 1))
    assert command.run(python("pass"), options) == 0


def test_an_old_core_dump_is_not_reported_again(options: Options) -> None:
    Path(options.directory).mkdir()
    (Path(options.directory) / "core-1.nvcudmp").touch()
    assert command.run(python("pass"), options) == 0


def test_a_directory_of_its_own_is_removed_where_nothing_faulted(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mark = tmp_path / "seen"
    code = f"import os; open({str(mark)!r}, 'w').write(os.environ['VLLM_GLM_PATCH_FENCE_DIRECTORY'])"
    assert command.run(python(code), Options(library=options.library)) == 0
    assert Path(mark.read_text()).parent == tmp_path
    assert not Path(mark.read_text()).exists()


def test_a_missing_library_is_said_before_the_command_runs(tmp_path: Path) -> None:
    with pytest.raises(FenceError, match=r"nowhere\.so"):
        command.run(python(f"open({str(tmp_path / 'ran')!r}, 'w')"), Options(library=str(tmp_path / "nowhere.so")))
    assert not (tmp_path / "ran").exists()


def test_sigterm_is_handed_on(options: Options) -> None:
    code = (
        "import sys; from pathlib import Path; from vllm_glm_patch.fence import command; "
        "from vllm_glm_patch.fence.options import Options; "
        f"o = Options(library={options.library!r}, directory={options.directory!r}); "
        "sys.exit(command.run([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(30)'], o))"
    )
    root = str(Path(command.__file__).parents[2])
    outer = subprocess.Popen(python(code), stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})
    assert outer.stdout is not None
    outer.stdout.readline()
    started = time.monotonic()
    outer.terminate()
    assert outer.wait(timeout=20) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 10
    outer.stdout.close()
