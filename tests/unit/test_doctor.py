"""`doctor`: what it finds, what it says is in the way, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import run

from vllm_glm_patch import catalog
from vllm_glm_patch.tools.doctor import facts, report
from vllm_glm_patch.version import __version__

Fake = Callable[[str], Path]
OUR_POINT = f"[vllm.general_plugins]\nglm_patch = {facts.ENTRY_POINT}\n"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No nvidia-smi on the path, and no other distribution than this package; returns where more can be put."""
    folder = tmp_path / "distributions"
    add_distribution(folder, "vllm-glm-patch", OUR_POINT)
    monkeypatch.setattr(facts, "distributions", lambda: importlib.metadata.distributions(path=[str(folder)]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return folder


def add_distribution(folder: Path, name: str, entry_points: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entry_points)


def put_nvidia_smi(tmp_path: Path, script: str) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)


def test_nothing_in_the_way_leaves_with_0(fake: Fake) -> None:
    fake("0.11.0")
    told = run("doctor", "--json").json()
    assert told["problems"] == []
    assert {patch["state"] for patch in told["patches"]} == {catalog.APPLY}
    assert run("doctor").code == 0


def test_it_says_what_is_installed(fake: Fake, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.19.1")
    add_distribution(machine, "torch", "")
    (torch,) = importlib.metadata.distributions(name="torch", path=[str(machine)])
    monkeypatch.setattr(facts, "distribution", lambda name: torch)
    packages = run("doctor", "--json").json()["packages"]
    assert packages["vllm-glm-patch"]["version"] == __version__
    assert packages["vllm"] == {"version": "0.19.1", "where": str(machine.parent / "vllm")}
    assert packages["torch"]["version"] == "1.2"


def test_a_package_that_is_missing_is_said_to_be(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    fake("0.19.1")
    monkeypatch.setattr(facts, "distribution", missing)
    assert run("doctor", "--json").json()["packages"]["torch"]["version"] == "not installed"


def test_it_says_which_defects_this_vllm_has(fake: Fake) -> None:
    fake("0.19.1")
    found = {defect["id"]: defect["present"] for defect in run("doctor", "--json").json()["defects"]}
    assert found == {patch.id: True for patch in catalog.patches() if patch.defect}


def test_the_text_has_every_defect_setting_and_plugin(fake: Fake) -> None:
    fake("0.11.0")
    lines = run("doctor").out.splitlines()
    started = {line.split()[0] for line in lines if line}
    assert {
        *(p.id for p in catalog.patches() if p.defect),
        "shape_policy",
        "compile_full_step",
        "glm_patch",
        "vllm",
        "torch",
    } <= started
    assert lines[-1] == "Nothing is in the way."


def test_settings_come_with_their_origin(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.11.0")
    monkeypatch.setenv("VLLM_GLM_PATCH_SHAPE_POLICY", "Guarded")
    settings = run("doctor", "--json").json()["settings"]
    assert settings["shape_policy"] == {"value": "guarded", "from": "VLLM_GLM_PATCH_SHAPE_POLICY=Guarded"}
    assert settings["strict"] == {"value": "false", "from": "default (VLLM_GLM_PATCH_STRICT)"}


def test_a_wrong_setting_leaves_with_2_and_still_reports(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.11.0")
    monkeypatch.setenv("VLLM_GLM_PATCH_SHAPE_POLICY", "always")
    result = run("doctor")
    assert result.code == 2
    assert "VLLM_GLM_PATCH_SHAPE_POLICY is 'always'" in result.err
    assert "scale-overread" in result.out
    assert "'always'" in run("doctor", "--json").json()["problems"][0]


def test_a_patch_that_is_switched_off_is_not_in_the_way(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.11.0")
    monkeypatch.setenv("VLLM_GLM_PATCH_DISABLE", "routing-ids")
    result = run("doctor", "--json")
    assert result.code == 0
    assert {"id": "routing-ids", "state": catalog.SWITCHED_OFF} in [
        {"id": patch["id"], "state": patch["state"]} for patch in result.json()["patches"]
    ]


def test_a_changed_function_leaves_with_1_and_is_named(fake: Fake) -> None:
    fake("0.11.0")
    (catalog.folder().parent / "vllm" / "_custom_ops.py").write_text("def cutlass_moe_mm(): return 'changed'\n")
    result = run("doctor")
    assert result.code == 1
    assert "Refused: scale-overread: vllm._custom_ops.cutlass_moe_mm is not the function" in result.out


def test_an_unknown_vllm_leaves_with_1_and_one_reason(fake: Fake) -> None:
    fake("0.99.0")
    result = run("doctor", "--json")
    assert result.code == 1
    (problem,) = result.json()["problems"]
    assert "vLLM 0.99.0 is newer than this release knows" in problem


def test_no_vllm_leaves_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_installed", lambda: None)
    result = run("doctor")
    assert result.code == 1
    assert "No vLLM is installed in this Python" in result.out


@pytest.mark.parametrize(("value", "code"), [("glm_patch", 0), ("a,glm_patch", 0), ("a", 1), ("", 1), ("a, glm_patch", 1)])
def test_vllm_plugins_is_read_as_vllm_reads_it(fake: Fake, monkeypatch: pytest.MonkeyPatch, value: str, code: int) -> None:
    fake("0.11.0")
    monkeypatch.setenv("VLLM_PLUGINS", value)
    result = run("doctor")
    assert result.code == code
    assert ("VLLM_PLUGINS leaves the plugin out" in result.out) is (code == 1)


def test_a_package_that_is_only_importable_leaves_with_1(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.11.0")
    monkeypatch.setattr(facts, "distributions", list)
    result = run("doctor")
    assert result.code == 1
    assert "vLLM will not find the plugin" in result.out


def test_other_plugins_are_listed_after_ours(fake: Fake, machine: Path) -> None:
    fake("0.11.0")
    add_distribution(machine, "a-platform", "[vllm.platform_plugins]\nother = a:b\n\n[console_scripts]\nnot_one = a:b\n")
    plugins = run("doctor", "--json").json()["plugins"]
    assert [(plugin["name"], plugin["package"], plugin["ours"]) for plugin in plugins] == [
        ("glm_patch", "vllm-glm-patch 1.2", True),
        ("other", "a-platform 1.2", False),
    ]


def test_without_nvidia_smi_that_is_said(fake: Fake) -> None:
    fake("0.11.0")
    assert run("doctor", "--json").json()["no_cards"] == "nvidia-smi is not there, so no NVIDIA driver is known"


def test_cards_and_driver_are_listed(fake: Fake, tmp_path: Path) -> None:
    fake("0.11.0")
    put_nvidia_smi(tmp_path, "echo 'NVIDIA H20, 570.1, 97871 MiB'; echo 'NVIDIA H20, 570.1, 97871 MiB'")
    assert run("doctor", "--json").json()["cards"] == [
        "0: NVIDIA H20, driver 570.1, 97871 MiB",
        "1: NVIDIA H20, driver 570.1, 97871 MiB",
    ]


def test_a_failing_nvidia_smi_is_quoted_and_not_in_the_way(fake: Fake, tmp_path: Path) -> None:
    fake("0.11.0")
    put_nvidia_smi(tmp_path, "echo 'Driver/library version mismatch' >&2; exit 18")
    result = run("doctor", "--json")
    assert result.code == 0
    assert "exit code 18 and said: Driver/library version mismatch" in result.json()["no_cards"]


def test_what_is_made_faster_is_told_with_its_state_here(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.11.0")
    assert re.search(r"fused-moe +applied when vLLM starts", run("doctor", "--plain").out)
    monkeypatch.setenv("VLLM_GLM_PATCH_MOE", "upstream")
    assert re.search(r"fused-moe +switched off +setting `moe_backend`", run("doctor", "--plain").out)
