"""Single tensors before an unmapped page, beside torch's own allocator.

guards = Guards(Options(align=512))
placed = guards.place(tensor)  # a copy whose last byte is followed, after rounding, by unmapped memory
kernel(placed.tensor)
placed.free()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .library import FenceError, Library, library_path
from .options import Options

if TYPE_CHECKING:
    import torch


@dataclass
class Placed:
    """A copy of a tensor in memory of the fence; `tensor` must not be used after `free`."""

    tensor: torch.Tensor
    address: int
    library: Library
    device: int

    def free(self) -> None:
        """Give the memory back once the card is done with it; after a fault nothing happens."""
        self.library.free(self.address, self.device)


class Guards:
    """Places tensors; the fence is not torch's allocator then.

    Raises:
        FenceError: the fence's library is missing or refuses the options.
    """

    def __init__(self, options: Options, library: Library | None = None) -> None:
        self._library = library or Library(library_path(options))
        self._library.configure(options, streams_recorded=False)

    def place(self, tensor: torch.Tensor) -> Placed:
        """A contiguous copy of a CUDA tensor that is not empty.

        Raises:
            FenceError: the card has no memory for it.
        """
        import torch

        size = tensor.numel() * tensor.element_size()
        device = tensor.device.index or 0
        address = self._library.malloc(size, device)
        if not address:
            raise FenceError(f"The card has no {size} bytes left for a guarded copy; end what else uses it.")
        copy = torch.as_tensor(_Bytes(address, size), device=tensor.device).view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor)
        return Placed(copy, address, self._library, device)


class _Bytes:
    """Raw device memory, as torch.as_tensor takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }
