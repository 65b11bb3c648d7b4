"""Each Triton kernel that a table or a rule asks for is compiled by this environment's Triton; a refused one is told."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("triton")
TOOL = Path(__file__).parents[2] / "tools/triton_releases.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_releases", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_triton_compiles_all_that_tables_and_rules_ask_for(tmp_path: Path) -> None:
    # A process of its own: the other tests import the kernels under Triton's interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, TOOL], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert int(run.stdout.split(" kernels, ")[0].rsplit(" ", 1)[1]) > 50


def test_a_refused_kernel_is_told_with_where_it_is_asked_for(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = [(SimpleNamespace(name=name), (), {}) for name in ("good", "bad")]
    monkeypatch.setattr(tool, "COUNTS", (8,))
    monkeypatch.setattr(tool, "launches", lambda shape, tokens, card: launched)
    monkeypatch.setattr(tool, "variant", lambda kernel, arguments, options: (kernel.name, (("BLOCK_M", 8),), (), 4, 3))
    monkeypatch.setattr(tool, "refused", lambda kernel, made: "CompilationError: no" if kernel.name == "bad" else "")
    assert tool.main() == 1
    said = capsys.readouterr().out
    assert "NVIDIA H200 TP8 8: bad {'BLOCK_M': 8}: CompilationError: no" in said and "2 kernels, 1 refused" in said


def test_a_triton_that_cannot_call_gdc_wait_starts_no_dependent_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_glm_patch.moe import dispatch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {}
    for version in ("3.3.1", "3.4.0", "3.5.0", "3.6.0"):
        monkeypatch.setattr("triton.__version__", version)
        dispatch.dependent_launch.cache_clear()
        found[version] = dispatch.dependent_launch()
    dispatch.dependent_launch.cache_clear()
    assert found == {"3.3.1": False, "3.4.0": False, "3.5.0": True, "3.6.0": True}
