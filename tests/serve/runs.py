"""Whole runs of a real vLLM on the CPU: started, asked, stopped. What is left of one is looked at by the tests."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.server import Answer, Server, varied_prompt

LENGTHS = (1, 4096, 8190, 8191, 8192, 8193, 16384)


@dataclass(frozen=True)
class Served:
    """What one run of a server left."""

    answers: dict[int, Answer]
    """By the length of the prompt."""
    steps: list[int]
    """Tokens of every step of the engine."""
    log: str

    def texts(self, lengths: Sequence[int] = LENGTHS) -> dict[int, str]:
        return {length: self.answers[length].text for length in lengths}


@dataclass(frozen=True)
class Rooms:
    """Where servers of this session find their model and put their logs."""

    model: Path
    new_folder: Callable[[str], Path]

    def server(self, name: str, **options: object) -> Server:
        return Server(self.model, self.new_folder(name), **options)  # type: ignore[arg-type]

    def serve(self, name: str, lengths: Sequence[int] = LENGTHS, max_tokens: int = 4, **options: object) -> Served:
        """Start a server, ask it with a prompt of each length, stop it."""
        with self.server(name, **options) as server:
            server.wait_until_ready()
            answers = {length: server.complete(varied_prompt(length), max_tokens) for length in lengths}
            return Served(answers, server.steps(), server.log_text())

    def fail_to_serve(self, name: str, **options: object) -> tuple[int, str]:
        """Start a server that is to end by itself; its exit code and log."""
        with self.server(name, **options) as server:
            return server.wait_for_exit(), server.log_text()

    def catalog_copy(self, name: str) -> Path:
        """A copy of the installed package for PYTHONPATH, in whose catalog a test may change things; the folder above it."""
        folder = self.new_folder(name)
        shutil.copytree(installed_package(), folder / "vllm_glm_patch")
        return folder


def installed_package() -> Path:
    return Path(sysconfig.get_path("purelib")) / "vllm_glm_patch"


def config(**settings: object) -> tuple[str, str]:
    """Flags of `vllm serve` that give these settings."""
    return ("--additional-config", json.dumps({"glm_patch": settings}))
