"""Routing on the device against a stable sort on the host, for good ids and bad."""

from __future__ import annotations

import random

import pytest
import torch
from configs import TILE, random_problem

from vllm_glm_patch.moe.dispatch import Config, Gemm2
from vllm_glm_patch.moe.generators import ROUTINGS, make_inputs
from vllm_glm_patch.moe.pipeline import Pass, Tensors
from vllm_glm_patch.moe.reference import local_experts
from vllm_glm_patch.moe.workspace import layout

CONFIG = Config(gemm1=TILE, gemm2=Gemm2("resident", 32, 32, strip=32, slice=64))


def route(inputs):
    problem = inputs.problem
    device = inputs.hidden_states.device
    workspace = torch.full((layout(problem, CONFIG).total,), 0xFF, dtype=torch.uint8, device=device)
    out = torch.empty_like(inputs.hidden_states)
    one_pass = Pass(problem, CONFIG, Tensors(*inputs.positional(), inputs.expert_map, out), workspace, 1)
    one_pass.prologue()
    return one_pass


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "parallel"), [(1, False), (170, True), (1100, True)])
def test_pairs_are_grouped_by_expert_in_pair_order(routing, tokens, parallel, seed, device) -> None:
    rng = random.Random(seed)
    problem = random_problem(rng, tokens, parallel)
    if problem.top_k > problem.global_experts:
        pytest.skip("fewer experts than choices")
    inputs = make_inputs(problem, seed, routing, device)
    got = route(inputs)
    local = local_experts(inputs.topk_ids, problem.experts, inputs.expert_map).flatten().cpu()
    key = torch.where(local < 0, problem.experts, local)
    order = torch.sort(key, stable=True).indices
    valid = int((local >= 0).sum())
    assert got.counts[0].item() == valid
    assert torch.equal(got.local_ids.cpu().long(), key)
    assert torch.equal(got.rows[:valid].cpu().long(), order[:valid])


@pytest.mark.parametrize("tokens", [90, 700])
def test_tiles_of_both_gemms_cover_every_row_once_and_never_mix_experts(tokens, seed, device) -> None:
    problem = random_problem(random.Random(seed), tokens)
    inputs = make_inputs(problem, seed, "skewed", device)
    got = route(inputs)
    local = local_experts(inputs.topk_ids, problem.experts, None).flatten().cpu()
    grouped = torch.sort(local, stable=True).values.tolist()
    tiles = got.tiles.view(2, 3, got.max_tiles).cpu()
    for which, block_m in ((0, CONFIG.gemm1.block_m), (1, CONFIG.gemm2.block_m)):
        covered = []
        for t in range(int(got.counts[1 + which])):
            expert, first, rows = (int(tiles[which, part, t]) for part in range(3))
            assert 0 < rows <= block_m
            assert all(grouped[row] == expert for row in range(first, first + rows))
            covered += range(first, first + rows)
        assert covered == list(range(len(grouped)))


def test_counters_behind_the_counts_start_at_zero(seed, device) -> None:
    problem = random_problem(random.Random(seed), 30)
    counts = route(make_inputs(problem, seed, "spread", device)).counts
    assert not counts[3:].any()


def test_tokens_are_quantised_as_the_reference_does(seed, device) -> None:
    from vllm_glm_patch.moe.reference import quantise_per_token

    problem = random_problem(random.Random(seed), 33)
    inputs = make_inputs(problem, seed, "spread", device)
    got = route(inputs)
    q, scale = quantise_per_token(inputs.hidden_states.double())
    count = problem.tokens * problem.hidden_size
    assert torch.equal(got.token_scales.double(), scale[:, 0])
    assert torch.equal(got.quantised[:count].view(q.shape).double(), q)
