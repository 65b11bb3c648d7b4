"""What the child process needs of whatever runs kernels: a card (card.py), or a stand-in in the tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .cases import Kernel, Shape, Unit
from .journal import Outcome

GUARDED_ALL, GUARDED_ONE = "all", "one"
Note = Callable[[dict[str, Any]], None]
"""Writes a line of the unit that runs into the journal: {"step": …} or {"buffers": […]}."""


class Backend(Protocol):
    """One object a child process; `prepare` runs before any worker is forked, the others in a worker."""

    def prepare(self, options: dict[str, Any]) -> dict[str, Any]:
        """Import what is needed and say what is here. Leaves the card alone, so that a fork can use it.

        Raises:
            UserError: nothing can be checked here.
        """

    def kernels(self) -> list[Kernel]:
        """What can be called, and what cannot be and why."""

    def can_fork(self) -> bool:
        """Whether a forked process could use the card."""

    def start(self, guarded: str) -> None:
        """Begin to use the card in this process: with every buffer guarded, or with single ones."""

    def run(self, unit: Unit, shape: Shape, guard: str, note: Note) -> Outcome:
        """Call a kernel and compare; `guard` names the one buffer to guard, or is "all".

        Returns:
            FAULT as outcome where this process can use the card no more.
        """


def load(name: str) -> Backend:
    """The backend `module:Class`."""
    module, _, attribute = name.partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made


def outside(text: str) -> bool:
    """Whether an exception's text says that the card faulted, as torch and CUTLASS word it."""
    return any(sign in text for sign in _FAULTS)


_FAULTS: Sequence[str] = (
    "CUDA error",
    "CUDA_ERROR",
    "device-side assert",
    "illegal memory access",
    "misaligned address",
    "Failed to initialize the TMA descriptor",
    "unspecified launch failure",
)
