"""What an exception of our kernel means: a kernel that cannot be compiled or loaded, the device lost, or neither."""

from __future__ import annotations

_LOST = ("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert", "CUDA error")
_TRITON = frozenset({"CompilationError", "OutOfResources", "PTXASError"})
"""Triton's own errors before a kernel's first launch (3.3 to 3.9): its language, the card's limits, the assembler."""
_PASSES = "PassManager::run failed"
"""All that Triton says where a pass of its compiler fails, in a plain RuntimeError; the rest is on stderr."""


def lost(error: BaseException) -> bool:
    """Whether it speaks of a device in error."""
    return any(text in str(error) for text in _LOST)


def not_compiled(error: BaseException) -> bool:
    """Whether it says for certain that a kernel was not compiled or loaded, so that nothing of it was launched.

    By names, which need no import and no particular Triton. Whatever is not known here is not certain.
    """
    if lost(error):
        return False
    if any(kind.__name__ in _TRITON and kind.__module__.partition(".")[0] == "triton" for kind in type(error).__mro__):
        return True
    if type(error) is RuntimeError:
        return str(error).startswith(_PASSES)
    from ..moe.hopper.errors import HopperError

    return isinstance(error, HopperError) and _not_loaded(error.code)


def _not_loaded(code: int) -> bool:
    """−1: refused before the driver was asked. The driver's other results may come of a launch, or of one before it."""
    from ..moe.hopper.library import REFUSALS

    return code == -1 or code in REFUSALS


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its first, with its last where the first only leads up to it, as Triton's «at 42:19:»
    before a kernel's text and what is wrong with it. Triton 3.3 has the latter in the error's cause, and ends with a «^»."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not lines[0].endswith(":") or len(lines) == 1:
        return lines[0]
    last = lines[-1].strip()
    return f"{lines[0]} {first_line(error.__cause__) if last == '^' and error.__cause__ is not None else last}"


def named(error: BaseException) -> str:
    """Its type and what it says."""
    return f"{type(error).__name__}: {first_line(error)}"
