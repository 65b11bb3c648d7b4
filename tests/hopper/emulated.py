"""For the tests of the kernels under the emulator: where their sources lie, and one run of native/check.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc/hopper"
NATIVE = Path(__file__).parent / "native"


def run_check(program: Path, kernel: str, **options: int) -> subprocess.CompletedProcess[str]:
    """Run one kernel; the outcome, with everything it printed."""
    words = [str(program), kernel, *(f"{key}={value}" for key, value in options.items())]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
