"""`python -m vllm_glm_patch.tools.verify.precompile PROCESSES`: compiles our kernels while upstream's are being checked.

Reads [[shape, [token counts]], …] as JSON from standard input. What it does not get to compiles when it is first called.
"""

from __future__ import annotations

import json
import os
import sys
import time

_SECONDS = 100.0


def main() -> None:
    from ...moe.problem import Problem
    from ...moe.tune import precompile
    from .cases import Shape
    from .ours import configurations

    problems = []
    for values, counts in json.load(sys.stdin):
        shape = Shape(**values)
        sizes = (shape.hidden_size, shape.intermediate_size, shape.experts, shape.global_experts, shape.top_k)
        problems += [Problem(tokens, *sizes) for tokens in counts]
    processes = max(1, min(int(sys.argv[1]), (os.cpu_count() or 2) - 1))
    precompile(configurations(problems), time.monotonic() + _SECONDS, processes)


if __name__ == "__main__":
    main()
