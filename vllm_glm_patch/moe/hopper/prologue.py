"""The native prologue before Triton's GEMMs (dispatch.Config.prologue): one launch, and the bits that Triton's would write."""

from __future__ import annotations

import functools

import torch

from ..pipeline import Pass
from ..problem import Problem
from .backend import TRITON, HopperConfig, layer_of, prologue_of, supports
from .library import loader
from .native import Native, numbers

_CONFIG = HopperConfig(TRITON, TRITON, prologue="native")  # of which the prologue reads nothing but its own name


def launch(one: Pass) -> bool:
    """Launch it on the current stream; False where it cannot serve here, and Triton's has to.

    Raises:
        HopperError: the launch is refused.
    """
    device = one.t.hidden.device
    if not _serves(one.problem.with_tokens(1), device):
        return False
    return run(loader().on(device.index), one, device.index, torch.cuda.current_stream(device).cuda_stream)


def run(native: Native, one: Pass, index: int, stream: int) -> bool:
    """The same with these kernels, on this stream of a device; False where there are more experts than it counts."""
    kernel = prologue_of(one.problem, _CONFIG, native)
    if kernel is None:
        return False
    native.run(index, stream, layer_of(one, _CONFIG), numbers(kernel))
    return True


@functools.lru_cache(maxsize=64)
def _serves(problem: Problem, device: torch.device) -> bool:
    """Whether the native kernels are there for this device and these sizes. Loads them if need be."""
    return supports(problem, device)
