"""tools.fingerprint: a release that is not published, and one that this package does not know yet."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tools import fingerprint, published
from vllm_glm_patch import catalog, upstream

SCHEDULER = "class Scheduler:\n    def __init__(self, vllm_config):\n        self.budget = {budget}\n"
WORKER = "class {name}:\n    def compile_or_warm_up_model(self):\n        return {budget}\n"
MEMORY = "    def determine_available_memory(self):\n        return 0\n"
KERNEL = "class FusedMoEKernel:\n    def apply(self, hidden_states):\n        return hidden_states\n"


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the catalog, and a registry that also has 0.34.0, whose functions nobody has seen; the folder of the copy."""
    folder = tmp_path / "patches"
    shutil.copytree(catalog.folder(), folder)
    monkeypatch.setattr(catalog, "folder", lambda: folder)
    monkeypatch.setattr(published, "available", lambda: {version: [] for version in (*catalog.releases(), "0.34.0")})
    return folder


def call(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fingerprint", *arguments])
    return fingerprint.main()


def write_source(tree: Path, *, scheduler: bool = True) -> None:
    """A release whose functions of full-step and fused-moe are written by the test."""
    files = {
        "v1/worker/gpu_worker.py": WORKER.format(name="Worker", budget=1) + MEMORY,
        "model_executor/layers/fused_moe/modular_kernel.py": KERNEL,
        "v1/worker/cpu_worker.py": WORKER.format(name="CPUWorker", budget=1),
        **({"v1/core/sched/scheduler.py": SCHEDULER.format(budget=1)} if scheduler else {}),
    }
    for name, text in files.items():
        (tree / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "vllm" / name).write_text(text)


def test_a_release_that_is_not_published_is_named_with_the_newest_and_changes_nothing(
    patches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in patches.iterdir() if file.is_file()}
    with pytest.raises(SystemExit) as left:
        call("0.99.0", monkeypatch=monkeypatch)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "vLLM 0.99.0 is not published, the newest is 0.34.0; nothing was read or changed" in said
    assert {file.name: file.read_bytes() for file in patches.iterdir() if file.is_file()} == before


def test_a_new_release_is_recorded_and_its_functions_are_said_to_be_new(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "0.34.0")
    monkeypatch.setattr(published, "fetch", lambda version, files, cache: tmp_path / version)
    assert call("0.34.0", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    found = upstream.fingerprint(SCHEDULER.format(budget=1), "Scheduler.__init__")
    assert f"Scheduler.__init__ of vLLM 0.34.0 is new: {found}" in said
    assert '    "0.34.0",\n' in (patches / "releases.toml").read_text(encoding="utf-8")
    text = (patches / "full-step.toml").read_text(encoding="utf-8")
    assert f'{found} = ["0.34.0"]' in text
    assert call("0.34.0", "--check", monkeypatch=monkeypatch) == 0


def test_a_function_that_is_gone_is_a_failure_that_names_it(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "0.34.0", scheduler=False)
    monkeypatch.setattr(published, "fetch", lambda version, files, cache: tmp_path / version)
    assert call("0.34.0", monkeypatch=monkeypatch) == 1
    assert "full-step: vLLM 0.34.0 does not define vllm.v1.core.sched.scheduler" in capsys.readouterr().err
