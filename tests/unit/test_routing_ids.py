"""Expert ids out of range: zero weight, a valid place to point at, and nothing else changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_vllm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_glm_patch
from vllm_glm_patch.fixes.routing_ids import sanitise_plainly

Fake = Callable[[str], Path]
ANY_INT32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids of which some are any int32 at all, with NaN and inf among the weights, and the number of experts."""
    experts, tokens, top_k = draw(st.integers(1, 200)), draw(st.integers(0, 12)), draw(st.integers(1, 9))
    one = st.one_of(st.integers(0, experts - 1), ANY_INT32, st.sampled_from([-1, experts, experts + 1]))
    ids = draw(st.lists(one, min_size=tokens * top_k, max_size=tokens * top_k))
    weight = st.floats(width=32)
    weights = draw(st.lists(weight, min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(ids, dtype=torch.int32).view(tokens, top_k), torch.tensor(weights).view(tokens, top_k), experts


@given(routings())
def test_every_id_comes_out_in_range_and_valid_entries_unchanged(routing: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, weights, experts = routing
    scales = torch.rand(ids.shape[0], 1) + 1
    new_ids, new_weights, new_scales = sanitise_plainly(ids, weights, experts, scales)
    valid = (ids >= 0) & (ids < experts)
    assert new_ids.dtype == ids.dtype
    assert new_ids.shape == ids.shape
    assert bool(((new_ids >= 0) & (new_ids < experts)).all())
    assert torch.equal(new_ids[valid], ids[valid])
    assert torch.equal(new_weights[valid].view(torch.int32), weights[valid].view(torch.int32)), "a valid weight lost its bits"
    assert bool((new_weights[~valid] == 0).all())
    assert new_scales is not None
    assert torch.equal(new_scales, torch.where(valid.any(1, keepdim=True), scales, 0.0) if ids.numel() else scales)


@given(routings())
def test_an_invalid_id_points_at_an_expert_of_its_own_token(routing: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, weights, experts = routing
    new_ids = sanitise_plainly(ids, weights, experts).ids
    for row in range(ids.shape[0]):
        valid = {int(i) for i in ids[row] if 0 <= i < experts}
        if valid:
            assert {int(i) for i in new_ids[row]} == valid


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(routing=routings())
@settings(max_examples=20)
def test_the_sum_over_experts_is_that_of_the_valid_ids(
    dtype: torch.dtype, routing: tuple[torch.Tensor, torch.Tensor, int]
) -> None:
    ids, weights, experts = routing[0].to(dtype), routing[1].nan_to_num(0.5, 1.0, -1.0).clamp(-8, 8), routing[2]
    results = torch.arange(1.0, experts + 1)
    valid = (ids >= 0) & (ids < experts)
    expected = torch.where(valid, results[ids.clamp(0, experts - 1).long()] * weights, 0.0).sum(1)
    new_ids, new_weights, _ = sanitise_plainly(ids, weights, experts)
    assert torch.equal((results[new_ids.long()] * new_weights).sum(1), expected)


def call(module: object, ids: torch.Tensor, weights: torch.Tensor, **other: object) -> None:
    given: dict[str, object] = {
        "output": torch.zeros(ids.shape[0], 4), "hidden_states": torch.zeros(ids.shape[0], 4), "topk_ids": ids,
        "global_num_experts": 8, "expert_map": None, "a1q_scale": torch.ones(ids.shape[0], 1),
        "use_batched_format": False, "topk_weights": weights, **other,
    }  # fmt: skip
    module.run_cutlass_moe_fp8(**given)  # type: ignore[attr-defined]


IDS = torch.tensor([[1, 2], [-1, 3], [8, 100000]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])


@pytest.fixture
def moe(fake: Fake) -> object:
    fake("0.19.1")
    module = fake_vllm.load("vllm.model_executor.layers.fused_moe.cutlass_moe")
    vllm_glm_patch.install()
    return module


def test_the_path_behind_sees_only_valid_ids(moe: object) -> None:
    weights = WEIGHTS.clone()
    call(moe, IDS, weights)
    ids, new_weights, scales = moe.calls[0]  # type: ignore[attr-defined]
    assert ids.tolist() == [[1, 2], [3, 3], [1, 2]]
    assert new_weights.tolist() == [[0.5, 0.5], [0.0, 0.75], [0.0, 0.0]]
    assert scales.tolist() == [[1.0], [1.0], [0.0]]
    assert torch.equal(weights, WEIGHTS), "the caller's own weights were changed"


def test_with_an_expert_map_its_length_is_the_number_of_experts(moe: object) -> None:
    call(moe, torch.tensor([[5, 20]], dtype=torch.int32), WEIGHTS[:1], expert_map=torch.arange(16), global_num_experts=16)
    assert moe.calls[0][0].tolist() == [[5, 5]]  # type: ignore[attr-defined]


def test_batched_experts_are_left_alone(moe: object) -> None:
    call(moe, IDS, WEIGHTS, use_batched_format=True)
    assert moe.calls[0][0] is IDS  # type: ignore[attr-defined]


def test_no_tokens_at_all_pass(moe: object) -> None:
    call(moe, IDS[:0], WEIGHTS[:0])
    assert moe.calls[0][0].shape == (0, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("on_input", [False, True])
def test_where_the_caller_reduces_its_weights_or_the_rows_become_zero(fake: Fake, on_input: bool) -> None:
    fake("0.10.1.1")
    module = fake_vllm.load("vllm.model_executor.layers.fused_moe.cutlass_moe")
    vllm_glm_patch.install()
    weights, output = WEIGHTS.clone(), torch.zeros(6, 4)
    experts = module.CutlassExpertsFp8Base()
    experts.apply(output, torch.zeros(3, 4), weights, IDS, 8, None, torch.ones(3, 1), on_input)
    assert module.calls[0][0].tolist() == [[1, 2], [3, 3], [1, 2]]
    if on_input:
        assert output[:, 0].tolist() == [1, 1, 0, 1, 0, 0]
    else:
        assert weights.tolist() == [[0.5, 0.5], [0.0, 0.75], [0.0, 0.0]]


IN_THE_INTERPRETER = """
import torch
from vllm_glm_patch.fixes import routing_ids_triton
from vllm_glm_patch.fixes.routing_ids import sanitise_plainly
seed = torch.seed()
print("seed", seed)
i32, i64 = torch.int32, torch.int64
for tokens, top_k, experts, dtype in [(1, 1, 1, i32), (7, 8, 160, i32), (65, 8, 160, i64), (130, 6, 3, i32)]:
    wide = torch.randint(-3, experts + 3, (tokens, top_k + 2), dtype=dtype)
    wide[torch.rand(wide.shape) < 0.1] = torch.iinfo(torch.int32).max
    weights = torch.randn(tokens, top_k + 2)
    weights[torch.rand(weights.shape) < 0.1] = float("nan")
    scales = torch.rand(tokens, 3)[:, 1:2]
    for ids, w in ((wide[:, :top_k], weights[:, :top_k]), (wide.T[:top_k].T, weights.T[:top_k].T)):
        pairs = zip(routing_ids_triton.sanitise(ids, w, experts, scales), sanitise_plainly(ids, w, experts, scales))
        for found, expected in pairs:
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=found.is_floating_point())
    assert routing_ids_triton.sanitise(wide, weights, experts, None)[2] is None
assert routing_ids_triton.sanitise(wide[:0], weights[:0], 3, None)[0].shape == (0, wide.shape[1])
print("same")
"""


def test_the_kernel_in_tritons_interpreter_does_what_plain_pytorch_does(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    root = Path(vllm_glm_patch.__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.endswith("same\n"), done.stdout + done.stderr
