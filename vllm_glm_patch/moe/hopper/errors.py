"""The one exception of this backend."""

from __future__ import annotations


class HopperError(RuntimeError):
    """The native kernels cannot be loaded, compiled or launched; the text says which, on what shape, why, and what to do.

    Attributes:
        code: the CUDA driver's result (CUresult), or −1 where it was not the driver that refused.
    """

    def __init__(self, text: str, code: int = -1) -> None:
        super().__init__(text)
        self.code = code
