"""The catalog: what it holds, and what is decided for which vLLM."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from vllm_glm_patch import catalog
from vllm_glm_patch.catalog import APPLY, NOT_MADE, NOT_NEEDED, REFUSED, SWITCHED_OFF
from vllm_glm_patch.fixes import Context
from vllm_glm_patch.settings import Settings
from vllm_glm_patch.upstream import Upstream, find_installed

Fake = Callable[[str], Path]


def states(settings: Settings | None = None) -> dict[str, str]:
    found = find_installed()
    assert found is not None
    return {d.id: d.state for d in catalog.decide(found, settings or Settings())}


def test_every_entry_of_the_repository_can_be_read() -> None:
    assert [entry for entry in catalog.load() if isinstance(entry, catalog.Broken)] == []
    assert {"scale-overread", "routing-ids", "full-step"} <= set(catalog.patch_ids())


@pytest.mark.parametrize("patch", catalog.patches(), ids=lambda p: p.id)
def test_every_site_has_a_fingerprint_for_every_release_it_is_in(patch: catalog.Patch) -> None:
    for release in map(Version, catalog.releases()):
        if not patch.affects.contains(release):
            continue
        assert patch.sites_for(release) or not patch.fix, f"{patch.id} has nothing to replace in {release}"
        for site in patch.sites_for(release):
            recorded = {version for versions in site.fingerprints.values() for version in versions}
            assert str(release) in recorded, f"{site} has no fingerprint for {release}"


@pytest.mark.parametrize("patch", [p for p in catalog.patches() if p.fix], ids=lambda p: p.id)
def test_every_role_of_a_patch_has_a_replacement(patch: catalog.Patch) -> None:
    fix = importlib.import_module(patch.fix)
    context = Context(Version("0.10.0"), Settings, lambda: True)
    assert {site.role for site in patch.sites} == set(fix.replacements(context))


@given(st.sampled_from(catalog.releases()))
def test_the_over_read_is_known_up_to_0_19_1_and_not_after(release: str) -> None:
    (patch,) = [p for p in catalog.patches() if p.id == "scale-overread"]
    assert patch.affects.contains(release) == (Version(release) <= Version("0.19.1"))


@given(st.tuples(st.integers(0, 3), st.integers(0, 99), st.integers(0, 99)))
def test_a_version_is_known_exactly_if_it_was_published(parts: tuple[int, int, int]) -> None:
    version = ".".join(map(str, parts))
    known, reason = catalog.known_release(Upstream(Path(), version))
    assert (known is not None) == (version in catalog.releases())
    assert known is not None or version in reason


@pytest.mark.parametrize("version", ["unknown", "0.34.0", "0.9.2", "0.12.1", "1.0.0.dev3"])
def test_an_unknown_version_is_refused_by_name(fake: Fake, version: str) -> None:
    fake(version)
    found = find_installed()
    assert found is not None
    decisions = catalog.decide(found, Settings())
    assert {d.state for d in decisions} == {REFUSED}
    assert all(version in d.reason for d in decisions)


def test_a_local_version_is_the_release_it_was_built_from(fake: Fake) -> None:
    fake("0.19.1+cu128")
    assert states()["scale-overread"] == APPLY


def test_what_a_release_does_not_have_is_not_needed(fake: Fake) -> None:
    fake("0.33.0")
    assert states()["scale-overread"] == NOT_NEEDED
    assert states()["routing-ids"] == NOT_NEEDED
    assert states()["full-step"] == APPLY


def test_switches_turn_off_all_or_one(fake: Fake) -> None:
    fake("0.11.0")
    assert set(states(Settings(enabled=False)).values()) == {SWITCHED_OFF}
    one = states(Settings(disable=("routing-ids",)))
    assert one.pop("routing-ids") == SWITCHED_OFF
    assert set(one.values()) == {APPLY}


def test_an_entry_without_a_fix_is_not_in_this_release(fake: Fake) -> None:
    entry = fake("0.11.0") / "fused-moe.toml"
    entry.write_text(entry.read_text().replace('fix = "vllm_glm_patch.fixes.fused_moe"', 'fix = ""'))
    assert states()["fused-moe"] == NOT_MADE


def test_a_changed_function_is_refused_and_the_others_are_not(fake: Fake, tmp_path: Path) -> None:
    fake("0.11.0")
    source = tmp_path / "vllm" / "_custom_ops.py"
    source.write_text(source.read_text().replace("seen.append(a_scales)", "seen.append((a_scales,))"))
    found = find_installed()
    assert found is not None
    decisions = {d.id: d for d in catalog.decide(found, Settings())}
    assert decisions["scale-overread"].state == REFUSED
    assert "cutlass_moe_mm" in decisions["scale-overread"].reason
    assert decisions["routing-ids"].state == APPLY


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: file.write_text("def f(:"), "cannot be parsed"),
        (lambda file: file.write_text("x = 1\n"), "does not define"),
    ],
)
def test_a_missing_or_broken_file_is_refused(fake: Fake, tmp_path: Path, change: Callable[[Path], object], told: str) -> None:
    fake("0.11.0")
    change(tmp_path / "vllm" / "_custom_ops.py")
    found = find_installed()
    assert found is not None
    (decision,) = [d for d in catalog.decide(found, Settings()) if d.id == "scale-overread"]
    assert decision.state == REFUSED
    assert told in decision.reason


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id = ", "cannot be read"),
        ('id = "routing-ids"\n', "lacks the key 'title'"),
        ('id = "other"\n', "its id is 'other'"),
        ('id = "routing-ids"\ntitle = "t"\nsummary = "s"\naffects = "newer"\nfix = ""\n', "cannot be read"),
    ],
)
def test_a_broken_entry_is_refused_and_the_others_are_not(fake: Fake, text: str, told: str) -> None:
    files = fake("0.11.0")
    (files / "routing-ids.toml").write_text(text)
    found = find_installed()
    assert found is not None
    decisions = {d.id: d for d in catalog.decide(found, Settings())}
    assert decisions["routing-ids"].state == REFUSED
    assert told in decisions["routing-ids"].reason
    assert decisions["scale-overread"].state == APPLY
