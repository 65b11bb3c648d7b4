"""Stand-ins for a card, loaded by the real child process of `verify`: kernels that fault, die, hang and err as told."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import types
from typing import Any

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.verify.backend import Note
from vllm_glm_patch.tools.verify.card import Card
from vllm_glm_patch.tools.verify.cases import GOOD, ROUTINGS, Kernel, Shape, Unit
from vllm_glm_patch.tools.verify.journal import ALL, ERROR, FAULT, OK, SKIPPED, WRONG, Outcome

FACTS = {"card": "Fake", "multiprocessors": 1, "driver": "1", "torch": "2", "vllm": "0.10.1.1", "patches": "no patch"}


class Fake:
    """A card on which `options["ends"]`, a list of [part of a unit's id, how it ends], says what goes wrong.

    `gemm` reads past `a_scales` where the tokens are a multiple of 16, and always reads its other buffer rightly.
    """

    def prepare(self, options: dict[str, Any]) -> dict[str, Any]:
        self.options = options
        if options.get("refuse"):
            raise UserError(options["refuse"])
        if options.get("dies_at_start"):
            print("no such library", flush=True)
            os._exit(9)
        self.pid = os.getpid()
        return FACTS

    def kernels(self) -> list[Kernel]:
        return [
            Kernel("upstream", "gemm", GOOD),
            Kernel("upstream", "layer", ROUTINGS),
            Kernel("upstream", "sum", ("spread",), absent="not in this path of vLLM 0.10.1.1"),
            Kernel("ours", "layer", ROUTINGS, counts=False),
        ]

    def can_fork(self) -> bool:
        return bool(self.options.get("fork", True))

    def start(self, guarded: str) -> None:
        self.guarded = guarded
        if self.options.get("no_start") or (self.options.get("no_start_in_a_fork") and os.getpid() != self.pid):
            raise RuntimeError("no CUDA-capable device is detected")

    def run(self, unit: Unit, shape: Shape, guard: str, note: Note) -> Outcome:
        assert (self.guarded == "all") == (guard == ALL)
        note({"buffers": ["a", "a_scales"] if unit.kernel == "gemm" else ["hidden_states"]})
        time.sleep(float(self.options.get("seconds", 0)))
        over = unit.kernel == "gemm" and unit.tokens % 16 == 0 and not self.options.get("sound")
        if over and guard in (ALL, "a_scales"):
            return Outcome(FAULT, "CUDA error: an illegal memory access was encountered")
        for part, how in self.options.get("ends", []):
            if part in unit.id:
                note({"step": "place"})
                return _end(how)
        return Outcome(OK, "", 0.01, 0.08)


def _end(how: str) -> Outcome:
    if how == "abort":
        os.abort()
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(5)
    elif how == "raise":
        raise ValueError("a defect of verify itself")
    elif how == "hang":
        time.sleep(60)
    elif how == "wrong":
        return Outcome(WRONG, "3 of 128 sampled rows", 0.5, 0.08)
    elif how == "nan":
        return Outcome(WRONG, "1 of 128 sampled rows", float("inf"), 0.08)
    return Outcome({"error": ERROR, "skipped": SKIPPED}[how], f"it was {how}")


class Interpreted(Card):
    """The backend of a card, with our own kernels through Triton's interpreter, on a shape small enough for it.

    With `fault_at` among the options the call of so many tokens, spread, faults at its last step, all buffers guarded.
    """

    device = "cpu"

    def prepare(self, options: dict[str, Any]) -> dict[str, Any]:
        os.environ["TRITON_INTERPRET"] = "1"
        self.options = options
        self._add_ours(counts=True)
        return FACTS

    def start(self, guarded: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.guarded = guarded
        self._guards = Copies()

    def synchronise(self) -> None:
        if self.guarded == "all" and self.last and self._kept[0][1:] == (self.options.get("fault_at"), "spread"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def run(self, unit: Unit, shape: Shape, guard: str, note: Note) -> Outcome:
        self.last = ""

        def watched(line: dict[str, Any]) -> None:
            self.last = line.get("step", self.last)
            note(line)

        return super().run(unit, shape, guard, watched)


class Copies:
    """Where a card has guards."""

    def place(self, tensor: Any) -> Any:
        return types.SimpleNamespace(tensor=tensor.clone(), free=lambda: None)
