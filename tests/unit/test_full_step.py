"""The full-budget step: what each policy does to the scheduler, the warm-up and the compile sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

import vllm_glm_patch
from vllm_glm_patch.fixes import Context, full_step, full_step_probe
from vllm_glm_patch.settings import SHAPE_POLICIES, Settings

Fake = Callable[[str], Path]
EXPERTS, TOP_K, VOCABULARY = 16, 4, 1000


def context(policy: str = "auto", corrected: bool = True, compile_full_step: bool = False) -> Context:
    chosen = Settings(shape_policy=policy, compile_full_step=compile_full_step)
    return Context(Version("0.19.1"), lambda: chosen, lambda: corrected)


def config(budget: int = 8192, limit: int | None = None, chunked: bool = True, longest: int = 20000, **more: Any) -> Any:
    scheduler = SimpleNamespace(
        max_num_batched_tokens=budget, max_num_scheduled_tokens=limit, enable_chunked_prefill=chunked
    )  # fmt: skip
    model = SimpleNamespace(
        max_model_len=longest, get_vocab_size=lambda: VOCABULARY, enforce_eager=more.pop("enforce_eager", False),
        hf_text_config=SimpleNamespace(num_experts_per_tok=TOP_K),
    )  # fmt: skip
    compilation = SimpleNamespace(compile_sizes=more.pop("compile_sizes", []))
    return SimpleNamespace(
        scheduler_config=scheduler, model_config=model, compilation_config=compilation, additional_config={}, **more
    )  # fmt: skip


def scheduler_of(vllm_config: Any) -> Any:
    limit = vllm_config.scheduler_config.max_num_scheduled_tokens
    return SimpleNamespace(
        vllm_config=vllm_config, scheduler_config=vllm_config.scheduler_config,
        max_num_scheduled_tokens=limit or vllm_config.scheduler_config.max_num_batched_tokens,
        max_model_len=vllm_config.model_config.max_model_len,
    )  # fmt: skip


@pytest.mark.parametrize(("corrected", "policy"), [(True, "captured"), (False, "guarded")])
def test_auto_is_captured_where_the_kernel_is_corrected_and_guarded_where_it_is_not(corrected: bool, policy: str) -> None:
    assert full_step.policy(context("auto", corrected), config()) == policy


@given(st.sampled_from(SHAPE_POLICIES[1:]), st.sampled_from(SHAPE_POLICIES[1:]))
def test_the_servers_own_configuration_wins(environment: str, given_to_server: str) -> None:
    vllm_config = config()
    vllm_config.additional_config = {"glm_patch": {"shape_policy": given_to_server}}
    assert full_step.policy(context(environment), vllm_config) == given_to_server


@given(st.integers(2, 100000), st.integers(1, 100000))
def test_a_guarded_scheduler_never_has_the_whole_budget_and_loses_at_most_one_token(budget: int, longest: int) -> None:
    scheduler = scheduler_of(config(budget, longest=longest))
    full_step.guard(scheduler)
    assert scheduler.max_num_scheduled_tokens == budget - 1


@given(st.integers(2, 100000), st.integers(1, 100000))
def test_a_limit_of_the_users_own_is_kept(budget: int, below: int) -> None:
    limit = max(1, budget - below)
    scheduler = scheduler_of(config(budget, limit=limit))
    full_step.guard(scheduler)
    assert scheduler.max_num_scheduled_tokens == limit


@given(st.integers(2, 10000), st.integers(1, 10000))
def test_without_chunked_prefill_no_prompt_becomes_unservable(budget: int, longest: int) -> None:
    scheduler = scheduler_of(config(budget, chunked=False, longest=longest))
    full_step.guard(scheduler)
    assert scheduler.max_num_scheduled_tokens >= min(longest, budget)


def test_a_prompt_that_needs_the_whole_budget_is_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vllm_glm_patch"):
        full_step.guard(scheduler_of(config(8192, chunked=False, longest=8192)))
    assert "--max-num-batched-tokens to 8193" in caplog.text


def test_the_older_name_of_the_chunked_prefill_switch_is_read() -> None:
    scheduler = scheduler_of(config(8192, longest=8192))
    del scheduler.scheduler_config.enable_chunked_prefill
    scheduler.scheduler_config.chunked_prefill_enabled = False
    full_step.guard(scheduler)
    assert scheduler.max_num_scheduled_tokens == 8192


@pytest.mark.parametrize(("policy", "budget"), [("guarded", 8191), ("captured", 8192), ("off", 8192), ("auto", 8192)])
def test_the_installed_patch_guards_only_under_guarded(fake: Fake, policy: str, budget: int) -> None:
    fake("0.19.1")
    vllm_glm_patch.install(Settings(shape_policy=policy))
    scheduler = fake_vllm.load("vllm.v1.core.sched.scheduler").Scheduler(config())
    assert scheduler.max_num_scheduled_tokens == budget


def test_auto_guards_where_the_cure_is_switched_off(fake: Fake) -> None:
    fake("0.19.1")
    vllm_glm_patch.install(Settings(disable=("scale-overread",)))
    scheduler = fake_vllm.load("vllm.v1.core.sched.scheduler").Scheduler(config())
    assert scheduler.max_num_scheduled_tokens == 8191


@given(
    st.lists(st.integers(1, 9000), unique=True), st.integers(1, 9000), st.one_of(st.none(), st.integers(1, 9000))
)  # fmt: skip
def test_compile_sizes_of_the_users_are_kept_and_the_full_step_added_once(
    sizes: list[int], budget: int, limit: int | None
) -> None:
    vllm_config = config(budget, limit=limit, compile_sizes=list(sizes))
    for _ in range(2):
        full_step.on_engine_config(context("captured", compile_full_step=True), vllm_config)
    expected = {*sizes, min(budget, limit or budget)}
    assert set(vllm_config.compilation_config.compile_sizes) == expected
    assert len(vllm_config.compilation_config.compile_sizes) == len(expected)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"policy": "captured"}, {}),
        ({"policy": "guarded", "compile_full_step": True}, {}),
        ({"policy": "captured", "compile_full_step": True}, {"enforce_eager": True}),
        ({"policy": "captured", "compile_full_step": True}, {"compile_sizes": None}),
    ],
)
def test_compile_sizes_are_left_alone_otherwise(settings: dict[str, Any], more: dict[str, Any]) -> None:
    vllm_config = config(**more)
    before = vllm_config.compilation_config.compile_sizes
    full_step.on_engine_config(context(**settings), vllm_config)
    assert vllm_config.compilation_config.compile_sizes == before


class Router(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 32)
        self.mlp = torch.nn.Module()
        self.mlp.gate = torch.nn.Linear(32, EXPERTS)

    def forward(self, input_ids: torch.Tensor | None = None, positions: torch.Tensor | None = None) -> torch.Tensor:
        assert input_ids is not None
        return self.mlp.gate(self.embedding(input_ids))


@dataclass
class Runner:
    """A model runner whose dummy run gives the model equal tokens, as vLLM's does."""

    model: Router = field(default_factory=Router)
    ids: torch.Tensor = field(default_factory=lambda: torch.zeros(8192, dtype=torch.int32))
    seen: list[torch.Tensor] = field(default_factory=list)
    failure: BaseException | None = None

    def get_model(self) -> Router:
        return self.model

    def _dummy_run(self, num_tokens: int, skip_eplb: bool = False) -> None:
        assert skip_eplb
        if self.failure:
            raise self.failure
        with torch.no_grad():
            self.model(input_ids=self.ids[:num_tokens], positions=None)
        self.seen.append(self.ids[:num_tokens].clone())


