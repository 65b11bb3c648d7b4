"""The commands `fence` and `diagnose` as a user gives them; the fence itself is tested in tests/fence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_glm_patch import catalog
from vllm_glm_patch.cli import app
from vllm_glm_patch.errors import UserError
from vllm_glm_patch.fence import command as fence_command
from vllm_glm_patch.tools import diagnose as diagnose_command
from vllm_glm_patch.upstream import Upstream

LOG = """INFO vLLM API server version {version}
ERROR dump_input.py: SchedulerOutput(total_num_scheduled_tokens={tokens}, ...)
RuntimeError: {error}
"""
FAULT = "CUDA error: an illegal memory access was encountered"


def diagnose(tmp_path: Path, version: str, tokens: int, error: str = FAULT) -> tuple[int, dict[str, Any]]:
    log = tmp_path / "vllm.log"
    log.write_text(LOG.format(version=version, tokens=tokens, error=error))
    result = CliRunner().invoke(app, ["diagnose", str(log), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_the_reported_crash_is_recognised(tmp_path: Path) -> None:
    code, found = diagnose(tmp_path, "0.10.1.1", 8192)
    assert code == 1
    (match,) = [m for m in found["matches"] if m["id"] == "scale-overread"]
    assert (match["grade"], match["certain"], match["unseen"]) == ("possible", False, ["kernel"])
    assert "fence --launches --align 512 -- COMMAND` names it" in match["settle"]
    assert found["tokens"] == 8192


@pytest.mark.parametrize("tokens", [8192, 8191])
def test_the_kernels_name_makes_it_a_match_and_anothers_rules_it_out(tmp_path: Path, tokens: int) -> None:
    grouped = "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<int>>>(Params)"
    for kernel, grades in ((grouped, ["match"]), ("topk_gating(float*)", [])):
        report = f"{FAULT}\nfence: process 7 faulted: CUDA_ERROR_ILLEGAL_ADDRESS\n  kernel       {kernel} <<<(1,1,1),(1,1,1)>>>"
        code, found = diagnose(tmp_path, "0.10.1.1", tokens, report)
        told = [m for m in found["matches"] if m["id"] == "scale-overread"]
        assert ([m["grade"] for m in told], code) == (grades, len(grades))
        assert all(m["settle"] is None for m in told)


@pytest.mark.parametrize(
    ("version", "tokens", "error"),
    [
        ("0.26.0", 8192, FAULT),
        ("0.10.1.1", 8191, "CUDA error: misaligned address"),
        ("0.10.1.1", 8192, "ValueError: no fault at all"),
    ],
)
def test_other_crashes_are_not(tmp_path: Path, version: str, tokens: int, error: str) -> None:
    code, found = diagnose(tmp_path, version, tokens, error)
    assert [m for m in found["matches"] if m["id"] == "scale-overread" and m["certain"]] == []
    assert code == int(bool(found["matches"]))


@pytest.mark.parametrize(
    ("installed", "has_it", "told"),
    [
        ("0.10.1.1", True, "start vLLM again; its log must then show the table of patches"),
        ("0.26.0", False, "nothing, where this vLLM is the one that serves"),
        (None, None, "install vllm-glm-patch beside the vLLM that serves"),
    ],
)
def test_the_vllm_here_is_held_against_the_match(
    installed: str | None, has_it: bool | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream_of = Upstream(tmp_path, installed) if installed else None
    monkeypatch.setattr(diagnose_command.upstream, "find_installed", lambda: upstream_of)
    monkeypatch.setattr(diagnose_command.catalog, "decide", lambda found, settings: decided)
    decided = [catalog.Decision("scale-overread", catalog.APPLY if has_it else catalog.NOT_NEEDED, "")]
    _, found = diagnose(tmp_path, "0.10.1.1", 8192)
    (match,) = [m for m in found["matches"] if m["id"] == "scale-overread"]
    assert (match["installed"], match["installed_has_it"]) == (installed, has_it)
    assert told in match["next"]


def test_a_patch_that_the_log_calls_applied_points_elsewhere(tmp_path: Path) -> None:
    table = "\nINFO   scale-overread  applied              the grouped FP8 GEMM reads past its scales"
    _, found = diagnose(tmp_path, "0.10.1.1", 8192, FAULT + table)
    (match,) = [m for m in found["matches"] if m["id"] == "scale-overread"]
    assert found["patches"] == {"scale-overread": "applied"}
    assert "it is likely something else" in match["next"]


def test_the_answer_for_a_person_ends_with_what_to_do(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(LOG.format(version="0.10.1.1", tokens=8192, error=FAULT))
    result = CliRunner().invoke(app, ["diagnose", str(log)])
    assert result.output.splitlines()[-1].startswith("scale-overread: ")
    assert " Next: " in result.output.splitlines()[-1]


def test_a_version_that_is_none_hides_no_match(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(LOG.format(version="0.11.0rc2.dev7+gabc", tokens=8192, error=FAULT))
    assert CliRunner().invoke(app, ["diagnose", str(log)]).exit_code == 1


def test_a_folder_is_not_read_as_a_log(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["diagnose", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "Is a directory. Give a vLLM log or a CUDA core dump." in str(result.exception)


def test_a_file_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(app, ["diagnose", "/no/such.log"])
    assert isinstance(result.exception, UserError)
    assert "/no/such.log" in str(result.exception)


def test_the_fence_gets_the_command_and_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setenv("VLLM_GLM_PATCH_FENCE_CUPTI", "/my/libcupti.so.12")
    monkeypatch.setenv("VLLM_GLM_PATCH_FENCE_LIBRARY", "/my/libglm_fence.so")
    monkeypatch.setattr(fence_command, "run", lambda command, options, rerun: seen.append((command, options, rerun)) or 3)
    arguments = [
        "fence",
        "--align",
        "512",
        "--stacks",
        "--launches",
        "--directory",
        str(tmp_path),
        "--",
        "true",
        "--align",
        "1",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 3
    ((command, options, rerun),) = seen
    assert command == ["true", "--align", "1"]
    assert (options.align, options.stacks, options.launches, options.directory) == (512, True, True, str(tmp_path))
    assert (options.cupti, options.library) == ("/my/libcupti.so.12", "/my/libglm_fence.so")
    assert not rerun


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--", "no-such-command"], "no-such-command"), (["--align", "3", "--", "true"], "power of two")],
)
def test_what_the_fence_cannot_do_is_said(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["fence", *arguments])
    assert isinstance(result.exception, UserError)
    assert told in str(result.exception)
