"""Compile every kernel for sm_90 without a card, and check what the compiler made of it: wgmma where meant, no spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

GLOBAL_READ = re.compile(r"\b(?:ld\.global|cp\.async\.c[ag]|ld\.acquire)")
GLOBAL_WRITE = re.compile(r"\b(?:st\.global|st\.release|atom|red)\.[\w.]+")
# The kernels' size constants for GLM-4.6 on one of 8 ranks.
_GLM = {"HIDDEN": 5120, "INTERMEDIATE": 192}


@dataclass(frozen=True)
class Case:
    """One kernel and one configuration. `wgmma`: whether its machine code must hold warpgroup matrix instructions."""

    name: str
    kernel: str
    constants: dict[str, object]
    warps: int
    stages: int
    wgmma: bool
    pdl: bool = False


def cases() -> list[Case]:
    """Every kernel, and again as programmatic dependent launch has it."""
    early = {
        "stream 16": {"EXPERTS": 160, "EARLY": 4},
        "resident 16 swapped": {"PREFETCH": 1024},
        "resident 64x128": {"EARLY": True, "HINTS": True},
        "loop 128x128": {"HINTS": True},
        "sum": {"HINTS": True},
    }
    plain = plain_cases()
    ahead = [
        replace(case, name=f"{case.name}, dependent", constants={**case.constants, **early.get(case.name, {})}, pdl=True)
        for case in plain
        if case.name not in ("tile 64x64", "tile 128x128", "pairs gemm1, 1 columns, 4 warps", "pairs gemm1, 2 columns, 4 warps")
    ]
    return plain + ahead


def plain_cases() -> list[Case]:
    """The configurations the defaults and the first sweep lean on."""
    resident = {**_GLM, "LOW": 128, "HIGH": 64, "QUANTISED": True, "SWAP": False, "EARLY": False, "PREFETCH": 0, "HINTS": False}
    routed = {
        "WIDTH": 5120,
        "LOW": 4096,
        "HIGH": 1024,
        "EXPERTS": 160,
        "GLOBAL_EXPERTS": 160,
        "HAS_MAP": False,
        "BINS": 256,
    }
    lists = {"BLOCK_M1": 16, "BLOCK_M2": 16, "DONE": 2048}
    return [
        Case(
            "tile 128x64",
            "triton.gemm1:gemm1_tile_kernel",
            {**_GLM, "TOP_K": 8, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 4},
            8,
            4,
            True,
        ),
        Case(
            "tile 64x64",
            "triton.gemm1:gemm1_tile_kernel",
            {**_GLM, "TOP_K": 8, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 4},
            4,
            4,
            True,
        ),
        Case(
            "tile 128x128",
            "triton.gemm1:gemm1_tile_kernel",
            {**_GLM, "TOP_K": 8, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 4},
            8,
            4,
            True,
        ),
        Case(
            "row 128",
            "triton.gemm1:gemm1_row_kernel",
            {**_GLM, "TOP_K": 8, "BLOCK_M": 128, "LOW": 128, "HIGH": 64, "BLOCK_K": 128},
            8,
            3,
            True,
        ),
        Case(
            "stream 16",
            "triton.gemm1:gemm1_stream_kernel",
            {**_GLM, "TOP_K": 8, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 4, "EXPERTS": 0, "EARLY": 0},
            4,
            4,
            True,
        ),
        Case(
            "resident 64x128",
            "triton.gemm2:gemm2_kernel",
            {**resident, "BLOCK_M": 64, "BLOCK_N": 128, "STRIP": 128, "STAGES": 2},
            4,
            2,
            True,
        ),
        Case(
            "resident 16 swapped",
            "triton.gemm2:gemm2_kernel",
            {**resident, "QUANTISED": False, "SWAP": True, "BLOCK_M": 16, "BLOCK_N": 64, "STRIP": 512, "STAGES": 3},
            4,
            3,
            True,
        ),
        Case(
            "loop 128x128",
            "triton.gemm2:gemm2_loop_kernel",
            {
                "HIDDEN": 5120,
                "INTERMEDIATE": 1536,
                "BLOCK_M": 128,
                "BLOCK_N": 128,
                "BLOCK_K": 128,
                "GROUP": 4,
                "SWAP": False,
                "HINTS": False,
            },
            8,
            4,
            True,
        ),
        Case(
            "fused 64x128",
            "triton.gemm2_fused:gemm2_sum_kernel",
            {
                **_GLM,
                "EXPERTS": 160,
                "TOP_K": 8,
                "LOW": 128,
                "HIGH": 64,
                "BLOCK_M": 64,
                "BLOCK_N": 128,
                "STRIP": 128,
                "SLICE": 128,
                "SLOTS": 2,
                "QUANTISED": True,
                "STAGES": 2,
                "BLOCK_T": 16,
            },
            4,
            2,
            True,
        ),
        *(
            Case(
                f"pairs gemm1, {columns} columns, {warps} warps",
                "triton.pairs:pair_gemm1_kernel",
                {
                    **_GLM,
                    "LOW": 4096,
                    "HIGH": 1024,
                    "EXPERTS": 160,
                    "GLOBAL_EXPERTS": 160,
                    "HAS_MAP": False,
                    "TOP_K": 8,
                    "COLUMNS": columns,
                },
                warps,
                3,
                False,
            )
            for columns, warps in ((2, 8), (1, 4), (2, 4), (4, 8))
        ),
        Case(
            "pairs gemm2",
            "triton.pairs:pair_gemm2_kernel",
            {
                **_GLM,
                "WIDTH_BLOCK": 256,
                "EXPERTS": 160,
                "GLOBAL_EXPERTS": 160,
                "HAS_MAP": False,
                "TOP_K": 8,
                "CHOICES": 8,
                "COLUMNS": 4,
            },
            4,
            3,
            False,
        ),
        Case(
            "sum",
            "triton.gemm2:sum_kernel",
            {"HIDDEN": 5120, "EXPERTS": 160, "TOP_K": 8, "BLOCK_T": 4, "BLOCK_C": 512, "EXACT": True, "HINTS": False},
            4,
            3,
            False,
        ),
        Case("quantise rows", "triton.quantise:quantise_rows_kernel", {"WIDTH": 192, "BLOCK": 256, "ROWS": 16}, 4, 3, False),
        Case(
            "prologue small",
            "routing:prologue_small_kernel",
            {**routed, **lists, "MOST_PAIRS": 1024, "PAIRS_BLOCK": 512, "PLACE": 16},
            8,
            3,
            False,
        ),
        Case("prologue", "routing:prologue_kernel", {**routed, "CHUNK": 1024}, 4, 3, False),
        Case("scan", "routing:scan_kernel", {"EXPERTS": 160, "BINS": 256, "ROWS": 16, **lists}, 8, 3, False),
        Case(
            "place",
            "routing:place_kernel",
            {"EXPERTS": 160, "BINS": 256, "CHUNK": 1024, "PLACE": 16, "STRIP": 256, "BAND_M": 0},
            4,
            3,
            False,
        ),
        Case(
            "place, by bands",
            "routing:place_kernel",
            {"EXPERTS": 160, "BINS": 256, "CHUNK": 1024, "PLACE": 16, "STRIP": 256, "BAND_M": 128},
            4,
            3,
            False,
        ),
        Case(
            "scan, by bands",
            "routing:scan_kernel",
            {"EXPERTS": 160, "BINS": 256, "ROWS": 16, **lists, "BLOCK_M2": 0},
            8,
            3,
            False,
        ),
    ]


def argument_type(name: str, kernel: str, constants: dict[str, object]) -> str:
    """Triton's type name for a kernel argument, by its name."""
    pointers = {
        "tokens": "*fp8e4nv",
        "w13": "*fp8e4nv",
        "w2": "*fp8e4nv",
        "act": "*fp8e4nv" if constants.get("QUANTISED") or "row" in kernel or "loop" in kernel else "*bf16",
        "hidden": "*bf16",
        "partial": "*bf16",
        "source": "*bf16",
        "target": "*fp8e4nv",
        "quantised": "*fp8e4nv",
        "out": "*bf16",
    }
    if name == "tokens" and "sum" in kernel:
        return "i32"
    if name in pointers:
        return pointers[name]
    if name.endswith("scales") or name == "topk_weights":
        return "*fp32"
    if name in ("rows", "tiles", "counts", "local_ids", "ids", "expert_map", "done", "histogram", "limit", "band_tiles"):
        return "*i32"
    return "i32"


