"""Answers what is asked of torch's caching allocator, which raises under any other allocator.

`allocated` counts mapped memory: under the fence a block of one byte takes a page of 2 MiB, and vLLM sizes its KV cache
by what the card gives up, not by what was asked for. The latter is in `requested_bytes`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .library import Counter, Library

_POOLS = ("all", "small_pool", "large_pool")  # everything is in large_pool here
_COUNTED = {
    "allocation": "blocks",
    "segment": "segments",
    "active": "blocks",
    "allocated_bytes": "allocated_bytes",
    "reserved_bytes": "reserved_bytes",
    "active_bytes": "allocated_bytes",
    "requested_bytes": "requested_bytes",
    "inactive_split": "",
    "inactive_split_bytes": "",
}
_FIELDS = ("current", "peak", "allocated", "freed")


class Accounting:
    """The functions, bound to one torch and one library. Each takes a device as torch's own does."""

    def __init__(self, torch: Any, library: Library):
        self._torch = torch
        self._library = library

    def _device(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        if device is not None:
            index = self._torch.device(device).index
            if index is not None:
                return int(index)
        return int(self._torch.cuda.current_device()) if self._torch.cuda.is_initialized() else 0

    def memory_stats_as_nested_dict(self, device: Any = None) -> dict[str, Any]:
        stats = self._library.stats(self._device(device))
        nested: dict[str, Any] = {}
        for name, source in _COUNTED.items():
            counter = getattr(stats, source) if source else Counter()
            counts = {field: getattr(counter, field) for field in _FIELDS}
            nested[name] = {pool: counts if pool != "small_pool" else dict.fromkeys(_FIELDS, 0) for pool in _POOLS}
        for name in ("oversize_allocations", "oversize_segments"):
            nested[name] = dict.fromkeys(_FIELDS, 0)
        nested.update(num_alloc_retries=stats.retries, num_ooms=stats.out_of_memory, max_split_size=-1)
        nested.update(num_sync_all_streams=0, num_device_alloc=stats.segments.allocated)
        nested.update(num_device_free=stats.segments.freed)
        nested["fence"] = {name: getattr(stats, name) for name in ("waiting_bytes", "idle_bytes", "graph_bytes", "granularity")}
        return nested

    def memory_stats(self, device: Any = None) -> OrderedDict[str, int]:
        flat: dict[str, int] = {}

        def flatten(prefix: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    flatten(f"{prefix}.{key}" if prefix else key, inner)
            else:
                flat[prefix] = value

        flatten("", self.memory_stats_as_nested_dict(device))
        return OrderedDict(sorted(flat.items()))

    def memory_allocated(self, device: Any = None) -> int:
        return int(self._library.stats(self._device(device)).allocated_bytes.current)

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(self._library.stats(self._device(device)).allocated_bytes.peak)

    def memory_reserved(self, device: Any = None) -> int:
        return int(self._library.stats(self._device(device)).reserved_bytes.current)

    def max_memory_reserved(self, device: Any = None) -> int:
        return int(self._library.stats(self._device(device)).reserved_bytes.peak)

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._library.reset_peak(self._device(device))

    def reset_accumulated_memory_stats(self, device: Any = None) -> None:
        """Accumulated counts are not reset: nothing that runs under the fence needs it."""

    def empty_cache(self) -> None:
        self._library.empty_cache()

    def memory_snapshot(self, mempool_id: Any = None, include_traces: bool = True) -> list[dict[str, Any]]:
        """The live blocks, each as a segment of its own."""
        return [
            {
                "device": block.device,
                "address": block.mapped_begin,
                "total_size": block.mapped_end - block.mapped_begin,
                "allocated_size": block.size,
                "active_size": block.size,
                "requested_size": block.size,
                "stream": block.stream,
                "segment_type": "large",
                "segment_pool_id": (0, 0),
                "is_expandable": False,
                "frames": [],
                "blocks": [
                    {
                        "address": block.address,
                        "size": block.mapped_end - block.address,
                        "requested_size": block.size,
                        "state": "active_allocated",
                        "frames": [],
                    }
                ],
            }
            for block in self._library.snapshot()
        ]


_CUDA_ONLY = ("memory_snapshot", "memory_stats_as_nested_dict")
_EVERYWHERE = (
    "memory_stats",
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_peak_memory_stats",
    "reset_accumulated_memory_stats",
    "empty_cache",
)


def install(torch: Any, library: Library) -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """Puts the answers where torch has the questions.

    Returns:
        (module, name, original) of each replaced function, for `uninstall`.
    """
    accounting = Accounting(torch, library)
    accelerator = getattr(torch, "accelerator", None)
    places = [
        (torch.cuda, _EVERYWHERE + _CUDA_ONLY),
        (torch.cuda.memory, _EVERYWHERE + _CUDA_ONLY),
        (accelerator, _EVERYWHERE),
        (getattr(accelerator, "memory", None), _EVERYWHERE),
    ]
    replaced = []
    for module, names in places:
        for name in names:
            if module is not None and hasattr(module, name):
                replaced.append((module, name, getattr(module, name)))
                setattr(module, name, getattr(accounting, name))
    return replaced


def uninstall(replaced: list[tuple[ModuleType, str, Callable[..., Any]]]) -> None:
    for module, name, original in reversed(replaced):
        setattr(module, name, original)
