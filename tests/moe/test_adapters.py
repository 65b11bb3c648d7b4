"""vLLM's MoE call served by the fused kernel: every generation end to end, what is left to vLLM, and the self-test."""

from __future__ import annotations

import ast
import dataclasses
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "unit"))

import fake_moe
from fake_moe import GENERATIONS, PROBLEM, call_new, layer, new_apply
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError

from vllm_glm_patch.adapters import conditions, self_test, serving
from vllm_glm_patch.adapters.modular_kernel import Reader
from vllm_glm_patch.adapters.serving import DeviceLost, Serving
from vllm_glm_patch.moe import backends, tables
from vllm_glm_patch.moe.dispatch import Card
from vllm_glm_patch.moe.hopper.errors import HopperError
from vllm_glm_patch.moe.reference import relative_error
from vllm_glm_patch.settings import Settings

H100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter; a card has scripts of its own")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path):
    """No tables of a user, no preference, one layer of the log."""
    yield
    backends.prefer(backends.AUTO)
    tables.use_folder(None)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The float64 reference in the place of the kernel, where its speed in the interpreter would be in the way."""
    from vllm_glm_patch.moe.reference import fused_moe

    ran: list[int] = []

    def run(call: Any) -> torch.Tensor:
        ran.append(call.hidden_states.shape[0])
        weights = call.w13, call.w2, call.w13_scale, call.w2_scale
        ids = call.topk_ids.view(torch.int32) if call.topk_ids.dtype == torch.uint32 else call.topk_ids
        made = fused_moe(call.hidden_states, *weights, call.topk_weights, ids, expert_map=call.expert_map)
        return made.to(torch.bfloat16)

    monkeypatch.setattr(serving, "run", run)
    return ran


def wrapped(of: fake_moe.Layer, settings: Settings | None = None, make: Any = new_apply) -> tuple[Any, Serving]:
    chosen = settings or Settings(tuned_dir="/nonexistent", moe_backend="auto")
    state = Serving(lambda: chosen)
    original = make(of)
    reader = Reader(original)
    return lambda *args, **kwargs: state.call(original, reader, args, kwargs), state


# Served.


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_generation_is_served_by_the_kernel_and_compared_before(name: str) -> None:
    make, call, prepare = GENERATIONS[name]
    of = layer(prepare=prepare)
    kept = of.inputs.hidden_states.clone()
    function, state = wrapped(of, make=make)
    out = call(function, of)
    assert relative_error(out, of.want()) < 0.03
    assert torch.equal(of.inputs.hidden_states, kept)  # the self-test of a kernel that works in place has its own tokens
    assert of.seen == [9]  # once, in the self-test: tokens of its own
    call(function, of)
    assert of.seen == [9]
    assert state.summary() == "1 of 1 MoE layers served, triton for 1 - 9 tokens"


def test_a_share_of_the_experts_with_a_map_is_served_as_vllm_serves_it(stand_in: list[int]) -> None:
    of = layer(dataclasses.replace(PROBLEM, experts=4))
    function, _ = wrapped(of)
    assert relative_error(call_new(function, of), of.want()) < 0.01
    assert of.seen == [9]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32])
def test_ids_of_every_type_that_vllm_uses_are_served(dtype: torch.dtype) -> None:
    of = layer()
    ids = of.inputs.topk_ids
    given = ids.view(torch.uint32) if dtype == torch.uint32 else ids.to(dtype)
    function, state = wrapped(of)
    # vLLM's own kernel is only asked in the self-test, with ids of the same type.
    of.theirs = lambda x, a, b, w, i, m: of.want(hidden_states=x, topk_weights=w, topk_ids=i.view(torch.int32) if i.dtype == torch.uint32 else i).to(torch.bfloat16)  # type: ignore[method-assign]  # fmt: skip # noqa: E501
    assert relative_error(call_new(function, of, topk_ids=given), of.want()) < 0.03
    assert state.layers[of.inputs.w13].reason is None


def test_ids_out_of_range_and_weights_of_half_precision_are_served(stand_in: list[int]) -> None:
    of = layer()
    function, _ = wrapped(of)
    ids = of.inputs.topk_ids.clone()
    ids[0, 0], ids[1, 1] = -1, 100_000
    weights = of.inputs.topk_weights.bfloat16()
    out = call_new(function, of, topk_ids=ids, topk_weights=weights)
    assert relative_error(out, of.want(topk_ids=ids, topk_weights=weights.float())) < 0.01


def test_no_tokens_give_no_rows() -> None:
    of = layer()
    function, _ = wrapped(of)
    call_new(function, of)
    nothing = {name: getattr(of.inputs, name)[:0] for name in ("hidden_states", "topk_weights", "topk_ids")}
    assert call_new(function, of, **nothing).shape == (0, 96)
    assert of.seen == [9]


def test_new_weights_are_a_new_layer_and_old_ones_are_not_kept(stand_in: list[int]) -> None:
    import gc
    import weakref

    of, function_state = layer(), []
    function, state = wrapped(of)
    function_state.append(state)
    call_new(function, of)
    gone = weakref.ref(of.inputs.w13)
    new = layer(seed=2)
    of.inputs, of.kernel = new.inputs, new.kernel
    call_new(function, of)
    del new
    gc.collect()
    assert gone() is None
    assert [known.number for known in state.layers.values()] == [2] or len(state.layers) == 1


# Left to vLLM.


class NaiveDPEP:
    """An all-to-all."""


class FlashInferExperts(fake_moe.CutlassExpertsFp8):
    """A kernel with a layout of its own."""


def quantised(**change: Any) -> Any:
    return lambda of: vars(of.kernel.fused_experts.quant_config).update(change)


def of_kernel(**change: Any) -> Any:
    return lambda of: vars(of.kernel).update(change)


LEFT = {
    "all-to-all": (of_kernel(prepare_finalize=NaiveDPEP()), {}, "travel between ranks by NaiveDPEP"),
    "shared experts": (of_kernel(shared_experts=object()), {}, "shared experts inside its kernel"),
    "shared experts of the impl": (of_kernel(impl=SimpleNamespace(shared_experts=1)), {}, "shared experts inside its kernel"),
    "kernel": (lambda of: setattr(of.kernel.fused_experts, "__class__", FlashInferExperts), {}, "chose FlashInferExperts"),
    "LoRA": (lambda of: setattr(of.kernel.fused_experts, "_lora_context", 1), {}, "LoRA is applied"),
    "LoRA up to 0.19": (lambda of: setattr(of.kernel.fused_experts, "activation", print), {}, "has replaced activation"),
    "blocks": (quantised(block_shape=[128, 128]), {}, r"blocks of \[128, 128\]"),
    "per tensor": (quantised(per_act_token_quant=False), {}, "not quantised per token"),
    "int8": (quantised(quant_dtype=torch.int8), {}, "quantised to torch.int8"),
    "bias": (quantised(w2_bias=torch.zeros(1)), {}, "has w2_bias"),
    "static scale": (quantised(a1_scale=torch.ones(1)), {}, "has a1_scale"),
    "clamp": (quantised(gemm1_clamp_limit=7.0), {}, "has gemm1_clamp_limit"),
    "clamp of the layer": (
        lambda of: setattr(of.kernel.fused_experts, "moe_config", SimpleNamespace(swiglu_limit=7.0)),
        {},
        "has swiglu_limit",
    ),
    "scale a tensor": (quantised(w1_scale=torch.ones(8)), {}, r"scales of w13 are torch.float32 \[8\]"),
    "half scales": (quantised(w2_scale=torch.ones(8, 96).half()), {}, "scales of w2 are torch.float16"),
    "activation": (lambda of: None, {"activation": "gelu"}, "activation is 'gelu'"),
    "weight on input": (lambda of: None, {"apply_router_weight_on_input": True}, "applied to the tokens"),
    "no map": (lambda of: None, {"global_num_experts": 16}, "count 16 experts of which this rank has 8"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_fit_is_left_to_vllm_and_the_log_says_why_once(
    name: str, stand_in: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    change, options, reason = LEFT[name]
    of = layer()
    change(of)
    function, state = wrapped(of)
    caplog.set_level(logging.INFO, "vllm_glm_patch")
    for _ in range(3):
        call_new(function, of, options)
    assert stand_in == []
    assert of.seen == [9, 9, 9]
    assert len(caplog.records) == 1
    import re

    assert re.search(reason, caplog.records[0].message), caplog.records[0].message
    assert re.search(reason, state.summary())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_states": torch.zeros(9, 96, dtype=torch.float16)}, "tokens are torch.float16"),
        ({"w13": torch.zeros(8, 41, 96).to(torch.float8_e4m3fn)}, "no gated layer"),
        ({"w2": torch.zeros(8, 96, 40).bfloat16()}, "quantised to"),
        ({"topk_ids": torch.zeros(9, 2)}, "expert ids are torch.float32"),
        ({"topk_weights": torch.zeros(9, 3)}, "unlike the ids"),
    ],
    ids=["tokens", "w13", "w2", "ids", "weights"],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], reason: str) -> None:
    of = layer()
    options = {"activation": "silu"}
    call = Reader(new_apply(of)).read((of.kernel,), {
        "hidden_states": of.inputs.hidden_states, "w1": of.inputs.w13, "w2": of.inputs.w2, "expert_map": None,
        "topk_weights": of.inputs.topk_weights, "topk_ids": of.inputs.topk_ids,
    })  # fmt: skip
    assert conditions.why_not(call, options.get) is None
    changed = dataclasses.replace(call, **change)
    assert reason in str(conditions.why_not(changed, options.get))


def test_weights_of_another_quantisation_are_told_without_a_look_at_their_scales() -> None:
    class Described(SimpleNamespace):
        @property
        def w1_scale(self) -> Any:
            raise AssertionError("not a tensor")

    of = layer()
    of.kernel.fused_experts.quant_config = Described(quant_dtype="mxfp4", per_act_token_quant=False, block_shape=None)
    of.theirs = lambda *given: "vLLM's"  # type: ignore[method-assign]
    function, state = wrapped(of)
    packed = torch.zeros(8, 80, 48, dtype=torch.uint8)
    assert call_new(function, of, w13=packed) == "vLLM's"
    assert "quantised to mxfp4, with weights of torch.uint8" in state.summary()


def test_other_cards_and_a_cpu_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    of = layer()
    function, state = wrapped(of)
    call_new(function, of)
    assert "on cpu, and the kernel needs a Hopper card" in state.summary()
    monkeypatch.setattr(conditions, "card_of", lambda device: Card("NVIDIA A100", 108, 166912, (8, 0)))
    function, state = wrapped(of)
    call_new(function, of)
    assert "NVIDIA A100 has compute capability 8.0" in state.summary()


def test_a_layer_that_nobody_thought_of_is_no_crash(stand_in: list[int]) -> None:
    of = layer()
    of.kernel = object()
    function, _ = wrapped(of)
    assert relative_error(call_new(function, of), of.want()) < 0.01
    assert stand_in == []


def test_lora_that_comes_after_the_first_call_is_vllms(stand_in: list[int]) -> None:
    of = layer()
    function, _ = wrapped(of)
    call_new(function, of)
    stand_in.clear()
    of.kernel.fused_experts._lora_context = object()
    call_new(function, of)
    assert stand_in == [] and of.seen == [9, 9]
    of.kernel.fused_experts._lora_context = None
    call_new(function, of)
    assert stand_in == [9]


# Who serves which counts.


def test_a_table_may_leave_counts_to_vllm_and_settings_override_it(tmp_path: Path, stand_in: list[int]) -> None:
    import json

    entry = {"backend": "upstream"}
    table = {"card": "interpreter", "multiprocessors": 4, "capability": [9, 0], "shapes": {PROBLEM.shape_key: {"9": entry}}}
    (tmp_path / "card.json").write_text(json.dumps(table))
    for backend, ours in (("auto", False), ("triton", True), ("upstream", False)):
        stand_in.clear()
        of = layer()
        function, state = wrapped(of, Settings(tuned_dir=str(tmp_path), moe_backend=backend))
        state.limit = 30
        call_new(function, of)
        stand_in.clear()
        of.seen.clear()
        call_new(function, of)
        assert (stand_in, of.seen) == (([9], []) if ours else ([], [9]))
        if backend == "auto":
            ranges = "triton for 1 - 4 tokens, upstream for 5 - 18 tokens, triton for 19 - 30 tokens"
            assert state.summary() == f"1 of 1 MoE layers served, {ranges}"


def test_vllms_own_workspace_is_grown_in_the_self_test_to_what_it_will_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "route", lambda problem, card: "upstream" if 300 < problem.tokens <= 400 else "triton")
    counts, _, theirs = serving.plan(PROBLEM, H100, 1000)
    assert theirs == 400
    assert not [count for count in counts if 300 < count <= 400]


def test_every_configuration_is_compiled_in_the_self_test() -> None:
    from vllm_glm_patch.moe import dispatch
    from vllm_glm_patch.moe.problem import Problem

    counts, compared, theirs = serving.plan(Problem(1), H100, 8192)
    assert theirs == 0
    all_of_them = {dispatch.choose(Problem(n), H100) for n in range(1, 8193)}
    assert {dispatch.choose(Problem(n), H100) for n in counts} == all_of_them
    assert len(counts) <= 2 * len(all_of_them)
    assert {dispatch.choose(Problem(n), H100) for n in compared} == all_of_them
    assert len(compared) == len(all_of_them)


def test_a_configuration_that_is_wrong_at_its_own_counts_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the boundary counts alone it would not be: 20 tokens are nobody's."""
    right = serving.run

    def wrong_at_20(call: Any) -> Any:
        return right(call) * (1.2 if call.hidden_states.shape[0] == 20 else 1.0)

    monkeypatch.setattr(serving, "run", wrong_at_20)
    monkeypatch.setattr(backends, "configuration", lambda problem, card: "few" if problem.tokens <= 20 else "many")
    monkeypatch.setattr(backends, "variant", lambda problem, card: 0)
    of = layer()
    function, state = wrapped(of)
    state.limit = 30
    call_new(function, of)
    assert state.refused is not None and "with 20 tokens it differs" in state.refused


