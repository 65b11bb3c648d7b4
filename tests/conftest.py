"""For all tests: `tools` can be imported, tests that need a card say so, SIGTERM ends a run as Ctrl-C does, and signals
are answered alike however the run was started and whatever ran before."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

# At the end: an installed vllm_glm_patch, the wheel, goes before the one of this source tree.
sys.path.append(str(Path(__file__).parent.parent))

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def pytest_configure(config: pytest.Config) -> None:
    """Choose Triton's interpreter where there is no card, before any test imports a kernel; clean up on SIGTERM too."""
    if not _has_card():
        os.environ.setdefault("TRITON_INTERPRET", "1")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    def interrupt_all(number: int, frame: FrameType | None) -> None:
        """Where tests run in processes of their own, those end their servers; xdist only kills them, after 10 s."""
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)
        interrupt(number, frame)

    def interrupt_worker(number: int, frame: FrameType | None) -> None:
        if processes := sys.modules.get("vllm_glm_patch.tools.processes"):
            processes._GRACE = 2.0  # type: ignore[attr-defined]
        interrupt(number, frame)

    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, interrupt_worker)
        signal.signal(signal.SIGINT, interrupt_worker)
    elif getattr(config.option, "numprocesses", None):
        signal.signal(signal.SIGTERM, interrupt_all)
        signal.signal(signal.SIGINT, interrupt_all)
    else:
        signal.signal(signal.SIGTERM, interrupt)
        # A shell has SIGINT ignored in its background jobs, nohup SIGHUP; every program that a test starts would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def signals_stay_as_they_were() -> Iterator[None]:
    """A test that leaves a signal ignored makes others fail that have nothing to do with it: it fails itself."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    changed = {number.name: handler for number, handler in before.items() if signal.getsignal(number) != handler}
    for name, handler in changed.items():
        signal.signal(signal.Signals[name], handler)
    assert not changed, f"this test leaves another handler of {', '.join(changed)} behind"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no card. In several processes, first what takes the longest: the servers."""
    if config.pluginmanager.hasplugin("xdist"):
        items.sort(key=lambda item: not _serves(item.path))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_card():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA card is present"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadgroup one process has all servers, and each other file has one process.

    Not by the mark `xdist_group`: pytest-xdist 3.8 writes it into an attribute of items that pytest 9.2 no longer reads.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "serve" if _serves(Path(file)) else file

    return ByFile(config, log)


def _serves(file: Path) -> bool:
    return file.parent.name == "serve"


def _has_card() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
