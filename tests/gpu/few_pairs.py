#!/usr/bin/env python3
"""How far one to three tokens are off float64, where few pairs are added up: EP8 and TP8, many seeds, both backends.

    few_pairs.py OUT.json      1200 inputs a shape, one card, 30 s

A test that compares a handful of rows needs a bound for the worst of them: a row's error is that of FP8 steps which fall the
other way, and averages out only over many.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_glm_patch.moe import backends, fused_moe_fp8
from vllm_glm_patch.moe.generators import make_inputs, make_weights
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import fused_moe, local_experts, relative_error

SHAPES = {"EP8": Problem(1, intermediate_size=1536, experts=20), "TP8": Problem(1, intermediate_size=192)}
BACKENDS = ("triton", "hopper")
SEEDS = 200


def row_of(shape: str, problem: Problem, seed: int, routing: Any, weights: Any) -> dict[str, Any]:
    """Errors of both backends on one input; where no pair is valid the largest value, which has to be 0."""
    inputs = make_inputs(problem, seed, routing, "cuda", weights)
    want = fused_moe(*inputs.positional(), expert_map=inputs.expert_map)
    valid = int((local_experts(inputs.topk_ids, problem.experts, inputs.expert_map) >= 0).sum())
    row = {"shape": shape, "seed": seed, "tokens": problem.tokens, "routing": routing, "valid": valid}
    for backend in BACKENDS:
        backends.prefer(backend)
        out = fused_moe_fp8(*inputs.positional(), expert_map=inputs.expert_map)
        row[backend] = float(relative_error(out, want)) if want.any() else float(out.abs().max())
    return row


def main() -> None:
    rows = []
    for shape, problem in SHAPES.items():
        weights = make_weights(problem, torch.Generator("cuda").manual_seed(1))
        for seed in range(SEEDS):
            for tokens in (1, 2, 3):
                here = dataclasses.replace(problem, tokens=tokens)
                rows += [row_of(shape, here, seed, routing, weights) for routing in ("skewed", "spread")]
    made = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(made) + "\n")
    for shape in SHAPES:
        for backend in BACKENDS:
            for valid in sorted({row["valid"] for row in rows if row["shape"] == shape}):
                errors = sorted(row[backend] for row in rows if (row["shape"], row["valid"]) == (shape, valid))
                middle, most = errors[len(errors) // 2], errors[-1]
                print(shape, backend, f"{valid} valid: {len(errors)} inputs, median {middle:.4f}, most {most:.4f}")


if __name__ == "__main__":
    main()
