"""Which kernels, tiles and stages serve a shape: from a tuned table (tables.py), else from rules of thumb.

An entry serves token counts up to twice and down to half its own; between entries farther apart the rules below apply.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from packaging.version import Version

from . import tables
from .problem import Problem


@dataclass(frozen=True)
class Card:
    """What is read from the device. `shared_memory`: bytes one block may use. `index`: its number, None for a stand-in;
    two cards of the same make are equal."""

    name: str
    multiprocessors: int
    shared_memory: int
    capability: tuple[int, int]
    index: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Pairs:
    """The path of a handful of tokens (triton/pairs.py)."""

    columns1: int = 2
    warps1: int = 8
    columns2: int = 4
    warps2: int = 4


@dataclass(frozen=True)
class Gemm1:
    """kind: `tile` many tokens, `row` the same with whole rows and fused requantisation, `stream` few tokens.

    early: of `stream` with dependent launches, lines of 128 bytes of each weight row that a program asks into L2 before the
    routing is known, as if every expert had one tile: 0, or a power of two.
    """

    kind: Literal["tile", "row", "stream"] = "tile"
    block_m: int = 64
    block_n: int = 64
    block_k: int = 128
    group: int = 4
    warps: int = 4
    stages: int = 3
    early: int = 0

    def __post_init__(self) -> None:
        """ValueError on what the kernel cannot do."""
        if self.early < 0 or self.early & (self.early - 1):
            raise ValueError(f"GEMM1 asks for 0 or a power of two of lines early, got {self.early}")


@dataclass(frozen=True)
class Gemm2:
    """kind: `resident` rows stay in the tile (widths to 512), `loop` any width, `fused` resident with the sum inside.

    swap: weights on the dot's wide side. strip: columns one program makes. slice: columns whose partials exist at
    once, 0 for all. requantise: a small kernel makes FP8 first; else the rows are quantised as they are read. hints: ask
    L2 to keep partials until they are summed (not in `fused`).
    """

    kind: Literal["resident", "loop", "fused"] = "resident"
    block_m: int = 64
    block_n: int = 128
    block_k: int = 128
    strip: int = 128
    slice: int = 512
    slots: int = 3
    swap: bool = False
    requantise: bool = True
    group: int = 4
    warps: int = 4
    stages: int = 2
    programs: int = 3  # fused: programs per multiprocessor
    hints: bool = False

    def __post_init__(self) -> None:
        """ValueError on what the kernels cannot do."""
        if self.kind == "fused" and self.slots < 2:
            raise ValueError(f"fused GEMM2 needs 2 slots of partials or more, got {self.slots}: it would wait for itself")
        if self.kind == "fused" and (self.slice < 16 or self.slice & (self.slice - 1) or self.slice % self.strip):
            raise ValueError(f"fused GEMM2 needs a slice that is a power of two and holds whole strips, got {self.slice}")
        if self.kind != "loop" and self.strip % self.block_n:
            raise ValueError(f"a strip of {self.strip} columns is not a whole number of tiles of {self.block_n}")
        if self.slice % self.block_n or (self.kind != "loop" and self.slice % self.strip):
            raise ValueError(f"a slice of {self.slice} columns is not a whole number of tiles or strips")


@dataclass(frozen=True)
class Sum:
    """The top-k sum: tokens × columns of one program."""

    block_t: int = 4
    block_c: int = 512
    warps: int = 4


@dataclass(frozen=True)
class Config:
    """Everything that may differ between two launches of the same problem. Results differ by rounding only.

    pdl: programmatic dependent launch (compute capability 9.0 on), where `dependent_launch` says that Triton can.
    prologue: of the grouped path, `native` for the native one (hopper/prologue.py) where it can serve, with the same bits.

    Raises:
        ValueError: there is no such prologue.
    """

    path: Literal["pairs", "grouped"] = "grouped"
    pairs: Pairs = field(default_factory=Pairs)
    gemm1: Gemm1 = field(default_factory=Gemm1)
    gemm2: Gemm2 = field(default_factory=Gemm2)
    sum: Sum = field(default_factory=Sum)
    pdl: bool = False
    prologue: Literal["triton", "native"] = "triton"

    def __post_init__(self) -> None:
        """ValueError on what nobody can run."""
        if self.prologue not in ("triton", "native"):
            raise ValueError(f"prologue {self.prologue!r} is none; there are triton and native")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; parts that `path` does not use are left out."""
        whole = asdict(self)
        unused = ("gemm1", "gemm2", "sum", "prologue") if self.path == "pairs" else ("pairs",)
        return {key: value for key, value in whole.items() if key not in unused}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Config:
        """Inverse of to_dict; "backend" may stand beside it. Raises TypeError on a key this release does not know."""
        parts = {"pairs": Pairs, "gemm1": Gemm1, "gemm2": Gemm2, "sum": Sum}
        given = {key: value for key, value in data.items() if key != "backend"}
        gemm2 = given.get("gemm2")
        if isinstance(gemm2, dict) and gemm2.get("band") == 0:  # as written while a native kernel had bands of its own
            given["gemm2"] = {key: value for key, value in gemm2.items() if key != "band"}
        return Config(**{key: parts[key](**value) if key in parts else value for key, value in given.items()})


