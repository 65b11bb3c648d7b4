"""The patch `fused-moe` as a patch: where it goes, when it has no use, and that it is taken back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import pytest
from packaging.version import Version

import vllm_glm_patch
from vllm_glm_patch import catalog
from vllm_glm_patch.fixes import Context, full_step_probe, fused_moe
from vllm_glm_patch.moe import backends
from vllm_glm_patch.settings import MOE_BACKENDS, Settings

Fake = Callable[[str], Path]
REAL_HAS_CARD = fused_moe.has_card
"""The fixture of all unit tests puts another in its place."""
KERNEL = "vllm.model_executor.layers.fused_moe.modular_kernel"


def state() -> tuple[str, str]:
    (status,) = (p for p in vllm_glm_patch.status().patches if p.id == "fused-moe")
    return status.state, status.reason


@pytest.mark.parametrize(
    ("version", "owner", "name", "other"),
    [
        ("0.10.1.1", "FusedMoEModularKernel", "forward", "FusedMoEKernel"),
        ("0.33.0", "FusedMoEKernel", "apply", "FusedMoEModularKernel"),
    ],
)
def test_each_generation_is_patched_at_its_own_door_and_the_same_objects_come_back(
    fake: Fake, version: str, owner: str, name: str, other: str
) -> None:
    fake(version)
    kernels, worker = fake_vllm.load(KERNEL), fake_vllm.load("vllm.v1.worker.gpu_worker").Worker
    before = vars(getattr(kernels, owner))[name], vars(worker)["determine_available_memory"]
    untouched = dict(vars(getattr(kernels, other)))
    for _ in range(2):
        vllm_glm_patch.install()
        once = vars(getattr(kernels, owner))[name]
        vllm_glm_patch.install()
        assert vars(getattr(kernels, owner))[name] is once  # wrapped once
        assert once.__wrapped__ is before[0]
        assert dict(vars(getattr(kernels, other))) == untouched
        vllm_glm_patch.uninstall()
        after = vars(getattr(kernels, owner))[name], vars(worker)["determine_available_memory"]
        assert all(a is b for a, b in zip(before, after))


def test_a_call_that_cannot_be_read_reaches_vllm(fake: Fake) -> None:
    fake("0.33.0")
    vllm_glm_patch.install()
    kernel = fake_vllm.load(KERNEL).FusedMoEKernel()
    assert kernel.apply(None, None, None, None, None, "silu", 8, None, False) == "vLLM's"


def test_without_a_card_it_is_not_needed_and_nothing_is_replaced(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("0.33.0")
    monkeypatch.setattr(fused_moe, "has_card", lambda: False)
    vllm_glm_patch.install()
    assert state() == (catalog.NOT_NEEDED, "this machine has no NVIDIA card")
    assert not hasattr(fake_vllm.load(KERNEL).FusedMoEKernel.apply, "__wrapped__")


@pytest.mark.parametrize("files", [("dev/nvidia0",), ("dev/nvidiactl",), ("version",), ()])
def test_a_card_is_told_by_its_device_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia-caps").mkdir()
    for name in files:
        (tmp_path / name).touch()
    places = ((f"{tmp_path}/dev", "nvidia[0-9]*"), (f"{tmp_path}/dev", "nvidiactl"), (f"{tmp_path}", "version"))
    monkeypatch.setattr(fused_moe, "_DEVICES", places)
    assert REAL_HAS_CARD() is bool(files)


def test_the_setting_upstream_switches_it_off_from_either_place_and_back_on(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_glm_patch import installation

    fake("0.33.0")
    monkeypatch.setenv("VLLM_GLM_PATCH_MOE", "upstream")
    vllm_glm_patch.install()
    assert state() == (catalog.SWITCHED_OFF, fused_moe.OFF)
    kernels = fake_vllm.load(KERNEL)
    installation.adopt({"glm_patch": {"moe_backend": "triton"}})
    assert state()[0] == "applied" and hasattr(kernels.FusedMoEKernel.apply, "__wrapped__")
    installation.adopt({"glm_patch": {"moe_backend": "upstream"}})
    assert state()[0] == catalog.SWITCHED_OFF and not hasattr(kernels.FusedMoEKernel.apply, "__wrapped__")


def test_it_is_on_by_default_and_its_switch_is_told_where_it_is_off(fake: Fake) -> None:
    fake("0.33.0")
    vllm_glm_patch.install()
    assert state()[0] == "applied"
    assert hasattr(fake_vllm.load(KERNEL).FusedMoEKernel.apply, "__wrapped__")
    assert "VLLM_GLM_PATCH_MOE=auto" in fused_moe.OFF


def test_the_backends_of_the_settings_are_those_of_the_kernel() -> None:
    assert set(MOE_BACKENDS) == {backends.AUTO, *backends.names()}


def test_after_the_profiling_run_the_log_says_who_serves(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake("0.33.0")
    vllm_glm_patch.install()
    caplog.set_level(logging.INFO, "vllm_glm_patch")
    worker = fake_vllm.load("vllm.v1.worker.gpu_worker").Worker()
    worker.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=4096))
    assert worker.determine_available_memory() == 4096
    (record,) = (r for r in caplog.records if r.message.startswith("Fused MoE: "))
    assert "no MoE layer came by vLLM's modular kernel" in record.message


def test_the_limit_of_the_self_test_is_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_glm_patch.adapters import serving as module

    made: list[module.Serving] = []

    class Kept(module.Serving):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(module, "Serving", Kept)
    factories = fused_moe.replacements(Context(Version("0.33.0"), Settings, lambda: True))
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_scheduled_tokens=8191)
        )
    )

    def determine_available_memory(self: object) -> int:
        assert made[0].limit == 8191
        return 1

    assert factories["profile"](determine_available_memory)(worker) == 1


def test_the_warm_up_of_the_full_step_sees_the_routing_of_a_layer_that_is_served_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    call = SimpleNamespace(topk_ids=torch.tensor([[0, 1], [1, 2]]), w2=torch.zeros(4, 1, 1), expert_map=None)
    with full_step_probe.watching() as probe, fused_moe._seen_by_the_warm_up(call):
        pass
    spread = probe.spread()
    assert spread is not None and (spread.experts, spread.used) == (4, 3)


def test_a_fault_in_the_warm_up_is_told_as_one_of_this_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vllm_glm_patch.adapters.serving import DeviceLost
    from vllm_glm_patch.fixes import full_step

    waits = iter([None, RuntimeError("CUDA error: an illegal memory access was encountered")])

    def wait(tensor: object) -> None:
        found = next(waits)
        if found is not None:
            raise found

    monkeypatch.setattr(full_step_probe, "wait", wait)
    call = SimpleNamespace(topk_ids=torch.tensor([[0, 1]]), w2=torch.zeros(4, 1, 1), expert_map=None)
    told = pytest.raises(DeviceLost, match=r"fused_moe_fp8.*warm-up of 1 tokens")
    with full_step_probe.watching(), told as caught, fused_moe._seen_by_the_warm_up(call):
        pass
    assert full_step._is_device_error(caught.value)
