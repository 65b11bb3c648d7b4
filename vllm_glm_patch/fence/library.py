"""libglm_fence.so through ctypes: its structures and functions as csrc/fence/glm_fence.h declares them."""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path
from typing import ClassVar, cast

from ..errors import UserError
from .options import Options, journal_path, launch_path, watch_path

JOURNAL_SLOTS = 1 << 20
STACK_FUNCTION = C.CFUNCTYPE(C.c_uint32, C.c_size_t, C.c_int)


class FenceError(UserError):
    """The fence cannot be built up here; the message says why and what to do."""


class _Options(C.Structure):
    _fields_: ClassVar = [
        ("align", C.c_uint32),
        ("guard_before", C.c_uint32),
        ("poison", C.c_uint32),
        ("journal_slots", C.c_uint32),
        ("cache_bytes", C.c_uint64),
        ("only_low", C.c_uint64),
        ("only_high", C.c_uint64),
        ("slack", C.c_uint64),
        ("streams_recorded", C.c_uint32),
        ("journal", C.c_char_p),
        ("libcuda", C.c_char_p),
    ]


class _Launches(C.Structure):
    _fields_: ClassVar = [
        ("cupti", C.c_char_p),
        ("libcuda", C.c_char_p),
        ("record", C.c_char_p),
        ("stack", C.c_void_p),
        ("watch", C.c_char_p),
        ("looked", C.c_char_p),
    ]


class Counter(C.Structure):
    _fields_: ClassVar = [(name, C.c_int64) for name in ("current", "peak", "allocated", "freed")]


class Stats(C.Structure):
    """Counts of one device; bytes."""

    _fields_: ClassVar = [
        *((name, Counter) for name in ("allocated_bytes", "requested_bytes", "reserved_bytes", "blocks", "segments")),
        *(
            (name, C.c_int64)
            for name in ("retries", "out_of_memory", "waiting_bytes", "idle_bytes", "graph_bytes", "granularity")
        ),
    ]


class Block(C.Structure):
    """One block; also a row of the journal."""

    _fields_: ClassVar = [
        ("address", C.c_uint64),
        ("size", C.c_uint64),
        ("mapped_begin", C.c_uint64),
        ("mapped_end", C.c_uint64),
        ("stream", C.c_uint64),
        ("sequence", C.c_uint64),
        ("device", C.c_int32),
        ("state", C.c_uint32),
        ("stack", C.c_uint32),
        ("in_graph_pool", C.c_uint32),
    ]


class PoolId(C.Structure):
    _fields_: ClassVar = [("first", C.c_uint64), ("second", C.c_uint64)]


def library_path(options: Options) -> Path:
    """The library to load: `options.library`, else the one built into this package."""
    return Path(options.library) if options.library else Path(__file__).with_name("libglm_fence.so")


