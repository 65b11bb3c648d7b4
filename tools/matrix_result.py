"""What the matrix found of one release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tools.matrix_source import Record


@dataclass(frozen=True)
class Result:
    """One row of the matrix."""

    version: str
    has_kernel_source: bool
    """False for a release of which only a wheel is published; its kernels were not looked at."""
    states: Mapping[str, str]
    """What becomes of each patch, by its id."""
    record: Record
    calls: int
    """Calls of replacements that were made."""
    problems: tuple[str, ...]
