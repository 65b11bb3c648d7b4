"""The values of a tensor from its name and a seed, computed on the device; the same numbers on every device.

The distribution is that of the written checkpoint (`tools.model.weights`): 256 steps of the normal distribution, each an
exact E4M3 number, times the scale of a row. The bytes that choose the steps come from SplitMix64 (Steele, Lea and
Flood, «Fast splittable pseudorandom number generators», OOPSLA 2014), which is counted, not stepped: any part can be
computed alone, by a few integer operations that every device rounds alike. A generator of torch would depend on the device.
Every dtype is spelled out, for vLLM sets another default while it loads a model.
"""

from __future__ import annotations

import hashlib
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
        return _row_scales(tensor.name, tensor.shape[0], tensor.value, seed, device)
    return _random(tensor, seed, device)


def _random(tensor: Tensor, seed: int, device: torch.device) -> torch.Tensor:
    rows, columns = tensor.shape[0], tensor.elements // tensor.shape[0]
    step = max(8, _PIECE_ELEMENTS // columns // 8 * 8)  # 8 elements a draw: a piece must not end within one
    steps, numbers = _tables(device)
    values = torch.empty(rows, columns, dtype=_DTYPES[tensor.dtype], device=device)
    scales = None if tensor.dtype == "F8_E4M3" else _scales(tensor, rows, seed, device)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        elements = count * columns
        draws = _draws(tensor.name, seed, start * columns // 8, -(-elements // 8), device)
        places = draws.view(torch.uint8)[:elements].int()
        if scales is None:
            values.view(torch.uint8)[start : start + count] = steps.index_select(0, places).view(count, columns)
        else:
            piece = numbers.index_select(0, places).view(count, columns)
            values[start : start + count] = piece.mul_(scales[start : start + count])
    return values.view(tensor.shape)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of [256]: the steps as E4M3 codes in uint8, and as numbers in float32."""
    steps = torch.from_numpy(codes())
    return steps.to(device), steps.view(torch.float8_e4m3fn).float().to(device)


def _scales(tensor: Tensor, rows: int, seed: int, device: torch.device) -> torch.Tensor:
    """[rows, 1] float32: what the steps of each row are multiplied by."""
    if tensor.fill == "linear":
        return _row_scales(tensor.name + _SCALE_SUFFIX, rows, tensor.value, seed, device).float()
    scales = torch.full((rows, 1), tensor.value / step_std(), dtype=torch.float32, device=device)
    return scales * answer_strength(rows).to(device) if tensor.name == "lm_head.weight" else scales


def _row_scales(name: str, rows: int, std: float, seed: int, device: torch.device) -> torch.Tensor:
    """[rows, 1] bf16. Rows differ by up to a quarter, so a kernel that mixes up channels is found out."""
    uniform = _shifted(_draws(name, seed, 0, rows, device), 11).double() * 2.0**-53
    return ((0.75 + 0.5 * uniform) * (std / step_std())).bfloat16().view(rows, 1)


def _draws(name: str, seed: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """[count] int64: the draws from number `first` on of the random stream that belongs to a name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    state = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    state.mul_(_GAMMA).add_(int.from_bytes(digest, "little", signed=True))
    for shift, factor in _ROUNDS:
        state.bitwise_xor_(_shifted(state, shift)).mul_(factor)
    return state


def _shifted(state: torch.Tensor, shift: int) -> torch.Tensor:
    """A shift to the right that brings in zeros; torch's own repeats the sign."""
    return (state >> shift).bitwise_and_(2 ** (64 - shift) - 1)
