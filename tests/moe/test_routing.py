"""Routing on the device against a stable sort on the host, for good ids and bad."""

from __future__ import annotations

import random

import pytest
import torch
from configs import TILE, random_problem

from vllm_glm_patch.moe import routing as routing_module
from vllm_glm_patch.moe.dispatch import Config, Gemm2
from vllm_glm_patch.moe.generators import ROUTINGS, make_inputs
from vllm_glm_patch.moe.pipeline import Pass, Tensors
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import local_experts
from vllm_glm_patch.moe.routing import bands_of
from vllm_glm_patch.moe.workspace import layout

CONFIG = Config(gemm1=TILE, gemm2=Gemm2("resident", 32, 32, strip=32, slice=64))


def route(inputs, band=0):
    problem = inputs.problem
    device = inputs.hidden_states.device
    workspace = torch.full((layout(problem, CONFIG, band).total,), 0xFF, dtype=torch.uint8, device=device)
    out = torch.empty_like(inputs.hidden_states)
    one_pass = Pass(problem, CONFIG, Tensors(*inputs.positional(), inputs.expert_map, out), workspace, 1, band=band)
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


def plain_tiles(local, problem, band, block_m):
    """([(expert, first row, rows)] band by band, index of each band's first), from each pair's local expert, −1 for none."""
    valid = [pair for pair, expert in enumerate(local) if expert >= 0]
    grouped = sorted(valid, key=lambda pair: (local[pair], pair))
    tiles, firsts = [], []
    for start in range(0, problem.tokens, band):
        firsts.append(len(tiles))
        for expert in range(problem.experts):
            rows = [
                row
                for row, pair in enumerate(grouped)
                if local[pair] == expert and start <= pair // problem.top_k < start + band
            ]
            tiles += [(expert, row, min(block_m, rows[-1] + 1 - row)) for row in rows[::block_m]]
    return tiles, firsts


@pytest.mark.parametrize(
    ("tokens", "top_k", "band", "parallel", "routing"),
    # The last band whole, shorter, of a few tokens; eleven bands, more than are counted at once.
    [(256, 8, 64, False, routing) for routing in ROUTINGS]
    + [(200, 8, 64, True, "bad"), (290, 4, 128, False, "skewed"), (330, 8, 32, True, "spread")],
)
def test_tiles_of_every_band_are_those_of_a_plain_list(
    tokens, top_k, band, parallel, routing, seed, device, monkeypatch
) -> None:
    monkeypatch.setattr(routing_module, "CHUNK", 256)  # the interpreter is slow: few programs, and as many bands
    monkeypatch.setattr(routing_module, "PLACE", 256)
    problem = Problem(tokens, 64, 64, experts=9, global_experts=18 if parallel else 9, top_k=top_k)
    inputs = make_inputs(problem, seed, routing, device)
    got = route(inputs, band)
    local = local_experts(inputs.topk_ids, problem.experts, inputs.expert_map).flatten().tolist()
    want, firsts = plain_tiles(local, problem, band, CONFIG.gemm2.block_m)
    assert got.bands == len(firsts) == -(-tokens // band)
    assert got.counts[2].item() == len(want) <= got.max_tiles
    assert got.band_tiles[: got.bands].tolist() == firsts
    tiles = got.tiles.view(2, 3, got.max_tiles).cpu()
    assert list(zip(*tiles[1, :, : len(want)].tolist())) == want
    # GEMM1's tiles and the rows know no bands.
    whole = route(inputs)
    valid, count = whole.counts[:2].tolist()
    assert got.counts[:2].tolist() == [valid, count]
    assert torch.equal(tiles[0, :, :count], whole.tiles.view(2, 3, -1)[0, :, :count].cpu())
    assert torch.equal(got.rows[:valid], whole.rows[:valid])
    assert not got.counts[3:].any()


def test_bands_are_whole_chunks_and_come_only_where_they_can() -> None:
    assert [bands_of(8192, 8, band) for band in (0, 8192, 9000, 2048, 128)] == [1, 1, 1, 4, 64]
    assert bands_of(8191, 8, 2048) == bands_of(6145, 8, 2048) == 4
    assert bands_of(128, 8, 32) == 1  # SMALL_PAIRS: one launch does all the routing
    with pytest.raises(ValueError, match=r"a band of 96 tokens with top_k 8 .* choose a multiple of 128 tokens"):
        bands_of(8192, 8, 96)
    with pytest.raises(ValueError, match=r"a band of -128 tokens"):
        bands_of(8192, 8, -128)


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