# Compiled and captured.


def test_inside_an_opaque_operator_one_compiled_graph_serves_all_counts_by_their_own_kernel(
    monkeypatch: pytest.MonkeyPatch, stand_in: list[int]
) -> None:
    of = layer()
    function, state = wrapped(of)
    call_new(function, of)
    layer_of = state.layers[of.inputs.w13]
    monkeypatch.setattr(backends, "route", lambda problem, card: "upstream" if problem.tokens < 5 else "triton")
    layer_of.ours.clear()
    weights, ids = of.inputs.topk_weights, of.inputs.topk_ids

    @torch.library.custom_op("glm_patch_tests::moe_forward", mutates_args=())
    def moe_forward(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        return call_new(function, of, hidden_states=x, topk_weights=weights[:n], topk_ids=ids[:n]).clone()

    @moe_forward.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: moe_forward(x) * 2, dynamic=True, fullgraph=True, backend=backend)
    stand_in.clear()
    of.seen.clear()
    for n in (9, 3, 7, 2, 8):
        x = of.inputs.hidden_states[:n].clone()
        assert compiled(x).shape == (n, 96)
    assert len(graphs) == 1
    assert stand_in == [9, 7, 8]
    assert of.seen == [3, 2]
    torch._dynamo.reset()


def test_a_call_that_is_traced_is_left_to_vllm_without_a_guard_on_the_count(stand_in: list[int]) -> None:
    of = layer()
    of.kernel.plain = True

    def apply(self, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
              apply_router_weight_on_input):  # type: ignore[no-untyped-def]  # fmt: skip
        return hidden_states * 2

    state = Serving(lambda: Settings(moe_backend="auto"))
    reader = Reader(apply)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def traced(x: torch.Tensor) -> Any:
        return state.call(apply, reader, (of.kernel, x, None, None, None, None, "silu", 8, None, False), {})

    compiled = torch.compile(traced, dynamic=True, fullgraph=True, backend=backend)
    for n in (9, 3, 7):
        x = torch.ones(n, 4)
        assert torch.equal(compiled(x), x * 2)
    assert len(graphs) == 1 and stand_in == []
    torch._dynamo.reset()


