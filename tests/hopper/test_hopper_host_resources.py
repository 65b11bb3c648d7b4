"""The kernels compiled by nvcc, where there is one: all that abi.h lists, no spills, and resources that a card has."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hopper_host import CSRC, TableRow, argument_sizes, cubin_arguments, nvcc, table

from vllm_glm_patch.moe.hopper import library

REGISTERS = 65536  # of one multiprocessor, compute capability 9.0
SHARED = 232448  # bytes one block may use, static and dynamic


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel."""

    registers: int
    spilled: int
    stack: int
    static_shared: int


def parse(text: str) -> dict[str, Report]:
    """The lines of `ptxas -v`, by kernel."""
    found = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.split("'")[0]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups())  # type: ignore[union-attr]
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = Report(registers, stores + loads, stack, int(shared[1]) if shared else 0)
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Report], dict[str, list[int]]]:
    """(ptxas' report, argument sizes) of every kernel."""
    compiler, where = nvcc(), tmp_path_factory.mktemp("cubins")
    flags = library.flags_of(library.read_sources(CSRC))

    def one(source: Path) -> tuple[dict[str, Report], dict[str, list[int]]]:
        cubin = where / f"{source.stem}.cubin"
        command = [compiler, "-cubin", *flags, "-Xptxas", "-v", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return parse(done.stderr), cubin_arguments(cubin.read_bytes())

    reports: dict[str, Report] = {}
    arguments: dict[str, list[int]] = {}
    with ThreadPoolExecutor(2) as pool:
        for report, sizes in pool.map(one, sorted(CSRC.glob("*.cu"))):
            reports |= report
            arguments |= sizes
    return reports, arguments


def test_the_sources_hold_the_kernels_that_abi_h_lists(compiled) -> None:
    reports, arguments = compiled
    assert set(reports) == {row.name for row in table()}
    assert arguments == {row.name: argument_sizes()[row.family] for row in table()}


@pytest.mark.parametrize("row", table(), ids=lambda row: row.name)
def test_no_kernel_spills_and_each_fits_a_multiprocessor(row: TableRow, compiled) -> None:
    report = compiled[0][row.name]
    assert (report.spilled, report.stack) == (0, 0)
    # Registers are given out to a warp in lots of 256.
    assert -(-report.registers * 32 // 256) * 256 * (row.block // 32) <= REGISTERS
    dynamic = 0
    if row.family != "sum":
        widest = 1536 if row.family == "gemm2_decode" else 0
        rows = row.tile_rows * (widest + 272) if widest else 0
        dynamic = row.stages * row.stage_bytes + 4096 + 1024 + rows
    assert report.static_shared + dynamic <= SHARED
