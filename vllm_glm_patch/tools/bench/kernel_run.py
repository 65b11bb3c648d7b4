"""The command behind `bench kernel`: reads the card, makes or continues the result file, and survives a failed device."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from ...errors import UserError
from ..processes import interruptible
from . import kernel_card, machine, schema
from .kernel import L2_TREATMENT, REPLAYS, ROUNDS, Died, GraphTimer, Lab, Work, our_layers, problem_of
from .kernel_upstream import BUILDERS

_UNTIL = "_GLM_PATCH_BENCH_UNTIL"  # time.time() until which a process that goes on for another may measure
_L2_OF_HOPPER = 50 * 1024**2  # for a torch that does not tell
_SAME = ("card", "vllm", "torch", "triton", "commit", "vllm_glm_patch")
_METHOD = "Medians of CUDA-graph replays of the whole layer, all implementations in one process, taking turns."


def check_card() -> None:
    """Refuse where no CUDA card can be used.

    Raises:
        UserError: there is no torch, or no card.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"`bench kernel` needs torch, which {sys.executable} has not. Activate the environment of your vLLM.")
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"`bench kernel` needs a CUDA card, and torch {torch.__version__} finds none. Run it on the machine with the card; "
            "`vllm-glm-patch doctor` says what is in the way."
        )
    if importlib.util.find_spec("triton") is None:
        raise UserError(f"`bench kernel` needs triton, which {sys.executable} has not. Activate the environment of your vLLM.")


def card_facts(with_upstream: bool) -> dict[str, str]:
    """What the numbers belong to; the card as torch names it, since only that one is measured."""
    import torch
    import triton

    found = machine.facts()
    cards = found.get("card", "")  # with drivers and memory
    found = {**found, "card": torch.cuda.get_device_name(), "cards": cards or "unknown", "triton": triton.__version__}
    return {**found, "vllm": found.get("vllm", "none") if with_upstream else "none"}


def make_lab(with_upstream: bool, asked: Sequence[str]) -> Lab:
    """Everything of the current card; measures its ceilings.

    Raises:
        UserError: a backend that is asked for is not known.
    """
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    ours = our_layers(device, asked)
    timer = GraphTimer()
    roofline = kernel_card.measure(device, timer.us_of)
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", _L2_OF_HOPPER)
    has_vllm = importlib.util.find_spec("vllm") is not None
    return Lab(device, l2_bytes, timer, ours, BUILDERS if with_upstream and has_vllm else {}, roofline)


def begin(file: Path, facts: dict[str, str], shapes: Sequence[str], tokens: Sequence[int], seed: int) -> dict[str, Any]:
    """A new result, or the one in the file, to go on with; its roofline is still to be filled in.

    Raises:
        UserError: the file is no result of `bench kernel`, or of another card, vLLM or commit.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    new: dict[str, Any] = {
        "kind": schema.KERNEL,
        "schema_version": schema.VERSION,
        "started": started,
        "finished": None,
        "complete": False,
        "machine": facts,
        "findings": [],
        "plan": {
            "shapes": list(shapes),
            "tokens": list(tokens),
            "seed": seed,
            "rounds": ROUNDS,
            "replays": REPLAYS,
            "method": _METHOD,
            "l2": L2_TREATMENT,
        },
        "roofline": None,
        "checks": [],
        "rows": [],
    }
    if not file.exists():
        return new
    old = schema.read(file)
    if old["kind"] != schema.KERNEL:
        raise UserError(f"--out {file} is a result of `{old['kind']}`; name another file.")
    for name in _SAME:
        if old["machine"].get(name) != facts.get(name):
            raise UserError(
                f"--out {file} was measured with {name} {old['machine'].get(name)}, and this is {facts.get(name)}. "
                "Name a new file, or remove it."
            )
    if old["plan"]["seed"] != seed:
        raise UserError(f"--out {file} was measured with --seed {old['plan']['seed']}; give the same, or name a new file.")
    plan = {
        **new["plan"],
        "shapes": list(dict.fromkeys([*old["plan"]["shapes"], *shapes])),
        "tokens": sorted({*old["plan"]["tokens"], *tokens}),
    }
    return {**old, "complete": False, "plan": plan}


def work(
    file: Path,
    shapes: Sequence[str],
    tokens: Sequence[int],
    *,
    asked: Sequence[str],
    checked: bool,
    with_upstream: bool,
    minutes: Optional[float],
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Check and time, and save after each row; the result. What the file has already is not measured again.

    Raises:
        UserError: no card, a shape that is not known, or a file of something else.
        Interrupted: a signal came; what was measured is in the file.
    """
    for shape in shapes:
        problem_of(shape)
    check_card()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to standard output, which is ours
    until = float(os.environ.pop(_UNTIL, 0)) or (time.time() + 60 * minutes if minutes else None)
    result = begin(file, card_facts(with_upstream), shapes, tokens, seed)
    with interruptible():
        lab = make_lab(with_upstream, asked)
        if result["roofline"]:  # one floor for all rows of a file
            lab = replace(lab, roofline=kernel_card.Roofline(**result["roofline"]))
        result["roofline"] = lab.roofline.as_dict()

        def save() -> None:
            result["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            schema.write(result, file)

        stop_at = None if until is None else time.monotonic() + until - time.time()
        try:
            Work(lab, result, save, say, stop_at).do(shapes, checked, tokens, seed)
        except Died as death:
            _go_on_in_a_new_process(death, until, say)
    return result


def _go_on_in_a_new_process(death: Died, until: Optional[float], say: Callable[[str], None]) -> None:
    """The same command again: what failed is in the file and is left out, so this comes to an end."""
    say(f"The device has failed under {death.name}; a new process goes on without it there.")
    if until is not None:
        os.environ[_UNTIL] = str(until)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "vllm_glm_patch", *sys.argv[1:]])
