"""What is installed here, what is wrong with this vLLM, and whether the patches will be applied."""

from __future__ import annotations

from .cli import command

__all__ = ["command"]
