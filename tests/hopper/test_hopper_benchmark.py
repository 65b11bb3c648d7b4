"""benchmarks/hopper.py without a card: its cases name kernels that exist, and a child that hangs or dies costs one case."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from emulated import KERNELS


def test_cases_name_every_kernel_and_none_other(benchmark: ModuleType) -> None:
    names = set(re.findall(r'\{"(glm_\w+)"', (KERNELS / "abi.h").read_text()))
    checked = benchmark.checks()
    named = {case.gemm1 for case in checked} | {case.gemm2 for case in checked}
    assert named | {"glm_topk_sum"} | {name for name in names if "_prologue_" in name} == names | {"triton"}
    for shape in benchmark.SHAPES:
        for tokens in (1, 8, 64, 1024, 8192):
            timed = benchmark.timed(shape, tokens)
            assert timed
            assert {case.gemm1 for case in timed} | {case.gemm2 for case in timed} <= names | {"triton"}


def test_cases_with_bands_are_configurations_and_say_so(benchmark: ModuleType) -> None:
    from vllm_glm_patch.moe.hopper.backend import HopperConfig
    from vllm_glm_patch.moe.routing import bands_of

    cases = benchmark.checks() + [case for shape in benchmark.SHAPES for case in benchmark.timed(shape, 8192)]
    banded = [case for case in cases if case.band]
    assert {(case.tokens, bands_of(case.tokens, 8, case.band)) for case in banded} == {
        (8192, 4),
        (8192, 2),
        (8191, 8),
        (700, 3),
    }
    assert any(case.tokens % case.band for case in banded), "none has a short last band"
    assert all(f"band {case.band} " in case.text for case in banded)
    assert len({case.text for case in banded}) >= 11
    for case in banded:
        HopperConfig(case.gemm1, case.gemm2, case.slice, case.slots, band=case.band)
    assert not any(case.band for case in benchmark.timed("TP8", 2048))


def test_the_native_prologue_is_checked_and_timed_at_every_count(benchmark: ModuleType) -> None:
    from vllm_glm_patch.moe.hopper.backend import HopperConfig, default_config

    checked = [case for case in benchmark.checks() if "prologue" in case.text]
    assert [case for case in benchmark.checks() if case.prologue != "triton"] == checked
    assert len({case.text for case in checked}) == len(checked) > 8
    assert {case.tokens * 8 <= 1024 for case in checked} == {True, False}  # one block, and a cluster
    assert {case.ids for case in checked} == {"int32", "int64"}
    assert any(case.band for case in checked) and {"EP8", "TP8"} == {case.shape for case in checked}
    for shape, problem in benchmark.SHAPES.items():
        for tokens in (1, 8, 16, 64, 256, 1024, 8192):
            named = [case for case in benchmark.timed(shape, tokens) if "prologue" in case.text]
            native = [case for case in named if "_quarter" not in case.gemm1]
            assert [case.prologue for case in native] in (["native"], ["native_c1", "native_c8"])
            configured = HopperConfig(*(getattr(native[0], name) for name in ("gemm1", "gemm2", "slice", "slots")))
            assert configured == replace(default_config(problem.with_tokens(tokens)), prologue="triton")


def test_weights_asked_for_early_are_checked_in_every_kernel_that_asks(benchmark: ModuleType) -> None:
    early = [case for case in benchmark.checks() if case.early_items]
    assert {case.gemm1.split("_")[3] for case in early} == {"split", "quarter"}
    assert {case.gemm2.split("_")[2] for case in early} == {"turns", "ring", "sum"}
    assert all(case.early_steps and f" early {case.early_steps}x{case.early_items} " in case.text for case in early)
    timed = benchmark.named("TP8", 1024, "row_split", "turns_lanes_n256:256x8", "native", True, "0x0,4x2")
    assert [(case.early_steps, case.early_items) for case in timed] == [(0, 0), (4, 2)]
    assert len({case.text for case in timed}) == 2


def test_quarters_of_tiles_are_timed_from_256_to_2048_tokens_with_and_without_an_early_start(benchmark: ModuleType) -> None:
    for tokens in (64, 256, 512, 1024, 2048, 4096):
        quarters = [case for case in benchmark.timed("TP8", tokens) if "_quarter" in case.gemm1]
        assert len({case.text for case in quarters}) == len(quarters) == (5 if 256 <= tokens <= 2048 else 0)
        native = [case.programmatic for case in quarters if case.prologue == "native"]
        assert set(native) == ({True, False} if quarters else set())
    assert not any("_quarter" in case.gemm1 for case in benchmark.timed("TP4", 1024))
    checked = {(case.tokens, case.routing) for case in benchmark.checks() if "_quarter" in case.gemm1}
    assert {(tokens, how) for tokens in (300, 1024) for how in ("spread", "skewed", "bad")} < checked


_CHILD = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    tokens = json.loads(line)["tokens"]
    if tokens == 2:
        sys.exit(7)
    if tokens == 3:
        time.sleep(60)
    print("a word on the way", flush=True)
    print(json.dumps({"case": "x", "tokens": tokens}), flush=True)
"""


def test_a_child_that_dies_or_hangs_costs_one_case(benchmark: ModuleType, tmp_path: Path) -> None:
    cases = [benchmark.Case("TP8", tokens, "glm_gemm1_row_c1", "glm_gemm2_sum_n128") for tokens in (1, 2, 3, 4)]
    start = time.monotonic()
    results = list(benchmark.run_cases([sys.executable, "-c", _CHILD], cases, tmp_path / "log", start + 50, limit=2.0))
    assert [result.get("tokens") for _, result in results] == [1, None, None, 4]
    assert "DIED" in results[1][1]["error"] and "7" in results[1][1]["error"]
    assert "HANGS" in results[2][1]["error"]
    late = list(benchmark.run_cases([sys.executable, "-c", _CHILD], cases[:1], tmp_path / "log", time.monotonic() - 1))
    assert late[0][1] == {"error": "no time left"}
