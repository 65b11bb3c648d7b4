"""Our fused kernel: as vLLM would call it, and step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ...moe import backends, dispatch, fused_moe_fp8, tables, workspace
from ...moe.pipeline import Pass, Tensors
from ...moe.problem import Problem
from ...settings import Settings
from .backend import Note
from .cases import ROUTINGS, Kernel
from .journal import WRONG, Outcome
from .material import Buffers, Call, Material

Make = Callable[[Material, Note], Call]
_POSITIONAL = ("hidden_states", "w13", "w2", "w13_scale", "w2_scale", "topk_weights", "topk_ids")


def as_served() -> None:
    """Choose kernels as a server with these settings would: by the user's tables, and the backend that is asked for."""
    settings = Settings.from_environment()
    tables.use_folder(settings.tables())
    backends.prefer(backends.AUTO if settings.moe_backend == backends.UPSTREAM else settings.moe_backend)


def kernels(counts: bool) -> list[tuple[Kernel, Make]]:
    """The kernels and how to call each. `counts`: vLLM is routed to ours, or there is none."""
    as_served()
    return [
        (Kernel("ours", "layer", ROUTINGS, counts), layer),
        (Kernel("ours", "steps", ROUTINGS, counts, most_tokens=workspace.TOKENS_PER_PASS), steps),
    ]


def _inputs(material: Material) -> dict[str, torch.Tensor]:
    m = material
    buffers = {
        "hidden_states": m.hidden,
        "w13": m.w13,
        "w2": m.w2,
        "w13_scale": m.w13_scale,
        "w2_scale": m.w2_scale,
        "topk_weights": m.topk_weights,
        "topk_ids": m.topk_ids,
        "out": torch.full_like(m.hidden, float("nan")),
    }
    if m.expert_map is not None:
        buffers["expert_map"] = m.expert_map
    return buffers


def layer(material: Material, note: Note) -> Call:
    """The public operator, twice: the second result must have the bits of the first. It makes its own workspace."""

    def call(b: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
        positional = [b[name] for name in _POSITIONAL]
        first = fused_moe_fp8(*positional, expert_map=b.get("expert_map"), out=b["out"]).clone()
        return first, fused_moe_fp8(*positional, expert_map=b.get("expert_map"), out=b["out"])

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> Outcome:
        first, second = (one[~material.dirty] for one in result)
        if not torch.equal(first, second):
            return Outcome(WRONG, "a second call with the same inputs gave other bits")
        return material.check_layer(result[0])

    return Call(_inputs(material), call, check)


def steps(material: Material, note: Note) -> Call:
    """The launches of one pass, each waited for, so that a fault is of the step that is named."""
    buffers = _inputs(material)
    problem = material.problem
    index = None if material.device == "cpu" else torch.cuda.current_device()
    card = dispatch.read_card(index)
    config = dispatch.choose(problem, card)
    need = workspace.layout(problem, config).total
    buffers["workspace"] = torch.full((need,), 0xFF, dtype=torch.uint8, device=material.device)

    def call(b: Buffers) -> torch.Tensor:
        tensors = Tensors(
            b["hidden_states"],
            b["w13"],
            b["w2"],
            b["w13_scale"],
            b["w2_scale"],
            b["topk_weights"],
            b["topk_ids"],
            b.get("expert_map"),
            b["out"],
        )
        for name, launch in Pass(problem, config, tensors, b["workspace"], card.multiprocessors).steps():
            note({"step": name})
            launch()
            if material.device != "cpu":
                torch.cuda.synchronize()
        return b["out"]

    return Call(buffers, call, material.check_layer)


def configurations(problems: list[Problem]) -> list[tuple[Problem, dispatch.Config]]:
    """What must be compiled for these problems on the card of this process: each kind of launch once."""
    as_served()
    card = dispatch.read_card(torch.cuda.current_device())
    jobs: dict[object, tuple[Problem, dispatch.Config]] = {}
    for problem in problems:
        for tokens in {min(problem.tokens, workspace.TOKENS_PER_PASS), problem.tokens % workspace.TOKENS_PER_PASS} - {0}:
            part = dataclasses.replace(problem, tokens=tokens)
            config = dispatch.choose(part, card)
            jobs.setdefault((problem.shape_key, config, min(dispatch.power_of_two(part.pairs), 1024)), (part, config))
    return list(jobs.values())
