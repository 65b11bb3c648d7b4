"""`fence -- COMMAND`: environment, exit codes, and reports as core dumps appear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_glm_patch.fence import command
from vllm_glm_patch.fence import report as report_module
from vllm_glm_patch.fence.coredump import parse
from vllm_glm_patch.fence.library import FenceError
from vllm_glm_patch.fence.options import Options

from .transcripts import transcript


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
