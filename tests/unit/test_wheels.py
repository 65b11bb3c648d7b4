"""tools.wheels and tools.beside: what they call wrong, and that the document is made of the records."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import beside, wheels, wheels_document
from tools.environment import SetUpFailed, requirements
from vllm_glm_patch.version import __version__

NAME = f"vllm_glm_patch-{__version__}-{{}}.whl"
FREEZE = ["rich==15.0.0", "torch==2.7.1", "vllm==0.10.1.1"]
OURS = "vllm-glm-patch @ file:///somewhere/vllm_glm_patch-0.1.0-py3-none-manylinux_2_24_x86_64.whl"


def seen(**changes: Any) -> dict[str, Any]:
    """A record of `tools.beside` in which all is well, but for the changes."""
    installer = {"added": ["vllm-glm-patch"], "changed": [], "restored": True, "failed": ""}
    plugin = {"milliseconds": [40.0, 50.0, 60.0], "cuda": False, "patches": {"full-step": "applied"}, "problem": ""}
    record = {"python": "3.12.1", "torch": "2.7.1", "packages": 3, "installers": {"pip": installer}, "plugin": plugin}
    for name, change in changes.items():
        record[name] = {**record[name], **change} if name == "plugin" else {"pip": {**installer, **change}}  # type: ignore[dict-item]
    return record


@pytest.mark.parametrize("tag", ["py3-none-manylinux_2_24_x86_64", "py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64"])
def test_a_wheel_for_every_python_and_for_systems_as_old_as_torchs_is_well(tag: str) -> None:
    assert wheels.tag_problems(NAME.format(tag)) == []


@pytest.mark.parametrize(
    "tag", ["py3-none-linux_x86_64", "py3-none-any", "py3-none-manylinux_2_34_x86_64", "cp311-cp311-manylinux_2_24_x86_64"]
)
def test_any_other_tag_is_a_problem(tag: str) -> None:
    assert len(wheels.tag_problems(NAME.format(tag))) == 1


def test_a_wheel_of_another_version_is_a_problem() -> None:
    assert len(wheels.tag_problems("vllm_glm_patch-99.0-py3-none-manylinux_2_24_x86_64.whl")) == 1


def test_files_that_two_wheels_do_not_share_are_named() -> None:
    assert wheels.differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b", "c"]


def test_a_python_that_is_on_the_path_and_does_not_run_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    runs = tmp_path / "versions" / f"{version}.99" / "bin" / f"python{version}"
    runs.parent.mkdir(parents=True)
    runs.symlink_to(sys.executable)
    shim = tmp_path / "shims" / f"python{version}"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\necho no such version >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{os.environ['PATH']}")
    assert wheels.find_python(version, tmp_path).resolve().name == Path(sys.executable).resolve().name


def test_a_python_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text("#!/bin/sh\necho nothing to fetch >&2\nexit 2\n")
    uv.chmod(0o755)
    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(SetUpFailed, match=r"no CPython 3\.77 .*nothing to fetch"):
        wheels.find_python("3.77", tmp_path)


def test_what_an_installation_adds_changes_and_leaves_is_seen() -> None:
    assert beside.compare(FREEZE, [*FREEZE, OURS], FREEZE) == {"added": ["vllm-glm-patch"], "changed": [], "restored": True}
    upgraded = ["rich==16.0.0", "vllm==0.10.1.1", OURS]
    found = beside.compare(FREEZE, upgraded, ["rich==16.0.0", "vllm==0.10.1.1"])
    assert found == {"added": ["vllm-glm-patch"], "changed": ["rich", "torch"], "restored": False}


def test_a_record_in_which_all_is_well_has_nothing_wrong() -> None:
    assert beside.judge(seen()) == []


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("installers", {"added": []}),
        ("installers", {"changed": ["torch"]}),
        ("installers", {"restored": False}),
        ("installers", {"failed": "no space left"}),
        ("plugin", {"cuda": True}),
        ("plugin", {"patches": {"full-step": "refused", "routing-ids": "applied"}}),
        ("plugin", {"patches": {}}),
        ("plugin", {"milliseconds": [140.0, 160.0, 170.0]}),
        ("plugin", {"problem": "vLLM does not load"}),
    ],
)
def test_each_thing_that_can_go_wrong_beside_vllm_is_named(part: str, change: dict[str, Any]) -> None:
    assert len(beside.judge(seen(**{part: change}))) == 1


def test_the_document_is_the_one_made_of_the_records() -> None:
    assert wheels_document.DOCUMENT.read_text(encoding="utf-8") == wheels_document.render(wheels_document.read())


def test_what_is_recorded_is_well_and_complete() -> None:
    recorded = wheels_document.read()
    assert recorded["wheel"]["problems"] == []
    assert set(recorded["pythons"]) == set(wheels.PYTHONS)
    assert not {(v, c): wrong for v, one in recorded["pythons"].items() for c, wrong in one["checks"].items() if wrong}
    assert set(beside.RELEASES) <= set(recorded["beside"])
    assert not {release: wrong for release, one in recorded["beside"].items() if (wrong := beside.judge(one))}


def test_the_package_names_each_python_it_is_tried_in() -> None:
    named = (wheels.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [v for v in wheels.PYTHONS if f'"Programming Language :: Python :: {v}"' not in named] == []


def test_a_record_of_one_version_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "wheels.json"
    for version in ("3.10", "3.9", "3.10"):
        wheels_document.record_in("pythons", version, {"python": version}, file)
    assert list(wheels_document.read(file)["pythons"]) == ["3.9", "3.10"]
    assert wheels_document.read(file)["wheel"] == {}


def test_torch_is_asked_for_without_the_tag_of_a_build_and_its_companions_are_left_out() -> None:
    asked = ["numpy", 'torch==2.13.0+cpu; platform_machine == "x86_64"', "torchvision", "torchcodec>=0.14"]
    assert requirements("Name: x\n" + "".join(f"Requires-Dist: {line}\n" for line in asked)) == ("torch==2.13.0", ["numpy"])
    with pytest.raises(SetUpFailed, match="no version of torch"):
        requirements("Name: x\nRequires-Dist: numpy\n")
