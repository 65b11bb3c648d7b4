"""One layer by the native kernels, step by step, each step against float64 made from what the step before really wrote.

So a fault shows in the step that has it, and the report says where: how many are wrong, in which rows and columns of the
tiles, NaN or poison or another row's values. Buffers are poisoned first. One call of `check_layer` tells all it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_glm_patch.moe import routing
from vllm_glm_patch.moe.generators import Inputs
from vllm_glm_patch.moe.hopper.backend import HopperConfig, HopperPass, band_of, layout_of, prologue_of, triton_config
from vllm_glm_patch.moe.hopper.native import Native
from vllm_glm_patch.moe.pipeline import Pass, Tensors
from vllm_glm_patch.moe.reference import fused_moe, local_experts, quantise_per_token, relative_error
from vllm_glm_patch.moe.workspace import bins_of

POISON = 0xFF  # NaN in FP8 and bf16, −1 in int32
# A tensor core's sums keep some 14 bits: what an element may be off by, relative to the largest of its row.
LOOSE = 0.01
# The same of an activation, a product of two such sums: of 65528 rows' largest, 6 were off by a little more than 1 % on an
# H100, and of 2.1 million values one by 1.7 % on an H200.
LOOSE_PRODUCT = 0.02


@dataclass
class Report:
    """What was found. `wrong`: elements out of tolerance in all steps together."""

    lines: list[str] = field(default_factory=list)
    wrong: int = 0

    def compare(self, step: str, got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor, tile_rows: int = 128) -> None:
        """[rows, columns]; tolerance is absolute, of a shape that broadcasts."""
        got, want = got.double(), want.double()
        bad = ~((got - want).abs() <= tolerance)
        count = int(bad.sum())
        self.wrong += count
        error = relative_error(got, want)
        self.lines.append(f"{'WRONG' if count else 'ok':5} {step}: {count} of {bad.numel()} wrong, relative error {error:.2e}")
        if count:
            self.lines += [f"      {line}" for line in describe(got, want, bad, tile_rows)]


def _spread(name: str, indices: torch.Tensor, size: int) -> str:
    counts = torch.bincount(indices % size, minlength=size)
    if int((counts > 0).sum()) == size and int(counts.min()) * 2 >= int(counts.max()):
        return f"{name} mod {size}: all alike"
    return f"{name} mod {size}: " + " ".join(f"{i}:{int(c)}" for i, c in enumerate(counts.tolist()) if c)


def describe(got: torch.Tensor, want: torch.Tensor, bad: torch.Tensor, tile_rows: int) -> list[str]:
    """What the wrong elements have in common."""
    rows, columns = bad.nonzero(as_tuple=True)
    whole_rows = bad.any(dim=1)
    lines = [
        f"NaN {int(torch.isnan(got[bad]).sum())}, zero {int((got[bad] == 0).sum())}; rows hit {int(whole_rows.sum())} of"
        f" {bad.shape[0]}, columns hit {int(bad.any(dim=0).sum())} of {bad.shape[1]}",
        _spread("row / 64", rows // 64, max(tile_rows // 64, 1)),
        _spread("row", rows, 16),
        _spread("column", columns, 8),
        _spread("column / 8", columns // 8, 4),
        _spread("column / 32", columns // 32, 8),
        _spread("column / 96", columns // 96, 4),
    ]
    finite = bad & torch.isfinite(got) & (want != 0)
    if finite.any():
        ratio = (got[finite] / want[finite]).float()
        quantiles = torch.quantile(ratio[:100_000], torch.tensor([0.05, 0.5, 0.95], device=ratio.device)).tolist()
        lines.append("got / want, 5 50 95 %: " + " ".join(f"{q:.3f}" for q in quantiles))
    for row in whole_rows.nonzero()[:3, 0].tolist():
        first = int(bad[row].nonzero()[0, 0])
        near = slice(first, first + 4)
        lines.append(
            f"row {row} column {first}: got {[f'{v:.4g}' for v in got[row, near].tolist()]},"
            f" want {[f'{v:.4g}' for v in want[row, near].tolist()]}; {_looks_like(got[row], want, row)}"
        )
    return lines


def _looks_like(values: torch.Tensor, want: torch.Tensor, row: int) -> str:
    """Whether a wrong row is some other row, or its own values in another order."""
    if not torch.isfinite(values).all():
        return "not finite throughout"
    norms = want.norm(dim=1) * values.norm()
    likeness = (want @ values) / norms.clamp(min=1e-30)
    best = int(likeness.argmax())
    sorted_alike = torch.nn.functional.cosine_similarity(values.sort().values, want[row].sort().values, dim=0)
    return f"likest to row {best} ({float(likeness[best]):.3f}); sorted, like itself {float(sorted_alike):.3f}"


def prologue_outputs(one: Pass) -> dict[str, torch.Tensor]:
    """All that a prologue makes and somebody reads, by name, out of the workspace of a pass. Integers, so NaN equals NaN."""
    p, counts = one.problem, one.counts
    size, chunks, bins = p.tokens * p.hidden_size, -(-p.pairs // routing.CHUNK), bins_of(p.experts)
    codes = one.quantised[:size].view(torch.uint8)
    if codes.device.type == "cpu":  # Triton's interpreter makes zeros of negative numbers positive
        codes = torch.where(codes == 0x80, 0, codes)
    tiles = one.tiles.view(2, 3, -1)
    found = {
        "tokens": codes,
        "token_scales": one.token_scales[: p.tokens].view(torch.int32),
        "local_ids": one.local_ids[: p.pairs],
        "counts": counts,
        "rows": one.rows[: int(counts[0])],
        "GEMM1's tiles": tiles[0, :, : int(counts[1])],
        "GEMM2's tiles": tiles[1, :, : int(counts[2])],
    }
    if one.bands > 1:
        found["band_tiles"] = one.band_tiles[: one.bands]
    if p.pairs > routing.SMALL_PAIRS:
        scanned = one.histogram[: (chunks + 1) * bins].view(chunks + 1, bins)
        found |= {"histogram": scanned[:chunks], "first rows": scanned[chunks, : p.experts + 1]}
    return {name: part.clone() for name, part in found.items()}


def compare_prologues(report: Report, ours: Pass, theirs: Pass) -> None:
    """What the native prologue made (`ours`: a pass over its workspace) against what Triton's makes now, to the bit."""
    theirs.prologue()
    different = []
    made = prologue_outputs(ours)
    for name, want in prologue_outputs(theirs).items():
        got = made[name]
        if got.shape != want.shape:
            report.wrong += 1
            different.append(f"{name} {list(got.shape)}, want {list(want.shape)}")
        elif bad := int((got != want).sum()):
            report.wrong += bad
            first = int((got != want).flatten().nonzero()[0, 0])
            values = int(got.flatten()[first]), int(want.flatten()[first])
            different.append(f"{name} {bad} of {got.numel()}, first at {first}: {values[0]}, want {values[1]}")
    what = "; ".join(different) or f"{', '.join(made)} as Triton's, to the bit"
    report.lines.append(f"{'WRONG' if different else 'ok':5} prologue: {what}")


