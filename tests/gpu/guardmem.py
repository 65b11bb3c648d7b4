"""GPU memory that ends at an unmapped page, seen as a PyTorch tensor.

Reading one byte past such a tensor is an illegal memory access at once, on any card,
whatever else is allocated. Needs only libcuda and PyTorch.
"""

import ctypes as C

import torch

GRANULARITY = 2 << 20  # bytes; what cuMemCreate maps at least, and PyTorch's small segment


class _Location(C.Structure):
    _fields_ = [("type", C.c_int), ("id", C.c_int)]


class _Flags(C.Structure):
    _fields_ = [("compression", C.c_ubyte), ("rdma", C.c_ubyte), ("usage", C.c_ushort), ("reserved", C.c_ubyte * 4)]


class _Properties(C.Structure):
    _fields_ = [("type", C.c_int), ("handles", C.c_int), ("location", _Location), ("win32", C.c_void_p), ("flags", _Flags)]


class _Access(C.Structure):
    _fields_ = [("location", _Location), ("flags", C.c_int)]


def _cuda(function, *args):
    status = getattr(C.CDLL("libcuda.so.1"), function)(*args)
    if status:
        raise RuntimeError(f"{function} returned {status}")


def mapped_end(nbytes):
    """Map at least `nbytes`; return the address where mapped memory ends and an unmapped page begins."""
    torch.cuda.current_stream().synchronize()
    here = _Location(1, torch.cuda.current_device())
    size = -(-nbytes // GRANULARITY) * GRANULARITY
    address, handle = C.c_uint64(), C.c_uint64()
    _cuda(
        "cuMemAddressReserve",
        C.byref(address),
        C.c_size_t(size + GRANULARITY),
        C.c_size_t(GRANULARITY),
        C.c_uint64(0),
        C.c_ulonglong(0),
    )
    properties = _Properties(1, 0, here, None, _Flags())
    _cuda("cuMemCreate", C.byref(handle), C.c_size_t(size), C.byref(properties), C.c_ulonglong(0))
    _cuda("cuMemMap", address, C.c_size_t(size), C.c_size_t(0), handle, C.c_ulonglong(0))
    access = _Access(here, 3)
    _cuda("cuMemSetAccess", address, C.c_size_t(size), C.byref(access), C.c_size_t(1))
    return address.value + size


def guarded(tensor, slack=None):
    """A copy of `tensor` that ends `slack` bytes before an unmapped page.

    slack=None leaves what PyTorch's allocator would: it rounds a block up to 512 bytes.
    """
    n = tensor.numel() * tensor.element_size()
    slack = -n % 512 if slack is None else slack
    start = mapped_end(n + slack) - slack - n

    class Bytes:
        __cuda_array_interface__ = {"shape": (n,), "typestr": "|u1", "data": (start, False), "version": 2}

    copy = torch.as_tensor(Bytes(), device="cuda").view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    torch.cuda.synchronize()
    return copy
