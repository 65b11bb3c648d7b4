"""The script for a card judges answers of two servers: what it calls a near tie, and that it fails where it should."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "gpu"))

import serve_moe


def answer(tokens: str, gaps: list[float]) -> dict[str, Any]:
    return {"outcome": "answered", "tokens": list(tokens), "logprobs": [-1.0] * len(tokens), "gaps": gaps}


def test_equal_answers_are_equal_to_their_end() -> None:
    row = serve_moe.compared(answer("abc", [1, 1, 1]), answer("abc", [1, 1, 1]))
    assert row == {"equal": 3, "of": 3, "largest logprob difference before": 0.0}


@pytest.mark.parametrize(("gap", "near"), [(0.01, True), (serve_moe.NEAR, True), (serve_moe.NEAR + 0.01, False)])
def test_the_first_difference_is_judged_by_how_near_upstreams_two_best_tokens_were(gap: float, near: bool) -> None:
    row = serve_moe.compared(answer("abc", [9, gap, 9]), answer("axc", [9, 2, 9]))
    assert (row["equal"], row["near tie"], row["gap upstream"], row["gap patched"]) == (1, near, gap, 2)


def result(**change: Any) -> dict[str, Any]:
    answers = {length: answer("abc", [1, 1, 1]) for length in serve_moe.LENGTHS}
    served = ["Fused MoE: 3 of 3 MoE layers served, triton for 1 - 8192 tokens."]
    servers: dict[str, Any] = {
        "upstream": {"server": "upstream", "answers": answers, "log": []},
        "patched": {"server": "patched", "answers": answers, "log": served, "self_test_seconds": 0.3},
        "upstream-memory": {"server": "upstream-memory", "log": [], "KV cache": {"tokens": "100,000"}},
        "patched-memory": {"server": "patched-memory", "log": served, "KV cache": {"tokens": "120,000"}},
    }
    for name, more in change.items():
        servers[name.replace("_", "-")].update(more)
    compared = {n: serve_moe.compared(servers["upstream"]["answers"][n], servers["patched"]["answers"][n]) for n in answers}
    return {"servers": list(servers.values()), "compared": compared}


def test_a_run_in_which_all_is_well_leaves_with_0() -> None:
    assert serve_moe.report(result()) == 0


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"patched": {"log": []}}, "which counts the kernel serves"),
        ({"patched": {"self_test_seconds": 1.5}}, "less than a second"),
        ({"upstream": {"log": ["Fused MoE: 3 of 3"]}}, "not in the unpatched server"),
        ({"patched_memory": {"KV cache": {}}}, "KV cache is larger"),
        ({"patched": {"answers": {n: answer("xyz", [3, 3, 3]) for n in serve_moe.LENGTHS}}}, None),
    ],
)
def test_whatever_is_not_as_it_should_be_is_named(
    change: dict[str, Any], check: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve_moe.report(result(**change)) == 1
    told = capsys.readouterr().out
    assert f"NOT HELD: {check}" in told or (check or "near tie") in next(x for x in told.splitlines() if "NOT HELD" in x)


def test_the_lines_it_looks_for_are_those_that_are_logged() -> None:
    import re

    from vllm_glm_patch.adapters.self_test import Outcome

    text = f"The fused MoE kernel passed its self-test with the weights of a layer: {Outcome((1, 64), 0.03, 0.07, 0.31, 12.3)}."
    found = re.search(r"passed its self-test.*?; ([\d.]+) s, and ([\d.]+) s for compiling", text)
    assert found is not None and found.groups() == ("0.31", "12.3")
