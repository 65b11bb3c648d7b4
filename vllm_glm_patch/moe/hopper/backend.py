"""One pass of the fused MoE layer by the native kernels: which problems they serve, in which configuration, and the launches.

Tokens are quantised and grouped by expert by the Triton prologue (routing.py), which both backends share, into the same
workspace (workspace.py), or by a native one, which writes the same bits there (HopperConfig.prologue). One C call launches
the rest:

    many tokens, intermediate_size 192   gemm1_row · gemm2_sum (top_k other than 8)
    many tokens, wider                   gemm1_columns · (Triton) requantise · gemm2_sum
    many tokens                          the same GEMM1 · gemm2_ring, which reads partials through shared memory, or
                                         gemm2_turns, which also sends them off that way
    few tokens                           gemm1_decode · gemm2_decode · topk_sum

GEMM1 may also be Triton's, before any of these ways of GEMM2 (HopperConfig.gemm1 "triton").
It serves where it is asked for, by the setting or by a tuned table (backends.py): where it was measured to be faster.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from .. import routing, tables
from ..dispatch import Card, Config, Gemm1, Gemm2, triton_from
from ..pipeline import Pass, Tensors
from ..problem import Problem
from ..routing import bands_of
from ..workspace import TOKENS_PER_PASS, Layout, layout
from .errors import HopperError
from .library import loader
from .native import Family, Kernel, Layer, Native, numbers

CAPABILITY = (9, 0)
# Rows an expert gets on average up to which a decode kernel reads its weights once: its tallest tile.
DECODE_ROWS = 64
# Up to which the rules of thumb take one: at 13 it is 7 % faster than row_split and turns_lanes, at 26 11 % slower.
FEW_ROWS = 20
ROW_WIDTH = 192  # intermediate_size of glm_gemm1_row_*, which holds whole rows
SLOT_BYTES = 101_000_000  # of partials at once: three slots of 256 columns at 8192 tokens
SUM_TOKENS = 32  # of one sum item of GEMM2 by slices
DECODE_WIDTH = 1536  # the widest rows that glm_gemm2_decode_* holds
TRITON = "triton"  # as HopperConfig.gemm1 and .prologue
SLICED = (Family.GEMM2, Family.GEMM2_RING)  # GEMM2 with the sum by slices of columns, whose partials lie in memory
RING_TOP_K = 8  # the choices that Family.GEMM2_RING adds up; abi.h's ring_choices
RING_COLUMNS = 256  # of which its slices are a multiple; abi.h's ring_columns
PROLOGUES = (TRITON, "native", "native_c1", "native_c8")
PROLOGUE_EXPERTS = 511  # the most that glm_prologue_* counts; abi.h's prologue_experts
_logger = logging.getLogger("vllm_glm_patch")


@dataclass(frozen=True)
class HopperConfig:
    """Kernels by name. `slice` × `band`: columns × tokens whose partials exist at once, a phase; slice is a power of two; band
    0, or no less than the tokens there are, means all of them; `slots`: phases in flight; the three for
    glm_gemm2_sum_*, …_ring_* and …_turns_* only.
    `programmatic`: a kernel that knows how may start while the one before it ends, be that one of the prologue.
    `weight_promotion`: bytes that L2 fetches at once for weights, 128 or 256. `prologue`: "triton" or "native", whose routing
    is done by one block or a cluster as the pairs are few or many; "native_c1" and "native_c8" take either for any number.
    Triton's serves anyway where there are more than PROLOGUE_EXPERTS experts.
    `early_steps`, `early_items`: K steps of GEMM1's first tiles and items of GEMM2 a block, whose weights the kernels for many
    tokens ask into L2 while what runs before them ends, as if every expert had one tile: before they can know. Triton's GEMM1
    for few tokens does, too (dispatch.Gemm1.early: a power of two); the native one does not.

    Raises:
        ValueError: band is negative or not a multiple of 32, early_steps or early_items are negative, or there is no such
            prologue.
    """

    gemm1: str
    gemm2: str
    slice: int = 512
    slots: int = 3
    programmatic: bool = True
    weight_promotion: int = 128
    band: int = 0
    prologue: str = TRITON
    early_steps: int = 0
    early_items: int = 0

    def __post_init__(self) -> None:
        """ValueError on what no problem can be served with; what depends on top_k comes with the problem."""
        if self.band < 0 or self.band % SUM_TOKENS:
            raise ValueError(
                f"band {self.band} must be a multiple of {SUM_TOKENS} tokens, or 0 for one band of all: GEMM2's sums take"
                f" {SUM_TOKENS} tokens at a time"
            )
        if self.early_steps < 0 or self.early_items < 0:
            raise ValueError(f"early_steps {self.early_steps} and early_items {self.early_items} must not be negative")
        if self.prologue not in PROLOGUES:
            raise ValueError(f"prologue {self.prologue!r} is none; there are {', '.join(PROLOGUES)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `told` reads it."""
        return asdict(self)


