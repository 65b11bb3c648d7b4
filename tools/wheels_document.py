"""Keeps what `tools.wheels` and `tools.beside` saw in benchmarks/results/wheels.json, and makes docs/wheels.md of it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "wheels.json"
DOCUMENT = ROOT / "docs" / "wheels.md"
HEAD = """<!-- Made by `python -m tools.wheels` and `python -m tools.beside`; not to be edited. -->
# The wheel

One wheel for every Python from 3.9 on, tried as a user gets it. Everything as recorded is in
[wheels.json](../benchmarks/results/wheels.json)."""
BARE = """Installed by that Python's own pip with what it depends on, tried, and uninstalled. *ok* means that each of these
went as it should: {checks}."""
BESIDE = """## Beside vLLM

Releases as published, for CUDA, on a machine without a card. The wheel was installed by pip and uninstalled, then by uv and
uninstalled; `pip freeze --all` was taken before, between and after.

- *packages*: lines of the freeze before.
- *added*, *changed*: lines that the installation added, and lines of others that it changed or took away, of both installers.
- *restored*: the freeze after uninstalling is the one before.
- *plugin*: what becomes of the patches when vLLM itself loads its plugins.
- *own time*: milliseconds of importing this package and of installing the patches, the median of {runs} processes."""


def read(file: Path = RECORDS) -> dict[str, Any]:
    """All that is recorded, empty where there is no file."""
    empty: dict[str, Any] = {"wheel": {}, "pythons": {}, "beside": {}}
    return {**empty, **json.loads(file.read_text(encoding="utf-8"))} if file.exists() else empty


def record(part: str, seen: Any, file: Path = RECORDS) -> None:
    """Put what was seen in the place of what was recorded of this part."""
    text = json.dumps({**read(file), part: seen}, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def record_in(part: str, version: str, seen: Any, file: Path = RECORDS) -> None:
    """The same for one version of a part that has several."""
    versions = {**read(file)[part], version: seen}
    record(part, {name: versions[name] for name in sorted(versions, key=Version)}, file)


def write() -> None:
    """Make the document of what is recorded."""
    DOCUMENT.write_text(render(read()), encoding="utf-8")


def render(recorded: dict[str, Any]) -> str:
    """The document."""
    parts = [HEAD]
    if recorded["wheel"]:
        parts.append("\n".join(_wheel(recorded["wheel"])))
    if recorded["pythons"]:
        checks = dict.fromkeys(check for seen in recorded["pythons"].values() for check in seen["checks"])
        named = ", ".join(f"`{check}`" if check.startswith("-") else check for check in checks)
        text = textwrap.fill(BARE.format(checks=named), 120, break_on_hyphens=False)
        parts += ["## In a bare environment of each Python", text, "\n".join(_pythons(recorded["pythons"]))]
    if recorded["beside"]:
        runs = max(len(seen["plugin"].get("milliseconds", ())) for seen in recorded["beside"].values())
        parts += [BESIDE.format(runs=runs), "\n".join(_beside(recorded["beside"]))]
    return "\n\n".join(parts) + "\n"


def _wheel(wheel: dict[str, Any]) -> Iterator[str]:
    needs = ", ".join(f"{library} {version}" for library, version in sorted(wheel["needs"].items()))
    yield "| | |"
    yield "|---|---|"
    yield f"| name | `{wheel['name']}` |"
    yield f"| size | {wheel['size'] // 1000} kB, {wheel['files']} files |"
    yield f"| native parts | {', '.join(f'`{name}`' for name in wheel['native'])} |"
    yield f"| newest symbols they ask for | {needs} |"
    yield f"| `auditwheel`, `twine check`, wheel of the sdist the same | {'; '.join(wheel['problems']) or 'ok'} |"
    yield f"| built of | {wheel['commit']} |"


def _pythons(pythons: dict[str, Any]) -> Iterator[str]:
    yield "| Python | pip | outcome | installed with it |"
    yield "|---|---|---|---|"
    for seen in pythons.values():
        wrong = "; ".join(f"{check}: {problem}" for check, problem in seen["checks"].items() if problem)
        brought = ", ".join(line.replace("==", " ") for line in seen["brought"])
        yield f"| {seen['python']} | {seen['pip']} | {wrong or 'ok'} | {brought} |"


def _beside(beside: dict[str, Any]) -> Iterator[str]:
    yield "| vLLM | Python | torch | packages | added | changed | restored | plugin | own time |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for version, seen in beside.items():
        added, changed = (
            sorted({name for one in seen["installers"].values() for name in one[part]}) for part in ("added", "changed")
        )
        restored = "yes" if all(one["restored"] for one in seen["installers"].values()) else "no"
        states: dict[str, list[str]] = {}
        for patch, state in seen["plugin"].get("patches", {}).items():
            states.setdefault(state, []).append(patch)
        plugin = "; ".join(f"{', '.join(ids)} {state}" for state, ids in states.items()) or seen["plugin"]["problem"]
        times = sorted(seen["plugin"].get("milliseconds", ()))
        median = f"{times[len(times) // 2]:.0f} ms" if times else "none"
        row = [version, seen["python"], seen["torch"], str(seen["packages"]), ", ".join(added), ", ".join(changed) or "none"]
        yield f"| {' | '.join([*row, restored, plugin, median])} |"
