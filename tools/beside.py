"""Installs the published wheel beside real releases of vLLM and takes it away again: nothing else may change.

    python -m tools.beside                       the releases below
    python -m tools.beside 0.21.0 --python 3.13  this one, with this Python; what is recorded of the others is kept

Each release is installed from the package registry, for CUDA as it is published, into an environment of its own below
.cache/wheels, of up to 9 GB, which is removed afterwards. No card is needed. The wheel is the one that `python -m tools.wheels`
left in dist. What was seen goes to benchmarks/results/wheels.json and docs/wheels.md.
Exit codes: 0 all is well; 1 something is not, and the last lines say what; 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import wheels_document
from tools.environment import run_step
from tools.outcome import exit_code_of
from tools.progress import console, doing
from tools.wheels import DIST, FOLDER, IMPORTS, PYTHONS, find_python, freeze, package_names, run, tools_environment
from vllm_glm_patch import catalog

RELEASES = {"0.10.1.1": "3.9", "0.17.1": "3.12", "0.26.0": "3.13"}
"""Three ways of calling the MoE layer, and the Python that each is tried with."""
SLOWEST = 150.0  # milliseconds that starting may take longer in each process of vLLM
_RUNS = 5
_LOAD = """
import json, sys, time
from vllm.plugins import load_general_plugins
assert not [name for name in sys.modules if name.startswith("vllm_glm_patch")]
started = time.perf_counter()
from vllm_glm_patch import plugin
plugin.register()
spent = (time.perf_counter() - started) * 1000
load_general_plugins()  # calls it again, as vLLM does
import torch, vllm_glm_patch
patches = {patch.id: patch.state for patch in vllm_glm_patch.status().patches}
print("SEEN " + json.dumps({"milliseconds": round(spent, 1), "cuda": torch.cuda.is_initialized(), "patches": patches}))
"""
_LOADED_BY_VLLM = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
import vllm_glm_patch
print("SEEN", vllm_glm_patch.status().vllm, len(vllm_glm_patch.status().patches))
"""


