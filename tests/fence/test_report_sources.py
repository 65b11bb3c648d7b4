"""The report from whatever there is: core dump, launch, the kernel's log."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vllm_glm_patch.fence import report as report_module
from vllm_glm_patch.fence.coredump import CoreDump, parse
from vllm_glm_patch.fence.journal import Journal, Row
from vllm_glm_patch.fence.report import INSTRUCTION, KERNEL_LOG, REGISTER, faulted, find_block, report_process, reports
from vllm_glm_patch.fence.xid import Xid

from .conftest import PAGE
from .transcripts import KERNEL, RECORD, transcript

SCALES = Row(0x7F3C89F00000 - 4096, 4096, 0x7F3C89D00000, 0x7F3C89F00000, 0, 3, 0, 1, 5, 0)
WEIGHTS = Row(0x7F3C80200000 - 512, 512, 0x7F3C80000000, 0x7F3C80200000, 0, 4, 0, 1, 6, 0)
JOURNAL = Journal(77, PAGE, 512, False, (SCALES, WEIGHTS))
PLAIN, TMA = "LDG.E R5, [R10.64]", "UTMALDG.2D [UR8], [UR99]"


def xid(address: int, pid: int | None = 77) -> Xid:
    return Xid(pid, "python", "0000:1b:00", address, "read", f"NVRM: Xid (PCI:0000:1b:00): 31, pid={pid}")


class Log:
    def __init__(self, *faults: Xid, problem: str = "") -> None:
        self._faults, self.problem = list(faults), problem

    def faults(self) -> list[Xid]:
        return self._faults


@pytest.mark.parametrize(
    ("registers", "instruction", "kernel_log", "block", "source"),
    [
        (SCALES.mapped_end, PLAIN, WEIGHTS.mapped_end, SCALES, INSTRUCTION),
        (SCALES.mapped_end, TMA, WEIGHTS.mapped_end, WEIGHTS, KERNEL_LOG),  # a page that is known goes before a register
        (SCALES.mapped_end, TMA, None, SCALES, REGISTER),
        (SCALES.mapped_end, TMA, 0x1000, SCALES, REGISTER),
        (SCALES.mapped_end, TMA, WEIGHTS.address, SCALES, REGISTER),  # an address within a block is no fault of the fence's
        (None, "", SCALES.mapped_end, SCALES, KERNEL_LOG),
        (None, "", SCALES.mapped_end + PAGE - 4096, SCALES, KERNEL_LOG),
        (None, "", SCALES.mapped_end + PAGE, None, ""),
        (None, "", None, None, ""),
    ],
)
def test_which_source_names_the_block(
    registers: int | None, instruction: str, kernel_log: int | None, block: Row | None, source: str
) -> None:
    dump = parse(transcript([registers], instruction)) if registers else CoreDump()
    place, told = find_block(dump, JOURNAL, xid(kernel_log) if kernel_log else None)
    assert (place.row if place else None, told) == (block, source)


def test_without_a_list_of_blocks_no_block_is_named() -> None:
    assert find_block(parse(transcript([SCALES.mapped_end], PLAIN)), None, xid(SCALES.mapped_end)) == (None, "")


def written(directory: Path, pid: int = 77, record: bool = True, **changes: Any) -> Path:
    """A fence's directory after a process has faulted."""
    header = struct.pack("<8sIIQQIIQQQ", b"GLMFENCE", 1, 2, pid, PAGE, 512, 0, 0, 0, 0)
    rows = [struct.pack("<QQQQQQiIII", *asdict(row).values()) for row in JOURNAL.rows]
    (directory / f"blocks-{pid}.bin").write_bytes(b"".join([header, *rows]))
    stacks = {5: "fp8.py:9 in quantise: torch.empty", 6: "moe.py:1 in load", 8: "moe.py:77 in apply: ops.cutlass_moe_mm("}
    lines = [json.dumps({"stack": number, "frames": [frame]}) + "\n" for number, frame in stacks.items()]
    (directory / f"stacks-{pid}.jsonl").write_text("".join(lines))
    candidates = [{"parameter": 0, "offset": 0, "value": row.address, "block": asdict(row)} for row in JOURNAL.rows]
    if record:
        told = {**RECORD, "pid": pid, "stack": 8, "candidates": candidates, **changes}
        (directory / f"launch-{pid}.json").write_text(json.dumps(told))
    return directory


def broken(path: Path) -> CoreDump:
    raise RuntimeError(f"{path} (68 KiB) holds no device")


