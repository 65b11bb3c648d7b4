"""docs/patches.md says what the catalog says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import patch_docs
from vllm_glm_patch import catalog


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["patch_docs", *arguments])
    return patch_docs.main()


def test_the_document_is_not_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "--check") == 0, "run `python -m tools.patch_docs` and commit docs/patches.md"


def test_it_has_the_title_summary_issues_and_sites_of_every_patch() -> None:
    text = patch_docs.render(catalog.patches())
    for patch in catalog.patches():
        assert f"## {patch.id}\n" in text and patch.title in text and patch.summary in text
        assert all(f"/issues/{number})" in text for number in patch.issues)
        assert all(f"| `{site.module}` | `{site.name}` |" in text for site in patch.sites)


def test_check_tells_a_stale_document_and_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "patches.md"
    document.write_text("old")
    monkeypatch.setattr(patch_docs, "DOCUMENT", document)
    assert call(monkeypatch, "--check") == 1
    assert "python -m tools.patch_docs" in capsys.readouterr().err
    assert document.read_text() == "old"


def test_it_is_written_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_docs, "DOCUMENT", tmp_path / "docs" / "patches.md")
    assert call(monkeypatch) == 0
    assert call(monkeypatch, "--check") == 0


def test_a_broken_entry_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text("id = 'other'\n")
    monkeypatch.setattr(catalog, "folder", lambda: tmp_path)
    monkeypatch.setattr(patch_docs, "DOCUMENT", tmp_path / "patches.md")
    assert call(monkeypatch) == 2
    assert "mine" in capsys.readouterr().err
    assert not (tmp_path / "patches.md").exists()
