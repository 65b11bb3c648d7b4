"""The launches of one fused MoE call, in order, for a chosen configuration. Host work depends on shapes only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import routing
from .dispatch import Config, dependent_launch, power_of_two, split_width
from .problem import Problem
from .triton.gemm1 import gemm1_row_kernel, gemm1_stream_kernel, gemm1_tile_kernel
from .triton.gemm2 import gemm2_kernel, gemm2_loop_kernel, sum_kernel
from .triton.gemm2_fused import gemm2_sum_kernel
from .triton.pairs import pair_gemm1_kernel, pair_gemm2_kernel
from .triton.quantise import quantise_rows_kernel
from .workspace import TILE_BYTES, Layout, bins_of, layout, needs_requantise, slice_of


@dataclass(frozen=True)
class Tensors:
    """The tensors of one pass, checked and contiguous (op.py). expert_map may be None."""

    hidden: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    out: torch.Tensor


Launch = Callable[..., Any]


QUANTISED_AT_ONCE = 4096  # values of activations that one program requantises, padding included


def launch_now(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the current stream."""
    kernel[grid](*arguments, **options)


def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """Compile a kernel into Triton's cache, for arguments that may have no memory (meta tensors)."""
    return kernel.warmup(*arguments, grid=grid, **options)


class _Operands(NamedTuple):
    """What GEMM2 reads and writes, and its own list of tiles. quantised: its rows are FP8."""

    quantised: bool
    tensors: tuple[torch.Tensor, ...]
    tiles: torch.Tensor


