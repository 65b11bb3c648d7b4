"""What one card can do, measured: the floor under every time of the MoE layer comes from these."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_glm_patch.moe.problem import Problem

_BYTES = 1 << 30
_SIDE = 8192  # rows and columns of the matrices


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings."""

    copy_tb_s: float
    """Bytes a second of a kernel that reads 1 GiB and writes as much. A plain copy may go by a copy engine, which is slower."""
    read_tb_s: float
    """Bytes a second of a reduction over 1 GiB."""
    fp8_tf_s: float
    """Of a dense FP8 product of 8192 × 8192 × 8192 by torch._scaled_mm."""

    def floor(self, problem: Problem) -> tuple[float, str]:
        """Microseconds that no version can go below, and what sets them: ``memory`` or ``arithmetic``.

        Memory: tokens in and out once and the weights of the experts that are used once, at the faster of copying and
        reading. Arithmetic: the multiply-adds of both GEMMs at the dense rate.
        """
        memory = problem.minimum_bytes() / max(self.copy_tb_s, self.read_tb_s) / 1e6
        arithmetic = problem.floating_point_operations() / self.fp8_tf_s / 1e6
        return (round(memory, 2), "memory") if memory > arithmetic else (round(arithmetic, 2), "arithmetic")

    def as_dict(self) -> dict[str, float]:
        """As the result file has it."""
        return {"copy_tb_s": self.copy_tb_s, "read_tb_s": self.read_tb_s, "fp8_tf_s": self.fp8_tf_s}


def measure(device: Any, us_of: Callable[[Callable[[], object]], list[float]]) -> Roofline:
    """Measure the ceilings of a card.

    Args:
        device: a torch device.
        us_of: microseconds of each of several runs of a call.
    """
    copy, read = _memory_us(device, us_of)
    product = _product_us(device, us_of)
    return Roofline(
        copy_tb_s=round(2 * _BYTES / copy / 1e6, 3),
        read_tb_s=round(_BYTES / read / 1e6, 3),
        fp8_tf_s=round(2 * _SIDE**3 / product / 1e6, 1),
    )


def _memory_us(device: Any, us_of: Callable[[Callable[[], object]], list[float]]) -> tuple[float, float]:
    """Of the copy and of the reduction."""
    import torch

    source = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return statistics.median(us_of(lambda: torch.neg(source, out=target))), statistics.median(us_of(lambda: torch.sum(source)))


def _product_us(device: Any, us_of: Callable[[Callable[[], object]], list[float]]) -> float:
    import torch

    left = torch.randn(_SIDE, _SIDE, device=device).to(torch.float8_e4m3fn)
    right = torch.randn(_SIDE, _SIDE, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), dtype=torch.float32, device=device)
    return statistics.median(
        us_of(lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
    )
