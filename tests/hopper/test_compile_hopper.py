"""The Hopper kernels through the real compiler, without a card: sm_90a, no spills, wgmma, and the sizes that abi.h promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated import KERNELS

REGISTERS = 65536  # of a multiprocessor
SHARED = 232448  # bytes that a block may have on compute capability 9.0
SOURCES = (
    "gemm1_prefill.cu",
    "gemm1_split.cu",
    "gemm1_quarter.cu",
    "gemm2_prefill.cu",
    "gemm1_decode.cu",
    "gemm2_decode.cu",
    "gemm2_turns.cu",
    "topk_sum.cu",
    "prologue.cu",
)


@dataclass(frozen=True)
class Entry:
    """One line of abi.h's table of kernels."""

    name: str
    source: str
    family: str
    block: int
    stages: int
    stage_bytes: int
    tile_rows: int

    def shared_bytes(self, intermediate_size: int) -> int:
        """abi.h's shared_bytes(), written again."""
        if self.family == "sum":
            return 0
        if self.family == "prologue":
            return self.stage_bytes
        if self.family == "gemm2_ring":
            return self.stages * self.stage_bytes + 2048
        fixed = self.stages * self.stage_bytes + 4096 + 1024
        if self.family != "gemm2_decode":
            return fixed
        room = -(-self.tile_rows * (-(-intermediate_size // 128) * 128 + 280) // 1024) * 1024
        return fixed + (2 * room if fixed + 2 * room <= 232448 else room)


def entries() -> list[Entry]:
    """abi.h's table of kernels."""
    found = re.findall(
        r'\{"(\w+)", "([\w.]+)", Family::(\w+), Grid::\w+, (\d+), \d+, (\d+), \d+, (\d+), (\d+), \w+, \{[^}]*\}\}',
        (KERNELS / "abi.h").read_text(),
    )
    return [
        Entry(name, source, family, int(block), int(stages), int(stage_bytes), int(rows))
        for name, source, family, block, rows, stages, stage_bytes in found
    ]


def find_nvcc() -> str | None:
    """CUDA's compiler, on the path or where its packages put it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ptxas says of each source; the cubins lie in `cubins` beside."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here, and only it can say what becomes of the kernels on sm_90a")
    folder = tmp_path_factory.mktemp("cubins")
    made = {}
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin"]
    for source in SOURCES:
        out = folder / f"{source}.cubin"
        done = subprocess.run(
            [nvcc, *target, "-o", out, KERNELS / source], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        made[source] = done.stdout + done.stderr
    made["folder"] = str(folder)
    return made


@pytest.mark.parametrize("source", SOURCES)
def test_source_compiles_for_hopper_without_spills(reports: dict[str, str], source: str) -> None:
    report = reports[source]
    named = re.findall(r"Compiling entry function '(\w+)'", report)
    assert sorted(named) == sorted(entry.name for entry in entries() if entry.source == source)
    assert Counter(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)) == {("0", "0"): len(named)}
    # C75xx: setmaxnreg ignored, or wgmma serialised.
    assert "C75" not in report, report
    registers = dict(zip(named, map(int, re.findall(r"Used (\d+) registers", report))))
    for entry in entries():
        if entry.source == source:
            assert registers[entry.name] * entry.block <= REGISTERS


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_shared_memory_fits_a_hopper_block(entry: Entry) -> None:
    for width in (192, 384, 768, 1536):
        assert entry.shared_bytes(width) <= SHARED


@pytest.fixture(scope="module")
def code(reports: dict[str, str]) -> dict[str, str]:
    """The machine code of each source, as text."""
    triton = pytest.importorskip("triton")
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not os.access(nvdisasm, os.X_OK):
        pytest.skip("this Triton brings no nvdisasm")
    made = {}
    for source in SOURCES:
        cubin = Path(reports["folder"]) / f"{source}.cubin"
        made[source] = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True, timeout=120).stdout
    return made


def kernels_of(code: str) -> dict[str, str]:
    """The machine code of each kernel of a source."""
    return dict(re.findall(r"^\.text\.(glm_\w+):(.*?)(?=^\.text\.|\Z)", code, re.MULTILINE | re.DOTALL))


def most_registers(lines: list[str], start: int) -> int:
    """Of all instructions that can be reached from one, the highest register's number and 1."""
    labels = {line: index for index, line in enumerate(lines) if line.startswith(".L_x_")}
    seen: set[int] = set()
    ahead, most = [start], 0
    while ahead:
        index = ahead.pop()
        if index in seen or index >= len(lines):
            continue
        seen.add(index)
        line = lines[index]
        most = max([most, *(1 + int(number) for number in re.findall(r"\bR(\d+)\b", line))])
        if target := re.search(r"`\((\.L_x_\d+)\)", line):
            ahead.append(labels[target[1]])
        if not re.match(r"(EXIT|RET|BRA)\b", line):  # with a predicate they start with it, and may go on
            ahead.append(index + 1)
    return most


@pytest.mark.parametrize(
    "source", ["gemm1_prefill.cu", "gemm1_split.cu", "gemm1_quarter.cu", "gemm2_prefill.cu", "gemm2_turns.cu"]
)
def test_no_role_uses_more_registers_than_setmaxnreg_leaves_it(code: dict[str, str], source: str) -> None:
    for name, body in kernels_of(code[source]).items():
        found = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;|^(\.L_x_\d+):", body, re.MULTILINE)
        lines = [instruction or label for instruction, label in found]
        asked = {index: int(line.split()[-1], 16) for index, line in enumerate(lines) if "USETMAXREG" in line}
        assert len(asked) >= 2, name
        for index, registers in asked.items():
            assert 24 <= registers <= 240
            assert 8 <= most_registers(lines, index) <= registers, f"{name}: {lines[index]}"


def test_machine_code_has_the_instructions_meant(code: dict[str, str]) -> None:
    for source in SOURCES[:-2]:
        assert "QGMMA" in code[source], f"{source} multiplies without wgmma"
        assert "UTMALDG" in code[source], f"{source} reads its weights without TMA"
        assert not re.search(r"\b(STL|LDL)\b", code[source]), f"{source} uses local memory"
    for source in ("gemm1_prefill.cu", "gemm1_split.cu"):
        assert "QGMMA.64x192x32.F32.E4M3.E4M3" in code[source]
    for source in ("gemm1_prefill.cu", "gemm1_split.cu", "gemm1_quarter.cu", "gemm1_decode.cu"):
        assert "LDGSTS.E.BYPASS.128" in code[source], f"{source} gathers in less than 16 bytes"
    for source in ("gemm1_prefill.cu", "gemm1_split.cu", "gemm1_quarter.cu", "gemm2_prefill.cu", "gemm2_turns.cu"):
        assert "USETMAXREG" in code[source]
    for source in ("gemm2_prefill.cu", "topk_sum.cu"):
        assert "LDG.E.128.STRONG.GPU" in code[source]
        assert "STG.E.128" in code[source]
    # Partials through the ring: read 16 bytes at a time, and none loaded from L2; a proxy fence for global memory before
    # products are told and one after they are seen.
    for name, body in kernels_of(code["gemm2_prefill.cu"]).items():
        ring = "_ring_" in name
        assert ("LDG.E.128.STRONG.GPU" in body) is not ring, name
        assert (body.count("LDS.128") >= 8) is ring, name
        assert body.count("FENCE.VIEW.ASYNC.G") == 2 * ring, name
        assert "STG.E.EF.128" in body, name
    # By turns: a stage's operands are a box each, of its products one group; partials go into shared memory by the matrix, and
    # out of it 16 bytes a lane.
    for name, body in kernels_of(code["gemm2_turns.cu"]).items():
        assert (body.count("UTMALDG.4D"), body.count("UTMALDG.3D")) == (2, 1), name  # weights also as what is read last
        assert body.count("QGMMA.64x128x32.F32.E4M3.E4M3") == 12 and body.count("WARPGROUP.DEPBAR") == 2, name
        assert body.count("STSM.16.M88.4") == 16, name
        assert body.count("FENCE.VIEW.ASYNC.S") == 1, name  # for the barriers
        assert body.count("FENCE.VIEW.ASYNC.G") == 2, name
        assert len(re.findall(r"STG\.E\.128 ", body)) == 16, name
    # By quarters: a step's weights are one box; its products one group, of 64 rows or of twice as many, waited for once; each
    # of the three places that finish 64 rows sends two largest values to another block; the launch before is waited for.
    quarter = code["gemm1_quarter.cu"]
    assert quarter.count("UTMALDG") == quarter.count("UTMALDG.4D") == 1
    assert quarter.count("QGMMA") == quarter.count("QGMMA.64x96x32.F32.E4M3.E4M3") == 4 + 8
    assert quarter.count("WARPGROUP.DEPBAR") == 2
    assert len(re.findall(r"\bSTAS\b", quarter)) == 3 * 2
    assert quarter.count("ACQBULK") == 1
    # Of the prologue: rows in 16-byte loads, all five before the first is used, and FP8 in 8-byte stores; the other blocks'
    # totals out of the cluster's shared memory.
    assert not re.search(r"\b(STL|LDL)\b", code["prologue.cu"])
    clustered = code["prologue.cu"].split(".text.glm_prologue_c8:")[1]
    row = clustered[: clustered.index("FMNMX")]
    assert row.count("LDG.E.NA.128.CONSTANT") == 5, "a row's loads wait for one another"
    assert "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C" in code["prologue.cu"]
    assert "STG.E.64" in code["prologue.cu"]
    # The wgmma of a group are waited for together: one wait a group, and one more at the end where the last runs on till then.
    for source in ("gemm1_prefill.cu", "gemm1_split.cu"):
        for name, body in kernels_of(code[source]).items():
            products = 4 if "_split" in name else 8
            waits = body.count("WARPGROUP.DEPBAR")
            assert waits >= 1 and body.count("QGMMA") == products * max(waits - 1, 1), name
