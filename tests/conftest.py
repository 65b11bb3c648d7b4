"""For all tests: `tools` can be imported, tests that need a card say so, and SIGTERM ends a run as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import pytest

# At the end: an installed vllm_glm_patch, the wheel, goes before the one of this source tree.
sys.path.append(str(Path(__file__).parent.parent))


def pytest_configure(config: pytest.Config) -> None:
    """Choose Triton's interpreter where there is no card, before any test imports a kernel; clean up on SIGTERM too."""
    if not _has_card():
        os.environ.setdefault("TRITON_INTERPRET", "1")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, interrupt)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no card."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_card():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA card is present"))


def _has_card() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
