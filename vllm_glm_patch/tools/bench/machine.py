"""What the numbers depend on besides the code: card, driver or CPU, Python, torch, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ... import upstream
from ...version import __version__
from ..doctor.facts import cards


def facts() -> dict[str, str]:
    """By name; a thing that is not known is left out."""
    found = {
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "vllm": installed_vllm(),
        "vllm_glm_patch": __version__,
        "commit": _commit(),
    }
    described, _ = cards()
    if described:
        found["card"] = "; ".join(described)
    return {name: value for name, value in found.items() if value}


def installed_vllm() -> str:
    """The version of the vLLM beside this Python; empty where there is none."""
    there = upstream.find_installed()
    return there.version if there else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()


def _commit() -> str:
    """Of the source tree this package runs from, or as COMMIT in the environment says."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
