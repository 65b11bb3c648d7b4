"""Installing into a (fake) vLLM: what is patched, said, refused, taken back."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_vllm
import pytest

import vllm_glm_patch
from vllm_glm_patch import StrictRefusal, UserError, installation, plugin
from vllm_glm_patch.settings import Settings

Fake = Callable[[str], Path]


def states() -> dict[str, str]:
    return {p.id: p.state for p in vllm_glm_patch.status().patches}


def test_install_patches_and_uninstall_restores_the_very_same_objects(fake: Fake) -> None:
    fake("0.19.1")
    ops, scheduler = fake_vllm.load("vllm._custom_ops"), fake_vllm.load("vllm.v1.core.sched.scheduler")
    arguments = fake_vllm.load("vllm.engine.arg_utils")
    before = ops.cutlass_moe_mm, vars(scheduler.Scheduler)["__init__"], arguments.EngineArgs.create_engine_config
    status = vllm_glm_patch.install()
    assert {p.state for p in status.patches} == {"applied"}
    assert ops.cutlass_moe_mm is not before[0]
    vllm_glm_patch.uninstall()
    after = ops.cutlass_moe_mm, vars(scheduler.Scheduler)["__init__"], arguments.EngineArgs.create_engine_config
    assert all(a is b for a, b in zip(before, after))
    assert vllm_glm_patch.status().patches == ()


def test_installing_twice_wraps_once(fake: Fake) -> None:
    fake("0.19.1")
    ops = fake_vllm.load("vllm._custom_ops")
    plugin.register()
    once = ops.cutlass_moe_mm
    plugin.register()
    assert ops.cutlass_moe_mm is once


def test_modules_imported_later_are_patched_then(fake: Fake) -> None:
    fake("0.19.1")
    vllm_glm_patch.install()
    assert "vllm._custom_ops" not in sys.modules
    ops = fake_vllm.load("vllm._custom_ops")
    assert hasattr(ops.cutlass_moe_mm, "__wrapped__")


def test_the_off_switch_touches_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.19.1")
    monkeypatch.setenv("VLLM_GLM_PATCH", "0")
    plugin.register()
    assert not hasattr(fake_vllm.load("vllm._custom_ops").cutlass_moe_mm, "__wrapped__")
    assert not hasattr(fake_vllm.load("vllm.engine.arg_utils").EngineArgs.create_engine_config, "__wrapped__")


def test_single_patches_are_switched_off_by_name(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.19.1")
    monkeypatch.setenv("VLLM_GLM_PATCH_DISABLE", "scale-overread, routing-ids")
    plugin.register()
    assert not hasattr(fake_vllm.load("vllm._custom_ops").cutlass_moe_mm, "__wrapped__")
    assert states() == {
        "full-step": "applied", "routing-ids": "switched off", "scale-overread": "switched off", "fused-moe": "applied",
    }  # fmt: skip


def test_a_wrong_switch_stops_the_start(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.19.1")
    monkeypatch.setenv("VLLM_GLM_PATCH_SHAPE_POLICY", "maybe")
    with pytest.raises(UserError, match="VLLM_GLM_PATCH_SHAPE_POLICY is 'maybe'"):
        plugin.register()


def test_an_unknown_version_is_warned_of_once_and_left_alone(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake("0.34.0")
    arguments = fake_vllm.load("vllm.engine.arg_utils")
    plugin.register()
    with caplog.at_level(logging.INFO, "vllm_glm_patch"):
        for _ in range(2):
            assert arguments.EngineArgs().create_engine_config() == "config"
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "vLLM 0.34.0 is newer than this release knows (0.33.0); nothing was patched" in warnings[0]
    assert "VLLM_GLM_PATCH_STRICT=1" in warnings[0]
    assert not hasattr(fake_vllm.load("vllm._custom_ops").cutlass_moe_mm, "__wrapped__")


def test_strict_mode_refuses_an_unknown_version(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.34.0")
    monkeypatch.setenv("VLLM_GLM_PATCH_STRICT", "1")
    with pytest.raises(StrictRefusal, match=r"0\.34\.0"):
        plugin.register()


def test_strict_mode_refuses_what_turns_out_wrong_at_import(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("0.19.1")
    monkeypatch.setenv("VLLM_GLM_PATCH_STRICT", "1")
    plugin.register()
    source = tmp_path / "vllm" / "_custom_ops.py"
    source.write_text(source.read_text() + "\ncutlass_moe_mm = len\n")
    with pytest.raises(StrictRefusal, match="already replaced"):
        fake_vllm.load("vllm._custom_ops")


def test_a_patch_that_fails_at_import_is_undone_whole_and_stays_refused(fake: Fake, tmp_path: Path) -> None:
    fake("0.19.1")
    vllm_glm_patch.install()
    source = tmp_path / "vllm" / "_custom_ops.py"
    source.write_text(source.read_text() + "\nscaled_fp8_quant = len\n")
    ops = fake_vllm.load("vllm._custom_ops")
    assert not hasattr(ops.cutlass_moe_mm, "__wrapped__")
    vllm_glm_patch.install()
    assert states()["scale-overread"] == "refused"
    assert states()["routing-ids"] == "applied"


def test_the_table_comes_once_with_every_patch(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake("0.19.1")
    arguments = fake_vllm.load("vllm.engine.arg_utils")
    plugin.register()
    with caplog.at_level(logging.INFO, "vllm_glm_patch"):
        arguments.EngineArgs().create_engine_config()
        arguments.EngineArgs().create_engine_config()
    tables = [r.getMessage() for r in caplog.records if "vllm-glm-patch" in r.getMessage()]
    assert len(tables) == 1
    assert "vLLM 0.19.1" in tables[0]
    assert all(f"  {name}" in tables[0] for name in states())


def test_additional_config_is_taken_over_and_handed_to_children(fake: Fake) -> None:
    fake("0.19.1")
    arguments, ops = fake_vllm.load("vllm.engine.arg_utils"), fake_vllm.load("vllm._custom_ops")
    known = fake_vllm.load("vllm.envs").environment_variables
    plugin.register()
    original = ops.cutlass_moe_mm.__wrapped__
    config = {"glm_patch": {"disable": ["scale-overread"], "shape_policy": "guarded"}}
    arguments.EngineArgs(config).create_engine_config()
    assert ops.cutlass_moe_mm is original
    assert os.environ["VLLM_GLM_PATCH_DISABLE"] == "scale-overread"
    assert Settings.from_environment().shape_policy == "guarded"
    assert known["VLLM_GLM_PATCH_SHAPE_POLICY"]() == "guarded"


def test_a_wrong_key_in_additional_config_stops_the_start(fake: Fake) -> None:
    fake("0.19.1")
    arguments = fake_vllm.load("vllm.engine.arg_utils")
    plugin.register()
    with pytest.raises(UserError, match="allowed keys: enabled, strict, disable"):
        arguments.EngineArgs({"glm_patch": {"polcy": 1}}).create_engine_config()


def test_fixes_that_want_it_are_shown_the_configuration(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.19.1")
    from vllm_glm_patch.fixes import full_step

    seen: list[object] = []
    monkeypatch.setattr(full_step, "on_engine_config", lambda context, config: seen.append(config))
    plugin.register()
    fake_vllm.load("vllm.engine.arg_utils").EngineArgs().create_engine_config()
    assert seen == ["config"]


def test_our_lines_come_out_where_vllms_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_glm_patch import log

    handler = logging.NullHandler()
    theirs = logging.getLogger("vllm")
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setattr(log.logger, "handlers", [])
    monkeypatch.setattr(log.logger, "propagate", True)
    monkeypatch.setattr(theirs, "propagate", False)
    log.follow_vllm()
    assert log.logger.handlers == [handler]
    assert log.logger.propagate is False


def test_without_vllm_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.upstream, "find_installed", lambda: None)
    plugin.register()
    assert vllm_glm_patch.status().patches == ()
    assert "(none found)" in vllm_glm_patch.status().table()


MEASURE = """
import sys, time
import packaging.specifiers, packaging.version, importlib.metadata, importlib.util, logging  # vLLM has these already
started = time.perf_counter()
from vllm_glm_patch.plugin import register
register()
print(time.perf_counter() - started, "torch" in sys.modules, "vllm._custom_ops" in sys.modules)
"""


def test_the_plugin_takes_at_most_150_ms_and_imports_neither_torch_nor_vllm(fake: Fake, tmp_path: Path) -> None:
    """Measured in a process of its own, the best of five: the limit is for our work, not for a busy machine."""
    fake("0.19.1")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(vllm_glm_patch.__file__).parent.parent}"}
    code = MEASURE.replace(
        "import sys, time", f"import sys, time, pathlib\nfiles = pathlib.Path({str(tmp_path / 'catalog')!r})"
    )
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)
    ]
    assert min(float(run[0]) for run in runs) < 0.150
    assert {tuple(run[1:]) for run in runs} == {("False", "False")}
