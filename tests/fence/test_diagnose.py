"""A log or a core dump against the known defects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_glm_patch.fence import diagnose as module
from vllm_glm_patch.fence.coredump import parse
from vllm_glm_patch.fence.diagnose import Signature, diagnose

from .transcripts import transcript

OVER_READ = Signature(
    "scale-overread", "illegal memory access", "GemmUniversal.*GroupProblemShape", 16, "No slack lies behind the scales."
)
BAD_IDS = Signature("routing-ids", "Failed to initialize the TMA descriptor")

LOG = """
INFO 11-20 [api_server.py:1805] vLLM API server version 0.10.1.1
ERROR [dump_input.py:69] Dumping input data for V1 LLM engine (v0.10.1.1) with config: model='glm'
ERROR [dump_input.py:76] Dumping scheduler output for model execution: SchedulerOutput(scheduled_new_reqs=[], \
num_scheduled_tokens={{chat-1: {tokens}}}, total_num_scheduled_tokens={tokens}, scheduled_spec_decode_tokens={{}})
{kernel}
ERROR [core.py:710] RuntimeError: CUDA error: {error}
"""


def log(tmp_path: Path, tokens: int = 8192, error: str = "an illegal memory access was encountered", kernel: str = "") -> Path:
    path = tmp_path / "vllm.log"
    path.write_text(LOG.format(tokens=tokens, error=error, kernel=kernel))
    return path


def test_the_reported_crash_is_recognised_though_the_log_cannot_name_the_kernel(tmp_path: Path) -> None:
    answer = diagnose(log(tmp_path), [BAD_IDS, OVER_READ])
    (match,) = answer.matches
    assert match.signature is OVER_READ
    assert (match.certain, match.unseen) == (False, ("kernel",))
    assert answer.evidence.version == "0.10.1.1"
    assert answer.evidence.tokens == (8192,)
    assert match.grade == "possible"
    assert "possible (not in this file: kernel): scale-overread. No slack lies behind the scales.\n" in answer.text()


def test_a_token_count_that_leaves_slack_speaks_against_it(tmp_path: Path) -> None:
    assert diagnose(log(tmp_path, tokens=8191), [OVER_READ]).matches == ()


def test_a_kernel_named_in_the_log_makes_it_certain(tmp_path: Path) -> None:
    line = "[00:40:46.6] coredump:   #0\t0x7462c3bac620\t_ZN7cutlass13GemmUniversalINS_17GroupProblemShapeE"
    answer = diagnose(log(tmp_path, kernel=line), [replace(OVER_READ, settle="the kernel")])
    (match,) = answer.matches
    assert (match.certain, match.grade) == (True, "match")
    assert "matches: scale-overread. No slack lies behind the scales.\n" in answer.text() + "\n"
    assert "To settle it" not in answer.text()


def test_what_is_only_possible_comes_with_what_would_settle_it(tmp_path: Path) -> None:
    text = diagnose(log(tmp_path), [replace(OVER_READ, settle="the kernel's name")]).text()
    assert "No slack lies behind the scales. To settle it: the kernel's name." in text


@pytest.mark.parametrize(
    ("kernel", "grades"),
    [
        ("void cutlass::GemmUniversal<cutlass::GroupProblemShape>(Params) <<<(132,1,1),(384,1,1)>>>", ["match"]),
        ("topk_gating(float*)", []),
        ("unknown", ["possible"]),
        ("one in a CUDA graph (cuGraphLaunch)", ["possible"]),
    ],
)
def test_the_fences_own_report_in_the_log_is_evidence(tmp_path: Path, kernel: str, grades: list[str]) -> None:
    told = f"fence: process 77 faulted: CUDA_ERROR_ILLEGAL_ADDRESS\n  kernel       {kernel}\n  device       0"
    assert [match.grade for match in diagnose(log(tmp_path, kernel=told), [OVER_READ]).matches] == grades


def test_another_kernel_speaks_against_it(tmp_path: Path) -> None:
    line = "[00:40:46.6] coredump:   #0\t0x7462c3bac620\t_Z13topk_gating"
    assert diagnose(log(tmp_path, kernel=line), [OVER_READ]).matches == ()


def test_another_error_matches_nothing_and_says_so(tmp_path: Path) -> None:
    answer = diagnose(log(tmp_path, error="device-side assert triggered"), [OVER_READ, BAD_IDS])
    assert answer.matches == ()
    assert "No known defect matches." in answer.text()


def test_a_log_without_an_error_matches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ok.log"
    path.write_text("INFO: all is well, total_num_scheduled_tokens=8192\n")
    assert diagnose(path, [Signature("any")]).matches == ()


def test_the_last_dumped_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "two.log"
    path.write_text("total_num_scheduled_tokens=8191\ntotal_num_scheduled_tokens=8192\nCUDA error: an illegal memory access\n")
    assert len(diagnose(path, [OVER_READ]).matches) == 1


def test_a_core_dump_is_read_through_the_debugger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "core"
    path.write_bytes(b"\x7fELF" + bytes(100))
    monkeypatch.setattr(module, "read_core_dump", lambda asked: parse(transcript([1 << 40])) if asked == path else None)
    (match,) = diagnose(path, [OVER_READ]).matches
    assert match.unseen == ("tokens",)


def test_certain_matches_come_first(tmp_path: Path) -> None:
    certain = Signature("plain", "illegal memory access")
    assert [match.signature for match in diagnose(log(tmp_path), [OVER_READ, certain]).matches] == [certain, OVER_READ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kernal": "x"}, "'kernal'; known keys are error, kernel"),
        ({"tokens_multiple_of": "16"}, "must be int"),
        ({"error": "("}, "does not compile"),
    ],
)
def test_a_wrong_signature_is_refused_by_name(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Signature.from_table("p", table)


def test_a_signature_table_is_read() -> None:
    assert Signature.from_table("p", {"error": "e", "tokens_multiple_of": 16}) == Signature("p", "e", "", 16)
