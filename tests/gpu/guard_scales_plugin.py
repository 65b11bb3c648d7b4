"""A vLLM plugin for one test: puts what the grouped GEMM gets as scales before an unmapped page, as PyTorch rounds it.

It replaces the operator below vllm._custom_ops, so that it sees what the patch hands over. The whole storage of
the scales is placed, slack and all: without the patch nothing lies between the last scale and the page at 8192 tokens.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

SMALLEST = 4096  # rows; smaller steps keep their own memory, so that CUDA graphs can be captured


def register() -> None:
    """vLLM's plugin entry point."""
    import torch
    import vllm._custom_ops  # noqa: F401  (loads the operators)

    sys.path.insert(0, str(Path(__file__).parent))
    original = torch.ops._C.cutlass_moe_mm
    if getattr(original, "_guarded", False):
        return

    @functools.cache
    def end_of_mapping(nbytes: int) -> int:
        from guardmem import mapped_end

        return mapped_end(nbytes)

    def at_the_edge(scales: torch.Tensor) -> torch.Tensor:
        behind = scales.storage_offset() * 4
        nbytes = scales.untyped_storage().nbytes() - behind
        start = end_of_mapping(-(-nbytes // 512) * 512) - -(-nbytes // 512) * 512

        class Bytes:
            __cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (start, False), "version": 2}

        placed = torch.as_tensor(Bytes(), device=scales.device).view(torch.float32)[: scales.numel()].view(scales.shape)
        placed.copy_(scales)
        return placed

    class Guarded:
        """The operator in all else: PyTorch lists the operators of every namespace and asks each for its overloads."""

        _guarded = True

        def __call__(self, out, a, b, a_scales, *rest):  # type: ignore[no-untyped-def]
            if a_scales.numel() >= SMALLEST and not torch.cuda.is_current_stream_capturing():
                a_scales = at_the_edge(a_scales)
            return original(out, a, b, a_scales, *rest)

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            return getattr(original, name)

    torch.ops._C.cutlass_moe_mm = Guarded()
    print(f"guard_scales_plugin: in place in process {os.getpid()}", flush=True)