def test_a_layer_that_is_first_met_while_a_graph_is_captured_keeps_vllms_kernel_in_it(
    monkeypatch: pytest.MonkeyPatch, stand_in: list[int]
) -> None:
    of = layer()
    function, state = wrapped(of)
    monkeypatch.setattr(serving, "_is_captured", lambda call: True)
    call_new(function, of)
    assert (stand_in, of.seen) == ([], [9])
    monkeypatch.setattr(serving, "_is_captured", lambda call: False)
    call_new(function, of)
    assert state.layers[of.inputs.w13].tested


# A kernel that cannot be compiled.


def of_triton(name: str, text: str, module: str = "triton.runtime.errors") -> Exception:
    """An error as Triton has it, whose own wants a syntax tree."""
    return type(name, (Exception,), {"__module__": module})(text)


CERTAIN: dict[str, Any] = {
    "CompilationError": lambda: of_triton(
        "CompilationError",
        "at 42:19:\n    gate = tl.dot(gate_w, x, gate)\n           ^\nshapes should have N >= 16",
        "triton.compiler.errors",
    ),
    "shared memory": lambda: OutOfResources(300000, 232448, "shared memory"),
    "assembler": lambda: PTXASError("`ptxas` failed with error code 255\n`ptxas` stderr:\nmany lines"),
    "static_assert": lambda: CompileTimeAssertionFailure("f()", ast.parse("f()").body[0], "no"),
    "a pass of the compiler": lambda: RuntimeError("PassManager::run failed"),
    "a native kernel refused before the driver is asked": lambda: HopperError("glm_gemm1 needs too much shared memory"),
    "a cubin that the driver does not take": lambda: HopperError("CUDA_ERROR_NO_BINARY_FOR_GPU", 209),
}
UNCERTAIN: dict[str, Any] = {
    "a value": lambda: ValueError("tile too large"),
    "another's error of that name": lambda: of_triton("CompilationError", "no", "other.compiler"),
    "Triton's interpreter": lambda: of_triton("InterpreterError", "no"),
    "memory": lambda: of_triton("OutOfMemoryError", "no memory", "torch"),
    "words of the compiler at another place": lambda: RuntimeError("no: PassManager::run failed"),
    "a launch that the driver refuses": lambda: HopperError("invalid value", 1),
}
FEW, SOME, MANY = range(1, 3), range(3, 33), range(33, 97)
"""The token counts of PROBLEM's first configurations: pairs, and tiles of 16 and 32 rows. Up to 384 they are of 64."""


