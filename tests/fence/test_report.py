"""From a core dump and a list of blocks to the block that was run past."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vllm_glm_patch.fence import report as report_module
from vllm_glm_patch.fence.coredump import commands, parse
from vllm_glm_patch.fence.journal import Journal, Row, read_journal
from vllm_glm_patch.fence.report import locate, report
from vllm_glm_patch.fence.rerun import search_size
from vllm_glm_patch.fence.stacks import StackRecorder, read_stacks

from .conftest import PAGE, Fence
from .transcripts import KERNEL, transcript


def journal_of(fence: Fence) -> Journal:
    return read_journal(fence.directory / f"blocks-{os.getpid()}.bin")


def test_the_transcript_names_kernel_device_and_thread() -> None:
    dump = parse(transcript([0x7F0000000000]))
    assert dump.kernel == KERNEL
    assert dump.exception == "Warp Illegal Address"
    assert (dump.device, dump.sm, dump.block, dump.thread) == (0, 12, "(7,1,0)", "(128,0,0)")
    assert dump.launch == "<<<(132,1,1),(384,1,1)>>>"
    assert dump.pc == 0x7F31ABB9F6D0
    assert dump.instruction == "LDG.E R5, [R10.64+0x20]"


def test_a_kernel_name_over_several_lines_is_one_name() -> None:
    assert parse(transcript([1 << 32], kernel=KERNEL.replace(", cutlass", ", cutl\nass"))).kernel == KERNEL


@pytest.mark.parametrize(
    ("operand", "address"),
    [
        ("[R10.64]", 0x7F0012345678),
        ("[R10.64+0x20]", 0x7F0012345698),
        ("desc[UR6][R10.64+-0x8]", 0x7F0012345670),
        ("[R10.64+UR4]", 0x7F0012345678 + (0x7E << 32)),
        ("[R0]", 1),
    ],
)
def test_the_address_is_worked_out_from_the_instruction(operand: str, address: int) -> None:
    text = transcript([0x7F0012345678], f"LDG.E.CONSTANT R5, {operand} ;").replace("UR4            0x0", "UR4 0x0\nUR5 0x7e")
    assert parse(text).addresses() == [address]


def test_an_instruction_without_a_plain_address_gives_none() -> None:
    assert parse(transcript([1 << 40], "UTMALDG.2D [UR8], [UR99]")).addresses() == []


def test_each_lane_has_its_own_address() -> None:
    assert parse(transcript([1 << 40, 2 << 40], "LDG.E R5, [R10.64]")).addresses() == [1 << 40, 2 << 40]


def test_garbage_from_the_debugger_is_no_fault() -> None:
    dump = parse("warning: something\nNo symbol table is loaded.\n")
    assert (dump.kernel, dump.exception, dump.registers) == ("", "", ())


def test_every_lane_and_the_faulting_instruction_are_asked_for() -> None:
    asked = commands(Path("/x/core-1.nvcudmp"))
    assert "x/i $errorpc" in asked
    assert [line for line in asked if line.startswith("cuda lane")] == [f"cuda lane {lane}" for lane in range(32)]


def test_the_block_that_was_run_past_is_found_with_its_distance(fence: Fence) -> None:
    fence.set(align=512)
    fence.malloc(1000)
    scales = fence.malloc(262144)
    fence.malloc(1000)
    lanes = [scales + 262144 - 32 - 8, scales + 262144 + 4 - 32]
    place, certain = locate(parse(transcript(lanes)), journal_of(fence))
    assert place is not None
    assert (place.row.address, place.row.size, place.where, place.distance) == (scales, 262144, "past the end", 4)
    assert certain


def test_a_register_alone_makes_the_block_likely(fence: Fence) -> None:
    address = fence.malloc(4096)
    place, certain = locate(parse(transcript([address + 4096], "UTMALDG.2D [UR8], [UR99]")), journal_of(fence))
    assert place is not None and place.row.address == address
    assert not certain


def test_addresses_inside_blocks_are_not_taken_for_the_fault(fence: Fence) -> None:
    address = fence.malloc(4096)
    assert locate(parse(transcript([address])), journal_of(fence)) == (None, False)


def test_running_below_a_block_is_told_apart(fence: Fence) -> None:
    fence.set(guard="start")
    address = fence.malloc(4096)
    place, _ = locate(parse(transcript([address - 4], "LDG.E R5, [R10.64]")), journal_of(fence))
    assert place is not None
    assert (place.where, place.distance) == ("before the start", 4)


def test_use_of_freed_memory_is_told_apart(fence: Fence) -> None:
    fence.set(cache_mb=0)
    address = fence.malloc(4096, stream=fence.mock.stream(automatic=True))
    fence.free(address)
    place, _ = locate(parse(transcript([address], "LDG.E R5, [R10.64]")), journal_of(fence))
    assert place is not None and place.where == "in freed memory"


def test_a_block_that_was_run_past_and_freed_since_was_run_past(fence: Fence) -> None:
    """As of vLLM's engine, whose exception drops the scales before the list of blocks is read."""
    fence.set(cache_mb=0, align=512)
    address = fence.malloc(262144, stream=fence.mock.stream(automatic=True))
    fence.free(address)
    place, _ = locate(parse(transcript([address + 262144], "LDG.E R5, [R10.64]")), journal_of(fence))
    assert place is not None and not place.row.live
    assert (place.where, place.distance) == ("past the end", 0)


