"""Gathers facts of this machine and this Python without importing vLLM or torch: packages, cards, plugins, settings."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from ...settings import Settings
from ...upstream import Upstream
from ...version import __version__

ENTRY_POINT = "vllm_glm_patch.plugin:register"
GENERAL_PLUGINS = "vllm.general_plugins"
_SMI_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


@dataclass(frozen=True)
class Plugin:
    """An entry point that vLLM looks at."""

    group: str
    name: str
    value: str
    package: str
    """The distribution that brings it, with its version."""
    loaded: bool
    """False where VLLM_PLUGINS leaves it out."""

    @property
    def ours(self) -> bool:
        """Whether it is the one that installs these patches."""
        return self.group == GENERAL_PLUGINS and self.value.replace(" ", "") == ENTRY_POINT


def packages(found: Upstream | None) -> list[tuple[str, str, str]]:
    """Name, version and place of everything that matters; the version is ``not installed`` where it is not."""
    rows = [
        ("vllm-glm-patch", __version__, str(Path(__file__).parents[2])),
        ("python", platform.python_version(), sys.executable),
        ("system", platform.platform(), ""),
        ("vllm", found.version if found else "not installed", str(found.root) if found else ""),
    ]
    return rows + [(name, _version_of(name), "") for name in ("torch", "triton", "transformers")]


def _version_of(name: str) -> str:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return "not installed"


def cards() -> tuple[list[str], str]:
    """One line a card with name, driver and memory, and, where there is none, why."""
    if shutil.which(_SMI_QUERY[0]) is None:
        return [], "nvidia-smi is not there, so no NVIDIA driver is known"
    try:
        answer = subprocess.run(_SMI_QUERY, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi did not answer: {error}"
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines() or ["nothing"]
        return [], f"nvidia-smi failed with exit code {answer.returncode} and said: {said[0]}"
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    described = []
    for index, line in enumerate(lines):
        name, driver, memory = ([part.strip() for part in line.rsplit(",", 2)] + ["?", "?"])[:3]
        described.append(f"{index}: {name}, driver {driver}, {memory}")
    return described, "" if described else "nvidia-smi lists no card"


def plugins(environ: Mapping[str, str] | None = None) -> list[Plugin]:
    """Every vLLM plugin of this Python, ours among them."""
    environ = os.environ if environ is None else environ
    chosen = environ["VLLM_PLUGINS"].split(",") if "VLLM_PLUGINS" in environ else None
    found: dict[tuple[str, str, str], Plugin] = {}
    for dist in distributions():
        for point in dist.entry_points:
            if point.group.startswith("vllm."):
                loaded = chosen is None or point.name in chosen
                package = f"{dist.metadata['Name']} {dist.version}"
                plugin = Plugin(point.group, point.name, point.value, package, loaded)
                found.setdefault((point.group, point.name, point.value), plugin)
    return sorted(found.values(), key=lambda plugin: (not plugin.ours, plugin.group, plugin.name))


def setting_rows(settings: Settings, environ: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Name, value and origin of every setting."""
    environ = os.environ if environ is None else environ
    rows = []
    for field in fields(Settings):
        variable = field.metadata["env"]
        value = getattr(settings, field.name)
        shown = (", ".join(value) or "none") if isinstance(value, tuple) else str(value).lower()
        rows.append((field.name, shown, f"{variable}={environ[variable]}" if variable in environ else f"default ({variable})"))
    return rows
