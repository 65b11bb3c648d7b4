"""benchmarks/host.py times the operator's host part where there is no card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_times_a_call_without_a_card_and_says_what_it_belongs_to(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [sys.executable, str(ROOT / "benchmarks/host.py"), "--tokens", "1,2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert {"cpu", "python", "torch", "commit"} <= set(told)
    assert [row["tokens"] for row in told["rows"]] == [1, 2]
    for row in told["rows"]:
        assert row["launches"] == 5  # prologue, GEMM1, requantise, GEMM2, sum
        assert 1 < row["function_us"] < 10_000 and 1 < row["operator_us"] < 10_000