def why_not(problem: Problem, device: torch.device | str) -> str | None:
    """Why the native kernels cannot serve this problem on this device; None if they can. Loads them if need be."""
    if reason := why_not_sizes(problem):
        return reason
    device = torch.device(device)
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    index = device.index if device.index is not None else torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(index)
    if capability != CAPABILITY:
        return f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, and the kernels are for 9.0"
    try:
        loader().on(index)
    except HopperError as error:
        return str(error)
    return None


def supports(problem: Problem, device: torch.device | str) -> bool:
    """Whether the native kernels serve this problem on this device. Loads them if need be."""
    return why_not(problem, device) is None


def why_not_sizes(problem: Problem) -> str | None:
    """The part of `why_not` that needs no device: abi.h, «Sizes any kernel can serve»."""
    if problem.hidden_size % 256:
        return f"hidden_size {problem.hidden_size} is not a multiple of 256"
    if problem.intermediate_size % 192:
        return f"intermediate_size {problem.intermediate_size} is not a multiple of 192"
    return None


def default_config(problem: Problem) -> HopperConfig:
    """Rules of thumb: the shortest tile that holds an expert's average share of rows; above 20 rows the prefill kernels."""
    density = problem.pairs / problem.global_experts
    if density <= FEW_ROWS and problem.intermediate_size <= DECODE_WIDTH:
        # Half again, since experts' shares differ.
        rows = next(rows for rows in (8, 16, 32) if 1.5 * density <= rows)
        return HopperConfig(f"glm_gemm1_decode_t{rows}", f"glm_gemm2_decode_t{rows}")
    return default_of_many(problem)


