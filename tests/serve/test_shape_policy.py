"""What a real server does with the step of exactly max_num_batched_tokens, and that answers stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import LENGTHS, Rooms, Served, config

from tools.server import BUDGET, MAX_MODEL_LEN

pytestmark = pytest.mark.serve
TABLE = "vllm-glm-patch 0"


def test_unpatched_server_schedules_the_full_step(unpatched: Served) -> None:
    assert unpatched.answers[8192].steps[0] == BUDGET
    assert TABLE not in unpatched.log


def test_greedy_answers_are_the_same_with_the_patch_and_without(unpatched: Served, captured: Served) -> None:
    assert captured.texts() == unpatched.texts()
    assert len(set(unpatched.texts().values())) == len(LENGTHS)  # the model does not answer everything alike


def test_captured_leaves_the_steps_as_they_are(unpatched: Served, captured: Served) -> None:
    assert captured.steps == unpatched.steps


@pytest.mark.parametrize("length", [8192, 8193, 16384])
def test_captured_schedules_the_full_step(captured: Served, length: int) -> None:
    assert BUDGET in captured.answers[length].steps


def test_captured_warms_the_full_step_up_with_all_experts(captured: Served) -> None:
    line = next(line for line in captured.log.splitlines() if "Warmed up the step" in line)
    assert f"of {BUDGET} tokens" in line
    assert "16 of 16 experts used" in line
    assert captured.log.index("Warmed up the step") < captured.log.index("Application startup complete")


def test_guarded_never_schedules_the_full_step(guarded: Served) -> None:
    assert max(guarded.steps) == BUDGET - 1
    assert "The scheduler emits at most 8191 tokens a step, never 8192" in guarded.log
    assert "Warmed up the step" not in guarded.log


@pytest.mark.parametrize(("length", "steps"), [(8191, [8191]), (8192, [8191, 1]), (8193, [8191, 2]), (16384, [8191, 8191, 2])])
def test_guarded_cuts_longer_prompts(guarded: Served, length: int, steps: list[int]) -> None:
    assert list(guarded.answers[length].steps) == [*steps, 1, 1, 1]


def test_guarded_answers_every_length(guarded: Served) -> None:
    assert all(guarded.texts().values())


def test_guarded_does_not_change_answers_to_prompts_that_fit(unpatched: Served, guarded: Served) -> None:
    fitting = [length for length in LENGTHS if length < BUDGET]
    assert guarded.texts(fitting) == unpatched.texts(fitting)


@pytest.mark.parametrize("run", ["captured", "guarded"])
def test_the_table_of_patches_is_logged_once(run: str, request: pytest.FixtureRequest) -> None:
    log = request.getfixturevalue(run).log
    assert log.count(TABLE) == 1
    assert sum("full-step " in line and " applied " in line for line in log.splitlines()) == 1


@pytest.mark.skipif(any(Path("/dev").glob("nvidia*")), reason="there is a card")
def test_the_moe_kernel_has_no_use_without_a_card_and_says_so(captured: Served) -> None:
    (line,) = (line for line in captured.log.splitlines() if "  fused-moe " in line)
    assert "not needed" in line and "this machine has no NVIDIA card" in line
    assert "Fused MoE: " not in captured.log


def test_additional_config_does_what_the_environment_does(rooms: Rooms, guarded: Served) -> None:
    """With other schedulings than the default at the same time: priority, and no prefix caching."""
    more = (
        *config(shape_policy="guarded", disable=["routing-ids"]),
        "--scheduling-policy",
        "priority",
        "--no-enable-prefix-caching",
    )
    lengths = (8191, 8192, 16384)
    served = rooms.serve("additional-config", lengths, more_flags=more)
    assert {n: served.answers[n].steps for n in lengths} == {n: guarded.answers[n].steps for n in lengths}
    assert served.texts(lengths) == guarded.texts(lengths)
    assert "shape policy guarded" in served.log
    assert any("routing-ids " in line and " switched off " in line for line in served.log.splitlines())


def test_guard_steps_aside_where_a_prompt_may_need_the_whole_budget(rooms: Rooms) -> None:
    """Chunked prefill off, and max_model_len as large as the budget."""
    flags = ("--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--max-model-len", "2048")
    environment = {"VLLM_GLM_PATCH_SHAPE_POLICY": "guarded"}
    served = rooms.serve("not-chunked", (2047,), max_tokens=1, flags=flags, environment=environment)
    assert served.steps == [2047]
    assert served.log.count("The step of 2048 tokens is not kept from being scheduled: chunked prefill is off") == 1


def test_prompts_leave_room_for_their_answers() -> None:
    assert max(LENGTHS) < MAX_MODEL_LEN
