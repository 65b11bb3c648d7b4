"""The public function: arguments, errors, empty input, passes, fake kernels."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from configs import TOLERANCE, error_of, random_problem

from vllm_glm_patch.moe import dispatch, fused_moe_fp8, op, pipeline, tables, workspace_bytes
from vllm_glm_patch.moe import workspace as workspace_module
from vllm_glm_patch.moe.generators import make_inputs
from vllm_glm_patch.moe.pipeline import Pass, Tensors
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.workspace import layout

SMALL = Problem(tokens=6, hidden_size=96, intermediate_size=40, experts=4, global_experts=4, top_k=2)


def test_no_tokens_give_no_rows(device) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, tokens=0), 1, device=device)
    assert fused_moe_fp8(*inputs.positional()).shape == (0, 96)


def test_writes_and_returns_the_output_it_is_given_using_the_workspace_it_is_given(seed, device) -> None:
    inputs = make_inputs(SMALL, seed, device=device)
    out = torch.full_like(inputs.hidden_states, float("nan"))
    workspace = torch.empty(workspace_bytes(SMALL, device), dtype=torch.uint8, device=device)
    assert fused_moe_fp8(*inputs.positional(), out=out, workspace=workspace) is out
    assert error_of(out, inputs) < TOLERANCE


def test_scales_may_have_a_last_dimension_of_one_and_ids_may_be_int64(seed, device) -> None:
    inputs = make_inputs(SMALL, seed, device=device)
    x, w13, w2, s13, s2, weights, ids = inputs.positional()
    plain = fused_moe_fp8(x, w13, w2, s13, s2, weights, ids)
    assert torch.equal(plain, fused_moe_fp8(x, w13, w2, s13[..., None], s2[..., None], weights, ids.long()))


def test_long_inputs_in_passes_give_the_same_bits(seed, device, monkeypatch) -> None:
    problem = random_problem(random.Random(seed), 23)
    inputs = make_inputs(problem, seed, device=device)
    # A table of one entry for both ways, so that only the passes differ.
    config = op.choose(problem, op.read_card(None if device == "cpu" else 0))
    monkeypatch.setattr(op, "choose", lambda part, card: config)
    ran: list[int] = []
    one_pass = op.Pass

    def watched(part, *given, **options):
        ran.append(part.tokens)
        return one_pass(part, *given, **options)

    monkeypatch.setattr(op, "Pass", watched)
    tables.changed()  # no plan of another test
    whole = fused_moe_fp8(*inputs.positional())
    monkeypatch.setattr(workspace_module, "TOKENS_PER_PASS", 10)
    assert torch.equal(fused_moe_fp8(*inputs.positional()), whole)
    assert ran == [23, 10, 10, 3]
    tables.changed()


def test_the_layout_is_made_once_for_a_shape_and_not_once_a_call(device, monkeypatch) -> None:
    """The host's part of a call is longer than the card's at one token, so it plans nothing twice."""
    inputs = make_inputs(SMALL, 1, device=device)
    made: list[int] = []
    layout = workspace_module.layout

    def counted(problem, *others):
        made.append(problem.tokens)
        return layout(problem, *others)

    monkeypatch.setattr(workspace_module, "layout", counted)
    monkeypatch.setattr(pipeline, "layout", counted)
    tables.changed()
    for _ in range(3):
        fused_moe_fp8(*inputs.positional())
    assert made == [6]


def test_a_plan_is_forgotten_when_a_table_changes(device, monkeypatch) -> None:
    inputs = make_inputs(SMALL, 1, device=device)
    used: list[object] = []
    one_pass = op.Pass

    def watched(part, config, *given, **options):
        used.append(config)
        return one_pass(part, config, *given, **options)

    monkeypatch.setattr(op, "Pass", watched)
    first = op.choose(SMALL, op.read_card(None if device == "cpu" else 0))
    other = dataclasses.replace(first, sum=dataclasses.replace(first.sum, block_t=2 * first.sum.block_t))
    assert first.path == "grouped"
    before = fused_moe_fp8(*inputs.positional())
    monkeypatch.setattr(tables, "entry", lambda problem, card: other.to_dict())
    fused_moe_fp8(*inputs.positional())
    tables.changed()
    assert torch.equal(fused_moe_fp8(*inputs.positional()), before)
    assert used == [first, first, other]
    tables.changed()


def test_tensors_that_are_not_contiguous_give_the_same_bits(seed, device) -> None:
    x, w13, w2, s13, s2, weights, ids = make_inputs(SMALL, seed, device=device).positional()
    wide = [torch.cat([t, t], 1) for t in (x, s13, s2, weights, ids)]
    strided = [w[:, : t.shape[1]] for w, t in zip(wide, (x, s13, s2, weights, ids))]
    assert not any(t.is_contiguous() for t in strided)
    a, b, c, d, e = strided
    plain = fused_moe_fp8(x, w13, w2, s13, s2, weights, ids)
    assert torch.equal(fused_moe_fp8(a, w13, w2, b, c, d, e), plain)
    assert torch.equal(fused_moe_fp8(a, w13, w2, b[..., None], c[..., None], d, e), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), "hidden_states is torch.float32, want bfloat16"),
        (lambda a: a.__setitem__(1, a[1][:, :, :-1]), "w13 is"),
        (lambda a: a.__setitem__(2, a[2].transpose(1, 2)), "w2 is"),
        (lambda a: a.__setitem__(3, a[3][:, :-1]), "w13_scale is"),
        (lambda a: a.__setitem__(5, a[5].double()), "topk_weights is torch.float64, want float32"),
        (lambda a: a.__setitem__(6, a[6].float()), "topk_ids is torch.float32, want int32 or int64"),
        (lambda a: a.__setitem__(6, a[6][:-1]), "topk_ids is"),
    ],
)
def test_an_unfit_argument_is_named(change, message, device) -> None:
    arguments = list(make_inputs(SMALL, 1, device=device).positional())
    change(arguments)
    with pytest.raises(ValueError, match=message):
        fused_moe_fp8(*arguments)


def test_a_small_workspace_is_refused_with_the_size_it_needs(device) -> None:
    inputs = make_inputs(SMALL, 1, device=device)
    with pytest.raises(ValueError, match=r"workspace has 16 elements.*workspace_bytes"):
        fused_moe_fp8(*inputs.positional(), workspace=torch.empty(16, dtype=torch.uint8, device=device))


def test_fake_kernels_give_shapes_without_running(device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = make_inputs(SMALL, 1, device=device)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in inputs.positional()]
        out = fused_moe_fp8(*fakes)
        assert out.shape == (6, 96) and out.dtype == torch.bfloat16
        given = torch.empty_like(out)
        assert fused_moe_fp8(*fakes, out=given) is given


def test_traces_whole_under_torch_compile(seed, device) -> None:
    inputs = make_inputs(SMALL, seed, device=device)
    compiled = torch.compile(lambda *a: fused_moe_fp8(*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs.positional()), fused_moe_fp8(*inputs.positional()) * 2)


@pytest.mark.parametrize("served", [True, False])
def test_a_configuration_asks_for_the_native_prologue_and_has_tritons_where_that_cannot_serve(monkeypatch, served) -> None:
    from vllm_glm_patch.moe.hopper import prologue

    asked: list[Pass] = []
    launched: list[object] = []
    monkeypatch.setattr(prologue, "launch", lambda one: asked.append(one) or served)
    monkeypatch.setattr(Pass, "launch", lambda self, kernel, grid, *arguments, **options: launched.append(kernel))
    inputs = make_inputs(SMALL, 1)
    config = dataclasses.replace(dispatch.Config(), prologue="native")
    workspace = torch.zeros(layout(SMALL, config).total, dtype=torch.uint8)
    on_card = SimpleNamespace(is_cuda=True, stride=inputs.hidden_states.stride)
    tensors = Tensors(on_card, *inputs.positional()[1:], None, torch.empty_like(inputs.hidden_states))
    one = Pass(SMALL, config, tensors, workspace, 4)
    one.prologue()
    assert asked == [one] and bool(launched) != served
    # Nor is anything launched where a kernel is only to be compiled.
    asked.clear()
    Pass(SMALL, config, tensors, workspace, 4, pipeline.compile_only).prologue()
    assert not asked and launched


def test_no_configuration_has_a_prologue_of_another_name() -> None:
    with pytest.raises(ValueError, match="prologue 'nativ' is none; there are triton and native"):
        dispatch.Config(prologue="nativ")  # type: ignore[arg-type]
    assert "prologue" not in dispatch.Config("pairs").to_dict()


@pytest.mark.parametrize("dependent", [True, False])
def test_the_streaming_gemm1_is_told_to_ask_early_where_launches_are_dependent(monkeypatch, dependent) -> None:
    monkeypatch.setattr(pipeline, "dependent_launch", lambda: dependent)
    launched: list[dict[str, object]] = []
    inputs = make_inputs(SMALL, 1)
    config = dispatch.Config(gemm1=dispatch.Gemm1("stream", early=4), pdl=True)
    tensors = Tensors(*inputs.positional(), None, torch.empty_like(inputs.hidden_states))
    workspace = torch.zeros(layout(SMALL, config).total, dtype=torch.uint8)
    catch = lambda kernel, grid, *arguments, **options: launched.append(options)  # noqa: E731
    Pass(SMALL, config, tensors, workspace, 4, catch).gemm1()
    (options,) = launched
    assert (options["EARLY"], options["EXPERTS"]) == ((4, SMALL.experts) if dependent else (0, 0))