def worker_of(runner: Any, vllm_config: Any = None) -> Any:
    return SimpleNamespace(vllm_config=vllm_config or config(), model_runner=runner, device="cpu")


def test_the_warm_up_runs_the_full_step_with_tokens_that_reach_every_expert(caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    with caplog.at_level(logging.INFO, "vllm_glm_patch"):
        full_step.warm_up(worker_of(runner))
    assert [len(ids) for ids in runner.seen] == [8192]
    assert len(runner.seen[0].unique()) > 900
    assert "Warmed up the step of 8192 tokens" in caplog.text
    assert f"{EXPERTS} of {EXPERTS} experts used" in caplog.text
    assert not any(runner.ids), "the dummy run's own tokens were not put back"
    assert full_step_probe.active is None
    assert not runner.model._forward_pre_hooks
    assert not runner.model.mlp.gate._forward_hooks


def test_a_warm_up_that_reached_few_experts_says_so(caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    with torch.no_grad():
        runner.model.mlp.gate.weight.zero_()
    full_step.warm_up(worker_of(runner))
    assert f"used only {TOP_K} of {EXPERTS} experts" in caplog.text


def test_the_warm_up_takes_the_users_smaller_limit() -> None:
    runner = Runner()
    full_step.warm_up(worker_of(runner, config(8192, limit=100)))
    assert [len(ids) for ids in runner.seen] == [100]


def test_a_device_error_in_the_warm_up_stops_the_start_and_says_what_to_set() -> None:
    runner = Runner(failure=RuntimeError("CUDA error: an illegal memory access was encountered\nmore"))
    with pytest.raises(full_step.FullStepFailed) as error:
        full_step.warm_up(worker_of(runner))
    text = str(error.value)
    assert "The step of 8192 tokens" in text
    assert "an illegal memory access was encountered" in text
    assert "more" not in text
    assert "VLLM_GLM_PATCH_SHAPE_POLICY=guarded" in text


@pytest.mark.parametrize("disable", [(), ("scale-overread",)])
def test_a_fault_in_the_grouped_gemm_is_named(fake: Fake, monkeypatch: pytest.MonkeyPatch, disable: tuple[str, ...]) -> None:
    fake("0.19.1")
    ops = fake_vllm.load("vllm._custom_ops")
    vllm_glm_patch.install(Settings(disable=disable))
    door = ops.cutlass_moe_mm

    def dummy_run(num_tokens: int, skip_eplb: bool) -> None:
        sizes, scales = torch.ones(160, 3, dtype=torch.int32), torch.rand(8, 1)
        ops.cutlass_moe_mm(sizes, sizes, sizes, scales, sizes, sizes, sizes, sizes, sizes, sizes, True, True)

    monkeypatch.setattr(ops, "seen", SimpleNamespace(append=_illegal_access))
    runner = SimpleNamespace(_dummy_run=dummy_run, get_model=Router)
    with pytest.raises(full_step.FullStepFailed, match="cutlass_moe_mm over 160 experts: CUDA error: an illegal"):
        full_step.warm_up(worker_of(runner))
    assert ops.cutlass_moe_mm is door


def _illegal_access(scales: torch.Tensor) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_running_out_of_memory_is_told_with_what_to_lower(caplog: pytest.LogCaptureFixture) -> None:
    full_step.warm_up(worker_of(Runner(failure=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))))
    assert "serving goes on. Lower --gpu-memory-utilization" in caplog.text


def test_tensors_of_inference_mode_are_varied_and_put_back() -> None:
    with torch.inference_mode():
        runner = Runner(ids=torch.zeros(8192, dtype=torch.int32))
    full_step.warm_up(worker_of(runner))
    assert len(runner.seen[0].unique()) > 900
    assert not any(runner.ids)


@pytest.mark.parametrize(
    "failure",
    [TypeError("unexpected argument"), AssertionError("not this model"), AttributeError("no"), RuntimeError("not on a device")],
)
def test_a_dummy_run_that_does_not_fit_is_told_and_serving_goes_on(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    full_step.warm_up(worker_of(Runner(failure=failure)))
    assert "could not be warmed up" in caplog.text
    assert str(failure) in caplog.text


def test_a_worker_without_a_dummy_run_is_told(caplog: pytest.LogCaptureFixture) -> None:
    full_step.warm_up(worker_of(SimpleNamespace()))
    assert "has no dummy run" in caplog.text


@pytest.mark.parametrize(("policy", "runs"), [("captured", 1), ("guarded", 0), ("off", 0), ("auto", 1)])
def test_the_installed_patch_warms_up_after_vllm_and_only_under_captured(fake: Fake, policy: str, runs: int) -> None:
    fake("0.19.1")
    vllm_glm_patch.install(Settings(shape_policy=policy))
    worker = fake_vllm.load("vllm.v1.worker.gpu_worker").Worker()
    worker.vllm_config, worker.model_runner, worker.device = config(), Runner(), "cpu"
    assert worker.compile_or_warm_up_model() == "warm"
    assert len(worker.model_runner.seen) == runs


@pytest.mark.parametrize("swapped", [False, True])
def test_the_load_is_read_from_the_problem_sizes_of_the_gemm(swapped: bool) -> None:
    rows = torch.tensor([0, 5, 3, 0])
    sizes = torch.stack([torch.full_like(rows, 384), rows] if swapped else [rows, torch.full_like(rows, 384)], 1)
    probe = full_step_probe.Probe()
    assert probe.spread() is None
    probe.call("cutlass_moe_mm", torch.cat([sizes, torch.full((4, 1), 5120)], 1).int(), lambda: None, (), {})
    spread = probe.spread()
    assert spread is not None
    assert (spread.experts, spread.used, spread.busiest) == (4, 2, 2.5)
