"""What vLLM asks of the caching allocator, answered from the allocator's counts; torch is a fake."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from vllm_glm_patch.fence import accounting

from .conftest import PAGE, Fence


def refuse(*_: object) -> None:
    raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")


@pytest.fixture
def torch(fence: Fence) -> SimpleNamespace:
    """As torch 2.11 looks, with every question unanswered; then answered by the fence."""
    cuda, memory, accelerator, accelerator_memory = (ModuleType(name) for name in ("cuda", "m", "accelerator", "am"))
    for module in (cuda, memory, accelerator, accelerator_memory):
        for name in accounting._EVERYWHERE + (accounting._CUDA_ONLY if module in (cuda, memory) else ()):
            setattr(module, name, refuse)
    cuda.memory, accelerator.memory = memory, accelerator_memory  # type: ignore[attr-defined]
    cuda.current_device, cuda.is_initialized = lambda: 1, lambda: True  # type: ignore[attr-defined]

    def device(text: str) -> SimpleNamespace:
        _, _, index = text.partition(":")
        return SimpleNamespace(index=int(index) if index else None)

    fake = SimpleNamespace(cuda=cuda, accelerator=accelerator, device=device)
    fake.replaced = accounting.install(fake, fence)
    return fake


def test_every_place_answers_the_peak_that_vllm_sizes_its_cache_by(torch: SimpleNamespace, fence: Fence) -> None:
    fence.free(fence.malloc(3 * PAGE, device=1))
    for module in (torch.cuda, torch.cuda.memory, torch.accelerator, torch.accelerator.memory):
        assert module.memory_stats()["allocated_bytes.all.peak"] == 3 * PAGE


def test_allocated_counts_mapped_memory_and_requested_what_was_asked(torch: SimpleNamespace, fence: Fence) -> None:
    fence.malloc(100, device=1)
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] == PAGE
    assert stats["requested_bytes.all.current"] == 100
    assert stats["allocation.all.current"] == 1


def test_reserved_includes_idle_memory_until_the_cache_is_emptied(torch: SimpleNamespace, fence: Fence) -> None:
    fence.free(fence.malloc(100, device=1, stream=fence.mock.stream(device=1)), device=1)
    assert torch.accelerator.memory_allocated() == 0
    assert torch.accelerator.memory_reserved() == PAGE
    torch.accelerator.empty_cache()
    assert torch.cuda.memory_reserved() == 0


@pytest.mark.parametrize("device", [0, "cuda:0", SimpleNamespace(index=0)])
def test_a_device_may_be_named_as_torch_names_it(torch: SimpleNamespace, fence: Fence, device: object) -> None:
    torch.device = lambda value: value if isinstance(value, SimpleNamespace) else SimpleNamespace(index=int(value[-1]))
    fence.malloc(100, device=0)
    assert torch.cuda.memory_allocated(device) == PAGE
    assert torch.cuda.memory_allocated() == 0  # the current device is 1


def test_resetting_the_peak_brings_it_to_the_current_value(torch: SimpleNamespace, fence: Fence) -> None:
    kept = fence.malloc(PAGE, device=1)
    fence.free(fence.malloc(5 * PAGE, device=1))
    torch.accelerator.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == PAGE
    fence.free(kept)


def test_the_snapshot_lists_blocks_as_segments(torch: SimpleNamespace, fence: Fence) -> None:
    address = fence.malloc(1000, device=1)
    (segment,) = torch.cuda.memory.memory_snapshot()
    assert segment["device"] == 1
    assert segment["total_size"] == PAGE
    assert segment["blocks"][0]["address"] == address


def test_a_torch_without_accelerator_memory_gets_no_new_functions(fence: Fence) -> None:
    cuda, memory, accelerator = ModuleType("cuda"), ModuleType("memory"), ModuleType("accelerator")
    cuda.memory, cuda.memory_stats = memory, refuse  # type: ignore[attr-defined]
    replaced = accounting.install(SimpleNamespace(cuda=cuda, accelerator=accelerator), fence)
    assert [(module, name) for module, name, _ in replaced] == [(cuda, "memory_stats")]
    assert not hasattr(accelerator, "memory_stats")


def test_uninstall_brings_back_what_torch_had(torch: SimpleNamespace) -> None:
    accounting.uninstall(torch.replaced)
    with pytest.raises(RuntimeError, match="getDeviceStats"):
        torch.cuda.memory_stats()
