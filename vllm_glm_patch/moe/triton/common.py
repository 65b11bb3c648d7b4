"""What the kernels share: FP8 rounding, SwiGLU, and turning any routing id into a safe expert number."""

from __future__ import annotations

import os

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.5 cannot launch that way: dispatch.dependent_launch says no, and no kernel asks

    @triton.jit
    def gdc_wait():
        """Nothing to wait for."""

    @triton.jit
    def gdc_launch_dependents():
        """Nobody to let go."""


# Triton's CPU interpreter rounds FP8 ties away from zero and loses carries into the smallest normal numbers
# (seen with Triton 3.6), so there the rounding is done by arithmetic first and the cast is exact.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

# Largest E4M3 number, and the smallest scale vLLM's quantisation lets through: 1 / (448 · 512).
FP8_MAX = tl.constexpr(448.0)
MIN_SCALE = tl.constexpr(1.0 / (448.0 * 512.0))


@triton.jit
def begin(PDL: tl.constexpr):
    """Under programmatic dependent launch: wait until the kernel before has finished, then let the one after start.

    In this order, so that a running kernel knows everything but its direct predecessor to be finished: whatever was
    written two launches ago or earlier may be read before this call. Nothing may be written before it.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def read_tile(tiles, max_tiles, tile):
    """A tile of one of routing.py's lists: its expert (int64), its first row in the grouped order, and its rows."""
    expert = tl.load(tiles + tile).to(tl.int64)
    first_row = tl.load(tiles + max_tiles + tile)
    size = tl.load(tiles + 2 * max_tiles + tile)
    return expert, first_row, size


@triton.jit
def load_block(row_starts, k0, k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k0 + k [BLOCK_K] of rows of WIDTH that start at these pointers [·]: [·, BLOCK_K], zeros past the rows' end.

    Without a mask where WIDTH is a whole number of blocks.
    """
    if WIDTH % BLOCK_K == 0:
        return tl.load(row_starts[:, None] + (k0 + k)[None, :])
    return tl.load(row_starts[:, None] + (k0 + k)[None, :], mask=(k0 + k)[None, :] < WIDTH, other=0.0)


@triton.jit
def prefetch(start, size, BLOCK: tl.constexpr):
    """Ask for `size` bytes (up to 128 · BLOCK) from pointer `start` on to be brought into L2, 128 bytes a request."""
    line = tl.minimum(128 * tl.arange(0, BLOCK), size - 1)
    ask(start.to(tl.uint64) + line.to(tl.uint64))


@triton.jit
def ask(where):
    """Ask for the lines of 128 bytes at these addresses (uint64) to be brought into L2."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [where], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def quantisation_scale(amax):
    """Per-token scale of FP8 values: amax / 448, no smaller than MIN_SCALE. fp32 in, fp32 out."""
    return tl.maximum(tl.div_rn(amax, FP8_MAX), MIN_SCALE)


@triton.jit
def to_fp8(x, scale):
    """x / scale → E4M3, to nearest, ties to even, clamped to ±448. Both fp32, of shapes that broadcast.

    The quotient is IEEE's, as in vLLM's quantisation: bf16 values often lie on a tie, which a bare reciprocal would
    move. On the card it is made from the reciprocal and one exact remainder (Markstein), without branches.
    """
    if INTERPRETED:
        x, scale = tl.broadcast(x, scale)
        x = tl.div_rn(x, scale)
    else:
        inverse = tl.div_rn(1.0, scale)
        quotient = x * inverse
        x = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    x = tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)
    if INTERPRETED:
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
        # One step of the E4M3 grid at this magnitude: 3 mantissa bits, subnormal below 2**-6.
        step_exponent = tl.maximum(exponent - 127, -6) - 3
        step = ((step_exponent + 127) << 23).to(tl.float32, bitcast=True)
        magic = 12582912.0  # 1.5 · 2**23: adding and subtracting it rounds to an integer, ties to even
        x = ((x / step + magic) - magic) * step
    return x.to(tl.float8e4nv)


@triton.jit
def swiglu(gate, up):
    """silu(gate) · up in fp32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def clean_expert(
    ids,
    offsets,
    mask,
    expert_map,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    """Local expert of each pair, int32 in [0, EXPERTS], where EXPERTS stands for «none here».

    Any integer is allowed in `ids` (int32 or int64) and in `expert_map` (int32): values that name no local expert,
    negative ones included, become EXPERTS and are never used as an address.
    """
    wanted = tl.load(ids + offsets, mask=mask, other=-1)
    known = (wanted >= 0) & (wanted < GLOBAL_EXPERTS)
    if HAS_MAP:
        local = tl.load(expert_map + tl.where(known, wanted, 0), mask=mask & known, other=-1)
        known = known & (local >= 0) & (local < EXPERTS)
    else:
        local = wanted
    return tl.where(known, local, EXPERTS).to(tl.int32)
