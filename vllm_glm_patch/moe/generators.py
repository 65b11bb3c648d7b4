"""Inputs of every test and benchmark: weights, tokens, and routings good and bad. Same seed, same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .problem import Problem

# w13, w2, w13_scale, w2_scale
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Routing = Literal["spread", "skewed", "collapsed", "bad", "none"]
ROUTINGS: tuple[Routing, ...] = ("spread", "skewed", "collapsed", "bad", "none")

# Ids a faulty router has been seen to emit, and the edges of int32.
BAD_IDS = (-1, -2, 2**31 - 1, -(2**31), 160, 161, 255, 65536, 1 << 24, -123456789)


@dataclass(frozen=True)
class Inputs:
    """Arguments of fused_moe_fp8 for one problem."""

    problem: Problem
    hidden_states: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None

    def positional(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The seven positional arguments."""
        return (
            self.hidden_states,
            self.w13,
            self.w2,
            self.w13_scale,
            self.w2_scale,
            self.topk_weights,
            self.topk_ids,
        )


_TOKEN_SEED = 0x70_6F_6B_65_6E  # any constant: what lies between a seed's weights and its tokens


def make_weights(problem: Problem, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """w13, w2 in FP8 and their channel scales, as a quantiser makes them: normal weights, each channel's amax at 448.

    Built expert by expert, so the peak of memory stays near the size of the result.
    """
    p, device = problem, generator.device

    def quantised(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.empty(p.experts, rows, columns, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(p.experts, rows, dtype=torch.float32, device=device)
        for expert in range(p.experts):
            w = torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5
            scale = w.abs().amax(dim=1, keepdim=True) / 448.0
            weights[expert] = (w / scale).to(torch.float8_e4m3fn)
            scales[expert] = scale[:, 0]
        return weights, scales

    w13, w13_scale = quantised(2 * p.intermediate_size, p.hidden_size)
    w2, w2_scale = quantised(p.hidden_size, p.intermediate_size)
    return w13, w2, w13_scale, w2_scale


def make_tokens(problem: Problem, generator: torch.Generator) -> torch.Tensor:
    """Normal tokens, each of its own magnitude, so that a mixed-up token scale shows."""
    shape = (problem.tokens, problem.hidden_size)
    x = torch.randn(shape, generator=generator, device=generator.device)
    loud = torch.exp(0.5 * torch.randn(problem.tokens, 1, generator=generator, device=generator.device))
    return (x * loud).to(torch.bfloat16)


def make_routing(
    problem: Problem, generator: torch.Generator, routing: Routing = "spread"
) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_weights fp32 and topk_ids int32, [tokens, top_k].

    spread: top-k of independent logits, about even over experts. skewed: some experts far likelier. collapsed: every
    token to the same top_k experts. bad: spread, with a third of the ids replaced by garbage and duplicates.
    none: no id names an expert.
    """
    p, device = problem, generator.device
    logits = torch.randn(p.tokens, p.global_experts, generator=generator, device=device)
    if routing == "skewed":
        logits += 2.0 * torch.randn(1, p.global_experts, generator=generator, device=device)
    if routing == "collapsed":
        logits = logits[:1].expand(p.tokens, -1) if p.tokens else logits
    weights, ids = torch.topk(torch.sigmoid(logits), p.top_k, dim=-1)
    weights = 2.5 * weights / weights.sum(dim=-1, keepdim=True)
    ids = ids.to(torch.int32)
    if routing in ("bad", "none"):
        garbage = torch.tensor(BAD_IDS, dtype=torch.int32, device=device)
        pick = torch.randint(len(BAD_IDS), ids.shape, generator=generator, device=device)
        # 160 … 255 name experts where there are that many; move them past the end.
        bad = garbage[pick]
        bad = torch.where((bad >= 0) & (bad < p.global_experts), bad + p.global_experts, bad)
        if routing == "none":
            ids = bad
        else:
            where = torch.rand(ids.shape, generator=generator, device=device)
            ids = torch.where(where < 0.2, bad, ids)
            ids = torch.where(where > 0.87, ids[:, :1], ids)
    return weights.float().contiguous(), ids.contiguous()


def make_expert_map(problem: Problem, rank: int = 0) -> torch.Tensor | None:
    """[global experts] int32 → local expert of a contiguous share, or −1; None where all experts are local."""
    if problem.experts == problem.global_experts:
        return None
    expert_map = torch.full((problem.global_experts,), -1, dtype=torch.int32)
    first = rank * problem.experts
    expert_map[first : first + problem.experts] = torch.arange(problem.experts, dtype=torch.int32)
    return expert_map


def make_inputs(
    problem: Problem,
    seed: int,
    routing: Routing = "spread",
    device: str | torch.device = "cpu",
    weights: Weights | None = None,
) -> Inputs:
    """Everything for one call. `weights` from an earlier make_weights saves their making.

    Their seed may be this one, too. The tokens get numbers of their own: were they those of the weights again, a token would
    equal a row of some expert's weights, and no tensor core adds up 5120 squares without losing 6 % of them (seen).
    """
    generator = torch.Generator(device).manual_seed(seed)
    made = weights if weights is not None else make_weights(problem, generator)
    generator.manual_seed(seed ^ _TOKEN_SEED)
    topk_weights, topk_ids = make_routing(problem, generator, routing)
    expert_map = make_expert_map(problem)
    inputs = Inputs(
        problem,
        make_tokens(problem, generator),
        *made,
        topk_weights,
        topk_ids,
        None if expert_map is None else expert_map.to(device),
    )
    if routing == "spread":
        check_spread(topk_ids, problem)
    return inputs


def spread(topk_ids: torch.Tensor, problem: Problem) -> tuple[int, int]:
    """(experts that got a token, most tokens of one expert) over valid global ids."""
    valid = topk_ids[(topk_ids >= 0) & (topk_ids < problem.global_experts)].to(torch.int64)
    counts = torch.bincount(valid, minlength=problem.global_experts)
    return int((counts > 0).sum()), int(counts.max()) if counts.numel() else 0


def check_spread(topk_ids: torch.Tensor, problem: Problem) -> None:
    """AssertionError where a routing meant to be spread is not: a collapsed one hides faults and flatters timings."""
    used, most = spread(topk_ids, problem)
    average = problem.pairs / problem.global_experts
    if problem.pairs:
        experts = problem.global_experts
        wanted = experts * (1.0 - (1.0 - problem.top_k / experts) ** problem.tokens)
        # Seven tenths of what is expected, but for a handful of experts chance alone leaves more than that unused.
        least = min(0.7 * wanted, wanted - 3.0 * experts**0.5)
        assert used >= least, f"{used} experts used, {wanted:.0f} expected of a spread routing"
        assert most <= 3 * average + 16, f"an expert got {most} tokens, {average:.0f} is the average"