def failing(monkeypatch: pytest.MonkeyPatch, counts: Any, error: Any) -> list[int]:
    """`error` where the kernel, or what stands in for it, gets so many tokens. Gives the counts at which it was raised."""
    right, failed = serving.run, []

    def run(call: Any) -> torch.Tensor:
        if call.hidden_states.shape[0] in counts:
            failed.append(call.hidden_states.shape[0])
            raise error()
        return right(call)

    monkeypatch.setattr(serving, "run", run)
    return failed


def with_tokens(function: Any, of: fake_moe.Layer, tokens: int) -> torch.Tensor:
    """A call of the layer with its first tokens, or with as many more of the same."""
    take = [n % of.inputs.hidden_states.shape[0] for n in range(tokens)]
    names = ("hidden_states", "topk_weights", "topk_ids")
    made: torch.Tensor = call_new(function, of, **{name: getattr(of.inputs, name)[take] for name in names})
    return made


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("name", CERTAIN)
def test_a_configuration_that_cannot_be_compiled_leaves_its_own_counts_to_vllm_in_all_layers(
    name: str, stand_in: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, SOME, CERTAIN[name])
    of = layer()
    function, state = wrapped(of)
    state.limit = 100
    assert relative_error(call_new(function, of), of.want()) < 0.01
    assert of.seen == [100, 9]  # the self-test, then the call, whose count is left
    assert state.refused is None
    assert state.summary() == (
        "1 of 1 MoE layers served, triton for 1 - 2 tokens, upstream for 3 - 32 tokens, triton for 33 - 100 tokens"
    )
    (message,) = warnings(caplog)
    assert "for 3 - 32 tokens cannot be compiled here" in message and "Please report this" in message
    assert serving.named(CERTAIN[name]()) in message
    first, other = (of.inputs, of.kernel), layer(seed=2)  # the latter with a short self-test of its own
    for inputs, kernel in (first, (other.inputs, other.kernel)):
        of.inputs, of.kernel = inputs, kernel
        with_tokens(function, of, 1)
        stand_in.clear()
        of.seen.clear()
        for tokens in (2, 3, 20, 32, 33, 100):  # of which 20 was tried by nobody
            with_tokens(function, of, tokens)
        assert (stand_in, of.seen) == ([2, 33, 100], [3, 20, 32])
    assert len(warnings(caplog)) == 1
    assert state.summary().startswith("2 of 2 MoE layers served, triton for 1 - 2 tokens, upstream for 3 - 32 tokens")


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_not_certain_to_be_one_kernel_alone_leaves_everything_to_vllm(
    name: str, stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, SOME, UNCERTAIN[name])
    of = layer()
    function, state = wrapped(of)
    state.limit = 100
    with_tokens(function, of, 100)
    assert state.refused == f"self-test of layer 1: {serving.named(UNCERTAIN[name]())}"


