"""The tuner's choices, with a stand-in for the clock: what it tries, what it combines, what it writes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vllm_glm_patch.moe import tune
from vllm_glm_patch.moe.dispatch import Card, Config
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.workspace import needs_requantise

H100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))


class FakeBench:
    """Times a configuration by a formula: the fewer stages and the taller the tile, the faster."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.card = problem, H100
        self.wholes: list[Config] = []

    def time_step(self, config: Config, name: str, replays: int) -> float:
        part = getattr(config, name)
        if part.stages == 3:
            raise RuntimeError("out of resource: shared memory")
        return 100.0 * part.stages / part.block_m

    def time_layer(self, config: Config, replays: int) -> float:
        self.wholes.append(config)
        return self.time_step(config, "gemm1", 1) + self.time_step(config, "gemm2", 1)


@pytest.mark.parametrize("tokens", [64, 1024, 8192])
def test_a_candidate_that_fails_is_reported_and_the_fastest_whole_layer_wins(tokens) -> None:
    bench = FakeBench(Problem(tokens))
    rows: list[dict] = []
    best = tune.tune_count(bench, rows.append, float("inf"))
    assert any("shared memory" in row.get("error", "") for row in rows)
    assert best in bench.wholes
    assert best.gemm1.stages != 3 and best.gemm2.stages != 3
    assert min(row["us"] for row in rows if row["group"] == "layer") == pytest.approx(bench.time_layer(best, 1), abs=0.01)


def test_whole_layers_never_mix_fp8_and_bf16_activations() -> None:
    bench = FakeBench(Problem(1024))
    tune.tune_count(bench, lambda row: None, float("inf"))
    assert bench.wholes
    for config in bench.wholes:
        if config.gemm1.kind != "row" and config.gemm2.kind == "loop":
            assert needs_requantise(config)


def test_past_the_deadline_nothing_is_tried() -> None:
    rows: list[dict] = []
    assert tune.tune_count(FakeBench(Problem(64)), rows.append, 0.0) is None
    assert rows == []


def test_a_table_keeps_what_earlier_runs_found(tmp_path) -> None:
    path = tmp_path / "card.json"
    for tokens in (64, 8, 1024):
        tune._extend(path, H100, Problem(tokens), Config())
    tune._extend(path, H100, dataclasses.replace(Problem(8), intermediate_size=384), Config())
    table = json.loads(path.read_text())
    assert table["card"] == H100.name and table["multiprocessors"] == 132
    assert [list(counts) for counts in table["shapes"].values()] == [["8", "64", "1024"], ["8"]]


@pytest.mark.parametrize("width", [192, 384, 768, 1536])
def test_every_count_has_candidates_for_each_step(width) -> None:
    for tokens in (1, 8, 64, 256, 1024, 4096, 16384):
        groups = tune.plans(Problem(tokens, intermediate_size=width), H100)
        assert groups["gemm1"] and groups["gemm2 fp8"] + groups["gemm2 bf16"]
        assert bool(groups["pairs"]) == (tokens <= 16)
