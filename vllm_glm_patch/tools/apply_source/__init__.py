"""Corrects a source tree of vLLM in place, for those who build their own."""

from __future__ import annotations

from .cli import command

__all__ = ["command"]
