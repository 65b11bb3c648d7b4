"""Single tensors before an unmapped page, on the mock driver, whose memory is real."""

from __future__ import annotations

import ctypes as C
from typing import Any

import pytest

from vllm_glm_patch.fence import FenceError, Guards, Options

from .conftest import PAGE, Fence
from .test_allocator import read_kills

torch = pytest.importorskip("torch")


@pytest.fixture
def guards(fence: Fence, libraries: Any, monkeypatch: pytest.MonkeyPatch) -> Guards:
    """Guards whose memory torch takes for the CPU's, which the mock's is."""

    def as_tensor(data: Any, device: Any) -> Any:
        interface = data.__cuda_array_interface__
        (size,), (address, read_only) = interface["shape"], interface["data"]
        assert (interface["typestr"], read_only) == ("|u1", False)
        return torch.frombuffer((C.c_ubyte * size).from_address(address), dtype=torch.uint8)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return Guards(Options(align=512, cache_mb=0, libcuda=str(libraries[1])), fence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.float8_e4m3fn])
def test_a_copy_has_the_same_values_and_ends_at_an_unmapped_page(guards: Guards, dtype: Any) -> None:
    tensor = torch.arange(4 * 256).view(4, 256).to(dtype)
    placed = guards.place(tensor)
    assert torch.equal(placed.tensor.view(torch.uint8), tensor.view(torch.uint8))
    assert (placed.tensor.dtype, placed.tensor.shape) == (dtype, tensor.shape)
    assert (placed.tensor.data_ptr() + tensor.numel() * tensor.element_size()) % PAGE == 0
    assert read_kills(placed.address + tensor.numel() * tensor.element_size())
    placed.free()


def test_what_pytorch_rounds_a_block_up_by_can_be_read(guards: Guards) -> None:
    scales = {tokens: guards.place(torch.ones(tokens * 8, 1)) for tokens in (8190, 8191, 8192)}
    over_read = {tokens: read_kills(placed.address + tokens * 32 + 31) for tokens, placed in scales.items()}
    assert over_read == {8190: False, 8191: False, 8192: True}
    for placed in scales.values():
        placed.free()


def test_a_tensor_that_is_not_contiguous_is_placed_by_its_values(guards: Guards) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    placed = guards.place(tensor)
    assert torch.equal(placed.tensor, tensor)
    assert placed.tensor.is_contiguous()
    placed.free()


def test_freed_memory_is_unmapped(guards: Guards, fence: Fence) -> None:
    placed = guards.place(torch.ones(4))
    placed.free()
    fence.empty_cache()
    assert not fence.mock.is_mapped(placed.address)


def test_a_full_card_is_told(guards: Guards, fence: Fence) -> None:
    fence.mock.native.mock_set_capacity(0, PAGE)
    with pytest.raises(FenceError, match="no 4194304 bytes left"):
        guards.place(torch.ones(1 << 20))
