"""For the tests of the kernels under the emulator: where their sources lie, and one run of native/check.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc/hopper"
NATIVE = Path(__file__).parent / "native"


def run_cases(module: str, libraries: tuple[Path, Path], *words: object) -> tuple[dict[int, dict[str, Any]], str]:
    """`run_all` of a test's module, interpreted, in a process of its own, given the libraries and words.

    Returns:
        The result of each case that came to an end, and how the process ended.
    """
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests/hopper")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import sys; from {module} import run_all; run_all(*sys.argv[1:])", *map(str, libraries)]
    command += map(str, words)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result["case"]: result for result in found}, f"exit status {done.returncode}: {done.stderr[-3000:]}"


def run_check(program: Path, kernel: str, **options: int) -> subprocess.CompletedProcess[str]:
    """Run one kernel; the outcome, with everything it printed."""
    words = [str(program), kernel, *(f"{key}={value}" for key, value in options.items())]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