def test_launch_and_kernel_log_tell_all_without_a_dump(tmp_path: Path) -> None:
    told = report_process(written(tmp_path), 77, Log(xid(SCALES.mapped_end)))  # type: ignore[arg-type]
    assert (told.kernel, told.certain, told.core) == ("reads_past(float*)", True, None)
    text = told.text()
    for part in (
        "process 77 faulted: CUDA_ERROR_ILLEGAL_ADDRESS",
        "kernel       reads_past(float*) <<<(1,1,1),(32,1,1)>>>",
        "device       0",
        "moe.py:77 in apply: ops.cutlass_moe_mm(",
        "in the page at 0x7f3c89f00000, at least 0 bytes past the end of the block (from the kernel's log)",
        f"block        4096 bytes at 0x{SCALES.address:x}",
        "fp8.py:9 in quantise: torch.empty",
        "kernel log   NVRM: Xid",
    ):
        assert part in text, text
    assert "one of" not in text
    assert "core dump" not in text


def test_without_an_address_the_blocks_of_the_launch_are_candidates(tmp_path: Path) -> None:
    told = report_process(written(tmp_path), 77, Log(problem="the kernel's log cannot be read: no permission"))  # type: ignore[arg-type]
    assert (told.place, told.certain, [row for row, _ in told.candidates]) == (None, False, [SCALES, WEIGHTS])
    text = told.text()
    for part in ("one of those that the launch was given", f"4096 bytes at 0x{SCALES.address:x}", "fp8.py:9", "no permission"):
        assert part in text, text
    told_to_machines = json.loads(json.dumps(told.as_dict()))
    assert [one["row"]["size"] for one in told_to_machines["candidates"]] == [4096, 512]
    assert told_to_machines["kernel"] == "reads_past(float*)"


def test_a_dump_that_cannot_be_read_is_a_note_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "read_core_dump", broken)
    (written(tmp_path) / "core-77.nvcudmp").touch()
    told = report_process(tmp_path, 77, Log(xid(SCALES.mapped_end)))  # type: ignore[arg-type]
    assert "holds no device" in told.problem
    assert told.kernel == "reads_past(float*)"
    assert told.place is not None and told.place.row == SCALES
    assert told.core == tmp_path / "core-77.nvcudmp"


def test_the_dumps_kernel_goes_before_the_launchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "read_core_dump", lambda path: parse(transcript([SCALES.mapped_end], PLAIN)))
    (written(tmp_path) / "core-77.nvcudmp").touch()
    told = report_process(tmp_path, 77, Log(xid(WEIGHTS.mapped_end)))  # type: ignore[arg-type]
    assert told.kernel == KERNEL
    assert f"{KERNEL} <<<(132,1,1),(384,1,1)>>>" in told.text()
    assert told.place is not None and (told.place.row, told.source) == (SCALES, INSTRUCTION)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"graph": True, "kernel": "", "function": "cuGraphLaunch"}, "kernel       one in a CUDA graph (cuGraphLaunch)"),
        ({"concurrent": 2}, "doubt        2 other threads"),
        ({"found": "launch"}, "doubt        The launch itself was refused"),
        ({"candidates": [], "parameters_read": False}, "block        unknown: the launch's parameters could not be read"),
        ({"candidates": []}, "block        unknown\n"),
    ],
)
def test_what_a_launch_does_not_tell_is_said(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    assert part in report_process(written(tmp_path, **changes), 77).text() + "\n"


def test_no_line_of_the_log_is_said_and_one_of_another_process_is_not_taken(tmp_path: Path) -> None:
    written(tmp_path, pid=78, record=False)
    told = report_process(written(tmp_path), 77, Log(xid(SCALES.mapped_end, pid=78)))  # type: ignore[arg-type]
    assert told.xid is None
    assert "no MMU fault (Xid 31) of this process" in told.problem


def test_a_line_that_points_nowhere_is_said(tmp_path: Path) -> None:
    told = report_process(written(tmp_path, record=False), 77, Log(xid(0x1000)))  # type: ignore[arg-type]
    assert "unknown: 0x1000 lies behind no block of the fence" in told.text()


def test_a_torn_record_is_a_note_only(tmp_path: Path) -> None:
    (written(tmp_path) / "launch-77.json").write_text('{"pid": 7')
    told = report_process(tmp_path, 77)
    assert told.launch is None
    assert "launch-77.json" in told.problem


def test_every_process_that_faulted_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "read_core_dump", broken)
    for pid in (77, 78, 79, 80):
        written(tmp_path, pid=pid, record=pid in (77, 78))
    (tmp_path / "core-77.nvcudmp").touch()
    assert sorted(faulted(tmp_path)) == [77, 78]
    log = Log(xid(SCALES.mapped_end, 77), xid(WEIGHTS.mapped_end, 79))
    told = {one.pid: one for one in reports(tmp_path, log)}  # type: ignore[arg-type]
    assert sorted(told) == [77, 78, 79]
    assert told[79].place is not None and told[79].place.row == WEIGHTS
    assert told[78].place is None
    assert len(reports(tmp_path)) == 2
