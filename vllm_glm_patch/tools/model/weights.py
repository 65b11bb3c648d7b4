"""The bytes of a tensor from its name and a seed, a piece at a time, so that memory stays small.

Everything random is drawn from 256 steps of the normal distribution, each an exact E4M3 number, times a scale. A linear
layer has a bf16 scale a row. The FP8 checkpoint stores its steps and scales, the bf16 one their product: one seed is
the same model in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import numpy as np
import torch

from vllm_glm_patch.tools.model.tensors import Tensor
from vllm_glm_patch.tools.model.vocabulary import answerable_ids, end_ids

_E4M3_MAX = 448.0  # compressed-tensors puts the largest weight of a row there
_PIECE_ELEMENTS = 1 << 23  # 8 Mi elements: 32 MiB in float32
# A greedy answer of tiny ends after some 2000 tokens (seeds 0 to 2, 49152 tokens); at full strength after some 200.
_END_STRENGTH = 0.85
_SCALE_SUFFIX = "_scale"


def pieces(tensor: Tensor, seed: int) -> Iterator[bytes]:
    """The little-endian bytes of a tensor in row order, in pieces of at most 16 MiB (32 in float32)."""
    if tensor.fill == "constant":
        yield _as_bytes(torch.full(tensor.shape, tensor.value, dtype=_torch_dtype(tensor.dtype)))
    elif tensor.fill == "scale":
        yield _as_bytes(_row_scales(tensor.name, tensor.shape[0], tensor.value, seed))
    else:
        yield from _random(tensor, seed)


def _random(tensor: Tensor, seed: int) -> Iterator[bytes]:
    rows, columns = tensor.shape[0], tensor.elements // tensor.shape[0]
    step = max(8, _PIECE_ELEMENTS // columns // 8 * 8)  # 8 steps a draw: a piece must not end within one
    stream = _stream(tensor.name, seed)
    scales = _scales(tensor, rows, seed)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        draws = stream.random_raw(-(-count * columns // 8)).astype("<u8").tobytes()[: count * columns]
        drawn = draws.translate(codes().tobytes())
        if tensor.dtype == "F8_E4M3":
            yield drawn
            continue
        values = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values.view(count, columns) * scales[start : start + count]
        yield _as_bytes(values.to(_torch_dtype(tensor.dtype)))


def _scales(tensor: Tensor, rows: int, seed: int) -> torch.Tensor:
    """[rows, 1] float32: what the steps of each row are multiplied by."""
    if tensor.fill == "linear":
        return _row_scales(tensor.name + _SCALE_SUFFIX, rows, tensor.value, seed).float()
    scales = torch.full((rows, 1), tensor.value / step_std())
    return scales * answer_strength(rows) if tensor.name == "lm_head.weight" else scales


def answer_strength(vocab_size: int) -> torch.Tensor:
    """[vocab_size, 1] float32: what each row of lm_head is multiplied by, so that answers are readable and end."""
    strength = torch.zeros(vocab_size, 1, dtype=torch.float32)
    strength[answerable_ids(vocab_size)] = 1
    strength[end_ids(vocab_size)] = _END_STRENGTH
    return strength


def _row_scales(name: str, rows: int, std: float, seed: int) -> torch.Tensor:
    """[rows, 1] bf16. Rows differ by up to a quarter, so a kernel that mixes up channels is found out."""
    uniform = (_stream(name, seed).random_raw(rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((0.75 + 0.5 * uniform) * (std / step_std())).bfloat16().view(rows, 1)


@cache
def codes() -> np.ndarray:
    """[256] uint8: the E4M3 code of each of 256 equally likely steps of the normal distribution."""
    quantiles = torch.tensor([NormalDist().inv_cdf((step + 0.5) / 256) for step in range(256)], dtype=torch.float32)
    scaled = quantiles * (_E4M3_MAX / quantiles.max())
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


@cache
def step_std() -> float:
    """The standard deviation of those steps as numbers."""
    return float(torch.from_numpy(codes()).view(torch.float8_e4m3fn).float().std(correction=0))


def _stream(name: str, seed: int) -> np.random.SFC64:
    """A random stream of the tensor's own: its values depend on no other tensor and on no shard."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


def _torch_dtype(name: str) -> torch.dtype:
    return {"BF16": torch.bfloat16, "F32": torch.float32}[name]


def _as_bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()
