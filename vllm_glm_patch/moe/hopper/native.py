"""libglm_hopper.so through ctypes: its structures and functions as csrc/hopper/host/glm_hopper.h declares them."""

from __future__ import annotations

import ctypes as C
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .errors import HopperError

LIBRARY = Path(__file__).with_name("libglm_hopper.so")
DRIVER = "libcuda.so.1"


class Family(enum.IntEnum):
    """What a kernel does; kernels of one family take the same arguments (abi.h)."""

    GEMM1 = 0
    GEMM2 = 1
    GEMM1_DECODE = 2
    GEMM2_DECODE = 3
    SUM = 4
    PROLOGUE = 5
    GEMM2_RING = 6


@dataclass(frozen=True)
class Kernel:
    """One row of abi.h's table. `number` is its place there; tile_rows is the BLOCK_M of the tile list that it reads."""

    number: int
    name: str
    source: str
    family: Family
    tile_rows: int
    tile_columns: int
    cluster: int


@dataclass(frozen=True)
class CacheStats:
    """Counts of the tensor maps' cache."""

    hits: int
    misses: int
    evictions: int
    entries: int
    capacity: int


@dataclass(frozen=True)
class Resources:
    """What a loaded kernel takes: registers a thread; bytes of local memory (spills), of shared memory, and its limit."""

    registers: int
    local_bytes: int
    static_shared: int
    dynamic_shared_limit: int


class Layer(C.Structure):
    """GlmHopperLayer: device addresses, then sizes. See the header for each member's shape."""

    _fields_: ClassVar = [
        *(
            (name, C.c_void_p)
            for name in (
                "tokens",
                "token_scales",
                "w13",
                "w13_scales",
                "w2",
                "w2_scales",
                "act",
                "act_quantised",
                "act_scales",
                "topk_weights",
                "partial",
                "out",
                "local_ids",
                "rows",
                "tiles",
                "counts",
                "band_tiles",
                "hidden",
                "topk_ids",
                "expert_map",
                "histogram",
            )
        ),
        ("w13_stride", C.c_int64),
        ("w2_stride", C.c_int64),
        *(
            (name, C.c_int32)
            for name in (
                "tokens_count",
                "hidden_size",
                "intermediate_size",
                "experts",
                "top_k",
                "max_tiles",
                "slice",
                "slots",
                "band",
                "multiprocessors",
                "weight_promotion",
                "programmatic",
                "global_experts",
                "tile_rows_1",
                "tile_rows_2",
                "wide_ids",
                "early_steps",
                "early_items",
            )
        ),
    ]


class _Kernel(C.Structure):
    _fields_: ClassVar = [
        ("name", C.c_char_p),
        ("source", C.c_char_p),
        ("family", C.c_int32),
        ("tile_rows", C.c_int32),
        ("tile_columns", C.c_int32),
        ("cluster", C.c_int32),
    ]


class _CacheStats(C.Structure):
    _fields_: ClassVar = [(name, C.c_int64) for name in CacheStats.__dataclass_fields__]


class _Resources(C.Structure):
    _fields_: ClassVar = [(name, C.c_int32) for name in Resources.__dataclass_fields__]


