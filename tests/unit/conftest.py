"""Fixtures of the unit tests: a fake vLLM, and a process without our traces."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import fake_vllm
import pytest

import vllm_glm_patch
from vllm_glm_patch import installation
from vllm_glm_patch.fixes import fused_moe
from vllm_glm_patch.moe import backends
from vllm_glm_patch.settings import PREFIX


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No switches in the environment, nothing patched before or after a test, a card that seems to be there, no preference."""
    monkeypatch.setattr(fused_moe, "has_card", lambda: True)
    for name in [n for n in os.environ if n.startswith((PREFIX, "_GLM_PATCH"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(installation, "_installation", installation._Installation())
    backends.prefer(backends.AUTO)
    yield
    vllm_glm_patch.uninstall()
    for name in [n for n in os.environ if n.startswith((PREFIX, "_GLM_PATCH"))]:
        del os.environ[name]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Call it with a version: a fake vLLM of that version is installed; it returns the folder of its catalog."""
    with ExitStack() as stack:
        yield lambda version: stack.enter_context(fake_vllm.installed(tmp_path, version, monkeypatch))
