"""The guard on vLLM's real scheduler class, with each way of scheduling; no server and no model is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import Rooms

pytestmark = pytest.mark.serve
GUARDED, CAPTURED = {"shape_policy": "guarded"}, {"shape_policy": "captured"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
ASYNC = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
# name -> settings, flags, lengths of the prompts, tokens of the steps they are cut into
CASES: dict[str, tuple[dict[str, str], dict[str, Any], list[int], list[int]]] = {
    "plain": (GUARDED, {}, [16384], [8191, 8191, 2]),
    "captured": (CAPTURED, {}, [16384], [8192, 8192]),
    "off": ({"shape_policy": "off"}, {}, [16384], [8192, 8192]),
    "auto, nothing to correct": ({}, {}, [8192], [8192]),
    "no prefix caching": (GUARDED, {"enable_prefix_caching": False}, [8192], [8191, 1]),
    "prefix caching": (GUARDED, {"enable_prefix_caching": True}, [8192], [8191, 1]),
    "async scheduling": (GUARDED, {"scheduler_cls": ASYNC}, [8192], [8191, 1]),
    "async scheduling, captured": (CAPTURED, {"scheduler_cls": ASYNC}, [8192], [8192]),
    "no async scheduling": (GUARDED, {"async_scheduling": False}, [8192], [8191, 1]),
    "priority": (GUARDED, {"scheduling_policy": "priority"}, [8192, 4096], [8191, 4097]),
    "speculative decoding": (GUARDED, {"speculative_config": NGRAM}, [16384], [8191, 8191, 2]),
    "several prompts fill a step": (GUARDED, {}, [1001] * 8 + [184], [8191, 1]),
    "smaller limit of the user": (GUARDED, {"max_num_scheduled_tokens": 4096}, [8192], [4096, 4096]),
    "limit of the user is the budget": (GUARDED, {"max_num_scheduled_tokens": 8192}, [8192], [8191, 1]),
    "other budget": (GUARDED, {"max_num_batched_tokens": 2048}, [4096], [2047, 2047, 2]),
    "not chunked, may be needed": (GUARDED, {"enable_chunked_prefill": False, "max_model_len": 8192}, [8191], [8191]),
    "not chunked, never needed": (GUARDED, {"enable_chunked_prefill": False, "max_model_len": 8191}, [8190] * 2, [8190] * 2),
}  # fmt: skip


@pytest.fixture(scope="session")
def scheduled(rooms: Rooms) -> dict[str, dict[str, Any]]:
    """What became of each case, all in one process."""
    folder = rooms.new_folder("scheduler")
    asked, answered, log = (folder / name for name in ("asked.json", "answered.json", "log.txt"))
    asked.write_text(json.dumps([{"settings": s, "flags": f, "prompts": p} for s, f, p, _ in CASES.values()]))
    child = Path(__file__).with_name("schedule_child.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_GLM_PATCH")} | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        command = [sys.executable, str(child), str(rooms.model), str(asked), str(answered)]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    assert done.returncode == 0, log.read_text()[-3000:]
    return dict(zip(CASES, json.loads(answered.read_text())))


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_cut_into_these_steps(case: str, scheduled: dict[str, dict[str, Any]]) -> None:
    assert scheduled[case]["steps"] == CASES[case][3]


def test_async_scheduling_is_the_scheduler_that_was_asked_for(scheduled: dict[str, dict[str, Any]]) -> None:
    assert scheduled["async scheduling"]["scheduler"] == "AsyncScheduler"


def test_guard_that_is_declined_says_what_to_set(scheduled: dict[str, dict[str, Any]]) -> None:
    (line,) = [line for line in scheduled["not chunked, may be needed"]["log"].splitlines() if "is not kept from" in line]
    assert line.startswith("WARNING The step of 8192 tokens")
    assert "Set --max-num-batched-tokens to 8193 or turn chunked prefill on." in line
    assert scheduled["not chunked, may be needed"]["limit"] == 8192


def test_smaller_limit_of_the_user_is_named(scheduled: dict[str, dict[str, Any]]) -> None:
    assert "max_num_scheduled_tokens is already 4096" in scheduled["smaller limit of the user"]["log"]
