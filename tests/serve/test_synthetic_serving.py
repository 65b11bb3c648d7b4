"""A real server whose weights are made by `--load-format glm_patch_synthetic`; on disk the model has only its config."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import Rooms, Served

pytestmark = pytest.mark.serve
LENGTHS = (16, 300)
LINE = re.compile(r"Synthetic weights: seed (\d+), \d+ parameters, .* first MoE gate: variation ([\d.]+), unused (\d+) of 16\.")


@pytest.fixture(scope="module")
def synthetic(rooms: Rooms) -> Served:
    """Unpatched, as one side of a comparison is."""
    folder = rooms.new_folder("config-only") / "glm"
    command = Path(sys.executable).parent / "vllm-glm-patch"
    subprocess.run([command, "model", folder, "--config-only"], check=True, cwd=folder.parent)
    assert not list(folder.glob("*.safetensors"))
    flags = ("--enforce-eager", "--load-format", "glm_patch_synthetic", "--model-loader-extra-config", '{"seed": 3}')
    return Rooms(folder, rooms.new_folder).serve("synthetic", LENGTHS, flags=flags, environment={"VLLM_GLM_PATCH": "0"})


def test_every_prompt_gets_an_answer_of_its_own(synthetic: Served) -> None:
    texts = synthetic.texts(LENGTHS)
    assert all(texts.values())
    assert len(set(texts.values())) == len(LENGTHS)


def test_the_log_says_the_seed_and_that_the_router_spreads_its_tokens(synthetic: Served) -> None:
    (found,) = LINE.findall(synthetic.log)
    seed, variation, unused = int(found[0]), float(found[1]), int(found[2])
    assert (seed, unused) == (3, 0)
    assert variation < 0.35


def test_vllm_takes_every_weight_that_is_made(synthetic: Served) -> None:
    assert "without a synthetic weight" not in synthetic.log
