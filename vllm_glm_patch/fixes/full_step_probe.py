"""Watches the MoE layers while the full-budget step is warmed up: which experts it used, and which kernel failed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..arguments import Arguments

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spread:
    """How a step's tokens were routed in its first observed MoE layer."""

    experts: int
    used: int
    busiest: float
    """Rows of the busiest expert over the mean."""

    def __str__(self) -> str:
        return f"{self.used} of {self.experts} experts used, the busiest {self.busiest:.1f} times the mean"


class KernelFailed(RuntimeError):
    """A kernel of the MoE path failed; the text names it and its shape."""


DOOR = ("vllm._custom_ops", "cutlass_moe_mm")
"""The function that every grouped FP8 GEMM goes through, in every release."""


@dataclass
class Probe:
    """One warm-up. Waits for the device before and after each grouped GEMM, so that a fault is pinned to it."""

    loads: list[torch.Tensor] = field(default_factory=list)

    def call(
        self, kernel: str, problem_sizes: torch.Tensor, original: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call the grouped GEMM and wait for it.

        Raises:
            KernelFailed: it failed on the device.
        """
        if not self.loads:
            # One of the first two columns is rows an expert, the other the width; which one depends on swap_ab.
            rows = problem_sizes[:, :2].amin(dim=0)
            self.loads.append(problem_sizes[:, int(rows.argmin())].clone())
        wait(problem_sizes)  # a fault of an earlier kernel shows here, and is not this one's
        try:
            result = original(*args, **kwargs)
            wait(problem_sizes)
        except RuntimeError as error:
            raise KernelFailed(f"{kernel} over {problem_sizes.shape[0]} experts: {_first_line(error)}") from error
        return result

    def saw_ids(self, topk_ids: torch.Tensor, experts: int) -> None:
        """Note the expert ids of a layer, int [tokens, top_k]."""
        if not self.loads:
            self.loads.append(topk_ids.flatten().long().bincount(minlength=experts))

    def saw_logits(self, router_logits: torch.Tensor, top_k: int) -> None:
        """Note the router's logits of a layer, [tokens, experts]; without groups the top k of them are the ids."""
        if not self.loads and router_logits.dim() == 2:
            self.saw_ids(router_logits.topk(top_k, dim=-1).indices, router_logits.shape[1])

    def spread(self) -> Spread | None:
        """How the step was routed; None where nothing of it could be seen."""
        if not self.loads:
            return None
        load = self.loads[0].float()
        mean = load.mean().item()
        return Spread(load.numel(), int((load > 0).sum()), load.max().item() / mean if mean else 0.0)


active: Probe | None = None


@contextmanager
def watching() -> Iterator[Probe]:
    """Make a new probe the active one for a while, and let it see the grouped GEMMs."""
    global active
    probe = Probe()
    active = probe
    module, name = sys.modules.get(DOOR[0]), DOOR[1]
    original = getattr(module, name, None)
    if original is not None:
        setattr(module, name, _seen_by(probe, original))
    try:
        yield probe
    finally:
        active = None
        if original is not None:
            setattr(module, name, original)


def _seen_by(probe: Probe, original: Any) -> Any:
    arguments = Arguments(original)

    @functools.wraps(original)
    def cutlass_moe_mm(*args: Any, **kwargs: Any) -> Any:
        sizes = arguments.get("problem_sizes", args, kwargs)
        return probe.call(DOOR[1], sizes, original, args, kwargs)

    return cutlass_moe_mm


def wait(tensor: torch.Tensor) -> None:
    """Wait for the device of a tensor."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
