"""benchmarks/hopper.py leaves out what cannot be launched, says why, and counts it as no failure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from emulated import ROOT

from vllm_glm_patch.moe.hopper.native import Native

H100 = 232448  # bytes of shared memory a block


def test_what_ran_out_of_shared_memory_on_a_card_is_left_out_and_nothing_that_ran(benchmark: ModuleType, table: Native) -> None:
    """Against the H100's own records: OutOfResources, or times."""
    ran_out = ran = 0
    for line in (ROOT / "benchmarks/results/hopper-times-h100.jsonl").read_text().splitlines():
        told = json.loads(line)
        names = benchmark.Case.__dataclass_fields__
        case = benchmark.Case(**{name: value for name, value in told.items() if name in names})
        reason = benchmark.left_out(case, table, H100)
        if required := re.search(r"OutOfResources.*Required: (\d+), Hardware limit: (\d+)", told.get("error", "")):
            ran_out += 1
            assert (
                f"needs {required.group(1)} bytes of shared memory, and this card gives a block {required.group(2)}" in reason
            )
            assert f"as {case.gemm2} reads them" in reason
        elif "native layer" in told:
            ran += 1
            assert reason == "", case.text
    assert ran_out >= 2 and ran >= 50


def test_of_all_that_is_checked_or_timed_only_triton_before_the_tallest_decode_tiles_is_left_out(
    benchmark: ModuleType, table: Native
) -> None:
    cases = benchmark.checks() + [
        c for shape in benchmark.SHAPES for count in (1, 64, 512, 8192) for c in benchmark.timed(shape, count)
    ]
    left = {(case.gemm1, case.gemm2) for case in cases if benchmark.left_out(case, table, H100)}
    assert left == {("triton", "glm_gemm2_decode_t64")}
    assert not [case for case in cases if benchmark.left_out(case, table, 1 << 20)]


def test_a_case_that_is_left_out_is_told_and_is_not_bad(
    benchmark: ModuleType, table: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = []

    class Worker:
        def __init__(self) -> None:
            self.native, self.card = table, SimpleNamespace(shared_memory=H100)

        def time(self, case: Any) -> dict[str, Any]:
            timed.append(case)
            return {"case": case.text, "native layer": 2.0, "triton layer": 3.0}

    first, second = (benchmark.Case("TP8", 1024, gemm1, "glm_gemm2_decode_t64") for gemm1 in ("triton", "glm_gemm1_decode_t64"))
    lines = [json.dumps(benchmark.dataclasses.asdict(case)) for case in (first, second)]
    monkeypatch.setattr(benchmark, "Worker", Worker)
    monkeypatch.setattr("sys.stdin", iter(lines))
    benchmark.work("time")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert timed == [second]
    assert "245760" in answers[0]["left out"] and answers[1]["native layer"] == 2.0

    monkeypatch.setattr(benchmark, "timed", lambda shape, tokens: [first, second])
    monkeypatch.setattr(benchmark, "run_cases", lambda words, cases, *_: zip(cases, answers))
    monkeypatch.setattr("sys.argv", ["hopper.py", "--out", str(tmp_path), "--tokens", "1024"])
    assert benchmark.main() == 0
    told = capsys.readouterr().out
    assert "2 cases, 0 bad" in told
    assert told.count(f"{first.text}: left out: Triton's GEMM1 with tiles of 64 rows") == 2  # as it comes, and in the summary
    kept = [json.loads(line) for line in (tmp_path / "hopper.jsonl").read_text().splitlines()]
    assert ["left out" in one for one in kept] == [True, False]
