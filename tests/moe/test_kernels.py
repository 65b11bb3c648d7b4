"""Every kernel against the float64 reference on fresh shapes and routings, under poison, NaN and canaries."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl
from configs import CONFIGS, TOLERANCE, error_of, random_problem, run_guarded

from vllm_glm_patch.moe.generators import make_inputs
from vllm_glm_patch.moe.reference import fused_moe, local_experts
from vllm_glm_patch.moe.triton.gemm1 import guessed_lines


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("routing", ["spread", "bad"])
def test_matches_the_reference(name, routing, seed, device) -> None:
    rng = random.Random(seed)
    problem = random_problem(rng, parallel=rng.random() < 0.5)
    print(problem)
    inputs = make_inputs(problem, seed, routing, device)
    out = run_guarded(inputs, CONFIGS[name])
    want = fused_moe(*inputs.positional(), expert_map=inputs.expert_map)
    if not want.any():
        assert not out.any()
    else:
        assert error_of(out, inputs) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_collapsed_routing_and_sizes_that_fill_tiles_exactly(name, seed, device) -> None:
    from vllm_glm_patch.moe.problem import Problem

    problem = Problem(tokens=32, hidden_size=128, intermediate_size=64, experts=4, global_experts=4, top_k=2)
    inputs = make_inputs(problem, seed, "collapsed", device)
    out = run_guarded(inputs, CONFIGS[name])
    assert error_of(out, inputs) < TOLERANCE


@pytest.mark.parametrize("name", ["pairs", "row, fused", "stream, loop swapped"])
def test_ids_that_name_no_expert_give_exact_zeros(name, seed, device) -> None:
    problem = random_problem(random.Random(seed), 9)
    inputs = make_inputs(problem, seed, "none", device)
    inputs.topk_weights.fill_(float("nan"))  # a weight of no expert must not matter either
    assert not run_guarded(inputs, CONFIGS[name]).any()


@pytest.mark.parametrize("name", ["pairs", "row, resident", "tile, loop", "row, fused"])
def test_nan_and_inf_stay_in_their_token(name, seed, device) -> None:
    problem = random_problem(random.Random(seed), 12)
    inputs = make_inputs(problem, seed, "spread", device)
    clean = run_guarded(inputs, CONFIGS[name])
    inputs.hidden_states[3, 5] = float("inf")
    inputs.hidden_states[7] = float("nan")
    inputs.topk_weights[9, 0] = float("nan")
    hurt = run_guarded(inputs, CONFIGS[name])
    others = [t for t in range(12) if t not in (3, 7, 9)]
    assert torch.equal(hurt[others], clean[others])
    assert hurt[9].isnan().all()


@pytest.mark.parametrize("name", ["tile, resident in slices", "row, fused"])
def test_repeats_bit_for_bit(name, seed, device) -> None:
    inputs = make_inputs(random_problem(random.Random(seed), 25), seed, "skewed", device)
    assert torch.equal(run_guarded(inputs, CONFIGS[name]), run_guarded(inputs, CONFIGS[name]))


@pytest.mark.parametrize("name", ["pairs", "row, fused", "tile, loop"])
def test_a_duplicated_expert_counts_twice(name, seed, device) -> None:
    from vllm_glm_patch.moe.problem import Problem

    problem = Problem(tokens=5, hidden_size=96, intermediate_size=40, experts=4, global_experts=4, top_k=2)
    inputs = make_inputs(problem, seed, "spread", device)
    inputs.topk_ids[:, 1] = inputs.topk_ids[:, 0]
    assert (local_experts(inputs.topk_ids, 4, None)[:, 0] == local_experts(inputs.topk_ids, 4, None)[:, 1]).all()
    assert error_of(run_guarded(inputs, CONFIGS[name]), inputs) < TOLERANCE


@triton.jit
def _write_guessed_lines(out, stride, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, EARLY: tl.constexpr):
    pid = tl.program_id(0)
    lines = guessed_lines(pid, stride, HIDDEN, WIDTH, EXPERTS, 16, 4, EARLY)
    where = out + pid * 16 * EARLY + tl.arange(0, 16)[:, None] * EARLY + tl.arange(0, EARLY)[None, :]
    tl.store(where, lines)


@pytest.mark.parametrize(("hidden", "width", "experts"), [(1024, 48, 6), (384, 40, 7)])
def test_lines_asked_for_early_are_the_first_of_every_gate_row_once(hidden, width, experts, device) -> None:
    stride, early = 2 * width * hidden + 4096, 4  # experts need not lie side by side
    programs = experts * -(-width // 16)
    out = torch.full((programs, 16, early), -1, dtype=torch.int64, device=device)
    _write_guessed_lines[(programs,)](out, stride, HIDDEN=hidden, WIDTH=width, EXPERTS=experts, EARLY=early)
    # Past a row's end its last byte is asked for again, and past the last row that one.
    lines = {min(128 * i, hidden - 1) for i in range(early)}
    rows = {expert * stride + row * hidden for expert in range(experts) for row in range(width)}
    assert set(out.flatten().tolist()) == {row + line for row in rows for line in lines}
    assert all(len({int(x) // stride for x in program.flatten()}) == 1 for program in out)