class Native:
    """The loaded library. It needs no CUDA until `open`.

    Raises:
        HopperError: the file is missing or cannot be loaded.
    """

    def __init__(self, path: Path = LIBRARY) -> None:
        try:
            library = C.CDLL(str(path))
        except OSError as error:
            raise HopperError(f"{path} cannot be loaded: {error}. Reinstall vllm-glm-patch from its wheel.") from None
        library.glm_hopper_driver_function.restype = C.c_char_p
        library.glm_hopper_driver_function.argtypes = [C.c_int, C.POINTER(C.c_int)]
        library.glm_hopper_open.argtypes = [C.POINTER(C.c_void_p), C.c_int]
        library.glm_hopper_last_error.restype = C.c_char_p
        library.glm_hopper_kernel.argtypes = [C.c_int, C.POINTER(_Kernel)]
        library.glm_hopper_load.argtypes = [C.c_int, C.c_char_p, C.c_char_p]
        library.glm_hopper_resources.argtypes = [C.c_int, C.c_int, C.POINTER(_Resources)]
        library.glm_hopper_run.argtypes = [C.c_int, C.c_void_p, C.POINTER(Layer), C.POINTER(C.c_int32), C.c_int]
        library.glm_hopper_cache_stats.restype = None
        library.glm_hopper_cache_stats.argtypes = [C.POINTER(_CacheStats)]
        library.glm_hopper_cache_resize.restype = None
        library.glm_hopper_cache_resize.argtypes = [C.c_int64]
        library.glm_hopper_close.restype = None
        self._library = library
        self._run = library.glm_hopper_run
        self.abi_version: int = library.glm_hopper_abi_version()
        self.kernels = self._read_kernels()
        self.by_name = {kernel.name: kernel for kernel in self.kernels}
        self.sources = tuple(dict.fromkeys(kernel.source for kernel in self.kernels))

    def _read_kernels(self) -> tuple[Kernel, ...]:
        rows: list[Kernel] = []
        row = _Kernel()
        while self._library.glm_hopper_kernel(len(rows), C.byref(row)):
            family = Family(row.family)
            names = row.name.decode(), row.source.decode()
            rows.append(Kernel(len(rows), *names, family, row.tile_rows, row.tile_columns, row.cluster))
        return tuple(rows)

    def open(self, driver: str = DRIVER) -> None:
        """Gives the library the CUDA driver's functions.

        Raises:
            HopperError: there is no driver, it is too old, or it does not start.
        """
        try:
            library = C.CDLL(driver)
        except OSError as error:
            raise HopperError(
                f"The CUDA driver {driver} cannot be loaded: {error}. Install one, or use the Triton kernels."
            ) from None
        addresses: list[int | None] = []
        optional = C.c_int()
        while name := self._library.glm_hopper_driver_function(len(addresses), C.byref(optional)):
            function = getattr(library, name.decode(), None)  # None where it is missing, which the library judges
            addresses.append(C.cast(function, C.c_void_p).value if function else None)
        self._check(self._library.glm_hopper_open((C.c_void_p * len(addresses))(*addresses), len(addresses)))

    def load(self, device: int, source: str, image: bytes) -> None:
        """Loads the cubin of one source on one device.

        Raises:
            HopperError: with the driver's code if it refuses the image; −1 if the image is not as abi.h says.
        """
        self._check(self._library.glm_hopper_load(device, source.encode(), image))

    def run(self, device: int, stream: int, layer: Layer, kernels: C.Array[C.c_int32]) -> None:
        """Launches kernels by number, in order, on a stream (its address) of the device. Does not wait for them.

        Raises:
            HopperError: a kernel is not loaded, cannot serve the layer, or the driver refuses the launch.
        """
        if code := self._run(device, stream, layer, kernels, len(kernels)):
            self._check(code)

    def resources(self, device: int, kernel: Kernel) -> Resources:
        """What a loaded kernel takes.

        Raises:
            HopperError: it is not loaded on this device.
        """
        row = _Resources()
        self._check(self._library.glm_hopper_resources(device, kernel.number, C.byref(row)))
        return Resources(*(getattr(row, name) for name in Resources.__dataclass_fields__))

    def cache_stats(self) -> CacheStats:
        """Counts of the tensor maps' cache."""
        row = _CacheStats()
        self._library.glm_hopper_cache_stats(C.byref(row))
        return CacheStats(*(getattr(row, name) for name in CacheStats.__dataclass_fields__))

    def cache_resize(self, capacity: int) -> None:
        """Keeps at most so many tensor maps."""
        self._library.glm_hopper_cache_resize(capacity)

    def close(self) -> None:
        """Unloads everything; only where nothing is running and no graph will be replayed."""
        self._library.glm_hopper_close()

    def _check(self, code: int) -> None:
        if code:
            raise HopperError(self._library.glm_hopper_last_error().decode(errors="replace"), code)


def numbers(*kernels: Kernel) -> C.Array[C.c_int32]:
    """Kernels as `Native.run` takes them."""
    return (C.c_int32 * len(kernels))(*(kernel.number for kernel in kernels))
