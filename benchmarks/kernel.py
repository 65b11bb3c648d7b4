"""`vllm-glm-patch bench kernel` of this tree, for a machine where the wheel is not installed; the same options.

    python benchmarks/kernel.py --vllm SITE --shapes TP8,EP8 --minutes 8 --out $OUT/kernel.json
    python benchmarks/kernel.py --no-time --no-upstream --out $OUT/check.json        # correctness only

SITE is a folder with an importable vLLM (shared/GPU_LAB.md says how to carry one); without it, that of PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = sys.argv[1:]
    path = [str(ROOT)]
    if "--vllm" in arguments:
        place = arguments.index("--vllm")
        path.append(arguments[place + 1])
        del arguments[place : place + 2]
    # A new Python: a measurement that goes on after a fault of the device starts one too, and needs the same path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "vllm_glm_patch", "bench", "kernel", *arguments]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main()
