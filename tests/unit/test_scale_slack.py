"""The slack behind the scales: always 32 bytes of their own storage, never more copied than needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_vllm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vllm_glm_patch
from vllm_glm_patch.fixes.scale_slack import SLACK, define_operator, empty_with_slack, with_slack

Fake = Callable[[str], Path]


def slack_of(scales: torch.Tensor) -> int:
    """Bytes of the tensor's own storage behind its last value."""
    return scales.untyped_storage().nbytes() - (scales.storage_offset() + scales.numel()) * scales.element_size()


@st.composite
def scale_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Contiguous scales that lie anywhere in a storage of any size, as [rows], [rows, 1] or [1, rows]."""
    before, rows, behind = draw(st.integers(0, 20)), draw(st.integers(0, 300)), draw(st.integers(0, 20))
    seed = draw(st.integers(0, 2**31))
    storage = torch.rand(before + rows + behind, generator=torch.Generator().manual_seed(seed))
    shape = draw(st.sampled_from([(rows,), (rows, 1), (1, rows)]))
    return storage[before : before + rows].view(shape)


@given(scale_tensors())
def test_there_are_always_32_bytes_behind_and_the_values_stay(scales: torch.Tensor) -> None:
    result = with_slack(scales)
    assert slack_of(result) >= 32
    assert result.shape == scales.shape
    assert result.is_contiguous()
    assert torch.equal(result, scales)


@given(scale_tensors())
def test_a_copy_is_made_exactly_where_slack_is_missing_and_is_as_small_as_it_can_be(scales: torch.Tensor) -> None:
    result = with_slack(scales)
    if slack_of(scales) >= 32:
        assert result is scales
    else:
        assert result.untyped_storage().nbytes() == (scales.numel() + SLACK) * 4


@given(st.integers(0, 1000))
def test_fresh_scales_have_the_slack(count: int) -> None:
    fresh = empty_with_slack(count, torch.empty(0))
    assert fresh.shape == (count,)
    assert fresh.dtype == torch.float32
    assert slack_of(fresh) == 32


@torch.library.custom_op("glm_patch_test::grouped_gemm", mutates_args=("slack",))
def grouped_gemm(scales: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    slack.fill_(slack_of(scales))
    return scales.clone()


@grouped_gemm.register_fake
def _(scales: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(scales)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_hands_over_scales_with_slack(backend: str) -> None:
    def layer(scales: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
        return grouped_gemm(with_slack(scales * 2), slack)

    define_operator()
    scales, slack = torch.rand(64, 1), torch.zeros((), dtype=torch.int64)
    result = torch.compile(layer, backend=backend, fullgraph=True)(scales, slack)
    assert torch.equal(result, scales * 2)
    assert slack.item() >= 32


def gemm_arguments(scales: torch.Tensor, per_token: bool) -> tuple[object, ...]:
    some = torch.zeros(3, 3, dtype=torch.int32)
    return (some, some, some, scales, some, some, some, some, some, some, per_token, True)


@pytest.mark.parametrize("rows", [0, 1, 64, 65536])
def test_the_grouped_gemm_sees_slack_for_both_gemms(fake: Fake, rows: int) -> None:
    fake("0.19.1")
    ops = fake_vllm.load("vllm._custom_ops")
    vllm_glm_patch.install()
    first = torch.rand(rows, 1)
    ops.cutlass_moe_mm(*gemm_arguments(first, per_token=True))
    _, second = ops.scaled_fp8_quant(torch.rand(rows, 4), use_per_token_if_dynamic=True)
    ops.cutlass_moe_mm(*gemm_arguments(second, per_token=True))
    assert [slack_of(seen) >= 32 for seen in ops.seen] == [True, True]
    assert torch.equal(ops.seen[0], first)
    assert ops.seen[1].data_ptr() == second.data_ptr(), "the second GEMM's scales were copied though they have slack"


def test_scales_given_by_name_get_slack_too(fake: Fake) -> None:
    fake("0.19.1")
    ops = fake_vllm.load("vllm._custom_ops")
    vllm_glm_patch.install()
    names = ops.cutlass_moe_mm.__wrapped__.__code__.co_varnames
    ops.cutlass_moe_mm(**dict(zip(names, gemm_arguments(torch.rand(8, 1), per_token=True))))
    assert slack_of(ops.seen[0]) >= 32


def test_one_scale_for_all_is_left_alone(fake: Fake) -> None:
    fake("0.19.1")
    ops = fake_vllm.load("vllm._custom_ops")
    vllm_glm_patch.install()
    scale = torch.rand(1)
    ops.cutlass_moe_mm(*gemm_arguments(scale, per_token=False))
    assert ops.seen[0] is scale


@pytest.mark.parametrize("options", [{}, {"use_per_token_if_dynamic": True, "num_token_padding": 9}, {"scale": torch.ones(1)}])
def test_every_other_quantisation_is_vllms_own(fake: Fake, options: dict[str, object]) -> None:
    fake("0.19.1")
    ops = fake_vllm.load("vllm._custom_ops")
    plain = [t.shape for t in ops.scaled_fp8_quant(torch.rand(5, 4), **options)]
    vllm_glm_patch.install()
    assert [t.shape for t in ops.scaled_fp8_quant(torch.rand(5, 4), **options)] == plain


def test_a_given_output_is_filled_and_its_scales_have_slack(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.19.1")
    ops = fake_vllm.load("vllm._custom_ops")
    vllm_glm_patch.install()
    filled: list[tuple[int, ...]] = []
    operators = type("Operators", (), {})()
    operators.dynamic_per_token_scaled_fp8_quant = lambda out, x, scales, bound: filled.append(tuple(scales.shape))
    monkeypatch.setattr(torch.ops, "_C", operators)
    given = torch.zeros(5, 4)
    output, scales = ops.scaled_fp8_quant(torch.rand(5, 4), use_per_token_if_dynamic=True, output=given)
    assert output is given
    assert filled == [(5, 1)]
    assert slack_of(scales) == 32
