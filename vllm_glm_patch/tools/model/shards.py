"""Writes tensors as safetensors shards with an index, one piece at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from vllm_glm_patch.tools.model.tensors import DTYPE_BYTES, Tensor


def split(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Cut the tensors into shards of at most `shard_bytes`; a larger tensor gets a shard of its own."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_shards(
    folder: Path,
    shards: list[list[Tensor]],
    bytes_of: Callable[[Tensor], Iterable[bytes]],
    wrote: Callable[[int], None],
) -> None:
    """Write `model-00001-of-0000N.safetensors` … and `model.safetensors.index.json` into `folder`.

    Args:
        folder: where to; it exists.
        shards: as `split` gives them.
        bytes_of: the bytes of one tensor, in pieces.
        wrote: called with the size of each piece once it is written.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Wide dtypes first, so that each tensor starts at a multiple of its own size.
        ordered = sorted(shard, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
        with (folder / name).open("wb") as file:
            file.write(_header(ordered))
            for tensor in ordered:
                weight_map[tensor.name] = name
                for piece in bytes_of(tensor):
                    file.write(piece)
                    wrote(len(piece))
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _header(tensors: list[Tensor]) -> bytes:
    """Length and JSON as the safetensors format asks, padded so that the data starts at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