def test_where_nothing_can_be_compiled_one_warning_says_so(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, range(1, 101), CERTAIN["shared memory"])
    of = layer()
    function, state = wrapped(of)
    state.limit = 100
    call_new(function, of)
    assert of.seen == [9] and stand_in == []
    (message,) = warnings(caplog)
    assert "is not used in this process (self-test of layer 1: OutOfResources: out of resource: shared memory" in message
    assert state.summary().startswith("vLLM's own kernel serves all MoE layers: self-test of layer 1: OutOfResources")


def test_two_configurations_that_cannot_be_compiled_are_told_one_by_one(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, [*FEW, *MANY], CERTAIN["assembler"])
    of = layer()
    function, state = wrapped(of)
    state.limit = 100
    with_tokens(function, of, 100)
    told = [message.partition(" tokens cannot")[0].rpartition("for ")[2] for message in warnings(caplog)]
    assert told == ["1 - 2", "33 - 96"]
    ranges = "upstream for 1 - 2 tokens, triton for 3 - 32 tokens, upstream for 33 - 96 tokens, triton for 97 - 100 tokens"
    assert state.summary() == f"1 of 1 MoE layers served, {ranges}"


def test_the_others_are_compared_and_one_of_them_that_differs_leaves_everything_to_vllm(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, SOME, CERTAIN["shared memory"])
    right = serving.run
    monkeypatch.setattr(serving, "run", lambda call: right(call) * (1.2 if call.hidden_states.shape[0] == 96 else 1.0))
    of = layer()
    function, state = wrapped(of)
    state.limit = 100
    with_tokens(function, of, 100)
    assert "with 96 tokens it differs" in str(state.refused)
    assert state.summary().startswith("vLLM's own kernel serves all MoE layers")


