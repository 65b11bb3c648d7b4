"""What verify_session.sh on a card is judged by."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "gpu"))

from verify_expected import differences


def row(kernel: str, tokens: int, outcome: str, routing: str = "spread", **more: Any) -> dict[str, Any]:
    shared = {"side": "upstream", "shape": "TP8", "text": "", "buffers": [], "traced": False}
    return {**shared, "kernel": kernel, "tokens": tokens, "outcome": outcome, "routing": routing, **more}


def over_read() -> list[dict[str, Any]]:
    traced = {"buffers": ["a_scales"], "traced": True}
    rows = [row(kernel, tokens, "fault", **traced) for kernel in ("gemm1", "gemm2") for tokens in (16, 8192)]
    return [*rows, row("layer", 8192, "fault"), row("layer", 17, "ok"), row("layer", 17, "wrong", "minus-one")]


def result(version: str, rows: list[dict[str, Any]], code: int = 1) -> dict[str, Any]:
    return {"facts": {"vllm": version}, "rows": rows, "exit_code": code, "verdict": "UNSAFE: x"}


def test_an_affected_release_is_as_expected_with_its_over_read_and_clean_with_the_patch() -> None:
    assert differences(result("0.10.1.1", over_read()), result("0.10.1.1", [], 0)) == []


def test_a_recent_release_is_as_expected_with_garbage_for_bad_ids_alone() -> None:
    assert differences(result("0.26.0", [row("layer", 17, "wrong", "minus-one")]), result("0.26.0", [], 0)) == []


@pytest.mark.parametrize(
    ("version", "rows", "told"),
    [
        ("0.10.1.1", [row("gemm1", 8192, "fault")], "gemm2 at 8192 tokens does not fault"),
        ("0.10.1.1", [*over_read(), row("gemm1", 8191, "fault")], "an unknown fault: upstream gemm1 TP8 spread 8191"),
        ("0.10.1.1", [*over_read(), row("silu", 16, "fault")], "an unknown fault: upstream silu"),
        ("0.10.1.1", [*over_read(), row("gemm1", 32, "fault", traced=True, buffers=["b"])], "traced to ['b']"),
        ("0.26.0", [row("gemm1", 8192, "fault")], "an unknown fault"),
        ("0.26.0", [], "-1 ids do no harm"),
        ("0.33.0", [row("layer", 17, "wrong", "minus-one")], "spoil the layer"),
        ("0.33.0", [row("layer", 17, "wrong")], "an unknown wrong result"),
        ("0.33.0", [row("permute", 17, "error")], "could not be called"),
    ],
)
def test_anything_else_is_told(version: str, rows: list[dict[str, Any]], told: str) -> None:
    assert [line for line in differences(result(version, rows), result(version, [], 0)) if told in line]


def test_an_unsafe_patched_run_is_told() -> None:
    assert differences(result("0.33.0", []), result("0.33.0", [], 1)) == ["patched: UNSAFE: x"]
