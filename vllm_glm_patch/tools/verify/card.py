"""The backend on a real Hopper card: the fence around every buffer or around one, and the kernels of both sides."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from ... import catalog, fence, installation
from ...errors import StrictRefusal, UserError
from ...fence.library import library_path
from ...settings import Settings
from .backend import GUARDED_ALL, Note, outside
from .cases import BAD, Grid, Kernel, Shape, Unit
from .journal import ALL, ERROR, FAULT, SKIPPED, WRONG, Outcome

_ROUNDING = 512  # bytes that PyTorch's allocator rounds a block up to: what is read there is no fault in practice
_CACHE_MB = 16384  # idle memory that the fence keeps, so that a large block is not mapped anew for every call
_COMPILERS = 8  # processes that compile our Triton kernels while upstream's run
_QUERY = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


class Card:
    """See backend.Backend."""

    device = "cuda"

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], tuple[Kernel, Callable[..., Any]]] = {}
        self._facts: dict[str, Any] = {}
        self._compiling: Optional[subprocess.Popen[bytes]] = None
        self._guards: Optional[fence.Guards] = None
        self._kept: tuple[Any, Any] = (None, None)

    def prepare(self, options: dict[str, Any]) -> dict[str, Any]:
        try:
            import torch
        except ImportError as error:
            raise UserError(f"verify needs torch, and it cannot be imported: {error}. Run it in vLLM's own Python.") from None
        if torch.version.cuda is None:
            raise UserError(
                f"verify needs a CUDA build of torch, and {torch.__version__} is none. Run it in vLLM's own Python."
            )
        if not library_path(fence.Options()).exists():
            raise UserError(f"{library_path(fence.Options())} is missing; install vllm-glm-patch from its wheel.")
        settings = Settings.from_environment()
        if options.get("unpatched"):
            settings = settings.with_values({"enabled": False}, {"enabled": "--unpatched"})
        try:
            status = installation.install(settings)
        except StrictRefusal as error:
            raise UserError(str(error)) from None
        from .upstream import Upstream

        # 0.33.0 guards the ids itself; there the patch is not needed.
        guarded = {patch.id for patch in status.patches if patch.state in (installation.APPLIED, catalog.NOT_NEEDED)}
        upstream = Upstream(ids_guarded="routing-ids" in guarded)
        self._add(upstream.kernels())
        # Again: a patch that failed as its module was imported is refused now.
        patches = {patch.id: patch.state for patch in installation.status().patches}
        applied = [name for name, state in patches.items() if state == installation.APPLIED]
        grid: Grid = options["grid"]
        self._add_ours(upstream.found is None or "fused-moe" in applied or grid.sides == ("ours",))
        self._facts = {
            **_ask_a_child(),
            "vllm": status.vllm,
            "unpatched": bool(options.get("unpatched")),
            "patch_states": patches,
            "patches": f"applied: {', '.join(applied)}" if applied else "no patch is applied",
        }
        capability = self._facts["capability"]
        if capability != "9.0":
            raise UserError(
                f"{self._facts['card']} has compute capability {capability}; what is verified here is for Hopper (9.0) alone."
            )
        if "ours" in grid.sides:
            self._compiling = _precompile(grid)
        return self._facts

    def _add(self, kernels: list[tuple[Kernel, Callable[..., Any]]]) -> None:
        self._made.update({(kernel.side, kernel.name): (kernel, make) for kernel, make in kernels})

    def _add_ours(self, counts: bool) -> None:
        try:
            from . import ours
        except ImportError as error:  # no Triton
            for name in ("layer", "steps"):
                self._made["ours", name] = (Kernel("ours", name, absent=f"it cannot be imported: {error}"), lambda *_: None)
        else:
            self._add(ours.kernels(counts))

    def kernels(self) -> list[Kernel]:
        return [kernel for kernel, _ in self._made.values()]

    def can_fork(self) -> bool:
        import torch

        return not torch.cuda.is_initialized()

    def start(self, guarded: str) -> None:
        import torch

        options = fence.Options(align=_ROUNDING, poison="fresh", cache_mb=_CACHE_MB)
        if guarded == GUARDED_ALL:
            fence.install(options)
        else:
            self._guards = fence.Guards(fence.Options(align=_ROUNDING, cache_mb=0))
        if float(torch.ones(1, device="cuda").sum()) != 1.0:  # a card that fails here must not pass for a kernel that faults
            raise RuntimeError("it does not add")

    def run(self, unit: Unit, shape: Shape, guard: str, note: Note) -> Outcome:
        if unit.side == "ours" and self._compiling is not None:
            note({"step": "compiling"})
            self._wait_for_compilers()
        _, make = self._made[unit.side, unit.kernel]
        placed = None
        try:
            call = make(self._material(shape, unit.tokens, unit.routing), note)
            note({"buffers": [name for name, tensor in call.buffers.items() if tensor.numel()]})
            buffers = dict(call.buffers)
            if guard != ALL:
                assert self._guards is not None
                placed = self._guards.place(buffers[guard])
                buffers[guard] = placed.tensor
            self.synchronise()
            result = call.run(buffers)
            self.synchronise()
            outcome: Outcome = call.check(result)
            return outcome
        except Exception as error:
            return self._judged(error, unit.routing)
        finally:
            if placed is not None:
                placed.free()

    def _judged(self, error: Exception, routing: str) -> Outcome:
        """What an exception of a call means."""
        import torch

        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if isinstance(error, (torch.OutOfMemoryError, fence.FenceError)):
            self._kept = (None, None)
            return Outcome(SKIPPED, f"the card has too little free memory for it: {text}")
        try:
            self.synchronise()
        except Exception:
            return Outcome(FAULT, text)
        if outside(str(error)):
            return Outcome(FAULT, text)
        if routing in BAD and isinstance(error, (RuntimeError, AssertionError, IndexError)):
            return Outcome(WRONG, f"it raises {type(error).__name__}, which ends the engine: {text}")
        return Outcome(ERROR, f"{type(error).__name__}: {text}")

    def synchronise(self) -> None:
        import torch

        torch.cuda.synchronize()

    def _material(self, shape: Shape, tokens: int, routing: str) -> Any:
        """The inputs of a case; those of one are kept, since all kernels of it come one after the other."""
        from .material import Material

        key = (shape, tokens, routing)
        if self._kept[0] != key:
            self._kept = (None, None)  # first, so that there is room
            self._kept = (key, Material(shape, tokens, routing, self.device))
        return self._kept[1]

    def _wait_for_compilers(self) -> None:
        """Until another process has ended; it is not a child of a forked worker, so it is looked for by its number."""
        assert self._compiling is not None
        pid = self._compiling.pid
        while self._compiling is not None:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                state = "X"
            if state in "ZX":
                self._compiling = None
            else:
                time.sleep(0.1)


def _ask_a_child() -> dict[str, Any]:
    """What the card is, asked in a process of its own, so that this one stays off it.

    Raises:
        UserError: torch finds no card it can use.
    """
    program = (
        "import json, torch; p = torch.cuda.get_device_properties(0); free, total = torch.cuda.mem_get_info();"
        "print(json.dumps({'card': p.name, 'multiprocessors': p.multi_processor_count, 'capability':"
        " f'{p.major}.{p.minor}', 'torch': torch.__version__, 'cuda': torch.version.cuda, 'free_bytes': free,"
        " 'memory_bytes': total}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"torch cannot use the card: {said}. `nvidia-smi` must list one, and CUDA_VISIBLE_DEVICES not hide it.")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    driver = subprocess.run(_QUERY, capture_output=True, text=True, check=False).stdout.split()
    return {**facts, "driver": driver[0] if driver else "unknown"}


def _precompile(grid: Grid) -> subprocess.Popen[bytes]:
    """Compile our kernels for a grid into Triton's cache, in other processes."""
    command = [sys.executable, "-m", "vllm_glm_patch.tools.verify.precompile", str(_COMPILERS)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert started.stdin is not None
    with started.stdin as pipe:
        pipe.write(json.dumps([[asdict(shape), list(grid.tokens)] for shape in grid.shapes]).encode())
    return started
