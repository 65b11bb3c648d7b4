"""Routes vLLM's FP8 MoE layers to the fused kernel in `moe/` (patch `fused-moe`); `adapters/` knows vLLM's insides."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..catalog import NOT_NEEDED, SWITCHED_OFF
from ..log import follow_vllm, logger
from ..settings import Settings
from . import Context, Factory, full_step, full_step_probe

_DEVICES = (("/dev", "nvidia[0-9]*"), ("/dev", "nvidiactl"), ("/proc/driver/nvidia", "version"))

OFF = "setting `moe_backend` is upstream; VLLM_GLM_PATCH_MOE=auto turns the kernel on"


def declines(settings: Settings) -> tuple[str, str] | None:
    """A state and the reason for it where the patch is of no use here. Looks at no driver: that would start CUDA."""
    if not has_card():
        return NOT_NEEDED, "this machine has no NVIDIA card"
    if settings.moe_backend == "upstream":
        return SWITCHED_OFF, OFF
    return None


def has_card() -> bool:
    """Whether an NVIDIA driver shows a device here."""
    return any(next(Path(folder).glob(name), None) is not None for folder, name in _DEVICES)


def replacements(context: Context) -> Mapping[str, Factory]:
    """Factories for the roles `modular-kernel` and `profile`."""
    from ..adapters.serving import Serving

    serving = Serving(context.settings, _seen_by_the_warm_up)
    return {
        "modular-kernel": functools.partial(_modular_kernel, serving),
        "profile": functools.partial(_profile, serving),
    }


def _modular_kernel(serving: Any, original: Any) -> Any:
    from ..adapters.modular_kernel import Reader

    reader = Reader(original)

    @functools.wraps(original)
    def modular_kernel(*args: Any, **kwargs: Any) -> Any:
        return serving.call(original, reader, args, kwargs)

    return modular_kernel


def _profile(serving: Any, original: Any) -> Any:
    """vLLM's profiling run is the first run of the model: all layers are looked at and tested in it."""

    @functools.wraps(original)
    def determine_available_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        serving.limit = full_step.full_step(self.vllm_config)
        result = original(self, *args, **kwargs)
        follow_vllm()
        logger.info("Fused MoE: %s.", serving.summary())
        return result

    return determine_available_memory


@contextmanager
def _seen_by_the_warm_up(call: Any) -> Iterator[None]:
    """While the full step is warmed up: show it the routing, and wait, so that a fault is pinned to this kernel."""
    probe = full_step_probe.active
    if probe is None:
        yield
        return
    probe.saw_ids(call.topk_ids, call.w2.shape[0] if call.expert_map is None else call.expert_map.numel())
    full_step_probe.wait(call.topk_ids)  # a fault of an earlier kernel shows here, and is not this one's
    yield
    try:
        full_step_probe.wait(call.topk_ids)
    except RuntimeError as error:
        from ..adapters.serving import DeviceLost

        raise DeviceLost(f"the warm-up of {call.topk_ids.shape[0]} tokens", error) from error
