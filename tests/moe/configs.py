"""Small configurations that between them use every kernel and every switch, and a runner that guards its buffers."""

from __future__ import annotations

import dataclasses
import functools
import random

import torch

from vllm_glm_patch.moe import op
from vllm_glm_patch.moe.dispatch import Config, Gemm1, Gemm2, Pairs, Sum, read_card
from vllm_glm_patch.moe.generators import Inputs
from vllm_glm_patch.moe.pipeline import Tensors
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import fused_moe, relative_error
from vllm_glm_patch.moe.workspace import layout

SUM = Sum(4, 64, 4)
TILE = Gemm1("tile", 16, 32, 64, 2, 4, 2)
ROW = Gemm1("row", 32, 32, 64, 2, 4, 2)
STREAM = Gemm1("stream", 16, 32, 64, 2, 4, 2)
CONFIGS: dict[str, Config] = {
    "pairs": Config("pairs", Pairs(16, 4, 32, 4)),
    "tile, resident in slices": Config(gemm1=TILE, gemm2=Gemm2("resident", 16, 32, strip=64, slice=64), sum=SUM),
    "row, resident": Config(gemm1=ROW, gemm2=Gemm2("resident", 16, 32, strip=32, slice=96), sum=SUM),
    "stream, swapped, quantised on the fly": Config(
        gemm1=STREAM, gemm2=Gemm2("resident", 16, 32, strip=64, slice=0, swap=True, requantise=False), sum=SUM
    ),
    "tile, loop": Config(gemm1=TILE, gemm2=Gemm2("loop", 16, 32, 32, slice=64), sum=SUM),
    "row, resident, dependent": Config(
        gemm1=ROW, gemm2=Gemm2("resident", 16, 32, strip=32, slice=64, hints=True), sum=SUM, pdl=True
    ),
    "stream, swapped, dependent": Config(
        gemm1=STREAM, gemm2=Gemm2("resident", 16, 32, strip=64, slice=0, swap=True), sum=SUM, pdl=True
    ),
    "pairs, dependent": Config("pairs", Pairs(16, 4, 32, 4), pdl=True),
    "stream, loop swapped": Config(gemm1=STREAM, gemm2=Gemm2("loop", 32, 32, 32, slice=0, swap=True), sum=SUM),
    "row, fused": Config(gemm1=ROW, gemm2=Gemm2("fused", 16, 32, strip=32, slice=64, slots=2, programs=1), sum=SUM),
    "tile, fused on the fly": Config(
        gemm1=TILE, gemm2=Gemm2("fused", 16, 32, strip=64, slice=64, slots=3, requantise=False), sum=SUM
    ),
}


def random_problem(rng: random.Random, tokens: int | None = None, parallel: bool = False) -> Problem:
    """A small problem whose sizes are multiples of nothing."""
    local = rng.randint(3, 9)
    return Problem(
        tokens=rng.randint(1, 40) if tokens is None else tokens,
        hidden_size=rng.randint(65, 200),
        intermediate_size=rng.randint(33, 90),
        experts=local,
        global_experts=local * rng.randint(2, 4) if parallel else local,
        top_k=rng.randint(1, 3),
    )


def guarded(tensor: torch.Tensor, fill: int, margin: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor's copy between margins of `fill` bytes, and the whole buffer as uint8. 0xFF is NaN in every dtype."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.full((size + 2 * margin,), fill, dtype=torch.uint8, device=tensor.device)
    inner = buffer[margin : margin + size].view(tensor.dtype).view(tensor.shape)
    inner.copy_(tensor)
    return inner, buffer


def run_guarded(inputs: Inputs, config: Config) -> torch.Tensor:
    """Run a configuration with NaN around every input, poison in output and workspace, and canaries around both."""
    p = inputs.problem
    device = inputs.hidden_states.device
    arguments = [guarded(t, 0xFF)[0] for t in inputs.positional()]
    expert_map = None if inputs.expert_map is None else guarded(inputs.expert_map, 0x00)[0]
    out, out_buffer = guarded(torch.full((p.tokens, p.hidden_size), float("nan"), dtype=torch.bfloat16, device=device), 0xA5)
    need = layout(p, config).total
    workspace, workspace_buffer = guarded(torch.full((need,), 0xFF, dtype=torch.uint8, device=device), 0xA5)
    card = read_card(device.index if device.type == "cuda" else None)
    op.run(p, config, card, Tensors(*arguments, expert_map, out), workspace)
    for name, buffer in (("out", out_buffer), ("workspace", workspace_buffer)):
        margins = torch.cat([buffer[:256], buffer[-256:]])
        assert bool((margins == 0xA5).all()), f"wrote outside {name}"
    for given, kept in zip(arguments, inputs.positional()):
        assert torch.equal(given.view(torch.uint8), kept.contiguous().view(torch.uint8)), "an input was changed"
    return out


def with_tokens(problem: Problem, tokens: int) -> Problem:
    """The same problem with another token count."""
    return dataclasses.replace(problem, tokens=tokens)


# Against the reference with the same FP8 steps and the same rounding between them. What is left: bf16 of the partials and of
# the output (the interpreter truncates, 0.5 %), and sums in fp32 that fall on the other side of a rounding. The largest of
# 1300 fresh small problems was 0.0064; against the reference without that rounding 0.038.
TOLERANCE = 0.02


def truncated(x: torch.Tensor) -> torch.Tensor:
    """fp32 → bf16 as Triton's interpreter does it."""
    return (x.float().view(torch.int32) & -65536).view(torch.float32)


def error_of(out: torch.Tensor, inputs: Inputs) -> float:
    """The relative error against the reference: activations exact before their FP8 step, or in bf16, as the kernels store them.

    Which of them goes by the configuration. Against one reference for all, small problems would need a tolerance of 0.07: a few
    large activations carry their error, and one that changes its FP8 value by the other rounding changes by up to 1/14.
    """
    wanted = functools.partial(fused_moe, *inputs.positional(), expert_map=inputs.expert_map)
    roundings = None, lambda y: y.to(torch.bfloat16), truncated
    return min(relative_error(out, wanted(stored=stored)) for stored in roundings)