@pytest.mark.parametrize("where", ["another configuration", "found when the device is waited for", "in the compiler's words"])
def test_an_error_of_the_device_ends_the_start_also_beside_one_of_a_compiler(
    where: str, stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    if where == "in the compiler's words":
        failing(monkeypatch, SOME, lambda: of_triton("CompilationError", str(lost)))
    else:
        failing(monkeypatch, SOME, CERTAIN["shared memory"])
    if where == "another configuration":
        failing(monkeypatch, MANY, lambda: lost)

    def wait(inputs: self_test.Inputs) -> None:
        if sys.exc_info()[0] is not None:
            raise lost

    if where == "found when the device is waited for":
        monkeypatch.setattr(self_test.Inputs, "wait", wait)
    function, state = wrapped(layer())
    state.limit = 100
    with pytest.raises(DeviceLost, match=r"self-test: CUDA error: an illegal memory"):
        with_tokens(function, layer(), 100)


def test_what_a_compiler_ended_keeps_no_memory(stand_in: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    right, held, seen = serving.run, [], []

    def run(call: Any) -> torch.Tensor:
        workspace = torch.empty(1)
        if call.hidden_states.shape[0] in SOME:
            held.append(weakref.ref(workspace))
            raise CERTAIN["shared memory"]()
        seen.extend(of() for of in held)
        return right(call)

    monkeypatch.setattr(serving, "run", run)
    function, state = wrapped(layer())
    state.limit = 100
    gc.disable()
    try:
        with_tokens(function, layer(), 100)
    finally:
        gc.enable()
    assert state.refused is None and seen and set(seen) == {None}


def test_another_layer_is_compared_also_where_its_usual_counts_are_left_to_vllm(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, [*FEW, *SOME, *MANY], CERTAIN["shared memory"])
    of = layer()
    function, state = wrapped(of)
    state.limit = 100
    call_new(function, of)
    first, new = of.inputs, layer(seed=2)
    of.inputs, of.kernel, of.spoil = new.inputs, new.kernel, lambda made: made * 0
    call_new(function, of)
    assert first.w13 in state.layers and "self-test of layer 2: with 100 tokens it differs" in str(state.refused)


def test_new_weights_do_not_try_again_what_could_not_be_compiled(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = failing(monkeypatch, MANY, CERTAIN["shared memory"])
    of = layer()
    function, state = wrapped(of)
    state.limit = 97  # a configuration's only count, whose neighbour is left
    for seed in (2, 3):
        call_new(function, of)
        assert failed == [95]  # once: its other counts are not tried after it
        new = layer(seed=seed)
        of.inputs, of.kernel = new.inputs, new.kernel
        assert len(state.layers) == 0  # so that the next is the first again
    assert len(warnings(caplog)) == 1 and state.refused is None


def test_what_could_not_be_compiled_is_tried_again_after_another_install(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = serving.run
    failing(monkeypatch, SOME, CERTAIN["shared memory"])
    of = layer()
    call_new(wrapped(of)[0], of)
    monkeypatch.setattr(serving, "run", right)
    function, state = wrapped(of)
    call_new(function, of)
    assert state.summary() == "1 of 1 MoE layers served, triton for 1 - 9 tokens"


def test_a_call_of_several_passes_is_vllms_where_one_of_them_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(*tokens: int) -> list[bool]:
        known = serving.Layer(1, None, PROBLEM, H100)
        return [state._is_ours(known, 16384 + n) for n in tokens]

    state = Serving(Settings)
    assert ours(0, 9, 50, 16384 + 9) == [True] * 4
    state._left = {backends.configuration(PROBLEM.with_tokens(9), H100)}
    assert ours(0, 9, 50, 16384 + 9) == [True, False, True, False]
    state._left = {backends.configuration(PROBLEM.with_tokens(16384), H100)}
    assert ours(0, 9, 50) == [False] * 3
    # Where vLLM's own is faster a pass runs kernels that no self-test has tried.
    monkeypatch.setattr(backends, "route", lambda problem, card: "upstream" if problem.tokens == 50 else "triton")
    state._left = {"another"}
    assert ours(9, 50) == [True, False]
    state._left = set()
    assert ours(9, 50) == [True, True]


def test_vllms_own_workspace_is_grown_in_the_self_test_to_the_counts_that_are_left_to_it(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, range(97, 385), CERTAIN["shared memory"])
    of = layer(dataclasses.replace(PROBLEM, tokens=600))
    function, state = wrapped(of)
    call_new(function, of)
    assert of.seen == [384, 216]
    assert state._compared == (1, 2, 32, 64, 96, 600)
    new = layer(dataclasses.replace(PROBLEM, tokens=600), seed=2)
    of.inputs, of.kernel = new.inputs, new.kernel
    assert len(state.layers) == 0  # the next is the first again
    call_new(function, of)
    assert of.seen == [384, 216] * 2


def test_a_plan_without_what_is_left_has_its_counts_among_vllms() -> None:
    few = backends.configuration(PROBLEM.with_tokens(9), H100)
    assert serving.plan(PROBLEM, H100, 100) == ([1, 2, 31, 32, 95, 96, 99, 100], [2, 32, 96, 100], 0)
    assert serving.plan(PROBLEM, H100, 100, {few}) == ([1, 2, 95, 96, 99, 100], [2, 96, 100], 32)


def test_a_count_of_vllms_beside_a_configurations_only_one_is_not_run(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "route", lambda problem, card: "triton" if problem.tokens in (9, 50) else "upstream")
    of = layer(dataclasses.replace(PROBLEM, tokens=50))
    function, state = wrapped(of)
    call_new(function, of)
    assert state.refused is None and set(stand_in) == {9, 50}


def test_where_each_count_of_one_pass_is_vllms_nothing_is_run_beforehand() -> None:
    like = self_test.Inputs(torch.device("cpu"), torch.int32, torch.float32)
    assert self_test.run_each(PROBLEM, lambda *given: pytest.fail("ran"), like, {}) == {}


# The self-test.


def test_a_kernel_that_differs_is_not_used_in_this_process_and_one_message_says_so(
    stand_in: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    of = layer()
    of.spoil = lambda made: made * 1.1
    function, state = wrapped(of)
    out = call_new(function, of)
    assert relative_error(out, of.want() * 1.1) < 0.01
    call_new(function, layer(seed=3))  # another layer of the same process
    (message,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "self-test of layer 1" in message and "differs from vLLM's own kernel by 9.1 %" in message
    assert "VLLM_GLM_PATCH_MOE=upstream" in message
    assert state.summary().startswith("vLLM's own kernel serves all MoE layers")


def test_a_kernel_that_triton_refuses_is_told_with_what_is_wrong_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: object) -> torch.Tensor:
        raise CERTAIN["CompilationError"]()

    monkeypatch.setattr(serving, "run", refuse)
    of = layer()
    function, state = wrapped(of)
    assert relative_error(call_new(function, of), of.want()) < 0.01  # vLLM's own serves
    assert state.refused == "self-test of layer 1: CompilationError: at 42:19: shapes should have N >= 16"


def test_what_triton_3_3_says_in_an_errors_cause_is_told() -> None:
    error = of_triton("CompilationError", "at 42:19:\n    gate = tl.dot(gate_w, x, gate)\n           ^")
    assert serving.named(error) == "CompilationError: at 42:19: ^"
    error.__cause__ = AssertionError("Input shapes should have M >= 16, N >= 16 and K >= 32")
    assert serving.named(error) == "CompilationError: at 42:19: Input shapes should have M >= 16, N >= 16 and K >= 32"


def test_one_wrong_token_among_many_fails_the_self_test(stand_in: list[int]) -> None:
    of = layer(dataclasses.replace(PROBLEM, tokens=600))

    def spoil(made: torch.Tensor) -> torch.Tensor:
        if len(made) < 256:
            made[3] = made[4]
        return made

    of.spoil = spoil
    function, state = wrapped(of)
    call_new(function, of)
    assert "one token by" in str(state.refused)


def test_a_later_layer_that_differs_fails_too(stand_in: list[int]) -> None:
    of = layer()
    function, state = wrapped(of)
    call_new(function, of)
    assert state.refused is None
    new = layer(seed=2)
    of.inputs, of.kernel, of.spoil = new.inputs, new.kernel, lambda made: made * 0
    call_new(function, of)
    assert "self-test of layer" in str(state.refused)


def test_values_that_are_not_finite_are_never_taken_for_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    good = torch.ones(4, 8)
    bad = good.clone()
    bad[2, 3] = float("nan")
    assert self_test.difference(bad, good) == (float("inf"), float("inf"))
    assert self_test.difference(good, good) == (0.0, 0.0)
    assert self_test.difference(torch.zeros(4, 8), torch.zeros(4, 8)) == (0.0, 0.0)
    assert self_test.difference(good, torch.zeros(4, 8))[0] == float("inf")
    assert self_test.difference(good[:3], good)[0] == float("inf")


def test_a_kernel_that_raises_is_not_used_and_serving_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(call: Any) -> torch.Tensor:
        raise ValueError("tile too large")

    monkeypatch.setattr(serving, "run", run)
    of = layer()
    function, state = wrapped(of)
    assert relative_error(call_new(function, of), of.want()) < 0.01
    assert "ValueError: tile too large" in str(state.refused)


def test_an_error_of_the_device_ends_the_start_and_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(call: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(serving, "run", run)
    of = layer()
    function, _ = wrapped(of)
    with pytest.raises(DeviceLost, match=r"self-test: CUDA error: an illegal memory .*VLLM_GLM_PATCH_MOE=upstream"):
        call_new(function, of)


def test_a_failure_while_serving_leaves_that_layer_to_vllm(
    monkeypatch: pytest.MonkeyPatch, stand_in: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    of = layer()
    function, state = wrapped(of)
    call_new(function, of)

    def run(call: Any) -> torch.Tensor:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(serving, "run", run)
    of.seen.clear()
    for _ in range(2):
        assert relative_error(call_new(function, of), of.want()) < 0.01
    assert of.seen == [9, 9]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "failed with 9 tokens (out of resources)" in state.summary()


@pytest.mark.parametrize(
    ("limit", "counts"),
    [(1, (1,)), (64, (1, 64)), (2048, (1, 64, 2048)), (8192, (1, 64, 8191, 8192)), (100_000, (1, 64, 8191, 8192, 16385))],
)
def test_the_boundary_counts_of_a_deployment_are_compared(limit: int, counts: tuple[int, ...]) -> None:
    assert self_test.counts_up_to(limit) == counts


def test_the_kernel_of_vllm_gets_few_tokens_at_a_time_in_the_self_test(stand_in: list[int]) -> None:
    of = layer(dataclasses.replace(PROBLEM, tokens=600))
    function, _ = wrapped(of)
    call_new(function, of)
    assert of.seen == [256, 256, 88]
