"""`patches`: the catalog, one line each, and the whole story of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import run

from vllm_glm_patch import catalog
from vllm_glm_patch.tools import patches

Fake = Callable[[str], Path]


def test_each_patch_has_one_line(fake: Fake) -> None:
    fake("0.19.1")
    lines = run("patches").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(catalog.patch_ids())
    for line, patch in zip(lines[1:], catalog.patches()):
        assert line.endswith(patch.title)


def test_each_line_says_what_this_vllm_needs(fake: Fake) -> None:
    fake("0.33.0")
    lines = {line.split()[0]: line for line in run("patches").out.splitlines()}
    assert "not needed" in lines["scale-overread"]
    assert "not needed" in lines["routing-ids"]


def test_the_story_has_everything_the_catalog_says(fake: Fake) -> None:
    fake("0.19.1")
    patch = next(p for p in catalog.patches() if p.id == "scale-overread")
    result = run("patches", "scale-overread")
    assert result.code == 0
    assert patch.title in result.out and patch.summary in result.out and ">=0.10.0, <0.20.0" in result.out
    assert all(f"vllm-project/vllm#{number}" in result.out for number in patch.issues)
    assert all(str(site) in result.out for site in patch.sites)
    assert all(rule["why"] in result.out for rule in patch.evidence)


def test_the_story_says_what_this_vllm_has(fake: Fake) -> None:
    fake("0.11.0")
    (catalog.folder().parent / "vllm" / "_custom_ops.py").write_text("def cutlass_moe_mm(): return 'changed'\n")
    story = " ".join(run("patches", "scale-overread").out.split())
    assert "0.11.0 in" in story
    assert "refused: vllm._custom_ops.cutlass_moe_mm is not the function of any known release" in story


def test_without_vllm_the_catalog_is_still_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "find_installed", lambda: None)
    assert "none installed" in run("patches").out
    assert "none is installed in this Python" in run("patches", "full-step").out
    assert {entry["here"] for entry in run("patches", "--json").json()} == {None}


def test_json_is_a_list_of_all_or_of_one(fake: Fake) -> None:
    fake("0.19.1")
    told = run("patches", "--json").json()
    assert [entry["id"] for entry in told] == list(catalog.patch_ids())
    assert run("patches", "routing-ids", "--json").json() == [entry for entry in told if entry["id"] == "routing-ids"]
    assert all(
        entry["here"]["state"] in (catalog.APPLY, catalog.NOT_NEEDED, catalog.REFUSED, catalog.NOT_MADE) for entry in told
    )


def test_an_unknown_id_lists_the_known() -> None:
    result = run("patches", "scale")
    assert result.code == 2
    assert all(patch_id in result.err for patch_id in ("'scale'", *catalog.patch_ids()))


def test_a_switch_that_is_off_does_not_hide_what_is_needed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.11.0")
    monkeypatch.setenv("VLLM_GLM_PATCH", "0")
    assert "needed, can be applied" in run("patches").out


def test_a_broken_entry_is_listed_and_leaves_with_1(fake: Fake) -> None:
    (fake("0.19.1") / "routing-ids.toml").write_text("id = ")
    result = run("patches")
    assert result.code == 1
    assert "its catalog entry is broken" in result.out and "scale-overread" in result.out
    assert "its catalog entry is broken" in run("patches", "routing-ids").out
    assert "broken" in run("patches", "routing-ids", "--json").json()[0]
