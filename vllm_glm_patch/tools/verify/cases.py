"""What is checked: shapes, token counts, routings, and the grid of them. Data and pure functions; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SIDES = ("upstream", "ours")
GOOD = ("spread", "skewed", "collapsed")
BAD = ("minus-one", "past-end", "nan")
ROUTINGS = (*GOOD, *BAD)
"""minus-one and past-end: ids that name no expert; nan: some tokens and their router logits are NaN."""


@dataclass(frozen=True)
class Shape:
    """One rank's share of GLM-4.6: its expert width and how many of the experts it holds."""

    name: str
    intermediate_size: int
    experts: int
    global_experts: int = 160
    hidden_size: int = 5120
    top_k: int = 8


# TP8 first: the report that this project began with. EP: whole experts, a share of them on each rank.
SHAPES = (
    Shape("TP8", 192, 160),
    Shape("EP8", 1536, 20),
    Shape("TP4", 384, 160),
    Shape("TP2", 768, 160),
    Shape("TP1", 1536, 160),
    Shape("EP4", 1536, 40),
)

# Around every boundary of a tile, a swap of operands, a block of 512 bytes of scales and a step of vLLM's scheduler.
# The most telling first, so that a run that is cut short has seen them.
TOKENS = (
    8192, 8191, 8190, 8193, 1, 16, 15, 17, 32, 31, 33, 64, 63, 65, 128, 127, 129, 256, 255, 257, 512, 511, 513,
    1024, 1023, 1025, 2048, 2047, 2049, 4096, 4095, 4097, 8176, 16384, 16383, 16385,
)  # fmt: skip
FEW = (8192, 8191, 1, 16, 17, 64, 65, 1024, 16385)
QUICK_TOKENS = (8192, 8191, 8190, 8193, 16, 17, 1, 64, 1024)
QUICK_FEW = (8192, 17)


@dataclass(frozen=True)
class Kernel:
    """One thing that is called.

    Attributes:
        side: "upstream" or "ours".
        name: as in the table of results.
        routings: those that it depends on; one that does not look at ids has "spread" alone.
        counts: this vLLM with these patches would run it here, so a finding makes the exit code 1.
        absent: why it cannot be called here; "" where it can.
        most_tokens: larger counts are left out; 0: none are.
    """

    side: str
    name: str
    routings: tuple[str, ...] = GOOD
    counts: bool = True
    absent: str = ""
    most_tokens: int = 0

    @property
    def title(self) -> str:
        return f"{self.side} {self.name}"


@dataclass(frozen=True)
class Unit:
    """One kernel called once with one input."""

    side: str
    kernel: str
    shape: str
    routing: str
    tokens: int

    @property
    def id(self) -> str:
        return f"{self.side}/{self.kernel}/{self.shape}/{self.routing}/{self.tokens}"

    @classmethod
    def from_id(cls, text: str) -> Unit:
        side, kernel, shape, routing, tokens = text.split("/")
        return cls(side, kernel, shape, routing, int(tokens))


@dataclass(frozen=True)
class Grid:
    """What a run covers. `few`: the token counts of routings other than spread where the shape is not the first."""

    shapes: tuple[Shape, ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    few: tuple[int, ...] = FEW
    sides: tuple[str, ...] = SIDES
    whole: tuple[str, ...] = field(default=("TP8", "EP8"))
    """Shapes whose good routings are all tried at all counts."""

    def counts_of(self, shape: Shape, routing: str) -> Sequence[int]:
        """Token counts of a shape under a routing."""
        everywhere = routing == "spread" or (routing in GOOD and shape.name in self.whole)
        return self.tokens if everywhere else self.few

    def units(self, kernels: Iterable[Kernel]) -> list[Unit]:
        """All units, the most telling first: by shape, side, routing, tokens, kernel."""
        present = [kernel for kernel in kernels if not kernel.absent]
        return [
            Unit(side, kernel.name, shape.name, routing, tokens)
            for shape in self.shapes
            for side in self.sides
            for routing in ROUTINGS
            for tokens in self.counts_of(shape, routing)
            for kernel in present
            if kernel.side == side and routing in kernel.routings and (tokens <= kernel.most_tokens or not kernel.most_tokens)
        ]

    def shape(self, name: str) -> Shape:
        return next(shape for shape in self.shapes if shape.name == name)


def quick(grid: Grid) -> Grid:
    """The part of a grid that takes a minute."""
    few = tuple(count for count in QUICK_FEW if count in grid.tokens) or grid.tokens[:1]
    tokens = tuple(count for count in grid.tokens if count in QUICK_TOKENS) or grid.tokens
    return Grid(grid.shapes[:1], tokens, few, grid.sides, ())


def seconds(units: Iterable[Unit]) -> float:
    """A guess of how long these take on an H100 where nothing faults; the start and the compiling come on top.

    35 ms a unit for its inputs and its float64 rows, and the making of 8192 tokens' inputs 8 ms more.
    """
    return sum(0.035 + 1e-6 * unit.tokens for unit in units)
