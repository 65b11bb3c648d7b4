"""The tuner's choices, with a stand-in for the clock: what it tries, what it combines, what it writes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from configs import CONFIGS

from vllm_glm_patch.moe import tune
from vllm_glm_patch.moe.dispatch import Card, Config, Gemm1, Gemm2, choose, read_card
from vllm_glm_patch.moe.generators import make_weights
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.workspace import layout, needs_requantise

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
    wholes = [row["us"] for row in rows if row["group"] in ("layer", "as it is") and "us" in row]
    assert min(wholes) == pytest.approx(bench.time_layer(best, 1), abs=0.01)


def test_whole_layers_never_mix_fp8_and_bf16_activations() -> None:
    bench = FakeBench(Problem(1024))
    tune.tune_count(bench, lambda row: None, float("inf"))
    assert bench.wholes
    for config in bench.wholes:
        if config.gemm1.kind != "row" and config.gemm2.kind == "loop":
            assert needs_requantise(config)


def test_where_gemm1_streams_it_is_tried_with_weights_asked_for_early() -> None:
    streams, tiles = Config(gemm1=Gemm1("stream", 16)), Config(gemm1=Gemm1("tile"))
    found = tune.dependent([(1.0, streams), (2.0, tiles)])
    for prologue in ("triton", "native"):
        tried = {(config.gemm1.kind, config.gemm1.early) for config in found if config.prologue == prologue}
        assert tried == {("stream", 0), ("stream", 4), ("stream", 8), ("tile", 0)}
    with pytest.raises(ValueError, match="0 or a power of two of lines early, got 6"):
        Gemm1("stream", early=6)


def test_what_runs_now_is_tried_with_dependent_launches_whatever_else_is(monkeypatch) -> None:
    monkeypatch.setattr(tune, "dependent_launch", lambda: True)
    bench = FakeBench(Problem(256))
    monkeypatch.setattr(FakeBench, "time_layer", lambda self, config, replays: 1.0 if config.pdl else 2.0)
    best = tune.tune_count(bench, lambda row: None, float("inf"), kinds=())
    assert best == dataclasses.replace(choose(bench.problem, H100), pdl=True)


def test_past_the_deadline_nothing_is_tried() -> None:
    rows: list[dict] = []
    assert tune.tune_count(FakeBench(Problem(64)), rows.append, 0.0) is None
    assert rows == []


# Of what is small enough for the interpreter: among fresh seeds, one in 300 has a few large activations which alone carry an
# error over the tuner's tolerance. What the kernels compute is tested elsewhere.
BENCH_SEED = 1


def _bench(monkeypatch) -> tune.Bench:
    """A real bench on small inputs; the clock is one more run of each pass."""

    def one_replay(calls, replays) -> float:
        for call in calls:
            call()
        return 1.0

    monkeypatch.setattr(tune, "median_us", one_replay)
    # Every token goes to every expert, so that each of the bench's routings is spread.
    problem = Problem(3, hidden_size=97, intermediate_size=41, experts=3, global_experts=3, top_k=3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = make_weights(problem, torch.Generator(device).manual_seed(BENCH_SEED))
    return tune.Bench(problem, read_card(0 if device == "cuda" else None), BENCH_SEED, weights, device)


def test_a_layer_is_timed_where_its_output_is_the_references(monkeypatch) -> None:
    bench = _bench(monkeypatch)
    assert bench.time_layer(CONFIGS["tile, resident in slices"]) == 1.0
    assert bench.time_layer(CONFIGS["pairs"]) == 1.0


def test_an_output_that_all_configurations_share_but_the_reference_does_not_is_refused(monkeypatch) -> None:
    # What a fault of a kernel that every path uses looks like; comparing configurations with each other misses it.
    bench = _bench(monkeypatch)
    monkeypatch.setattr(tune.Pass, "run", lambda self: self.t.out.fill_(1.0))
    with pytest.raises(RuntimeError, match=r"wrong output: .* from the float64 reference"):
        bench.time_layer(CONFIGS["tile, resident in slices"])


def test_one_wrong_set_of_inputs_among_the_right_ones_is_refused(monkeypatch) -> None:
    bench = _bench(monkeypatch)
    real = tune.Pass.run

    def run(self) -> None:
        real(self)
        if self.t.hidden is bench.sets[-1].hidden_states:
            self.t.out.zero_()

    monkeypatch.setattr(tune.Pass, "run", run)
    with pytest.raises(RuntimeError, match="wrong output"):
        bench.time_layer(CONFIGS["tile, resident in slices"])


def test_replays_that_change_the_bits_are_refused(monkeypatch) -> None:
    bench = _bench(monkeypatch)

    def spoil(calls, replays) -> float:
        for call in calls:
            call.__self__.t.out[0, 0] += 1.0
        return 1.0

    monkeypatch.setattr(tune, "median_us", spoil)
    with pytest.raises(RuntimeError, match="other bits"):
        bench.time_layer(CONFIGS["tile, resident in slices"])


def test_a_layer_that_needs_more_workspace_than_allowed_is_refused(monkeypatch) -> None:
    bench = _bench(monkeypatch)
    monkeypatch.setattr(tune, "workspace_limit", lambda problem, card: 1000.0)
    with pytest.raises(RuntimeError, match="workspace of"):
        bench.time_layer(CONFIGS["tile, resident in slices"])


def test_no_candidate_at_8192_tokens_needs_more_than_140_mb() -> None:
    problem = Problem(8192)
    found = tune.gemm2_candidates(problem, H100)
    assert found
    assert max(layout(problem, Config(gemm1=Gemm1("row"), gemm2=gemm2)).total for gemm2, _ in found) <= 140e6


def test_wider_experts_may_have_their_activations_beside() -> None:
    narrow, wide = Problem(8192), Problem(8192, intermediate_size=384)
    assert tune.workspace_limit(narrow, H100) == 140e6
    assert tune.workspace_limit(wide, H100) == 140e6 + 65536 * 192 * 3


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


def test_the_best_layers_are_tried_again_with_dependent_launches() -> None:
    sliced = Config(gemm2=Gemm2("resident", 64, 128, strip=128, slice=512))
    whole = Config(gemm2=Gemm2("resident", 64, 128, strip=128, slice=0))
    slow = Config(gemm2=Gemm2("resident", 64, 64, strip=64, slice=0))
    pairs = Config("pairs")
    found = tune.dependent([(9.0, slow), (1.0, sliced), (2.0, pairs), (3.0, whole)])
    assert all(config.pdl for config in found) and len(set(found)) == len(found)
    tried = {(config.path, config.gemm2.slice, config.gemm2.hints) for config in found}
    assert tried == {
        ("grouped", 512, False),
        ("grouped", 512, True),
        ("grouped", 256, False),
        ("grouped", 256, True),
        ("grouped", 0, False),
        ("pairs", 512, False),
    }
    assert all(Config.from_dict(config.to_dict()) == config for config in found)
