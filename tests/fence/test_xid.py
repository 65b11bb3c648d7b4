"""Faults of the card's MMU in the kernel's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_glm_patch.fence.xid import KernelLog, of_process, parse_xids

MMU = "MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_3 faulted @ 0x7f3c_8a000000. Fault is of type FAULT_PTE ACCESS_TYPE_VIRT_READ"
LINE = f"NVRM: Xid (PCI:0000:1b:00): 31, pid=1234, name=VLLM::EngineCor, Ch 00000008, intr 00000000. {MMU}"
LINES = {  # as drivers 450 to 580 put it, through /dev/kmsg, dmesg and dmesg -T
    f"6,2817,93184455,-;{LINE}": (1234, "VLLM::EngineCor", "0000:1b:00", 0x7F3C8A000000, "read"),
    f"[   93.184455] {LINE}": (1234, "VLLM::EngineCor", "0000:1b:00", 0x7F3C8A000000, "read"),
    f"[Tue Nov 25 09:00:01 2025] {LINE}": (1234, "VLLM::EngineCor", "0000:1b:00", 0x7F3C8A000000, "read"),
    f"NVRM: Xid (PCI:0000:00:1e): 31, Ch 00000010, intr 10000000. {MMU}": (None, "", "0000:00:1e", 0x7F3C8A000000, "read"),
    f"NVRM: Xid (PCI:0000:c1:00): 31, pid='<unknown>', name=<unknown>, Ch 00000008, intr 00000000. {MMU}": (
        None, "", "0000:c1:00", 0x7F3C8A000000, "read",
    ),
    f"NVRM: Xid (PCI:0000:81:00 GPU-I:05): 31, pid='77', name=python3, channel 0x00000008, intr 00000000. {MMU}": (
        77, "python3", "0000:81:00", 0x7F3C8A000000, "read",
    ),
    LINE.replace("0x7f3c_8a000000", "0x1_00002000").replace("VIRT_READ", "VIRT_WRITE"): (
        1234, "VLLM::EngineCor", "0000:1b:00", 0x100002000, "write",
    ),
    LINE.replace("0x7f3c_8a000000", "0x7f3c8a000000").replace("VIRT_READ", "VIRT_ATOMIC_STRONG"): (
        1234, "VLLM::EngineCor", "0000:1b:00", 0x7F3C8A000000, "atomic_strong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", list(LINES))
def test_a_line_of_the_log_is_read(line: str) -> None:
    (found,) = parse_xids([line])
    assert (found.pid, found.name, found.card, found.address, found.access) == LINES[line]
    assert found.line.startswith("NVRM: Xid")


@pytest.mark.parametrize(
    "line",
    [
        "NVRM: Xid (PCI:0000:1b:00): 13, pid=1234, name=python, Graphics SM Warp Exception on (GPC 0, TPC 1): Illegal Address",
        "NVRM: Xid (PCI:0000:1b:00): 43, pid=1234, name=python, Ch 00000008",
        f"someone wrote: {MMU}",
        "",
    ],
)
def test_other_lines_are_no_fault_of_the_mmu(line: str) -> None:
    assert parse_xids([line]) == []


def line_of(pid: int | str) -> str:
    return LINE.replace("1234", str(pid))


@pytest.mark.parametrize(
    ("pids", "others", "found"),
    [
        ([1234], (), 1234),
        ([5, 1234, 6], (), 1234),
        ([5], (), 5),  # a container: it is counted otherwise there
        ([5], (5,), None),  # another process of the run
        ([5, 6], (), None),
        ([5, 6], (6,), 5),
        ([], (), None),
    ],
)
def test_the_line_of_a_process(pids: list[int], others: tuple[int, ...], found: int | None) -> None:
    fault = of_process(parse_xids(map(line_of, pids)), 1234, others)
    assert (fault.pid if fault else None) == found


def test_only_lines_since_the_start_count(tmp_path: Path) -> None:
    kmsg = tmp_path / "kmsg"
    kmsg.write_text(line_of(1) + "\n")
    log = KernelLog(kmsg)
    assert log.faults() == []
    for pid in (2, 3):
        with kmsg.open("a") as file:
            file.write(line_of(pid) + "\n SUBSYSTEM=pci\n")
    assert [fault.pid for fault in log.faults()] == [2, 3]
    assert [fault.pid for fault in log.faults()] == [2, 3]
    log.close()


def test_without_kmsg_dmesg_is_asked(tmp_path: Path) -> None:
    text = f"[1.0] {line_of(1)}\n"
    log = KernelLog(tmp_path / "none", lambda: text)
    assert (log.faults(), log.problem) == ([], "")
    text += f"[2.0] {line_of(1)}\n"
    assert [fault.line for fault in log.faults()] == [line_of(1)]


def test_without_permission_the_log_says_why_and_nothing_fails(tmp_path: Path) -> None:
    def refused() -> str:
        raise PermissionError("dmesg: read kernel buffer failed: Operation not permitted")

    log = KernelLog(tmp_path / "none", refused)
    assert log.faults() == []
    assert "Operation not permitted" in log.problem
    assert str(tmp_path / "none") in log.problem
    log.close()
