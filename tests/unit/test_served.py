"""tools.served: what it calls wrong with a run, and that the document is made of the records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools import served
from tools.server import Answer, ServerFailed, in_words, patch_table

PATCHES = {"full-step": "applied", "scale-overread": "not needed"}
LOG = """INFO something else
INFO 11-25 02:00:00 [installation.py:1] vllm-glm-patch 0.1.0 on vLLM 0.27.0, shape policy auto
INFO 11-25 02:00:00 [installation.py:1]   full-step       applied              the step of exactly max_num_batched_tokens
INFO 11-25 02:00:00 [installation.py:1]   scale-overread  not needed           vLLM 0.27.0 does not have this defect
INFO the end
"""


def answers() -> dict[str, dict[int, Answer]]:
    """A run in which all is well: a step of the whole budget, or of one token less, then what is left."""
    seen: dict[str, dict[int, Answer]] = {}
    for side in served.SIDES:
        largest = 8191 if side == "guarded" else 8192
        for length in served.LENGTHS:
            first = min(length, largest)
            steps = (first, *([length - first] if length > first else []), 1, 1, 1)
            seen.setdefault(side, {})[length] = Answer(f"text {length}", 1.0, steps)
    return seen


def test_a_run_in_which_all_is_well_has_nothing_wrong() -> None:
    assert served.judge(PATCHES, answers()) == ""


@pytest.mark.parametrize(
    ("side", "change", "found"),
    [
        ("patched", {"text": "other"}, "'other' with the patches"),
        ("patched", {"steps": (8191, 1, 1, 1, 1)}, "patched: the steps of 8192 tokens"),
        ("patched", {"steps": (8192, 1)}, "patched: the steps of 8192 tokens"),
        ("guarded", {"steps": (8192, 1, 1, 1)}, "guarded: the steps of 8192 tokens"),
        ("unpatched", {"text": ""}, "unpatched: 8192 tokens were not answered"),
    ],
)
def test_each_thing_that_can_go_wrong_in_a_run_is_named(side: str, change: dict[str, object], found: str) -> None:
    run = answers()
    run[side][8192] = replace(run[side][8192], **change)  # type: ignore[arg-type]
    assert found in served.judge(PATCHES, run)


def test_a_side_that_was_not_served_is_named() -> None:
    run = answers()
    del run["guarded"]
    assert "guarded: 8190 tokens were not answered" in served.judge(PATCHES, run)


@pytest.mark.parametrize(
    ("patches", "found"), [({"full-step": "refused", "x": "applied"}, "full-step was refused"), ({}, "no patch")]
)
def test_a_patch_that_is_refused_and_a_plugin_that_did_nothing_are_named(patches: dict[str, str], found: str) -> None:
    assert found in served.judge(patches, answers())


def test_the_table_of_patches_is_read_from_the_log() -> None:
    title, rows = patch_table(LOG)
    assert title == "vllm-glm-patch 0.1.0 on vLLM 0.27.0, shape policy auto"
    assert [row[:2] for row in rows] == list(PATCHES.items())
    with pytest.raises(ServerFailed, match="plugin did not run"):
        patch_table("INFO nothing of it\n")


def test_steps_are_said_in_words() -> None:
    assert in_words(8193, (8192, 1, 1, 1)) == "8192 + 1, then 2 × 1"
    assert "do not add up" in in_words(8193, (8192, 2))


def test_a_record_is_read_as_it_was_written_and_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    file = tmp_path / "served.json"
    older = served.Record("0.30.0", {"python": "3.11.7"}, "cpu", "2026-01-01T00:00:00Z", "abc", "", problem="it did not start")
    newer = replace(older, patches=PATCHES, answers=answers(), problem="")
    for record in (older, replace(newer, vllm="0.9.0"), newer):
        served.write(record, file)
    assert served.read(file) == [replace(newer, vllm="0.9.0"), newer]


def test_the_document_is_the_one_made_of_the_records() -> None:
    assert served.DOCUMENT.read_text(encoding="utf-8") == served.render(served.read())


def test_every_release_that_is_to_be_served_is_recorded_and_was_served_as_it_should() -> None:
    recorded = {record.vllm: record for record in served.read()}
    assert set(served.RELEASES) <= set(recorded)
    assert not {release: record.problem for release, record in recorded.items() if record.problem}
    assert not {r: wrong for r, one in recorded.items() if (wrong := served.judge(one.patches, one.answers))}