def check_layer(
    native: Native,
    inputs: Inputs,
    config: HopperConfig,
    multiprocessors: int,
    stream: Callable[[], int],
) -> Report:
    """Run every step once from poisoned buffers and compare each, then the whole against the float64 reference."""
    report = Report()
    problem, device = inputs.problem, inputs.hidden_states.device
    shared = triton_config(problem, config, native)
    plan = layout_of(problem, config, shared)
    workspace = torch.full((plan.total,), POISON, dtype=torch.uint8, device=device)
    out = torch.full_like(inputs.hidden_states, float("nan"))
    tensors = Tensors(
        inputs.hidden_states,
        inputs.w13,
        inputs.w2,
        inputs.w13_scale,
        inputs.w2_scale,
        inputs.topk_weights,
        inputs.topk_ids,
        inputs.expert_map,
        out,
    )
    layer = HopperPass(native, problem, config, tensors, workspace, multiprocessors, stream)

    def view(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        offset, size = plan.offsets[name]
        flat = workspace[offset : offset + size - size % dtype.itemsize].view(dtype)
        elements = 1
        for length in shape:
            elements *= length
        return flat[:elements].view(*shape)

    state = _State(problem, inputs, view, shared.gemm1.block_m, shared.gemm1.kind == "row", config)
    for name, step in layer.steps():
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if name == "prologue" and prologue_of(problem, config, native) is not None:
            both = (
                Pass(problem, shared, tensors, room, multiprocessors, band=band_of(config, shared))
                for room in (workspace, torch.full_like(workspace, POISON))
            )
            compare_prologues(report, *both)
        getattr(state, f"check_{name}")(report, out)
    whole = fused_moe(*inputs.positional(), expert_map=inputs.expert_map)
    error = relative_error(out, whole)
    # Both have the contract's FP8 steps; a rounding that falls the other way is what remains.
    good = error < 0.025
    report.wrong += not good
    report.lines.append(f"{'ok' if good else 'WRONG':5} layer: relative error {error:.4f}, want < 0.025")
    return report


@dataclass
class _State:
    """What the steps read and wrote so far."""

    problem: Any
    inputs: Inputs
    view: Callable[..., torch.Tensor]
    tile_rows: int
    whole_rows: bool  # GEMM1 requantises
    config: HopperConfig

    def check_prologue(self, report: Report, out: torch.Tensor) -> None:
        p = self.problem
        self.tokens = self.view("tokens_or_partial", torch.float8_e4m3fn, p.tokens, p.hidden_size).double()
        self.token_scales = self.view("token_scales", torch.float32, p.tokens).double()
        q, scale = quantise_per_token(self.inputs.hidden_states)
        report.compare("prologue: tokens", self.tokens, q, torch.zeros((), device=q.device))
        report.compare("prologue: scales", self.token_scales[:, None], scale, scale * 1e-6)
        self.local = local_experts(self.inputs.topk_ids, p.experts, self.inputs.expert_map).reshape(-1)
        valid = (self.local >= 0).nonzero()[:, 0]
        want = valid[torch.argsort(self.local[valid], stable=True)]
        self.rows = want
        count = int(self.view("counts", torch.int32, 4)[0])
        got = self.view("rows", torch.int32, p.pairs)[: len(want)].long()
        report.wrong += (count != len(want)) + int((got != want).sum())
        report.lines.append(
            f"      prologue: {count} valid pairs, want {len(want)}; {int((got != want).sum())} rows out of order"
        )

    def check_gemm1(self, report: Report, out: torch.Tensor) -> None:
        p, n = self.problem, self.problem.intermediate_size
        device = self.tokens.device
        want = torch.zeros(len(self.rows), n, dtype=torch.float64, device=device)
        for expert in self.local[self.rows].unique().tolist():
            here = self.local[self.rows] == expert
            token = self.rows[here] // p.top_k
            scales = self.inputs.w13_scale[expert].reshape(1, -1).double()
            sums = self.tokens[token] @ self.inputs.w13[expert].double().T * self.token_scales[token, None] * scales
            gate, up = sums.chunk(2, dim=1)
            want[here] = gate * torch.sigmoid(gate) * up
        largest = want.abs().amax(dim=1, keepdim=True) if len(want) else want
        if self.whole_rows:
            codes = self.view("act_quantised", torch.float8_e4m3fn, p.pairs, n)[: len(want)].double()
            scales = self.view("act_scales", torch.float32, p.pairs)[: len(want), None].double()
            self.act = codes * scales
            report.compare(
                "gemm1: act scales", scales, (largest / 448.0).clamp(min=1.0 / (448.0 * 512.0)), LOOSE_PRODUCT * largest / 448.0
            )
            report.compare(
                "gemm1: act", self.act, want, want.abs() / 16 + (LOOSE_PRODUCT + 1.0 / 448.0 / 512.0) * largest, self.tile_rows
            )
        else:
            self.act = self.view("act", torch.bfloat16, p.pairs, n)[: len(want)].double()
            report.compare("gemm1: act", self.act, want, want.abs() / 256 + LOOSE_PRODUCT * largest, self.tile_rows)

    def check_requantise(self, report: Report, out: torch.Tensor) -> None:
        p, n = self.problem, self.problem.intermediate_size
        q, scale = quantise_per_token(self.act)
        codes = self.view("act_quantised", torch.float8_e4m3fn, p.pairs, n)[: len(q)].double()
        scales = self.view("act_scales", torch.float32, p.pairs)[: len(q), None].double()
        report.compare("requantise", codes * scales, q * scale, 1e-6 * scale * 448)
        self.act = codes * scales

    def _products(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 results of every pair [pairs, hidden] summed over choices, and the sum of their sizes."""
        p = self.problem
        act = self.act
        if "_decode_" in self.config.gemm2:
            q, scale = quantise_per_token(act)
            act = q * scale
        sums = torch.zeros(p.tokens, p.hidden_size, dtype=torch.float64, device=act.device)
        sizes = torch.zeros_like(sums)
        weights = self.inputs.topk_weights.reshape(-1).double()
        for expert in self.local[self.rows].unique().tolist():
            here = self.local[self.rows] == expert
            pair = self.rows[here]
            scales = self.inputs.w2_scale[expert].reshape(1, -1).double()
            z = act[here] @ self.inputs.w2[expert].double().T * scales * weights[pair, None]
            sums.index_add_(0, pair // p.top_k, z)
            sizes.index_add_(0, pair // p.top_k, z.abs())
        return sums, sizes

    def _check_out(self, step: str, report: Report, got: torch.Tensor) -> None:
        want, sizes = self._products()
        report.compare(step, got, want, sizes / 256 + want.abs() / 256 + LOOSE * sizes.amax(dim=1, keepdim=True), 128)

    def check_gemm2(self, report: Report, out: torch.Tensor) -> None:
        if "_decode_" not in self.config.gemm2:
            self._check_out("gemm2 + sum", report, out)
            return
        p = self.problem
        partial = self.view("tokens_or_partial", torch.bfloat16, p.pairs, p.hidden_size).double()
        valid = (self.local >= 0)[:, None]
        total = torch.where(valid, partial, 0.0).view(p.tokens, p.top_k, -1).sum(dim=1)
        self._check_out("gemm2", report, total)

    def check_sum(self, report: Report, out: torch.Tensor) -> None:
        self._check_out("sum", report, out)
