"""Fused MoE for per-channel FP8 weights and per-token FP8 activations. Knows nothing of vLLM.

`fused_moe_fp8` and `workspace_bytes` are loaded on first use, so that importing this package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .op import fused_moe_fp8 as fused_moe_fp8
    from .op import workspace_bytes as workspace_bytes

__all__ = ["fused_moe_fp8", "workspace_bytes"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import op

        return getattr(op, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
