"""The reference against the slowest possible spelling of the contract, and the generators' own checks."""

from __future__ import annotations

import pytest
import torch

from vllm_glm_patch.moe.generators import check_spread, make_inputs, make_routing
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import MIN_SCALE, fused_moe, quantise_per_token, relative_error

PROBLEM = Problem(tokens=7, hidden_size=20, intermediate_size=6, experts=3, global_experts=6, top_k=2)


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("routing", ["spread", "bad"])
def test_reference_equals_a_loop_over_tokens_and_choices(quantised, routing, seed) -> None:
    inputs = make_inputs(PROBLEM, seed, routing)
    got = fused_moe(*inputs.positional(), expert_map=inputs.expert_map, quantised=quantised)

    def step(row: torch.Tensor) -> torch.Tensor:
        if not quantised:
            return row
        q, scale = quantise_per_token(row[None])
        return (q * scale)[0]

    want = torch.zeros(7, 20, dtype=torch.float64)
    for token in range(7):
        x = step(inputs.hidden_states[token].double())
        for choice in range(2):
            wanted = int(inputs.topk_ids[token, choice])
            local = int(inputs.expert_map[wanted]) if 0 <= wanted < 6 else -1
            if local < 0:
                continue
            both = (inputs.w13[local].double() @ x) * inputs.w13_scale[local].double()
            y = step(both[:6] / (1 + torch.exp(-both[:6])) * both[6:])
            z = (inputs.w2[local].double() @ y) * inputs.w2_scale[local].double()
            want[token] += inputs.topk_weights[token, choice].double() * z
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_a_row_of_zeros_takes_the_smallest_scale() -> None:
    q, scale = quantise_per_token(torch.zeros(1, 8, dtype=torch.float64))
    assert scale.item() == pytest.approx(MIN_SCALE) and not q.any()


def test_relative_error_is_infinite_where_anything_is_not_finite() -> None:
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2).double()) == float("inf")


def test_check_spread_refuses_a_collapsed_routing(seed) -> None:
    problem = Problem(tokens=512)
    generator = torch.Generator().manual_seed(seed)
    check_spread(make_routing(problem, generator, "spread")[1], problem)
    with pytest.raises(AssertionError):
        check_spread(make_routing(problem, generator, "collapsed")[1], problem)


def test_check_spread_allows_what_chance_leaves_unused_of_few_experts() -> None:
    problem = Problem(tokens=5, experts=4, global_experts=4, top_k=1)
    check_spread(torch.tensor([[0], [0], [1], [0], [1]], dtype=torch.int32), problem)
