"""A real server whose weights are made by `--load-format glm_patch_synthetic`; on disk the model has only its config."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import Rooms, Served

pytestmark = pytest.mark.serve
LENGTHS = (16, 300)
LINE = re.compile(r"Synthetic weights: seed (\d+), \d+ parameters, .* first MoE gate: variation ([\d.]+), unused (\d+) of 16\.")


FLAGS = ("--enforce-eager", "--load-format", "glm_patch_synthetic", "--model-loader-extra-config", '{"seed": 3}')


@pytest.fixture(scope="module")
def config_only(rooms: Rooms) -> Rooms:
    folder = rooms.new_folder("config-only") / "glm"
    command = Path(sys.executable).parent / "vllm-glm-patch"
    subprocess.run([command, "model", folder, "--config-only"], check=True, cwd=folder.parent)
    assert not list(folder.glob("*.safetensors"))
    return Rooms(folder, rooms.new_folder)


@pytest.fixture(scope="module")
def synthetic(config_only: Rooms) -> Served:
    """Unpatched, as one side of a comparison is."""
    return config_only.serve("synthetic", LENGTHS, flags=FLAGS, environment={"VLLM_GLM_PATCH": "0"})


@pytest.fixture(scope="module")
def two_ranks(config_only: Rooms) -> Served:
    """The report's flags on two ranks, with a step budget that is small here."""
    flags = (*FLAGS, "--enable-chunked-prefill", "--max-num-batched-tokens", "1024", "-tp", "2")
    cores = sorted(os.sched_getaffinity(0))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}  # else vLLM wants a NUMA node for each
    return config_only.serve("two-ranks", (*LENGTHS, 1024), flags=flags, environment=bound)


def test_every_prompt_gets_an_answer_of_its_own(synthetic: Served) -> None:
    texts = synthetic.texts(LENGTHS)
    assert all(texts.values())
    assert len(set(texts.values())) == len(LENGTHS)


def test_the_log_says_the_seed_and_that_the_router_spreads_its_tokens(synthetic: Served) -> None:
    (found,) = LINE.findall(synthetic.log)
    seed, variation, unused = int(found[0]), float(found[1]), int(found[2])
    assert (seed, unused) == (3, 0)
    assert variation < 0.35


def test_two_ranks_serve_the_same_model_patched(synthetic: Served, two_ranks: Served) -> None:
    assert two_ranks.texts(LENGTHS) == synthetic.texts(LENGTHS)


def test_each_rank_is_patched_and_warms_up_the_full_step(two_ranks: Served) -> None:
    warmed = re.findall(r"\(Worker_TP(\d) .*Warmed up the step of 1024 tokens", two_ranks.log)
    assert sorted(warmed) == ["0", "1"]
    assert max(two_ranks.steps) == 1024
    assert "without a synthetic weight" not in two_ranks.log


def test_vllm_takes_every_weight_that_is_made(synthetic: Served) -> None:
    assert "without a synthetic weight" not in synthetic.log
