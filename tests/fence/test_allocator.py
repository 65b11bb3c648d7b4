"""The allocator against a mock of the driver: guards, streams, graphs, limits."""

from __future__ import annotations

import ctypes as C
import os
import signal

import pytest

from vllm_glm_patch.fence.library import FenceError, PoolId

from .conftest import PAGE, Fence


def read_kills(address: int) -> bool:
    """Reads one byte in a child process: did it die of it?"""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        C.string_at(address, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)


@pytest.mark.parametrize("align", [1, 16, 64, 512])
@pytest.mark.parametrize("size", [1, 15, 16, 100, 511, 512, PAGE - 1, PAGE, PAGE + 1, 262144])
def test_a_block_ends_at_an_unmapped_page_after_rounding_to_align(fence: Fence, align: int, size: int) -> None:
    fence.set(align=align)
    address = fence.malloc(size)
    assert address is not None
    end = address + -(-size // align) * align
    assert end % PAGE == 0
    assert address % align == 0
    C.memset(address, 1, size)
    assert not fence.mock.is_mapped(end)
    fence.free(address)


def test_reading_one_byte_past_a_block_faults_and_the_last_byte_does_not(fence: Fence) -> None:
    address = fence.malloc(4096)
    assert not read_kills(address + 4095)
    assert read_kills(address + 4096)
    fence.free(address)


def test_align_512_hides_an_over_read_that_pytorch_hides_too(fence: Fence) -> None:
    fence.set(align=512)
    scales = {tokens: fence.malloc(tokens * 8 * 4) for tokens in (8190, 8191, 8192)}
    over_read = {tokens: read_kills(address + tokens * 32 + 31) for tokens, address in scales.items()}
    assert over_read == {8190: False, 8191: False, 8192: True}


def test_guard_at_the_start_catches_reading_before_a_block(fence: Fence) -> None:
    fence.set(guard="start")
    address = fence.malloc(1000)
    assert address % PAGE == 0
    assert not read_kills(address)
    assert read_kills(address - 1)


def test_neighbouring_blocks_keep_their_guards(fence: Fence) -> None:
    blocks = [fence.malloc(PAGE) for _ in range(20)]
    for address in blocks:
        assert not fence.mock.is_mapped(address + PAGE)


def test_a_recycled_block_of_another_size_ends_at_the_guard_again(fence: Fence) -> None:
    stream = fence.mock.stream()
    first = fence.malloc(1000, stream=stream)
    fence.free(first)
    second = fence.malloc(5000, stream=stream)
    assert second + 5008 == first + 1008
    assert read_kills(second + 5008)


def test_only_blocks_of_the_asked_sizes_touch_their_guard(fence: Fence) -> None:
    fence.set(only=(1000, 2000), slack=4096)
    tight, loose = fence.malloc(1008), fence.malloc(3008)
    assert not fence.mock.is_mapped(tight + 1008)
    assert fence.mock.is_mapped(loose + 3008 + 4095)
    assert not fence.mock.is_mapped(loose + 3008 + 4096)


def test_fresh_memory_is_poisoned_when_asked(fence: Fence) -> None:
    fence.set(poison="fresh")
    address = fence.malloc(100)
    assert C.string_at(address, 100) == b"\xff" * 100


def test_freed_memory_is_poisoned_when_asked(fence: Fence) -> None:
    fence.set(poison="freed")
    stream = fence.mock.stream()
    address = fence.malloc(100, stream=stream)
    C.memset(address, 0, 100)
    fence.free(address)
    assert C.string_at(address, 100) == b"\xff" * 100


def test_memory_is_not_poisoned_when_not_asked(fence: Fence) -> None:
    address = fence.malloc(100)
    C.memset(address, 5, 100)
    fence.free(address)
    assert C.string_at(address, 100) == b"\x05" * 100
    assert fence.mock.calls("cuMemsetD8Async") == 0


def test_a_freed_block_stays_mapped_until_its_stream_is_done(fence: Fence) -> None:
    fence.set(cache_mb=0)
    stream = fence.mock.stream()
    address = fence.malloc(100, stream=stream)
    fence.mock.use(stream, address)
    fence.free(address)
    fence.reap()
    assert fence.mock.is_mapped(address)
    fence.mock.finish(stream)
    fence.reap()
    assert not fence.mock.is_mapped(address)


def test_a_recorded_stream_is_waited_for_too(fence: Fence) -> None:
    fence.set(cache_mb=0)
    own, other = fence.mock.stream(), fence.mock.stream()
    address = fence.malloc(100, stream=own)
    fence.record_stream(address, other)
    fence.mock.use(other, address)
    fence.free(address)
    fence.mock.finish(own)
    fence.reap()
    assert fence.mock.is_mapped(address)
    fence.mock.finish(other)
    fence.reap()
    assert not fence.mock.is_mapped(address)


def test_without_record_stream_the_context_is_synchronised_before_unmapping(fence: Fence) -> None:
    fence.set(cache_mb=0, streams_recorded=False)
    own, other = fence.mock.stream(automatic=True), fence.mock.stream()
    address = fence.malloc(100, stream=own)
    fence.mock.use(other, address)  # nobody told the allocator; the mock objects if it is unmapped too early
    fence.free(address)
    assert not fence.mock.is_mapped(address)
    assert fence.mock.calls("cuCtxSynchronize") == 1


def test_the_same_stream_reuses_a_freed_block_at_once_and_another_stream_does_not(fence: Fence) -> None:
    one, two = fence.mock.stream(), fence.mock.stream()
    address = fence.malloc(100, stream=one)
    fence.free(address)
    foreign = fence.malloc(100, stream=two)
    assert foreign != address
    assert fence.malloc(100, stream=one) == address


def test_a_block_that_two_streams_used_is_not_reused_while_one_of_them_works(fence: Fence) -> None:
    one, two = fence.mock.stream(), fence.mock.stream()
    address = fence.malloc(100, stream=one)
    fence.record_stream(address, two)
    fence.mock.use(two, address)
    fence.free(address)
    assert fence.malloc(100, stream=one) != address
    fence.mock.finish(one)
    fence.mock.finish(two)
    fence.reap()
    assert fence.malloc(100, stream=one) == address


def test_a_block_of_a_stream_that_is_gone_is_kept_until_the_context_is_synchronised(fence: Fence) -> None:
    stream = fence.mock.stream()
    address = fence.malloc(100, stream=stream)
    fence.mock.destroy_stream(stream)
    fence.free(address)
    fence.reap()
    assert fence.mock.is_mapped(address)
    fence.empty_cache()
    assert not fence.mock.is_mapped(address)


def test_without_a_cache_no_address_range_is_handed_out_while_it_is_in_use(fence: Fence) -> None:
    fence.set(cache_mb=0)
    stream = fence.mock.stream()
    first = fence.malloc(100, stream=stream)
    fence.free(first)
    assert fence.malloc(100, stream=stream) != first


def test_the_cache_keeps_no_more_than_it_may(fence: Fence) -> None:
    fence.set(cache_mb=6)
    stream = fence.mock.stream(automatic=True)
    for address in [fence.malloc(100, stream=stream) for _ in range(10)]:
        fence.free(address)
    assert fence.stats(0).idle_bytes == 6 << 20
    assert fence.stats(0).reserved_bytes.current == 6 << 20


def test_devices_do_not_share_memory_or_counts(fence: Fence) -> None:
    zero, one = fence.malloc(100, device=0), fence.malloc(PAGE + 1, device=1)
    assert fence.mock.native.mock_in_use(0) == PAGE
    assert fence.mock.native.mock_in_use(1) == 2 * PAGE
    assert fence.stats(0).allocated_bytes.current == PAGE
    assert fence.stats(1).requested_bytes.current == PAGE + 1
    assert fence.find(zero).device == 0
    assert fence.find(one).device == 1


def test_a_full_card_gives_null_and_counts_it(fence: Fence) -> None:
    fence.mock.native.mock_set_capacity(0, 4 * PAGE)
    assert fence.malloc(3 * PAGE) is not None
    assert fence.malloc(2 * PAGE) is None
    assert fence.stats(0).out_of_memory == 1


def test_a_full_card_gives_up_its_idle_and_waiting_memory_first(fence: Fence) -> None:
    fence.mock.native.mock_set_capacity(0, 4 * PAGE)
    stream = fence.mock.stream()
    address = fence.malloc(3 * PAGE, stream=stream)
    fence.mock.use(stream, address)
    fence.free(address)
    assert fence.malloc(4 * PAGE, stream=stream) is not None
    assert fence.stats(0).retries == 1
    assert fence.stats(0).out_of_memory == 0


def test_a_block_can_take_the_whole_card(fence: Fence) -> None:
    fence.mock.native.mock_set_capacity(0, 64 * PAGE)
    assert fence.malloc(64 * PAGE) is not None


@pytest.mark.parametrize("size", [2**64 - 1, 2**63])
def test_an_absurd_size_is_out_of_memory(fence: Fence, size: int) -> None:
    assert fence.malloc(size) is None


def test_size_zero_is_null_and_freeing_null_does_nothing(fence: Fence) -> None:
    assert fence.malloc(0) is None
    fence.free(None)
    assert fence.stats(0).blocks.current == 0


def test_peaks_are_kept_until_they_are_reset(fence: Fence) -> None:
    address = fence.malloc(5 * PAGE)
    fence.free(address)
    assert fence.stats(0).allocated_bytes.peak == 5 * PAGE
    fence.reset_peak(0)
    assert fence.stats(0).allocated_bytes.peak == 0


def test_find_knows_a_block_from_its_inside_and_from_its_guard(fence: Fence) -> None:
    address = fence.malloc(1000)
    for probe in (address, address + 999, address + 1008, address + 1008 + PAGE - 1):
        assert fence.find(probe).address == address
    assert fence.find(address + 1008 + PAGE) is None


def test_snapshot_lists_live_blocks_only(fence: Fence) -> None:
    kept, gone = fence.malloc(100), fence.malloc(200)
    fence.free(gone)
    assert [(block.address, block.size) for block in fence.snapshot()] == [(kept, 100)]


def test_options_are_refused_once_memory_is_out(fence: Fence) -> None:
    fence.malloc(1)
    with pytest.raises(FenceError, match="before the first CUDA allocation"):
        fence.set(align=512)


def test_each_operation_costs_the_same_with_many_blocks(fence: Fence) -> None:
    """Driver calls per allocate and free do not grow with the number of live or waiting blocks."""
    stream = fence.mock.stream()
    names = ("cuMemCreate", "cuEventRecord", "cuEventQuery", "cuMemMap", "cuMemUnmap")

    def cost() -> list[int]:
        before = [fence.mock.calls(name) for name in names]
        for _ in range(10):
            fence.free(fence.malloc(100, stream=stream))
        return [fence.mock.calls(name) - was for name, was in zip(names, before)]

    fence.free(fence.malloc(100, stream=stream))
    few = cost()
    blocks = [fence.malloc(100, stream=stream) for _ in range(500)]
    for address in blocks[:250]:
        fence.free(address)
    assert cost() == few


class Graph:
    """A capture as torch makes it: pool begun, stream captured, pool ended."""

    def __init__(self, fence: Fence, stream: int, pool: PoolId, announced: bool = True):
        self.fence, self.stream, self.pool, self.announced = fence, stream, pool, announced

    def __enter__(self) -> Graph:
        if self.announced:
            self.fence._native.glm_fence_begin_pool.argtypes = [C.c_int, PoolId, C.c_void_p]
            empty_function = C.create_string_buffer(32)  # a std::function that holds nothing, passed by reference
            self.fence._native.glm_fence_begin_pool(0, self.pool, C.addressof(empty_function))
        self.fence.mock.begin_capture(self.stream)
        return self

    def __exit__(self, *_: object) -> None:
        self.fence.mock.end_capture(self.stream)
        if self.announced:
            self.fence._native.glm_fence_end_pool(0, self.pool)

    def kernel(self, size: int) -> int:
        """A kernel on a temporary of `size` bytes; its address."""
        address = self.fence.malloc(size, stream=self.stream)
        self.fence.mock.use(self.stream, address)
        self.fence.free(address)
        return address


@pytest.mark.parametrize("announced", [True, False])
def test_memory_of_a_graph_stays_mapped_after_capture_whatever_is_emptied(fence: Fence, announced: bool) -> None:
    stream = fence.mock.stream()
    with Graph(fence, stream, PoolId(1, 0), announced) as graph:
        address = graph.kernel(100)
    fence.empty_cache()
    fence.reap()
    assert fence.mock.is_mapped(address)
    assert fence.malloc(100, stream=stream) != address


def test_a_capture_reuses_its_own_temporaries(fence: Fence) -> None:
    stream = fence.mock.stream()
    with Graph(fence, stream, PoolId(1, 0)) as graph:
        assert graph.kernel(100) + 112 == graph.kernel(5000) + 5008


def test_captures_of_one_pool_share_memory_and_those_of_two_do_not(fence: Fence) -> None:
    stream = fence.mock.stream()
    addresses = []
    for pool in (PoolId(1, 0), PoolId(1, 0), PoolId(2, 0)):
        with Graph(fence, stream, pool) as graph:
            addresses.append(graph.kernel(100))
    assert addresses[0] == addresses[1] != addresses[2]


def test_two_streams_of_a_pool_do_not_share_memory(fence: Fence) -> None:
    addresses = []
    for stream in (fence.mock.stream(), fence.mock.stream()):
        with Graph(fence, stream, PoolId(1, 0)) as graph:
            addresses.append(graph.kernel(100))
    assert addresses[0] != addresses[1]


def test_the_memory_of_a_destroyed_graph_is_unmapped(fence: Fence) -> None:
    stream = fence.mock.stream()
    for _ in range(2):
        with Graph(fence, stream, PoolId(1, 0)) as graph:
            address = graph.kernel(100)
    fence._native.glm_fence_release_pool(0, PoolId(1, 0))
    fence.empty_cache()
    assert fence.mock.is_mapped(address)  # the other graph lives
    fence.mock.native.mock_forget_graphs()
    fence._native.glm_fence_release_pool(0, PoolId(1, 0))
    fence.empty_cache()
    assert not fence.mock.is_mapped(address)


def test_a_block_that_is_freed_during_a_capture_stays_mapped_until_graphs_are_released(fence: Fence) -> None:
    stream, main = fence.mock.stream(), fence.mock.stream(automatic=True)
    address = fence.malloc(100, stream=main)
    with Graph(fence, stream, PoolId(1, 0)):
        fence.mock.use(stream, address)
        fence.free(address)
    fence.empty_cache()
    assert fence.mock.is_mapped(address)
    fence.mock.native.mock_forget_graphs()
    fence.release_graphs()
    fence.empty_cache()
    assert not fence.mock.is_mapped(address)


def test_nothing_waits_and_nothing_is_unmapped_during_a_capture(fence: Fence) -> None:
    """The mock counts a violation for either."""
    stream, main = fence.mock.stream(), fence.mock.stream()
    waiting = fence.malloc(100, stream=main)
    fence.free(waiting)
    fence.mock.native.mock_set_capacity(0, 2 * PAGE)
    with Graph(fence, stream, PoolId(1, 0)):
        fence.mock.finish(main)
        fence.reap()
        fence.empty_cache()
        assert fence.malloc(2 * PAGE, stream=stream) is None
    assert fence.malloc(2 * PAGE, stream=stream) is not None


def test_the_output_of_a_graph_is_kept_with_it_when_freed_after_the_capture(fence: Fence) -> None:
    stream = fence.mock.stream()
    with Graph(fence, stream, PoolId(1, 0)):
        output = fence.malloc(100, stream=stream)
        fence.mock.use(stream, output)
    fence.free(output)
    fence.empty_cache()
    assert fence.mock.is_mapped(output)
    assert fence.stats(0).graph_bytes == PAGE


def test_the_legacy_stream_counts_as_capturing_while_another_is(fence: Fence) -> None:
    stream = fence.mock.stream()
    address = fence.malloc(100, stream=None)
    with Graph(fence, stream, PoolId(1, 0), announced=False):
        fence.free(address)
    fence.empty_cache()
    assert fence.mock.is_mapped(address)
