"""What must not harm: any id, any routing weight, no tokens, and offsets past 2**31."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from configs import CONFIGS, TOLERANCE, error_of, random_problem, run_guarded

from vllm_glm_patch.moe import op, workspace
from vllm_glm_patch.moe.dispatch import Card, choose
from vllm_glm_patch.moe.generators import make_inputs
from vllm_glm_patch.moe.problem import GLM_SHAPES, Problem
from vllm_glm_patch.moe.reference import relative_error
from vllm_glm_patch.moe.triton.common import INTERPRETED
from vllm_glm_patch.moe.triton.gemm2 import store_partial, sum_tile
from vllm_glm_patch.moe.triton.quantise import quantise_row


@pytest.mark.parametrize("name", ["pairs", "tile, resident in slices", "row, fused", "stream, loop swapped"])
def test_weights_of_pairs_without_an_expert_are_never_used_even_if_they_are_nan(name, seed, device) -> None:
    inputs = make_inputs(random_problem(random.Random(seed), 12), seed, "spread", device)
    inputs.topk_ids[2, 0], inputs.topk_ids[5] = -1, 2**31 - 1
    clean = run_guarded(inputs, CONFIGS[name])
    assert clean.isfinite().all() and not clean[5].any()
    inputs.topk_weights[2, 0], inputs.topk_weights[5] = float("nan"), float("inf")
    assert torch.equal(run_guarded(inputs, CONFIGS[name]), clean)


@pytest.mark.parametrize("name", ["pairs", "tile, resident in slices", "stream, loop swapped"])
def test_infinite_weights_stay_in_their_token(name, seed, device) -> None:
    inputs = make_inputs(random_problem(random.Random(seed), 12), seed, "spread", device)
    clean = run_guarded(inputs, CONFIGS[name])
    inputs.topk_weights[4, 0], inputs.topk_weights[6, 0] = float("inf"), float("-inf")
    hurt = run_guarded(inputs, CONFIGS[name])
    others = [t for t in range(12) if t not in (4, 6)]
    assert torch.equal(hurt[others], clean[others])
    assert not hurt[4].isfinite().any() and not hurt[6].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 40])
def test_ids_of_64_bits_whose_low_half_names_an_expert_name_none(tokens, seed, device) -> None:
    inputs = make_inputs(Problem(tokens, 96, 40, 4, 4, 2), seed, device=device)
    ids = inputs.topk_ids.long()
    ids[0, 0] = ids[0, 0] + (1 << 32)
    ids[0, 1] = -(1 << 62)
    out = op.fused_moe_fp8(*inputs.positional()[:6], ids)
    assert not out[0].any()
    assert tokens == 1 or error_of(out, dataclasses.replace(inputs, topk_ids=ids)) < TOLERANCE


def test_no_tokens_launch_nothing(device, monkeypatch) -> None:
    monkeypatch.setattr(op, "run", lambda *given: pytest.fail("a kernel was launched"))
    inputs = make_inputs(Problem(0, 96, 40, 4, 4, 2), 1, device=device)
    assert op.fused_moe_fp8(*inputs.positional()).shape == (0, 96)


def test_131072_tokens_run_in_passes_whose_numbers_fit_32_bits(monkeypatch) -> None:
    parts = []
    runner = op.Runner(lambda problem, card: 1024, lambda problem, *others: parts.append(problem.tokens))
    monkeypatch.setitem(op.RUNNERS, "triton", runner)
    inputs = make_inputs(Problem(1, 16, 16, 4, 4, 8 // 2), 1)
    x = torch.zeros(131072, 16, dtype=torch.bfloat16)
    ids = torch.zeros(131072, 4, dtype=torch.int32)
    op.fused_moe_fp8(x, *inputs.positional()[1:5], torch.zeros(131072, 4), ids)
    assert parts == [16384] * 8
    h100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))
    for shape in GLM_SHAPES.values():
        problem = shape.with_tokens(workspace.TOKENS_PER_PASS)
        config = choose(problem, h100)
        programs = workspace.tiles_of(problem, config) * problem.hidden_size // 64
        assert problem.pairs < 2**31 and programs < 2**31
        offsets = workspace.layout(problem, config).offsets
        assert all(start >= 0 and size > 0 for start, size in offsets.values())


# Offsets past 2**31: a sparse file stands for memory that is not there.


@triton.jit
def _quantise_far(source, target, scales, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    quantise_row(source, target, scales, row + tl.program_id(0), WIDTH, BLOCK, 0)


@triton.jit
def _sum_far(partial, local_ids, out, first, tokens, width, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    first = first + tl.program_id(0)
    sum_tile(partial, local_ids, out, first, tokens, 0, HIDDEN, 0, width, HIDDEN, 4, TOP_K, 1, BLOCK, True, False)


@triton.jit
def _store_far(partial, pair, width, HIDDEN: tl.constexpr):
    acc = tl.full((1, HIDDEN), 3.0, tl.float32)
    rows = pair + tl.arange(0, 1)
    store_partial(
        partial,
        acc,
        rows,
        tl.arange(0, HIDDEN),
        0,
        width,
        tl.full((1,), 2.0, tl.float32),
        rows >= 0,
        HIDDEN,
        True,
        False,
        False,
    )


def sparse(folder: Path, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] of a file that takes no room until it is written."""
    size = rows * columns
    return torch.from_file(str(folder / "far"), shared=True, size=size, dtype=dtype).view(rows, columns)


pytestmark_interpreter = pytest.mark.skipif(not INTERPRETED.value, reason="needs memory that only a CPU can pretend to have")


@pytestmark_interpreter
def test_a_row_far_behind_is_quantised_where_it_lies(tmp_path) -> None:
    rows, row = 600_000, 599_999
    source = sparse(tmp_path, rows, 4096, torch.bfloat16)
    source[row] = torch.randn(4096).bfloat16()
    (tmp_path / "q").mkdir()
    target = sparse(tmp_path / "q", rows, 4096, torch.float8_e4m3fn)
    scales = torch.zeros(rows)
    _quantise_far[(1,)](source, target, scales, row, WIDTH=4096, BLOCK=4096)
    assert row * 4096 > 2**31
    back = target[row].float() * scales[row]
    assert relative_error(back, source[row].double()) < 0.04


@pytestmark_interpreter
def test_partials_far_behind_are_written_and_summed_where_they_lie(tmp_path) -> None:
    tokens, top_k, width = 131_072, 8, 4096
    partial = sparse(tmp_path, tokens * top_k, width, torch.bfloat16)
    last = tokens * top_k - 1
    _store_far[(1,)](partial, last, width, HIDDEN=width)
    assert last * width > 2**31
    assert (partial[last] == 6.0).all()
    (tmp_path / "out").mkdir()
    out = sparse(tmp_path / "out", tokens, width, torch.bfloat16)
    ids = torch.zeros(tokens * top_k, dtype=torch.int32)
    _sum_far[(1,)](partial, ids, out, tokens - 1, tokens, width, HIDDEN=width, TOP_K=top_k, BLOCK=width)
    assert (out[tokens - 1] == 6.0).all()


def test_the_sizes_of_a_problem_can_be_replaced_by_tokens_alone() -> None:
    problem = GLM_SHAPES["EP8"]
    assert dataclasses.replace(problem, tokens=7) == problem.with_tokens(7)
