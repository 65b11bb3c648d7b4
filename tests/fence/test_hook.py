"""The sitecustomize that brings the fence into a process: when it acts, and what it must not break."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from vllm_glm_patch.fence.command import HOOK

_FAKE_TORCH = """
class version:
    cuda = None
class cuda:
    is_initialized = staticmethod(lambda: False)
__version__ = "2.11.0+fake"
print("torch runs")
"""


def python(code: str, tmp_path: Path, *more_paths: Path, fence: str = "1") -> subprocess.CompletedProcess[str]:
    (tmp_path / "torch").mkdir(exist_ok=True)
    (tmp_path / "torch/__init__.py").write_text(_FAKE_TORCH)
    path = os.pathsep.join(map(str, [HOOK, *more_paths, tmp_path]))
    env = {**os.environ, "PYTHONPATH": path, "VLLM_GLM_PATCH_FENCE": fence}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_the_fence_is_tried_right_after_torch_is_imported(tmp_path: Path) -> None:
    done = python("print('start'); import torch; print('end')", tmp_path)
    assert done.stdout.split("\n")[:3] == ["start", "torch runs", "end"]
    assert "built without CUDA" in done.stderr


def test_nothing_happens_in_a_process_without_torch(tmp_path: Path) -> None:
    done = python("import json, sys; print('vllm_glm_patch' in sys.modules)", tmp_path)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_nothing_happens_without_the_switch(tmp_path: Path) -> None:
    done = python("import torch", tmp_path, fence="0")
    assert done.stderr == ""


def test_the_users_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys; sys.theirs = __file__")
    done = python("import sys, sitecustomize; print(sys.theirs, sitecustomize.__file__); import torch", tmp_path, own)
    assert done.stdout.split("\n")[0] == f"{own}/sitecustomize.py {own}/sitecustomize.py"
    assert "built without CUDA" in done.stderr


def test_child_processes_are_fenced_too(tmp_path: Path) -> None:
    done = python("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch'])", tmp_path)
    assert "built without CUDA" in done.stderr


def test_torchs_source_can_still_be_read(tmp_path: Path) -> None:
    done = python("import torch, inspect; print('torch runs' in inspect.getsource(torch))", tmp_path)
    assert done.stdout.strip().endswith("True"), done.stderr


def test_a_missing_torch_stays_an_ordinary_import_error(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    bare = tmp_path / "bare" / "bin" / "python"
    env = {**os.environ, "PYTHONPATH": str(HOOK), "VLLM_GLM_PATCH_FENCE": "1"}
    done = subprocess.run([bare, "-c", "import torch"], env=env, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr
