"""Choosing a configuration: tables, borrowed tables, rules of thumb, and the memory they ask for."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from vllm_glm_patch.moe import dispatch
from vllm_glm_patch.moe.dispatch import Card, Config, choose, default_config
from vllm_glm_patch.moe.problem import GLM_SHAPES
from vllm_glm_patch.moe.workspace import layout

H100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))
H20 = Card("NVIDIA H20", 78, 232448, (9, 0))
COUNTS = [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
SHAPES = GLM_SHAPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("card", [H100, H20], ids=["H100", "H20"])
def test_every_count_gets_a_configuration_that_survives_json(shape, card) -> None:
    for tokens in COUNTS:
        config = choose(dataclasses.replace(SHAPES[shape], tokens=tokens), card)
        assert Config.from_dict(config.to_dict()) == config


def test_one_and_two_tokens_go_by_pairs_only_where_experts_are_narrow_and_all_here() -> None:
    for tokens, paired in ((1, {"TP8", "TP4"}), (2, {"TP8", "TP4"}), (3, set())):
        paths = {shape: default_config(problem.with_tokens(tokens), H100).path for shape, problem in SHAPES.items()}
        assert paths == {shape: "pairs" if shape in paired else "grouped" for shape in SHAPES}


@pytest.mark.parametrize("card", [H100, H20], ids=["H100", "H20"])
def test_workspace_at_8192_tokens_tp8_is_at_most_140_mb(card) -> None:
    problem = dataclasses.replace(SHAPES["TP8"], tokens=8192)
    assert layout(problem, choose(problem, card)).total <= 140e6
    assert layout(problem, default_config(problem, card)).total <= 140e6


def test_resident_and_fused_kernels_are_chosen_only_where_a_row_fits() -> None:
    for problem in SHAPES.values():
        for tokens in COUNTS:
            config = choose(dataclasses.replace(problem, tokens=tokens), H100)
            if config.path == "grouped" and config.gemm2.kind != "loop":
                assert dispatch.fits_resident(problem.intermediate_size)
            if config.path == "grouped" and config.gemm2.kind == "fused":
                assert config.gemm2.slice & (config.gemm2.slice - 1) == 0


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    code = "import sys, vllm_glm_patch.moe; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