class Library:
    """The loaded library.

    Raises:
        FenceError: the file is missing or cannot be loaded.
    """

    def __init__(self, path: Path):
        try:
            self._native = C.CDLL(str(path))
        except OSError as error:
            raise FenceError(
                f"The fence's library {path} cannot be loaded: {error}. Reinstall vllm-glm-patch from its wheel, or "
                "build csrc/fence with CMake and name the file in VLLM_GLM_PATCH_FENCE_LIBRARY."
            ) from None
        self.path = path
        native = self._native
        native.glm_fence_malloc.restype = C.c_void_p
        native.glm_fence_malloc.argtypes = [C.c_size_t, C.c_int, C.c_void_p]
        native.glm_fence_free.restype = None
        native.glm_fence_free.argtypes = [C.c_void_p, C.c_size_t, C.c_int, C.c_void_p]
        native.glm_fence_record_stream.argtypes = [C.c_void_p, C.c_void_p]
        native.glm_fence_end_pool.argtypes = [C.c_int, PoolId]
        native.glm_fence_release_pool.argtypes = [C.c_int, PoolId]
        native.glm_fence_configure.argtypes = [C.POINTER(_Options)]
        native.glm_fence_last_error.restype = C.c_char_p
        native.glm_fence_stats.argtypes = [C.c_int, C.POINTER(Stats)]
        native.glm_fence_reset_peak.argtypes = [C.c_int]
        native.glm_fence_find.argtypes = [C.c_uint64, C.POINTER(Block)]
        native.glm_fence_snapshot.restype = C.c_size_t
        native.glm_fence_snapshot.argtypes = [C.POINTER(Block), C.c_size_t]
        native.glm_fence_set_stack_function.argtypes = [C.c_void_p]
        native.glm_fence_watch_launches.restype = None
        native.glm_fence_watch_launches.argtypes = [C.POINTER(_Launches)]
        self._stack_function: object = None
        self._launch_stack_function: object = None

    def configure(self, options: Options, streams_recorded: bool) -> None:
        """Sets the options; only before the first allocation.

        Raises:
            FenceError: the library refuses them.
        """
        journal = os.fsencode(journal_path(options.directory, "%p")) if options.directory else None
        native = _Options(
            align=options.align,
            guard_before=options.guard == "start",
            poison={"none": 0, "fresh": 1, "freed": 2, "both": 3}[options.poison],
            journal_slots=JOURNAL_SLOTS,
            cache_bytes=options.cache_mb << 20,
            only_low=options.only[0],
            only_high=options.only[1],
            slack=options.slack,
            streams_recorded=streams_recorded,
            journal=journal,
            libcuda=os.fsencode(options.libcuda),
        )
        if self._native.glm_fence_configure(C.byref(native)):
            raise FenceError(f"The fence refuses its options: {self.last_error()}.")

    def last_error(self) -> str:
        return cast(bytes, self._native.glm_fence_last_error()).decode(errors="replace")

    def pointer(self, name: str) -> int:
        """Address of an exported function, as torch's set_..._fn take it."""
        return C.cast(getattr(self._native, name), C.c_void_p).value or 0

    def malloc(self, size: int, device: int = 0, stream: int | None = None) -> int | None:
        return cast("int | None", self._native.glm_fence_malloc(size, device, stream))

    def free(self, address: int | None, device: int = 0, stream: int | None = None) -> None:
        self._native.glm_fence_free(address, 0, device, stream)

    def record_stream(self, address: int, stream: int) -> None:
        self._native.glm_fence_record_stream(address, stream)

    def empty_cache(self) -> None:
        self._native.glm_fence_empty_cache()

    def reap(self) -> None:
        self._native.glm_fence_reap()

    def release_graphs(self) -> None:
        self._native.glm_fence_release_graphs()

    def shutdown(self) -> None:
        self._native.glm_fence_shutdown()

    def stats(self, device: int) -> Stats:
        stats = Stats()
        self._native.glm_fence_stats(device, C.byref(stats))
        return stats

    def reset_peak(self, device: int) -> None:
        self._native.glm_fence_reset_peak(device)

    def find(self, address: int) -> Block | None:
        """The live block that holds `address`, or whose guard page does."""
        block = Block()
        return block if self._native.glm_fence_find(address, C.byref(block)) else None

    def snapshot(self) -> list[Block]:
        """All live blocks."""
        while True:
            room = self._native.glm_fence_snapshot(None, 0) + 64
            rows = (Block * room)()
            count = self._native.glm_fence_snapshot(rows, room)
            if count <= room:
                return list(rows[:count])

    def set_stack_function(self, function: object) -> None:
        """`function`: a STACK_FUNCTION, kept alive here; None takes it back."""
        self._native.glm_fence_set_stack_function(C.cast(function, C.c_void_p) if function else None)  # type: ignore[arg-type]
        self._stack_function = function

    def watch_launches(self, options: Options, cupti: str, stack_function: object = None, looked: str = "") -> None:
        """From the next allocation on, every launch is waited for; the first that faults goes to `options.directory`.

        Args:
            options: `directory` and `libcuda` are used.
            cupti: path or name of CUPTI's library. Where it cannot be used, standard error and a file beside the records say
                so (launches.py: Watch), and nothing is watched.
            stack_function: a STACK_FUNCTION, called in the thread of that launch and kept alive here; None for no stack.
            looked: for that file, where CUPTI was looked for.
        """
        self._launch_stack_function = stack_function
        native = _Launches(
            cupti=os.fsencode(cupti),
            libcuda=os.fsencode(options.libcuda),
            record=os.fsencode(launch_path(options.directory, "%p")),
            stack=C.cast(stack_function, C.c_void_p) if stack_function else None,  # type: ignore[arg-type]
            watch=os.fsencode(watch_path(options.directory, "%p")),
            looked=looked.encode(),
        )
        self._native.glm_fence_watch_launches(C.byref(native))

    def unwatch_launches(self) -> None:
        self._native.glm_fence_watch_launches(None)