@functools.cache
def read_card(index: int | None) -> Card:
    """The CUDA device of that index, or for None a stand-in with H100's limits (Triton's interpreter on CPU)."""
    if index is None:
        return Card("interpreter", 4, 232448, (9, 0))
    import torch

    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)
    return Card(properties.name, properties.multi_processor_count, shared, (properties.major, properties.minor), index)


def triton_from(version: str) -> bool:
    """Whether this Triton is that version or a later one, a build of its development included."""
    import triton

    return Version(triton.__version__) >= Version(f"{version}.dev0")


@functools.cache
def dependent_launch() -> bool:
    """Whether this Triton starts a kernel before its predecessor has ended: from 3.5 on, and not in its interpreter.

    3.4.0 has gdc_wait, but its compiler cannot call it («unexpected keyword argument '_semantic'»).
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or not triton_from("3.5.0"):
        return False
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
        from triton.language.extra.cuda import gdc_wait  # noqa: F401
    except ImportError:
        return False
    return "launch_pdl" in CUDAOptions.__dataclass_fields__


def power_of_two(n: int) -> int:
    """Smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()


def split_width(width: int) -> tuple[int, int]:
    """A row of `width` as two power-of-two blocks: the largest that fits, and one that covers the rest (0: none)."""
    low = 1 << (width.bit_length() - 1)
    rest = width - low
    return low, max(32, power_of_two(rest)) if rest else 0


def fits_resident(intermediate_size: int) -> bool:
    """Whether a whole activation row can stay in a GEMM2 tile."""
    return 32 <= intermediate_size <= 512


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, card: Card) -> Config:
    """The configuration of the Triton kernels for a problem on a card."""
    entry = tables.entry(problem, card)
    if entry is not None and entry.get("backend", "triton") == "triton":
        return Config.from_dict(entry)
    return default_config(problem, card)


tables.when_changed(choose.cache_clear)


PAIRS_WIDTH = 384  # the widest experts whose first two tokens go by pairs


def default_config(problem: Problem, card: Card) -> Config:
    """Rules of thumb. `density`: rows an expert gets on average, which decides how tall tiles can be."""
    density = problem.pairs / problem.global_experts
    resident = fits_resident(problem.intermediate_size)
    # Wider experts and experts of several ranks lose by it: 0.3 – 0.8 of vLLM's speed on an H100 (docs/kernel-notes.md).
    if problem.tokens <= 2 and problem.intermediate_size <= PAIRS_WIDTH and problem.experts == problem.global_experts:
        wide = power_of_two(problem.intermediate_size)
        return Config(path="pairs", pairs=Pairs(columns2=max(1, min(4, 1024 // wide))))
    if density <= 24:
        block_m = 16 if density <= 8 else 32
        gemm1 = Gemm1("stream", block_m, 64, 128, 4, 4, 4)
        if resident:
            gemm2 = Gemm2("resident", block_m, 64, 64, strip=512, slice=0, swap=True, requantise=False, warps=4, stages=3)
        else:
            gemm2 = Gemm2("loop", block_m, 64, 128, slice=0, swap=True, warps=4, stages=4)
        return Config(gemm1=gemm1, gemm2=gemm2)
    block_m = 64 if density <= 96 else 128
    gemm1 = Gemm1("tile", block_m, 64, 128, 4, 4 if block_m == 64 else 8, 4)
    if resident:
        slice_width = 0 if problem.tokens <= 1024 else 256
        gemm2 = Gemm2("resident", 64, 128, 64, strip=128, slice=slice_width, warps=4, stages=2)
    else:
        slice_width = 0 if problem.tokens <= 1024 else 1024
        gemm2 = Gemm2("loop", block_m, 128, 128, slice=slice_width, warps=4 if block_m == 64 else 8, stages=4)
    config = Config(gemm1=gemm1, gemm2=gemm2)
    while config.gemm1.stages > 2 and shared_memory_of(config.gemm1) > card.shared_memory:
        config = Config(gemm1=Gemm1(**{**asdict(config.gemm1), "stages": config.gemm1.stages - 1}), gemm2=config.gemm2)
    return config


def shared_memory_of(gemm1: Gemm1) -> int:
    """Bytes of shared memory GEMM1's pipeline takes: its FP8 operand tiles × stages."""
    return (gemm1.block_m + 2 * gemm1.block_n) * gemm1.block_k * gemm1.stages
