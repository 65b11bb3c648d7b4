"""The whole backend without a card: Triton's prologue in its interpreter, the launcher, the kernels under the emulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from emulated import run_cases

_CASES = [
    # tokens, intermediate size, experts of this rank and in all, kernels, routing; tokens of a band, top_k, prologue
    (40, 192, 4, 4, "glm_gemm1_row_c1", "glm_gemm2_sum_n128", "spread"),
    (136, 192, 9, 9, "glm_gemm1_row_c1", "glm_gemm2_sum_n128", "bad", 128, 8),
    (70, 192, 3, 3, "glm_gemm1_row_split", "glm_gemm2_sum_n128", "bad"),
    (136, 192, 8, 16, "glm_gemm1_row_c1", "glm_gemm2_sum_n256", "spread", 128, 8),
    # A cluster of four shares each tile.
    (150, 192, 4, 4, "glm_gemm1_row_quarter", "glm_gemm2_sum_n128", "skewed"),
    (70, 192, 9, 9, "glm_gemm1_row_quarter", "glm_gemm2_ring_n256", "bad", 0, 8, "native"),
    (40, 192, 9, 9, "glm_gemm1_row_quarter", "glm_gemm2_turns_lanes_n256", "spread", 0, 8),
    (5, 192, 2, 2, "glm_gemm1_row_quarter", "glm_gemm2_sum_n256", "none"),
    (33, 384, 3, 6, "glm_gemm1_columns_c1", "glm_gemm2_sum_n256", "spread"),
    (20, 384, 3, 3, "glm_gemm1_exact_c1", "glm_gemm2_sum_n128", "skewed"),
    (3, 192, 4, 4, "glm_gemm1_decode_t8", "glm_gemm2_decode_t8", "spread"),
    (17, 384, 3, 6, "glm_gemm1_decode_t16", "glm_gemm2_decode_t16", "bad"),
    (40, 192, 2, 2, "glm_gemm1_decode_t64", "glm_gemm2_decode_t64", "collapsed"),
    (15, 1536, 20, 160, "glm_gemm1_decode_t8", "glm_gemm2_decode_t8", "spread", 0, 8),
    (5, 192, 2, 2, "glm_gemm1_decode_t32", "glm_gemm2_decode_t32", "none"),
    (40, 192, 4, 4, "triton", "glm_gemm2_sum_n256", "bad"),
    (33, 384, 3, 6, "triton", "glm_gemm2_sum_n128", "spread"),
    (17, 192, 4, 4, "triton", "glm_gemm2_decode_t16", "spread"),
    # Partials through a ring in shared memory: some in two bands, the last of 8 tokens; rows of two widths.
    (136, 192, 9, 9, "glm_gemm1_row_c1", "glm_gemm2_ring_n256", "bad", 128, 8),
    (70, 192, 8, 16, "triton", "glm_gemm2_ring_n128", "spread", 0, 8),
    (33, 384, 9, 9, "glm_gemm1_columns_c1", "glm_gemm2_ring_n256", "skewed", 0, 8),
    (136, 192, 8, 16, "glm_gemm1_row_split", "glm_gemm2_ring_n128", "collapsed", 128, 8, "native"),
    # Warpgroups by turns.
    (136, 192, 9, 9, "glm_gemm1_row_c1", "glm_gemm2_turns_lanes_n256", "bad", 128, 8),
    (70, 384, 8, 16, "triton", "glm_gemm2_turns_lanes_n256", "spread", 0, 8),
    (33, 192, 9, 9, "glm_gemm1_row_c1", "glm_gemm2_turns_lanes_n256", "skewed", 0, 8),
    (20, 192, 4, 4, "glm_gemm1_decode_t8", "glm_gemm2_decode_t16", "bad", 0, 2, "native"),
    (136, 192, 8, 16, "glm_gemm1_row_c1", "glm_gemm2_sum_n128", "spread", 128, 8, "native"),
]


def run_all(launcher: str, driver: str) -> None:
    """In a process of its own, under Triton's interpreter: each layer against float64, step by step, a line of JSON a case."""
    from tests.gpu.hopper_stages import check_layer
    from vllm_glm_patch.moe.generators import make_inputs
    from vllm_glm_patch.moe.hopper.backend import HopperConfig
    from vllm_glm_patch.moe.hopper.native import Native
    from vllm_glm_patch.moe.problem import Problem

    native = Native(Path(launcher))
    native.open(driver)
    for source in native.sources:
        native.load(0, source, b"")
    for number, (tokens, width, experts, global_experts, gemm1, gemm2, routing, *more) in enumerate(_CASES):
        band, top_k, prologue = (*more, *(0, 2, "triton")[len(more) :])
        problem = Problem(tokens, 512, width, experts, global_experts, top_k)
        inputs = make_inputs(problem, 11, routing)  # type: ignore[arg-type]
        config = HopperConfig(gemm1, gemm2, slice=256, slots=2, band=band, prologue=prologue)
        report = check_layer(native, inputs, config, multiprocessors=2, stream=lambda: 0)
        print(json.dumps({"case": number, "wrong": report.wrong, "lines": report.lines}), flush=True)


@pytest.fixture(scope="module")
def results(emulated_libraries: tuple[Path, Path]) -> tuple[dict[int, dict[str, Any]], str]:
    """(result of each case that came to an end, what the process printed otherwise)."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    return run_cases("test_whole_layer_emulated", emulated_libraries)


@pytest.mark.parametrize(
    "case", range(len(_CASES)), ids=[f"{c[4].removeprefix('glm_')}-{c[5][4:]}-{'-'.join(map(str, c[6:8]))}" for c in _CASES]
)
def test_layer_agrees_with_float64(results: tuple[dict[int, dict[str, Any]], str], case: int) -> None:
    found, otherwise = results
    assert case in found, otherwise
    lines = found[case]["lines"]
    assert found[case]["wrong"] == 0, "\n".join(lines)
    # Every step was compared, and the layer.
    assert [line.split()[1].rstrip(":") for line in lines if line.startswith("ok")][-1] == "layer"
    assert len(lines) >= 6
