"""The values of a tensor from its name and a seed, computed on the device; the same numbers on every device.

The distribution is that of the written checkpoint (`tools.model.weights`): 256 steps of the normal distribution, each an
exact E4M3 number, times the scale of a row. The bytes that choose the steps come from SplitMix64 (Steele, Lea and
Flood, «Fast splittable pseudorandom number generators», OOPSLA 2014), which is counted, not stepped: any part can be
computed alone, by a few integer operations that every device rounds alike. A generator of torch would depend on the device.
Every dtype is spelled out, for vLLM sets another default while it loads a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache

import torch

from vllm_glm_patch.tools.model.tensors import Tensor
from vllm_glm_patch.tools.model.weights import answer_strength, codes, step_std

_PIECE_ELEMENTS = 1 << 23  # 8 Mi elements: about 100 MiB at a time beside the tensor itself
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
_SCALE_SUFFIX = "_scale"
# The constants of SplitMix64, as the signed numbers torch has: the step of the counter, then shift and factor of each round.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def made(tensor: Tensor, seed: int, device: torch.device) -> torch.Tensor:
    """The values of one tensor of a checkpoint.

    Args:
        tensor: its name, dtype, shape and fill.
        seed: from 0 to 2^63 - 1.
        device: where to make it.

    Returns:
        A tensor of that shape and dtype on `device`.
    """
    if tensor.fill == "constant":
        return torch.full(tensor.shape, tensor.value, dtype=_DTYPES[tensor.dtype], device=device)
    if tensor.fill == "scale":
        return _row_scales([tensor.name], tensor, seed, device)[0]
    return _random(tensor, seed, device)


def made_alike(tensors: Sequence[Tensor], seed: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of tensors that differ in their names only, the same values as `made` gives.

    Some are made at once: the 160 experts of 89 layers are 85,000 tensors, and a kernel's start costs more than its work.
    """
    first = tensors[0]
    count = max(1, _PIECE_ELEMENTS // first.elements)
    for start in range(0, len(tensors), count):
        some = tensors[start : start + count]
        if len(some) == 1 or first.fill == "constant":
            for tensor in some:
                yield tensor.name, made(tensor, seed, device)
            continue
        names = [tensor.name for tensor in some]
        if first.fill == "scale":
            values = _row_scales(names, first, seed, device)
        else:
            values = torch.empty(
                len(some), first.shape[0], first.elements // first.shape[0], dtype=_DTYPES[first.dtype], device=device
            )
            _fill(values, _keys(names, seed, device), 0, _scales(names, first, seed, device))
        yield from zip(names, values.view(len(some), *first.shape).unbind())


def _random(tensor: Tensor, seed: int, device: torch.device) -> torch.Tensor:
    rows, columns = tensor.shape[0], tensor.elements // tensor.shape[0]
    step = max(8, _PIECE_ELEMENTS // columns // 8 * 8)  # 8 elements a draw: a piece must not end within one
    values = torch.empty(1, rows, columns, dtype=_DTYPES[tensor.dtype], device=device)
    keys, scales = _keys([tensor.name], seed, device), _scales([tensor.name], tensor, seed, device)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        _fill(values[:, piece], keys, start * columns // 8, None if scales is None else scales[:, piece])
    return values.view(tensor.shape)


def _fill(values: torch.Tensor, keys: torch.Tensor, first: int, scales: torch.Tensor | None) -> None:
    """Fill [tensors, rows, columns] from the draws of each from number `first` on, times scales [tensors, rows, 1]."""
    steps, numbers = _tables(values.device)
    elements = values[0].numel()
    draws = _draws(keys, first, -(-elements // 8))
    places = draws.view(torch.uint8)[:, :elements].int().flatten()
    if scales is None:
        values.view(torch.uint8)[:] = steps.index_select(0, places).view(values.shape)
    else:
        values[:] = numbers.index_select(0, places).view(values.shape).mul_(scales)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of [256]: the steps as E4M3 codes in uint8, and as numbers in float32."""
    steps = torch.from_numpy(codes())
    return steps.to(device), steps.view(torch.float8_e4m3fn).float().to(device)


def _scales(names: Sequence[str], alike: Tensor, seed: int, device: torch.device) -> torch.Tensor | None:
    """[tensors, rows, 1] float32: what the steps of each row are multiplied by; None where a tensor of its own says."""
    if alike.dtype == "F8_E4M3":
        return None
    rows = alike.shape[0]
    if alike.fill == "linear":
        return _row_scales([name + _SCALE_SUFFIX for name in names], alike, seed, device).float()
    scales = torch.full((len(names), rows, 1), alike.value / step_std(), dtype=torch.float32, device=device)
    return scales * answer_strength(rows).to(device) if alike.name == "lm_head.weight" else scales


def _row_scales(names: Sequence[str], alike: Tensor, seed: int, device: torch.device) -> torch.Tensor:
    """[tensors, rows, 1] bf16. Rows differ by up to a quarter, so a kernel that mixes up channels is found out."""
    uniform = _shifted(_draws(_keys(names, seed, device), 0, alike.shape[0]), 11).double() * 2.0**-53
    return ((0.75 + 0.5 * uniform) * (alike.value / step_std())).bfloat16().unsqueeze(-1)


def _keys(names: Sequence[str], seed: int, device: torch.device) -> torch.Tensor:
    """[tensors, 1] int64: where the random stream of each name begins."""
    digests = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
    keys = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(keys, dtype=torch.int64, device=device).unsqueeze(-1)


def _draws(keys: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """[tensors, count] int64: the draws from number `first` on of the random streams that begin at these keys."""
    state = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=keys.device).mul_(_GAMMA) + keys
    for shift, factor in _ROUNDS:
        state.bitwise_xor_(_shifted(state, shift)).mul_(factor)
    return state


def _shifted(state: torch.Tensor, shift: int) -> torch.Tensor:
    """A shift to the right that brings in zeros; torch's own repeats the sign."""
    return (state >> shift).bitwise_and_(2 ** (64 - shift) - 1)