def main() -> int:
    """Do what is asked for; the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="tools.beside", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"releases of vLLM [default: {' '.join(RELEASES)}]")
    parser.add_argument("--python", choices=PYTHONS, help="the Python of the environments [default: 3.12, or as in RELEASES]")
    arguments = parser.parse_args()
    known = catalog.releases()
    for release in arguments.releases:
        if release not in known:
            parser.error(f"{release!r} is not a release this package knows; they go from {known[0]} to {known[-1]}.")
    wheels = sorted(DIST.glob("*manylinux*.whl"))
    if not wheels:
        parser.error("dist holds no wheel with a manylinux tag; `python -m tools.wheels` makes it.")

    def work() -> list[str]:
        problems = []
        for release in arguments.releases or RELEASES:
            python = arguments.python or RELEASES.get(release, "3.12")
            seen = try_beside(release, python, wheels[-1], FOLDER / f"beside-{release}")
            wheels_document.record_in("beside", release, seen)
            problems += [f"vLLM {release}: {wrong}" for wrong in judge(seen)]
        wheels_document.write()
        return problems

    return exit_code_of(work)


def try_beside(release: str, python: str, wheel: Path, folder: Path) -> dict[str, Any]:
    """Install a release, then the wheel by pip and by uv, look, and remove all of it; what was seen.

    Raises:
        SetUpFailed: the release could not be installed.
    """
    tools = tools_environment()
    uv, ours, log = tools / "bin" / "uv", folder / "bin" / "python", FOLDER / f"beside-{release}.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    try:
        console.print(f"[bold]vLLM {release}, Python {python}[/]")
        make: list[str | Path] = [uv, "venv", "--no-cache", "--seed", "--python", find_python(python, tools), folder]
        run_step("Making the environment", make, log, "run it again")
        by_pip: list[str | Path] = [ours, "-m", "pip"]
        by_uv: list[str | Path] = [uv, "--no-cache", "pip"]
        into: list[str | Path] = ["--python", ours]
        run_step(f"Installing vLLM {release}", [*by_uv, "install", *into, f"vllm=={release}"], log, "run it again")
        before = freeze(ours)
        torch = next((line.split("==")[1] for line in before if line.startswith("torch==")), "none")
        with doing("Installing the wheel with pip, loading the plugin, uninstalling"):
            pip, plugin = _there_and_back([*by_pip, "install"], [*by_pip, "uninstall", "-y"], ours, wheel)
        with doing("Installing the wheel with uv, uninstalling"):
            uvs, _ = _there_and_back([*by_uv, "install", *into], [*by_uv, "uninstall", *into], ours, wheel, look=False)
        installers = {"pip": pip, "uv": uvs}
        return {"python": version(ours), "torch": torch, "packages": len(before), "installers": installers, "plugin": plugin}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _there_and_back(
    put: Sequence[str | Path], take: Sequence[str | Path], python: Path, wheel: Path, *, look: bool = True
) -> tuple[dict[str, object], dict[str, object]]:
    """Install the wheel, load the plugin where wanted, uninstall what came: what changed, and what the plugin did."""
    before = freeze(python)
    installed = run(*put, wheel)
    after = freeze(python)
    plugin = load(python) if look else {}
    came = sorted(set(package_names(after)) - set(package_names(before)))
    removed = run(*take, *came)
    failed = "" if installed.returncode == removed.returncode == 0 else (installed.stderr + removed.stderr)[-700:]
    return {**compare(before, after, freeze(python)), "failed": failed}, plugin


def compare(before: Sequence[str], after: Sequence[str], at_last: Sequence[str]) -> dict[str, object]:
    """What installing changed, as names: packages `added`, those `changed` or gone; and whether the freeze is `restored`."""
    old, new = (dict(zip(package_names(lines), lines)) for lines in (before, after))
    return {
        "added": sorted(new.keys() - old.keys()),
        "changed": sorted(name for name in old if new.get(name) != old[name]),
        "restored": sorted(before) == sorted(at_last),
    }


def load(python: Path) -> dict[str, object]:
    """What the plugin does in this environment, without a card: states, time, whether CUDA was initialised; or a `problem`.

    That each module of ours can be imported beside this torch is tried first.
    """
    by_vllm = run(python, "-c", _LOADED_BY_VLLM)
    every = run(python, "-c", IMPORTS)
    if every.returncode != 0:
        return {"problem": f"a module of ours cannot be imported: {every.stderr.strip()[-700:]}"}
    seen = []
    for _ in range(_RUNS):
        done = run(python, "-c", _LOAD)
        lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
        if done.returncode != 0 or not lines or "SEEN" not in by_vllm.stdout:
            return {"problem": f"vLLM does not load its plugins here: {(done.stderr or by_vllm.stderr).strip()[-700:]}"}
        seen.append(json.loads(lines[0].removeprefix("SEEN ")))
    return {**seen[0], "milliseconds": [one["milliseconds"] for one in seen], "problem": ""}


def judge(seen: dict[str, Any]) -> list[str]:
    """What is wrong with what was seen of one release."""
    wrong = []
    for name, one in seen["installers"].items():
        if one["failed"]:
            wrong.append(f"{name}: {one['failed']}")
        if "vllm-glm-patch" not in one["added"]:
            wrong.append(f"{name} did not install the wheel")
        if one["changed"]:
            wrong.append(f"{name} changed {', '.join(one['changed'])}")
        if not one["restored"]:
            wrong.append(f"uninstalling with {name} did not restore the freeze")
    plugin = seen["plugin"]
    if plugin["problem"]:
        return [*wrong, plugin["problem"]]
    if plugin["cuda"]:
        wrong.append("loading the plugin initialised CUDA")
    if "refused" in plugin["patches"].values() or "applied" not in plugin["patches"].values():
        wrong.append(f"the patches are {plugin['patches']}")
    median = sorted(plugin["milliseconds"])[len(plugin["milliseconds"]) // 2]
    if median > SLOWEST:
        wrong.append(f"the plugin takes {median:.0f} ms to load, more than {SLOWEST:.0f}")
    return wrong


def version(python: Path) -> str:
    """The version of a Python."""
    return run(python, "-c", "import platform; print(platform.python_version())").stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