def test_the_journal_outlives_a_sudden_death(fence: Fence) -> None:
    child = os.fork()
    if child == 0:
        fence.malloc(12345)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (row,) = read_journal(fence.directory / f"blocks-{child}.bin").rows
    assert (row.size, row.live, row.device) == (12345, True, 0)


def test_the_report_names_kernel_block_and_stack(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    address = fence.malloc(262144)
    core = fence.directory / f"core-{os.getpid()}.nvcudmp"
    core.touch()
    text = transcript([address + 262144], "LDG.E R5, [R10.64]")
    monkeypatch.setattr(report_module, "read_core_dump", lambda path: parse(text))
    monkeypatch.setattr(report_module, "read_stacks", lambda path: {0: ["model.py:7 in forward: torch.empty(...)"]})
    told = report(core)
    for part in (KERNEL, "0 bytes past the end", f"262144 bytes at 0x{address:x} on device 0", "model.py:7 in forward"):
        assert part in told.text()
    assert told.as_dict()["place"]["row"]["size"] == 262144


def test_without_cuda_gdb_the_report_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_glm_patch.fence.coredump.cuda_gdb", lambda: None)
    core = tmp_path / "core-5.nvcudmp"
    core.touch()
    assert "CUDA toolkit" in report(core).text()


def test_stacks_are_numbered_once_each_and_read_back(tmp_path: Path) -> None:
    recorder = StackRecorder(str(tmp_path))
    numbers = {number for _ in "abc" for number in (recorder.number(1, 0),)}
    other = recorder.number(1, 0)
    assert len(numbers) == 1
    assert other not in {0, *numbers}
    stacks = read_stacks(tmp_path / f"stacks-{os.getpid()}.jsonl")
    assert "test_stacks_are_numbered_once_each_and_read_back" in "".join(stacks[numbers.pop()])


def test_a_stack_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text('{"stack": 1, "frames": ["a"]}\n{"stack": 2, "fra')
    assert read_stacks(tmp_path / "stacks") == {1: ["a"]}


def test_the_allocators_stack_callback_fills_the_journal(fence: Fence) -> None:
    from vllm_glm_patch.fence.library import STACK_FUNCTION

    fence.set_stack_function(STACK_FUNCTION(lambda size, device: size + 1))
    fence.malloc(41)
    fence.set_stack_function(None)
    assert journal_of(fence).rows[0].stack == 42


def test_a_full_journal_forgets_the_oldest_freed_block_first(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_glm_patch.fence.library.JOURNAL_SLOTS", 2)
    fence.set()
    kept, gone = fence.malloc(1), fence.malloc(2)
    fence.free(gone)
    fence.malloc(3)
    assert sorted(row.size for row in journal_of(fence).rows) == [1, 3]
    assert fence.find(kept) is not None


@pytest.mark.parametrize("culprit", [16, 512, 4096, 262144])
def test_the_search_by_rerun_ends_at_the_size_that_faults(culprit: int) -> None:
    sizes = [16, 32, 512, 1024, 4096, 65536, 262144]
    runs = []

    def faults(low: int, high: int) -> bool:
        runs.append((low, high))
        return low <= culprit <= high

    assert search_size(sizes, faults) == (culprit, culprit)
    assert len(runs) <= 6


def test_the_search_by_rerun_stops_where_the_fault_does_not_return() -> None:
    assert search_size([1, 2, 3, 4], lambda low, high: False) == (1, 4)


def test_page_is_what_the_journal_says(fence: Fence) -> None:
    fence.malloc(1)
    assert journal_of(fence).granularity == PAGE


SEEN_ON_AN_H100 = """Opening GPU coredump: core-1122.nvcudmp
[Current focus set to CUDA kernel 0, grid 3, block (0,0,0), thread (0,0,0), device 0, sm 124, warp 2, lane 0]

CUDA Exception: Warp Illegal Address
The exception was triggered at PC 0x7f3bc37ad1e0  reads_past_the_end  (over-read.py:5)
#0  0x00007f3bc37ad200 in reads_past_the_end<<<(1,1,1),(128,1,1)>>> () at over-read.py:5

@@glm-fence code
*> 0x7f3bc37ad1e0 <reads_past_the_end+224>:\tLDG.E R5,desc[UR4][R4.64]

@@glm-fence lane 0
CUDA focus unchanged.
R3             0x7f3b              32571
R4             0xc0a00000          3231711232
R5             0x0                 0
"""


def test_a_load_that_overwrote_half_of_its_address_still_points_to_the_block() -> None:
    """cuda-gdb 13.0 on a dump of driver 580.159.04: the register that the load writes already holds its result, zero."""
    block = Row(0x7F3BC09F8000, 32768, 0x7F3BC0800000, 0x7F3BC0A00000, 0, 7, 0, 1, 0, 0)
    other = Row(0x7F3A00000000, 2 << 20, 0x7F3A00000000, 0x7F3A00200000, 0, 8, 0, 1, 0, 0)
    place, certain = locate(parse(SEEN_ON_AN_H100), Journal(1122, 2 << 20, 512, False, (other, block)))
    assert place is not None
    assert (place.row, place.where, place.distance, certain) == (block, "past the end", 0, False)