def default_of_many(problem: Problem) -> HopperConfig:
    """Rules of thumb among the kernels for many tokens, as measured on an H200 (docs/kernel-notes.md)."""
    whole_rows = problem.intermediate_size == ROW_WIDTH
    gemm1 = f"glm_gemm1_{'row' if whole_rows else 'columns'}_split"
    if problem.top_k != RING_TOP_K:
        return HopperConfig(gemm1, "glm_gemm2_sum_n256", 256, 2, prologue="native")
    # In rows of more than one stage the warpgroups that take turns copy their weights twice.
    gemm2 = f"glm_gemm2_{'turns_lanes' if whole_rows else 'ring'}_n256"
    return _fitted(problem, HopperConfig(gemm1, gemm2, RING_COLUMNS, problem.hidden_size // RING_COLUMNS, prologue="native"))


def _fitted(problem: Problem, config: HopperConfig) -> HopperConfig:
    """With no more slots than SLOT_BYTES hold, but two: a table's entry also serves counts up to twice its own. A pass of more
    than 8192 tokens may take as much more, as the tuner allows it."""
    rows = problem.pairs if config.band == 0 else min(problem.pairs, config.band * problem.top_k)
    most = SLOT_BYTES * max(8192, min(problem.tokens, TOKENS_PER_PASS)) // 8192
    return replace(config, slots=min(config.slots, max(2, most // (2 * rows * config.slice))))


def told(entry: Mapping[str, Any]) -> HopperConfig | None:
    """The configuration that an entry of a table has; None where it has none. Raises TypeError on a key that is not known."""
    given = {key: value for key, value in entry.items() if key not in ("backend", tables.OTHERWISE)}
    return HopperConfig(**given) if given else None


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, card: Card) -> HopperConfig:
    """The configuration for a problem: what a table's entry tells, where its kernels exist, else the rules of thumb."""
    entry = tables.entry(problem, card)
    found = told(entry) if entry is not None and entry.get("backend") == "hopper" else None
    if found is not None and (unknown := _unknown(found)):
        _warn_of_unknown(unknown)
        found = None
    return _fitted(problem, found) if found else default_config(problem)


def _unknown(config: HopperConfig) -> tuple[str, ...]:
    """Kernels of a configuration that this release does not have: another release's table may name them."""
    try:
        there = loader().native.by_name
    except HopperError:
        return ()  # nothing is served by native kernels here, and why_not says so
    return tuple(name for name in (config.gemm1, config.gemm2) if name != TRITON and name not in there)


@functools.lru_cache(maxsize=64)
def _warn_of_unknown(names: tuple[str, ...]) -> None:
    """Once for each: entries of many counts name the same kernels, and many counts have the same entry."""
    _logger.warning(
        "A tuned table names %s, which this release of vllm-glm-patch does not have: what it says there is left out, and the "
        "rules of thumb choose among the native kernels that there are. Tune again, or remove these entries.",
        " and ".join(names),
    )


tables.when_changed(choose.cache_clear)
tables.when_changed(_warn_of_unknown.cache_clear)


def triton_config(problem: Problem, config: HopperConfig, native: Native) -> Config:
    """The Triton configuration with the same tiles and buffers: what the shared prologue and workspace go by.

    Raises:
        HopperError: a kernel is unknown, or the two do not fit together.
    """
    second = _kernel(native, config.gemm2)
    first = None if config.gemm1 == TRITON else _kernel(native, config.gemm1)
    if first is None and second.family not in (*SLICED, Family.GEMM2_DECODE):
        raise HopperError(f"{second.name} is no GEMM2.")
    if second.family is Family.GEMM2_RING and (problem.top_k != RING_TOP_K or config.slice % RING_COLUMNS):
        raise HopperError(
            f"{second.name} adds up {RING_TOP_K} choices a token of slices that are a multiple of {RING_COLUMNS} columns, and"
            f" there are {problem.top_k} choices and slices of {config.slice}; choose glm_gemm2_sum_n{second.tile_columns}."
        )
    # The tiles of Triton's GEMM1 are those that were fastest at 8192 and 64 tokens on an H100 (moe/tuned).
    if second.family in SLICED and (first is None or first.family is Family.GEMM1):
        gemm2 = Gemm2("fused", second.tile_rows, strip=128, slice=config.slice, slots=config.slots, requantise=True)
        whole_rows = problem.intermediate_size == ROW_WIDTH if first is None else _writes_rows(first)
        kind: Literal["row", "tile"] = "row" if whole_rows else "tile"
        gemm1 = Gemm1(kind, first.tile_rows) if first else Gemm1(kind, 128, 64, 128, group=1, warps=8, stages=3)
    elif second.family is Family.GEMM2_DECODE and (first is None or first.family is Family.GEMM1_DECODE):
        gemm2 = Gemm2("resident", second.tile_rows, slice=0, requantise=False)
        rows = first.tile_rows if first else max(second.tile_rows, least_rows())
        early = config.early_steps if first is None else 0
        if early & (early - 1):
            raise HopperError(f"HopperConfig(early_steps={early}): Triton's GEMM1 asks for 0 or a power of two of lines early.")
        gemm1 = Gemm1("stream", rows) if first else Gemm1("stream", rows, 64, 256, warps=4, stages=5, early=early)
    else:
        raise HopperError(
            f"{config.gemm1} and {config.gemm2} do not go together: take GEMM1 and GEMM2 either both for few tokens "
            "(…_decode_…) or both for many."
        )
    return Config(gemm1=gemm1, gemm2=gemm2, pdl=config.programmatic)


@functools.lru_cache(maxsize=1)
def least_rows() -> int:
    """Rows of the least tile that this Triton multiplies: tl.dot of 3.3 and 3.4 refuses fewer than 16 on either side."""
    return 8 if triton_from("3.5.0") else 16


def band_of(config: HopperConfig, shared: Config) -> int:
    """Tokens of a band, of which the kernels for few tokens know nothing."""
    return config.band if shared.gemm2.kind == "fused" else 0


def prologue_of(problem: Problem, config: HopperConfig, native: Native) -> Kernel | None:
    """The native prologue that serves a problem; None for Triton's. Above a chunk of pairs a cluster routes."""
    if config.prologue == TRITON or problem.experts > PROLOGUE_EXPERTS:
        return None
    usual = "native_c1" if problem.pairs <= routing.SMALL_PAIRS else "native_c8"
    kind = usual if config.prologue == "native" else config.prologue
    return _kernel(native, kind.replace("native", "glm_prologue"))


def layout_of(problem: Problem, config: HopperConfig, shared: Config) -> Layout:
    """Where each buffer lies in the workspace. shared: triton_config's.

    Raises:
        HopperError: a band is not a whole number of routing's chunks.
    """
    try:
        return layout(problem, shared, band_of(config, shared))
    except ValueError as error:
        raise HopperError(f"HopperConfig(band={config.band}) cannot serve {problem.tokens} tokens: {error}.") from None


def by_bands(problem: Problem, config: HopperConfig, native: Native | None = None) -> bool:
    """Whether routing lists GEMM2's tiles band by band, by kernels of its own that want compiling before they are needed."""
    shared = triton_config(problem, config, native or loader().native)
    return bands_of(problem.tokens, problem.top_k, band_of(config, shared)) > 1


def workspace_bytes(problem: Problem, config: HopperConfig, native: Native | None = None) -> int:
    """Bytes of workspace that `run` needs.

    Raises:
        HopperError: the configuration is none for this problem.
    """
    return layout_of(problem, config, triton_config(problem, config, native or loader().native)).total


class HopperPass:
    """One pass and its steps, as pipeline.Pass has them.

    Raises:
        HopperError: the configuration is none.
    """

    def __init__(
        self,
        native: Native,
        problem: Problem,
        config: HopperConfig,
        tensors: Tensors,
        workspace: torch.Tensor,
        multiprocessors: int,
        stream: Callable[[], int],
    ) -> None:
        shared, plan = _plan(native, problem, config)
        self.t = tensors
        self._native, self._stream = native, stream
        self._device = tensors.hidden.device.index or 0
        self._pass = Pass(problem, shared, tensors, workspace, multiprocessors, band=band_of(config, shared), plan=plan)
        self._first, self._second = native.by_name.get(config.gemm1), native.by_name[config.gemm2]  # None: Triton's
        self._prologue = prologue_of(problem, config, native)  # None: Triton's
        self._layer = layer_of(self._pass, config)

    def run(self) -> None:
        """Launch every step on the current stream; native kernels between which nothing lies by one C call.

        Raises:
            HopperError: a launch is refused.
        """
        if self._first is not None and not self._requantises():
            kernels = self._first, self._second, *self._sums()
            if self._prologue is not None:
                kernels = self._prologue, *kernels
            else:
                self._pass.prologue()
            self._launch(*kernels)
            return
        self.prologue()
        self._gemm1()
        if self._requantises():
            self._pass.requantise()
        self._launch(self._second, *self._sums())

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """(name, launch) of each step, in order; benchmarks time them one by one."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("prologue", self.prologue),
            ("gemm1", self._gemm1),
        ]
        if self._requantises():
            steps.append(("requantise", self._pass.requantise))
        steps.append(("gemm2", lambda: self._launch(self._second)))
        if sums := self._sums():
            steps.append(("sum", lambda: self._launch(*sums)))
        return steps

    def prologue(self) -> None:
        """Quantise tokens and group pairs by expert."""
        if self._prologue is None:
            self._pass.prologue()
        else:
            self._launch(self._prologue)

    def _gemm1(self) -> None:
        if self._first is None:
            self._pass.gemm1()
        else:
            self._launch(self._first)

    def _requantises(self) -> bool:
        return self._second.family in SLICED and self._pass.config.gemm1.kind != "row"

    def _sums(self) -> list[Kernel]:
        if self._second.family is not Family.GEMM2_DECODE:
            return []
        return [kernel for kernel in self._native.kernels if kernel.family is Family.SUM]

    def _launch(self, *kernels: Kernel) -> None:
        self._native.run(self._device, self._stream(), self._layer, numbers(*kernels))


def run(problem: Problem, config: HopperConfig, card: Card, tensors: Tensors, workspace: torch.Tensor) -> None:
    """Run one pass on the current stream: `op.run` for this backend. Does not wait, and may be captured in a graph.

    Raises:
        HopperError: the kernels cannot be loaded on this device or do not serve this problem.
    """
    make_pass(problem, config, card, tensors, workspace).run()


def make_pass(problem: Problem, config: HopperConfig, card: Card, tensors: Tensors, workspace: torch.Tensor) -> HopperPass:
    """One pass on whatever stream is current when its steps are launched.

    Raises:
        HopperError: the kernels cannot be loaded on this device or do not serve this problem.
    """
    device = tensors.hidden.device

    def stream() -> int:
        return torch.cuda.current_stream(device).cuda_stream

    return HopperPass(loader().on(device.index), problem, config, tensors, workspace, card.multiprocessors, stream)


def _kernel(native: Native, name: str) -> Kernel:
    if name not in native.by_name:
        raise HopperError(f"There is no kernel {name}; there are {', '.join(native.by_name)}.")
    return native.by_name[name]


def _writes_rows(kernel: Kernel) -> bool:
    return kernel.name.startswith("glm_gemm1_row_")


@functools.lru_cache(maxsize=1024)
def _plan(native: Native, problem: Problem, config: HopperConfig) -> tuple[Config, Layout]:
    """The shared configuration, and where each buffer lies in the workspace."""
    shared = triton_config(problem, config, native)
    return shared, layout_of(problem, config, shared)


def layer_of(one: Pass, config: HopperConfig) -> Layer:
    """Addresses and sizes of a pass as the launcher takes them; its tensors and workspace must outlive the launches."""
    problem, tensors = one.problem, one.t
    offsets, workspace = one.buffers
    base = workspace.data_ptr()

    def within(name: str) -> int | None:
        return base + offsets[name][0] if name in offsets else None

    return Layer(
        tokens=within("tokens_or_partial"),
        token_scales=within("token_scales"),
        w13=tensors.w13.data_ptr(),
        w13_scales=tensors.w13_scale.data_ptr(),
        w2=tensors.w2.data_ptr(),
        w2_scales=tensors.w2_scale.data_ptr(),
        act=within("act"),
        act_quantised=within("act_quantised"),
        act_scales=within("act_scales"),
        topk_weights=tensors.topk_weights.data_ptr(),
        partial=within("tokens_or_partial"),
        out=tensors.out.data_ptr(),
        local_ids=within("local_ids"),
        rows=within("rows"),
        tiles=within("tiles"),
        counts=within("counts"),
        band_tiles=within("band_tiles"),
        hidden=tensors.hidden.data_ptr(),
        topk_ids=tensors.topk_ids.data_ptr(),
        expert_map=None if tensors.expert_map is None else tensors.expert_map.data_ptr(),
        histogram=within("histogram"),
        w13_stride=tensors.w13.stride(0),
        w2_stride=tensors.w2.stride(0),
        tokens_count=problem.tokens,
        hidden_size=problem.hidden_size,
        intermediate_size=problem.intermediate_size,
        experts=problem.experts,
        top_k=problem.top_k,
        max_tiles=one.max_tiles,
        slice=config.slice,
        slots=config.slots,
        # One band has no array of first tiles.
        band=one.band if "band_tiles" in offsets else 0,
        multiprocessors=one.multiprocessors,
        weight_promotion=config.weight_promotion,
        programmatic=config.programmatic,
        global_experts=problem.global_experts,
        tile_rows_1=one.config.gemm1.block_m,
        tile_rows_2=one.config.gemm2.block_m,
        wide_ids=tensors.topk_ids.dtype == torch.int64,
        early_steps=config.early_steps,
        early_items=config.early_items,
    )