def before_waits(ptx: str) -> str:
    """What a program runs before it waits for its predecessor: up to the first wait, and between the end of a path that has
    waited and the next path's wait."""
    first, *later = ptx.split("griddepcontrol.wait")
    return first + "".join(re.split(r"\bbra\.uni\b|\bret;", part)[-1] for part in later[:-1])


def compile_case(case: Case) -> dict[str, object]:
    """Compile for sm_90; registers, spilled bytes, shared memory, and whether QGMMA is in the machine code."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(f"vllm_glm_patch.moe.{module}"), name)
    signature: dict[str, str] = {}
    attributes = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in case.constants or argument == "PDL":
            signature[argument] = "constexpr"
        else:
            signature[argument] = argument_type(argument, name, case.constants)
            unspecialised = ("pairs", "chunks", "bands", "band_chunks")
            if argument not in unspecialised and not (argument == "tokens" and signature[argument] == "i32"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature["PDL"] = "constexpr"
    source = ASTSource(kernel, signature, constexprs={**case.constants, "PDL": case.pdl}, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = Path(os.environ.get("TMPDIR", "/tmp")) / f"vgp-{os.getpid()}.cubin"
    try:
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    finally:
        cubin.unlink(missing_ok=True)
    before_wait = before_waits(compiled.asm["ptx"]) if case.pdl else ""
    return {
        "case": case.name,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "spills": len(re.findall(r"\bSTL\b", code)),
        "shared": compiled.metadata.shared,
        "qgmma": len(re.findall(r"QGMMA", code)),
        # FP8 conversions of an immediate: none is meant, and ptxas has made a NaN of a zero there (triton/pairs.py).
        "fp8_of_constants": re.findall(r"E4M3\.UNPACK_B \w+, ([\d+-][^ ;]*)", code),
        # Global memory touched before the wait of a dependent launch: reads, and what must never be there.
        "read_before_wait": len(GLOBAL_READ.findall(before_wait)),
        "written_before_wait": GLOBAL_WRITE.findall(before_wait),
        "asked_before_wait": before_wait.count("prefetch.global.L2"),
        "waits": code.count("ACQBULK"),
        "qmma": len(re.findall(r"\bQMMA|\bHMMA", code)),
        "ldgsts": sorted(set(re.findall(r"LDGSTS\.E(?:\.\w+)*", code))),
        "ldg": sorted(set(re.findall(r"LDG\.E(?:\.\w+)*", code))),
        "stg": sorted(set(re.findall(r"STG\.E(?:\.\w+)*", code))),
    }


def main(names: list[str]) -> None:
    for case in cases():
        if not names or any(name in case.name for name in names):
            print(compile_case(case), flush=True)


@pytest.mark.parametrize("name", [case.name for case in cases()])
def test_kernel_compiles_for_hopper_with_its_matrix_instructions_and_without_spills(name: str) -> None:
    # A process of its own: the rest of the CPU tests import the kernels under Triton's interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    result = next(eval(line) for line in run.stdout.splitlines() if line.startswith("{"))
    case = next(case for case in cases() if case.name == name)
    assert result["spills"] == 0
    assert result["fp8_of_constants"] == []
    assert (result["waits"] > 0) == case.pdl
    assert result["written_before_wait"] == []
    # These read before they wait what was finished two launches ago (see each); the others read nothing.
    reads_early = ("resident", "loop", "fused", "pairs gemm2", "quantise rows", "place")
    assert (result["read_before_wait"] > 0) == (case.pdl and case.name.startswith(reads_early))
    asks = case.constants.get("PREFETCH", 0) or (case.name.startswith("stream") and case.constants["EARLY"])
    assert (result["asked_before_wait"] > 0) == bool(asks)
    assert (result["qgmma"] > 0) == case.wgmma


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    main(sys.argv[1:])
