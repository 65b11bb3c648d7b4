"""What an exception under one implementation means: that case's failure, or that the device is lost to the whole process."""

from __future__ import annotations

from typing import Any

_LOST_CODES = frozenset({214, 220, 700, 702, 709, 710, *range(714, 720), 721, 999})
"""Results of the driver and the runtime, numbered alike, after which cuda.h says that the process must be ended."""
_LOST_TEXTS = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "CUDA error",
)
# CUDA errors too, after which the device answers as before.
_HARMLESS_TEXTS = (
    "out of memory",
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "invalid resource handle",
    "no kernel image is available",
    "too many resources requested",
    "stream is capturing",
    "during capture",
)
_LINES, _LETTERS = 3, 400


def device_lost(error: BaseException) -> bool:
    """Whether the CUDA context cannot be used after this error: torch's, Triton's or the native launcher's.

    By the error's number where it has one (`torch.AcceleratorError`, `HopperError`), else by its text, of a RuntimeError
    only: a compiler's or a user's error that quotes such words is none of the device.
    """
    code = getattr(error, "error_code", getattr(error, "code", None))
    if isinstance(code, int) and code > 0:
        return code in _LOST_CODES
    text = str(error)
    if not isinstance(error, RuntimeError) or any(harmless in text for harmless in _HARMLESS_TEXTS):
        return False
    return type(error).__name__ == "AcceleratorError" or any(sign in text for sign in _LOST_TEXTS)


def lost_since(device: Any) -> BaseException | None:
    """A lost device's error, where what was raised says nothing of it: launches fail later than they are made."""
    if getattr(device, "type", "") != "cuda":
        return None
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return error if device_lost(error) else None
    return None


def whole(error: BaseException) -> str:
    """Type and message, all of it."""
    return f"{type(error).__name__}: {str(error).strip()}".rstrip(": ")


def beginning(text: str) -> str:
    """The first lines of a text, on one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[:_LINES])[:_LETTERS]