class _Buffer:
    """A buffer of the workspace as an attribute of a pass, made when it is first asked for: functools.cached_property's lock
    costs as much again up to Python 3.11."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self._name, self._dtype = name, dtype

    def __set_name__(self, owner: type, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, one: Any, owner: type | None = None) -> torch.Tensor:
        if one is None:
            raise AttributeError(f"{self._attribute} is a buffer of a pass, not of the class")
        offset, size = one._plan.offsets[self._name]
        view: torch.Tensor = one._workspace[offset : offset + size - size % self._dtype.itemsize].view(self._dtype)
        one.__dict__[self._attribute] = view  # found before this from now on
        return view


class Pass:
    """One pass: views into the workspace and a method for each step. `run` calls them in order.

    band: tokens of a band, by which the prologue lists GEMM2's tiles for the native gemm2_sum; Triton's GEMM2 takes but one
    band (0). plan: the layout of this problem, configuration and band, where the caller has it. Views are made when a step asks
    for them: each costs the host more than a microsecond.
    """

    def __init__(
        self,
        problem: Problem,
        config: Config,
        tensors: Tensors,
        workspace: torch.Tensor,
        multiprocessors: int,
        launch: Launch = launch_now,
        band: int = 0,
        plan: Layout | None = None,
    ) -> None:
        self._launch = launch
        self.band, self.bands = band, routing.bands_of(problem.tokens, problem.top_k, band)
        self.pdl = config.pdl and dependent_launch()
        self.problem, self.config, self.t = problem, config, tensors
        self.multiprocessors = multiprocessors
        self._plan, self._workspace = plan or layout(problem, config, band), workspace
        # Absent tensors still need an argument; kernels never read it.
        self.map = tensors.expert_map if tensors.expert_map is not None else tensors.topk_ids
        self.routing_constants = {
            "EXPERTS": problem.experts,
            "GLOBAL_EXPERTS": problem.global_experts,
            "HAS_MAP": tensors.expert_map is not None,
        }
        if config.path == "grouped":
            self.max_tiles = self._plan.offsets["tiles"][1] // TILE_BYTES

    @property
    def buffers(self) -> tuple[dict[str, tuple[int, int]], torch.Tensor]:
        """(offset and bytes of each buffer by name, the workspace)."""
        return self._plan.offsets, self._workspace

    local_ids = _Buffer("local_ids", torch.int32)
    rows = _Buffer("rows", torch.int32)
    histogram = _Buffer("histogram", torch.int32)
    tiles = _Buffer("tiles", torch.int32)
    counts = _Buffer("counts", torch.int32)
    token_scales = _Buffer("token_scales", torch.float32)
    act = _Buffer("act", torch.bfloat16)
    act_quantised = _Buffer("act_quantised", torch.float8_e4m3fn)
    act_scales = _Buffer("act_scales", torch.float32)
    quantised = _Buffer("tokens_or_partial", torch.float8_e4m3fn)
    partial = _Buffer("tokens_or_partial", torch.bfloat16)
    band_tiles = _Buffer("band_tiles", torch.int32)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Start a kernel, before its predecessor has ended where that is wanted.

        first=True, for the first kernel of a pass: it starts as usual, since what came before is not ours and need not
        follow our order of waits.
        """
        first = options.pop("first", False)
        if self.pdl and not first:
            options["launch_pdl"] = True
        self._launch(kernel, grid, *arguments, PDL=self.pdl, **options)

    def run(self) -> None:
        """Launch every step on the current stream."""
        for _, step in self.steps():
            step()

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """(name, launch) of each step, in order; benchmarks time them one by one."""
        if self.config.path == "pairs":
            return [("gemm1", self.pair_gemm1), ("gemm2", self.pair_gemm2)]
        steps = [("prologue", self.prologue), ("gemm1", self.gemm1)]
        if needs_requantise(self.config):
            steps.append(("requantise", self.requantise))
        steps.append(("gemm2", self.gemm2))
        return steps

    def pair_gemm1(self) -> None:
        p, c, t = self.problem, self.config.pairs, self.t
        grid = (p.pairs, -(-p.intermediate_size // c.columns1))
        low, high = split_width(p.hidden_size)
        self.launch(
            pair_gemm1_kernel,
            grid,
            t.hidden,
            t.w13,
            t.w13_scale,
            self.act,
            t.topk_ids,
            self.map,
            t.w13.stride(0),
            p.hidden_size,
            HIDDEN=p.hidden_size,
            LOW=low,
            HIGH=high,
            INTERMEDIATE=p.intermediate_size,
            TOP_K=p.top_k,
            COLUMNS=c.columns1,
            num_warps=c.warps1,
            first=True,
            **self.routing_constants,
        )

    def pair_gemm2(self) -> None:
        p, c, t = self.problem, self.config.pairs, self.t
        grid = (p.tokens, -(-p.hidden_size // c.columns2))
        self.launch(
            pair_gemm2_kernel,
            grid,
            self.act,
            t.w2,
            t.w2_scale,
            t.topk_weights,
            t.out,
            t.topk_ids,
            self.map,
            t.w2.stride(0),
            HIDDEN=p.hidden_size,
            INTERMEDIATE=p.intermediate_size,
            WIDTH_BLOCK=power_of_two(p.intermediate_size),
            TOP_K=p.top_k,
            CHOICES=power_of_two(p.top_k),
            COLUMNS=c.columns2,
            num_warps=c.warps2,
            **self.routing_constants,
        )

    def prologue(self) -> None:
        """Quantise tokens and group pairs by expert."""
        p, c, t = self.problem, self.config, self.t
        if c.prologue == "native" and t.hidden.is_cuda and self._launch is launch_now:
            from .hopper import prologue  # not at once: who does not ask for native kernels need not load them

            if prologue.launch(self):
                return
        bins = bins_of(p.experts)
        blocks = {"BLOCK_M1": c.gemm1.block_m, "BLOCK_M2": c.gemm2.block_m, "DONE": routing.DONE}
        low, high = split_width(p.hidden_size)
        width = {"WIDTH": p.hidden_size, "LOW": low, "HIGH": high}
        if p.pairs <= routing.SMALL_PAIRS:
            block = max(16, power_of_two(p.pairs))
            self.launch(
                routing.prologue_small_kernel,
                (1 + -(-p.pairs // routing.SMALL_PLACE) + p.tokens,),
                t.hidden,
                self.quantised,
                self.token_scales,
                t.topk_ids,
                self.map,
                self.local_ids,
                self.rows,
                self.tiles,
                self.counts,
                p.pairs,
                self.max_tiles,
                BINS=bins,
                MOST_PAIRS=routing.SMALL_PAIRS,
                PAIRS_BLOCK=block,
                PLACE=routing.SMALL_PLACE,
                num_warps=8,
                first=True,
                **width,
                **blocks,
                **self.routing_constants,
            )
            return
        chunks = -(-p.pairs // routing.CHUNK)
        banded = self.bands > 1
        self.launch(
            routing.prologue_kernel,
            (chunks + p.tokens,),
            t.hidden,
            self.quantised,
            self.token_scales,
            t.topk_ids,
            self.map,
            self.local_ids,
            self.histogram,
            p.pairs,
            chunks,
            BINS=bins,
            CHUNK=routing.CHUNK,
            num_warps=4,
            first=True,
            **width,
            **self.routing_constants,
        )
        self.launch(
            routing.scan_kernel,
            (1,),
            self.histogram,
            self.tiles,
            self.counts,
            chunks,
            self.max_tiles,
            EXPERTS=p.experts,
            BINS=bins,
            ROWS=16,
            num_warps=8,
            **(blocks | {"BLOCK_M2": 0} if banded else blocks),
        )
        self.launch(
            routing.place_kernel,
            (-(-p.pairs // routing.PLACE) + (self.bands if banded else 0),),
            self.local_ids,
            self.histogram,
            self.rows,
            self.tiles,
            self.counts,
            self.band_tiles if banded else self.counts,  # which the kernel does not read then
            p.pairs,
            chunks,
            self.max_tiles,
            self.bands,
            self.band * p.top_k // routing.CHUNK,
            EXPERTS=p.experts,
            BINS=bins,
            CHUNK=routing.CHUNK,
            PLACE=routing.PLACE,
            STRIP=routing.STRIP,
            BAND_M=c.gemm2.block_m if banded else 0,
            num_warps=4,
        )

    def gemm1(self) -> None:
        p, c, t = self.problem, self.config.gemm1, self.t
        tiles = routing.max_tiles(p.pairs, p.experts, c.block_m)
        shared = (self.rows, self.tiles, self.counts, self.max_tiles, t.w13.stride(0))
        shape = {"HIDDEN": p.hidden_size, "INTERMEDIATE": p.intermediate_size, "TOP_K": p.top_k}
        launch = {"num_warps": c.warps, "num_stages": c.stages}
        if c.kind == "row":
            low, high = split_width(p.intermediate_size)
            self.launch(
                gemm1_row_kernel,
                (tiles,),
                self.quantised,
                self.token_scales,
                t.w13,
                t.w13_scale,
                self.act_quantised,
                self.act_scales,
                *shared,
                BLOCK_M=c.block_m,
                LOW=low,
                HIGH=high,
                BLOCK_K=c.block_k,
                **shape,
                **launch,
            )
            return
        kernel, early = gemm1_tile_kernel, {}
        if c.kind == "stream":
            lines = c.early if self.pdl else 0
            kernel, early = gemm1_stream_kernel, {"EARLY": lines, "EXPERTS": p.experts if lines else 0}
        self.launch(
            kernel,
            (tiles * -(-p.intermediate_size // c.block_n),),
            self.quantised,
            self.token_scales,
            t.w13,
            t.w13_scale,
            self.act,
            *shared,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            GROUP=c.group,
            **early,
            **shape,
            **launch,
        )

    def requantise(self) -> None:
        p = self.problem
        block = power_of_two(p.intermediate_size)
        rows = max(1, QUANTISED_AT_ONCE // block)
        self.launch(
            quantise_rows_kernel,
            (-(-p.pairs // rows),),
            self.act,
            self.act_quantised,
            self.act_scales,
            self.counts,
            WIDTH=p.intermediate_size,
            BLOCK=block,
            ROWS=rows,
            num_warps=4,
        )

    def gemm2(self) -> None:
        """GEMM2 and the top-k sum, slice by slice, or both in one launch."""
        p, c = self.problem, self.config.gemm2
        if c.kind == "fused":
            self._gemm2_fused()
            return
        width = slice_of(p, self.config)
        operands = self._gemm2_operands()
        for start in range(0, p.hidden_size, width):
            wide = min(width, p.hidden_size - start)
            self._gemm2_slice(start, wide, operands)
            self._sum_slice(start, wide)

    def _gemm2_operands(self) -> _Operands:
        t = self.t
        quantised = self.config.gemm1.kind == "row" or needs_requantise(self.config)
        act = self.act_quantised if quantised else self.act
        tensors = (act, self.act_scales, t.w2, t.w2_scale, t.topk_weights, self.partial)
        return _Operands(quantised, tensors, self.tiles[3 * self.max_tiles :])

    def _gemm2_slice(self, start: int, width: int, given: _Operands) -> None:
        p, c = self.problem, self.config.gemm2
        operands = given.tensors
        tiles = routing.max_tiles(p.pairs, p.experts, c.block_m)
        common = (self.rows, given.tiles, self.counts, self.max_tiles, self.t.w2.stride(0))
        shape = {"HIDDEN": p.hidden_size, "INTERMEDIATE": p.intermediate_size}
        if c.kind == "loop":
            self.launch(
                gemm2_loop_kernel,
                (tiles * -(-width // c.block_n),),
                *operands,
                *common,
                start,
                width,
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                SWAP=c.swap,
                HINTS=c.hints,
                num_warps=c.warps,
                num_stages=c.stages,
                **shape,
            )
            return
        low, high = split_width(p.intermediate_size)
        lines = -(-c.strip * p.intermediate_size // 128)
        self.launch(
            gemm2_kernel,
            (tiles * -(-width // c.strip),),
            *operands,
            *common,
            start,
            width,
            LOW=low,
            HIGH=high,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            STRIP=c.strip,
            QUANTISED=given.quantised,
            SWAP=c.swap,
            STAGES=c.stages,
            # The launch before a later slice is a sum, which makes none of what this one reads.
            EARLY=self.pdl and start > 0,
            HINTS=c.hints,
            PREFETCH=power_of_two(lines) if self.pdl and c.swap and lines <= 1024 else 0,
            num_warps=c.warps,
            **shape,
        )

    def _sum_slice(self, start: int, width: int) -> None:
        p, c = self.problem, self.config.sum
        grid = (-(-p.tokens // c.block_t) * -(-width // c.block_c),)
        self.launch(
            sum_kernel,
            grid,
            self.partial,
            self.local_ids,
            self.t.out,
            p.tokens,
            start,
            width,
            HIDDEN=p.hidden_size,
            EXPERTS=p.experts,
            TOP_K=p.top_k,
            BLOCK_T=c.block_t,
            BLOCK_C=c.block_c,
            EXACT=width % c.block_c == 0,
            HINTS=self.config.gemm2.hints,
            num_warps=c.warps,
        )

    def _gemm2_fused(self) -> None:
        p, c = self.problem, self.config.gemm2
        given = self._gemm2_operands()
        low, high = split_width(p.intermediate_size)
        width = slice_of(p, self.config)
        self.launch(
            gemm2_sum_kernel,
            (self.multiprocessors * c.programs,),
            *given.tensors,
            self.local_ids,
            self.t.out,
            self.rows,
            given.tiles,
            self.counts,
            self.counts[4:],
            p.tokens,
            self.max_tiles,
            self.t.w2.stride(0),
            HIDDEN=p.hidden_size,
            INTERMEDIATE=p.intermediate_size,
            EXPERTS=p.experts,
            TOP_K=p.top_k,
            LOW=low,
            HIGH=high,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            STRIP=c.strip,
            SLICE=width,
            SLOTS=c.slots,
            QUANTISED=given.quantised,
            STAGES=c.stages,
            BLOCK_T=self.config.sum.block_t,
            num_warps=c.warps,
        )
