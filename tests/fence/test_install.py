"""Putting the fence into torch, which is a fake here: what is set, in which order, and what is refused."""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_glm_patch.fence import installation as module
from vllm_glm_patch.fence.library import FenceError
from vllm_glm_patch.fence.options import Options

from .conftest import Fence

SETTERS = tuple(module._CALLBACKS)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fake = ModuleType("torch")
    cuda, memory = ModuleType("torch.cuda"), ModuleType("torch.cuda.memory")
    events: list[tuple[str, Any]] = []

    class Pluggable:
        def __init__(self, path: str, malloc: str, free: str):
            events.append(("made", (malloc, free)))
            self.native = SimpleNamespace(
                **{name: lambda pointer, name=name: events.append((name, pointer)) for name in SETTERS}
            )

        def allocator(self) -> SimpleNamespace:
            return self.native

    memory.CUDAPluggableAllocator = Pluggable  # type: ignore[attr-defined]
    memory.change_current_allocator = lambda wrapper: events.append(("changed", wrapper))  # type: ignore[attr-defined]
    cuda.memory, cuda.is_initialized = memory, lambda: False  # type: ignore[attr-defined]
    cuda.memory_allocated = lambda device=None: -1  # type: ignore[attr-defined]
    cuda.current_device = lambda: 0  # type: ignore[attr-defined]
    fake.cuda, fake.version, fake.__version__ = cuda, SimpleNamespace(cuda="13.0"), "2.11.0"  # type: ignore[attr-defined]
    fake.events = events  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "torch", fake)
    monkeypatch.setattr(module, "_state", {})
    yield fake


def options(libraries: tuple[Path, Path], **more: Any) -> Options:
    return Options(library=str(libraries[0]), libcuda=str(libraries[1]), **more)


def test_callbacks_are_set_before_the_allocator_becomes_torchs(torch: Any, fence: Fence, libraries: Any) -> None:
    module.install(options(libraries))
    names = [name for name, _ in torch.events]
    assert names == ["made", *SETTERS, "changed"]
    assert torch.events[0][1] == ("glm_fence_torch_malloc", "glm_fence_free")
    record = dict(torch.events)["set_record_stream_fn"]
    assert record == C.cast(fence._native.glm_fence_record_stream, C.c_void_p).value


def test_torch_gets_its_answers_from_the_fence(torch: Any, fence: Fence, libraries: Any) -> None:
    library = module.install(options(libraries))
    address = library.malloc(1)
    assert torch.cuda.memory_allocated() == 2 << 20
    library.free(address)


def test_a_second_install_changes_nothing(torch: Any, fence: Fence, libraries: Any) -> None:
    assert module.install(options(libraries)) is module.install(Options(align=512))
    assert [name for name, _ in torch.events].count("changed") == 1


def test_it_is_refused_after_cuda_was_used(torch: Any, libraries: Any) -> None:
    torch.cuda.is_initialized = lambda: True
    with pytest.raises(FenceError, match="before the fence was installed"):
        module.install(options(libraries))
    assert torch.events == []


def test_from_the_environment_a_process_without_cuda_goes_on_unfenced(
    torch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.version.cuda = None
    monkeypatch.setenv("VLLM_GLM_PATCH_FENCE", "1")
    assert module.install_from_environment() is False
    assert "without CUDA" in caplog.text


def test_without_the_switch_nothing_is_installed(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_GLM_PATCH_FENCE", raising=False)
    assert module.install_from_environment() is False
    assert torch.events == []


def test_a_missing_library_says_how_to_get_one(torch: Any, tmp_path: Path) -> None:
    with pytest.raises(FenceError, match="VLLM_GLM_PATCH_FENCE_LIBRARY"):
        module.install(Options(library=str(tmp_path / "none.so")))


def test_stacks_of_allocations_are_kept_when_asked(torch: Any, fence: Fence, libraries: Any, tmp_path: Path) -> None:
    library = module.install(options(libraries, stacks=True, directory=str(tmp_path)))
    library.malloc(1)
    library.set_stack_function(None)
    (block,) = library.snapshot()
    assert block.stack == 1
    assert "library.malloc(1)" in next(tmp_path.glob("stacks-*.jsonl")).read_text()
