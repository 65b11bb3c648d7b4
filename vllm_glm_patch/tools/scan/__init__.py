"""Which defects a vLLM carries, without importing, running or unpacking it."""

from __future__ import annotations

from .cli import command
from .evidence import Finding, judge
from .target import Target, identify, installed

__all__ = ["Finding", "Target", "command", "identify", "installed", "judge"]
