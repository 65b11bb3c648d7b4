"""A vLLM plugin of our own that writes down every step the scheduler decides on, one line of JSON each.

`install` makes a folder for PYTHONPATH, in which vLLM finds the plugin; vLLM and vllm-glm-patch are left as they are.
It wraps `Scheduler.schedule`, so it sees the steps themselves, with the patch and without it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "GLM_PATCH_RECORD_STEPS"
"""Names the file that steps are written to."""
_NAME = "glm_patch_step_recorder"


@dataclass(frozen=True)
class Step:
    """One step of the engine."""

    total: int
    """Tokens of all requests."""
    requests: dict[str, int]
    """Tokens of each request, by vLLM's internal id, which begins with the one that the client gave."""


def install(folder: Path) -> None:
    """Make `folder` one that vLLM finds this plugin in once it is on PYTHONPATH."""
    metadata = folder / f"{_NAME}-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, folder / f"{_NAME}.py")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_NAME} = {_NAME}:register\n")


def read(file: Path) -> list[Step]:
    """The steps written so far; none where the file does not exist yet."""
    if not file.exists():
        return []
    return [Step(**json.loads(line)) for line in file.read_text().splitlines()]


def register() -> None:
    """Called by vLLM in each of its processes; only the one that schedules has something to write."""
    from vllm_glm_patch.patching import when_imported  # only waits for an import; no patch is needed for it

    when_imported("vllm.v1.core.sched.scheduler", _wrap)


def _wrap(module: Any) -> None:
    original = module.Scheduler.schedule

    @functools.wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        decided = original(self, *args, **kwargs)
        if decided.total_num_scheduled_tokens:
            step = {"total": decided.total_num_scheduled_tokens, "requests": dict(decided.num_scheduled_tokens)}
            with Path(os.environ[VARIABLE]).open("a") as file:
                file.write(json.dumps(step) + "\n")
        return decided

    module.Scheduler.schedule = schedule
