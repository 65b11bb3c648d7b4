"""Every kernel of the FP8 MoE path on this card, before unmapped pages and against float64: upstream's and ours."""

from __future__ import annotations

from .cli import command

__all__ = ["command"]
