"""The command line as a whole: its commands, its exit codes, its errors, and how fast it starts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command_line import run

from vllm_glm_patch import __version__

COMMANDS = ("doctor", "patches", "scan", "model", "verify", "diagnose")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_version_is_printed() -> None:
    result = run("--version")
    assert (result.code, result.out) == (0, f"vllm-glm-patch {__version__}\n")


def test_help_lists_every_command_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.code == 0
    assert all(f" {command} " in result.out for command in COMMANDS)
    assert "Exit codes" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_tells_its_exit_codes(command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert "Exit codes: 0" in result.out


@pytest.mark.parametrize("arguments", [("nonsense",), ("scan",), ("scan", "0.17.1", "--nonsense"), ("patches", "a", "b")])
def test_a_wrong_call_leaves_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err


def test_a_mistake_of_the_user_is_told_without_a_traceback() -> None:
    result = python("-m", "vllm_glm_patch", "patches", "nonsense")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: There is no patch 'nonsense'")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["doctor"], ["patches"], ["scan", "0.17.1"]])
def test_looking_imports_neither_torch_nor_vllm(arguments: list[str]) -> None:
    program = (
        "import sys; from vllm_glm_patch import cli\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = python("-c", program)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr
