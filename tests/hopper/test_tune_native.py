"""The tuner's way through the native kernels, with a stand-in for the clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_glm_patch.moe import tables, tune
from vllm_glm_patch.moe.dispatch import Card, Config
from vllm_glm_patch.moe.hopper import backend, candidates
from vllm_glm_patch.moe.hopper.backend import HopperConfig
from vllm_glm_patch.moe.hopper.native import Native
from vllm_glm_patch.moe.problem import GLM_SHAPES, Problem

H100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))


class Clock:
    """Stands for tune.Bench: a layer takes what `us` says of its configuration."""

    def __init__(self, problem: Problem, us: Callable[[object], float]) -> None:
        self.problem, self.card, self.us = problem, H100, us
        self.wholes: list[object] = []

    def time_layer(self, config: object, replays: int) -> float:
        self.wholes.append(config)
        return self.us(config)


def fastest(problem: Problem, table: Native, us: Callable[[object], float]) -> tuple[object, Clock]:
    clock = Clock(problem, us)
    return tune.tune_count(clock, lambda row: None, float("inf"), table, ("hopper",)), clock  # type: ignore[arg-type]


def test_each_stage_goes_on_from_the_best_so_far(table: Native) -> None:
    wanted = HopperConfig("glm_gemm1_row_split", "glm_gemm2_ring_n256", 256, 3, weight_promotion=256, prologue="triton")

    def us(config: object) -> float:
        if isinstance(config, Config):
            return 1000.0
        return sum(
            getattr(config, name) != getattr(wanted, name) for name in ("gemm1", "gemm2", "weight_promotion", "prologue")
        )

    best, clock = fastest(GLM_SHAPES["TP8"].with_tokens(8192), table, us)
    assert best == wanted
    assert len(clock.wholes) == len(set(clock.wholes)) < 40


@pytest.mark.parametrize(("tokens", "tried"), [(512, True), (8192, False)])
def test_weights_are_asked_for_early_where_an_expert_fills_one_tile(table: Native, tokens: int, tried: bool) -> None:
    def us(config: object) -> float:
        if isinstance(config, Config) or "_decode_" in config.gemm2:
            return 1000.0
        return 10 * ("_quarter" not in config.gemm1) - config.early_steps / 4 - config.early_items

    best, clock = fastest(GLM_SHAPES["TP8"].with_tokens(tokens), table, us)
    assert isinstance(best, HopperConfig)
    # A quarter of a tile: four times the steps.
    assert (best.gemm1, best.early_steps, best.early_items) == ("glm_gemm1_row_quarter", *((32, 4) if tried else (0, 0)))
    assert any(isinstance(config, HopperConfig) and config.early_items for config in clock.wholes) == tried


def test_what_runs_now_stays_where_no_native_kernel_is_faster(table: Native) -> None:
    best, clock = fastest(GLM_SHAPES["TP8"].with_tokens(8192), table, lambda config: 1 + isinstance(config, HopperConfig))
    assert isinstance(best, Config)
    assert best == clock.wholes[0]


@pytest.mark.parametrize("shape", ["TP8", "TP4", "TP2", "TP1", "EP8"])
@pytest.mark.parametrize("tokens", [1, 2, 64, 256, 1024, 2048, 8192, 16384])
def test_each_candidate_is_a_configuration_of_the_problem(table: Native, shape: str, tokens: int) -> None:
    problem = GLM_SHAPES[shape].with_tokens(tokens)
    assert candidates.families(problem, table)
    tried = []

    def us(config: object) -> float:
        if isinstance(config, HopperConfig):
            tried.append(backend.workspace_bytes(problem, config, table))
        return 1.0

    assert fastest(problem, table, us)[0] is not None
    assert len(tried) > 4


def test_a_family_whose_beginning_fails_is_left(table: Native) -> None:
    def us(config: object) -> float:
        if isinstance(config, HopperConfig) and "_sum_" in config.gemm2:
            raise RuntimeError("wrong output")
        return 2.0 if isinstance(config, Config) else 1.0

    best, _ = fastest(GLM_SHAPES["TP8"].with_tokens(1024), table, us)
    assert isinstance(best, HopperConfig)
    assert "decode" in best.gemm2


def test_an_entry_freezes_the_whole_configuration_and_is_read_back(table: Native, tmp_path: Path) -> None:
    problem = GLM_SHAPES["TP8"].with_tokens(8192)
    config = HopperConfig("glm_gemm1_row_split", "glm_gemm2_ring_n256", prologue="native")
    entry = tune.entry_of(config)
    assert entry == {
        "backend": "hopper",
        "gemm1": "glm_gemm1_row_split",
        "gemm2": "glm_gemm2_ring_n256",
        "slice": 512,
        "slots": 3,
        "programmatic": True,
        "weight_promotion": 128,
        "band": 0,
        "prologue": "native",
        "early_steps": 0,
        "early_items": 0,
    }
    assert backend.told(entry) == config
    tune._extend(tmp_path / "t.json", H100, problem, config)
    assert tables.read(tmp_path / "t.json")["shapes"][problem.shape_key] == {"8192": entry}
