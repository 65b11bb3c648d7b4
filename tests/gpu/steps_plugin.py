"""A vLLM plugin that writes a line for each step of a server that is too long for its graphs: what it took, and what PyTorch's
allocator asked of the driver meanwhile. Both sides of an A/B can have it.

    python tests/gpu/steps_plugin.py FOLDER      a folder for PYTHONPATH, with an entry point for vLLM
    VGP_STEPS=OUT PYTHONPATH=FOLDER:… vllm serve …          OUT-PID.jsonl for each worker
    python tests/gpu/steps_plugin.py --read OUT-*.jsonl     the steps of each file, most time first

Times in milliseconds: `host` from the call to its return, `device` between two events on the stream (null without a card).
`retries`: allocations that first had to give all cached blocks back to the driver. Steps of less than 257 tokens are left out.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FEWEST = 257
COUNTED = {"retries": "num_alloc_retries", "mallocs": "num_device_alloc", "frees": "num_device_free"}
ENTRY = "[vllm.general_plugins]\nvgp_steps = steps_plugin:register\n"


def register() -> None:
    """vLLM's plugin entry point: wraps the model runner's step, once a process."""
    out = os.environ.get("VGP_STEPS")
    if not out:
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.execute_model
    if getattr(original, "_writes_steps", False):
        return
    writer = Steps(Path(f"{out}-{os.getpid()}.jsonl"))

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens < FEWEST:
            writer.write()
            return original(self, scheduler_output, *args, **kwargs)
        with writer.step(tokens, len(scheduler_output.num_scheduled_tokens)):
            return original(self, scheduler_output, *args, **kwargs)

    execute_model._writes_steps = True  # type: ignore[attr-defined]
    GPUModelRunner.execute_model = execute_model


class Steps:
    """Lines of one process. A step's device time is known later: its line is written when another begins, or at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: tuple[dict[str, Any], Any, Any] | None = None
        atexit.register(self.write)

    def step(self, tokens: int, requests: int) -> Any:
        """A context: the step itself."""
        return _Step(self, tokens, requests)

    def begin(self) -> tuple[Any, dict[str, int]]:
        """An event, and the allocator's counts."""
        import torch

        self.write()
        if not torch.cuda.is_available():
            return None, {}
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, self._counts()

    def end(self, line: dict[str, Any], begun: Any, counts: dict[str, int]) -> None:
        """The step has returned."""
        import torch

        ended = None
        if begun is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            line |= {name: now - counts[name] for name, now in self._counts().items()}
            line["reserved_mb"] = torch.cuda.memory_reserved() >> 20
        self._open = line, begun, ended

    def _counts(self) -> dict[str, int]:
        import torch

        stats = torch.cuda.memory_stats()
        return {name: stats.get(key, 0) for name, key in COUNTED.items()}

    def write(self) -> None:
        """The line of the step before, if it is not written yet."""
        if self._open is None:
            return
        line, begun, ended = self._open
        self._open = None
        device = None
        if ended is not None:
            ended.synchronize()  # long over: the next step has been scheduled since
            device = round(begun.elapsed_time(ended), 3)
        with self._path.open("a") as file:
            file.write(json.dumps({**line, "device": device}) + "\n")


class _Step:
    def __init__(self, steps: Steps, tokens: int, requests: int) -> None:
        self._steps, self._line = steps, {"tokens": tokens, "requests": requests}

    def __enter__(self) -> None:
        self._begun, self._counts = self._steps.begin()
        self._at = time.perf_counter()

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._line["host"] = round(1000 * (time.perf_counter() - self._at), 3)
            self._steps.end(self._line, self._begun, self._counts)


def main() -> int:
    """Make the folder, or show what was written."""
    if len(sys.argv) == 2 and sys.argv[1] != "--read":
        folder = Path(sys.argv[1])
        known = folder / "steps_plugin-1.0.dist-info"
        known.mkdir(parents=True, exist_ok=True)
        (folder / "steps_plugin.py").write_text(Path(__file__).read_text())
        (known / "METADATA").write_text("Metadata-Version: 2.1\nName: steps_plugin\nVersion: 1.0\n")
        (known / "entry_points.txt").write_text(ENTRY)
        return 0
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    for name in sys.argv[2:]:
        lines = [json.loads(line) for line in Path(name).read_text().splitlines()]
        print(f"{name}: {len(lines)} steps")
        for line in sorted(lines, key=lambda line: -line["host"])[:30]:
            print("  " + "  ".join(f"{key} {value}" for key, value in line.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
