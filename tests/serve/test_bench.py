"""A smoke run of `bench serve` and `bench report`: a real vLLM on the CPU and a few tokens. Its numbers mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import Rooms

from tools.environment import VLLM

pytestmark = pytest.mark.serve
COMMANDS = Path(sys.executable).parent
SERVE = ("--enforce-eager", "--max-model-len", "2048")
CLIENT = ("--random-input-len", "64", "--random-output-len", "4", "--num-prompts", "4", "--ignore-eos")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_GLM_PATCH", "_GLM_PATCH"))}
    environment = {
        **inherited,
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [str(COMMANDS / "vllm-glm-patch"), "bench", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False)


def test_smoke_run_measures_both_servers_and_draws_a_report(rooms: Rooms) -> None:
    folder = rooms.new_folder("bench")
    options = ("--order", "AB", "--warmups", "0", "--out", "measured", "--json")
    served = call(folder, "serve", str(rooms.model), *SERVE, *options, "--", *CLIENT)
    assert served.returncode == 0, served.stderr
    result = json.loads(served.stdout)
    assert (result["complete"], result["findings"]) == (True, [])
    assert result["machine"]["vllm"].startswith(VLLM)
    assert [(run["side"], run["completed"]) for run in result["runs"]] == [("upstream", 4), ("patched", 4)]
    rows = {row["metric"]: row for row in result["rows"]}
    for metric in ("output_throughput", "input_throughput", "p99_ttft_ms", "median_tpot_ms", "mean_itl_ms", "p90_e2el_ms"):
        assert rows[metric]["upstream"] > 0, metric
        assert rows[metric]["patched"] > 0, metric
    for metric in ("startup_s", "kv_cache_tokens", "peak_memory_mib"):
        assert rows[metric]["patched"] > 0, metric
    logs = {server["side"]: (folder / "measured" / server["log"]).read_text() for server in result["servers"]}
    assert "vllm-glm-patch 0" in logs["patched"]
    assert "vllm-glm-patch 0" not in logs["upstream"]

    drawn = call(folder, "report", "measured")
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / "measured" / "report.html").stat().st_size > 10_000
