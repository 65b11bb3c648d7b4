"""Starts a real `vllm serve` of a tiny model on the CPU, asks it things, and ends it with all its processes."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import accumulate
from pathlib import Path
from typing import Any

from tools import step_recorder
from tools.processes import Session

BUDGET = 8192
"""--max-num-batched-tokens, the number this project is about."""
MAX_MODEL_LEN = 20480  # 16384 tokens and their answer
_TEXT_TOKENS = (*range(32, 127), *range(256, 900))  # printable characters and words of the tiny model's 1024
START_LIMIT = 420.0  # seconds; an unhurried start takes 40
_ANSWER_LIMIT = 240.0
FLAGS = ("--enforce-eager", "--enable-chunked-prefill", "--max-num-batched-tokens", str(BUDGET))
"""The flags of the report this project answers, and no compilation, which is slow on a CPU."""
_NOT_INHERITED = ("VLLM_GLM_PATCH", "_GLM_PATCH", "TRITON_INTERPRET")  # our own switches, and one of the tests
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerFailed(Exception):
    """The server ended, did not start in time, or did not answer; the text holds the end of its log."""


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    text: str
    seconds: float
    steps: tuple[int, ...]
    """Tokens of each step of the engine in which this request took part."""


class Server:
    """One `vllm serve` of a model, listening on this machine only. Use it in a `with` statement."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        flags: Sequence[str] = FLAGS,
        more_flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        python_path: Sequence[Path] = (),
        python: Path = Path(sys.executable),
    ) -> None:
        """Start it; `wait_until_ready` says when it can be asked.

        Args:
            model: the folder of the model.
            folder: where log and recorded steps go; also the working directory, so it must not hold a folder `vllm`.
            flags: flags of `vllm serve`; by default those of the report this project answers.
            more_flags: flags after those.
            environment: variables in addition to those a CPU server needs.
            python_path: folders whose modules go before the installed ones.
            python: the Python whose vLLM serves.
        """
        self.log = folder / "server.log"
        self._record = folder / "steps.jsonl"
        for old in (self.log, self._record):
            old.unlink(missing_ok=True)
        recorder = folder / "recorder"
        step_recorder.install(recorder)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
        variables = {
            **inherited,
            **_ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(map(str, (*python_path, recorder))),
            step_recorder.VARIABLE: str(self._record),
            **(environment or {}),
        }
        self._port = _free_port()
        where = ("--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", "glm")
        vllm = python.parent / "vllm"
        command: list[str | Path] = [vllm, "serve", model, *where, "--max-model-len", str(MAX_MODEL_LEN), *flags, *more_flags]
        self._session = Session(command, self.log, variables, folder)
        self._asked = 0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def session(self) -> Session:
        """The processes of the server."""
        return self._session

    def wait_until_ready(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until requests are taken.

        Raises:
            ServerFailed: it ended instead, or is not ready after `START_LIMIT` seconds.
        """
        deadline = time.monotonic() + START_LIMIT
        while not self._is_healthy():
            self._check_alive()
            if time.monotonic() > deadline:
                raise ServerFailed(f"The server was not ready after {START_LIMIT:.0f} s. {self._log_end()}")
            while_waiting()
            time.sleep(0.25)

    def wait_for_exit(self) -> int:
        """Wait until a server that is not to start has ended by itself; its exit code.

        Raises:
            ServerFailed: it still runs after `START_LIMIT` seconds.
        """
        code = self._session.wait(START_LIMIT)
        if code is None:
            raise ServerFailed(f"The server still runs after {START_LIMIT:.0f} s. {self._log_end()}")
        return code

    def stop(self) -> None:
        """End it and everything it started."""
        self._session.stop()

    def log_text(self) -> str:
        """Everything it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def steps(self) -> list[int]:
        """Tokens of every step of the engine so far."""
        return [step.total for step in step_recorder.read(self._record)]

    def complete(self, prompt: Sequence[int], max_tokens: int = 4) -> Answer:
        """The greedy continuation of a prompt of token ids, always `max_tokens` long.

        Raises:
            ServerFailed: no answer came.
        """
        self._asked += 1
        request_id = f"prompt-{self._asked}-of-{len(prompt)}-tokens"
        body = {"model": "glm", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        started = time.monotonic()
        with self._post("/v1/completions", body, request_id) as response:
            answer = json.load(response)
        seconds = time.monotonic() - started
        taken = [step.requests for step in step_recorder.read(self._record)]
        steps = (tokens for requests in taken for name, tokens in requests.items() if request_id in name)
        return Answer(answer["choices"][0]["text"], seconds, tuple(steps))

    def chat(self, question: str, max_tokens: int = 16) -> Iterator[str]:
        """The pieces of a streamed chat answer, as they come.

        Raises:
            ServerFailed: no answer came.
        """
        messages = [{"role": "user", "content": question}]
        body = {"model": "glm", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        with self._post("/v1/chat/completions", body, "chat") as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    delta = json.loads(data)["choices"][0]["delta"]
                    yield delta.get("content") or delta.get("reasoning") or ""

    @contextmanager
    def _post(self, path: str, body: Mapping[str, Any], request_id: str) -> Iterator[Any]:
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        request = urllib.request.Request(self._url(path), json.dumps(body).encode(), headers)
        try:
            with _direct.open(request, timeout=_ANSWER_LIMIT) as response:
                yield response
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise ServerFailed(f"{request_id}: the server answered {error.code}: {text}. {self._log_end()}") from error
        except (OSError, HTTPException) as error:
            self._session.wait(2)  # a server that dies drops its connections first
            self._check_alive()
            raise ServerFailed(f"{request_id}: no answer ({error}). {self._log_end()}") from error

    def _is_healthy(self) -> bool:
        try:
            with _direct.open(self._url("/health"), timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _check_alive(self) -> None:
        code = self._session.exit_code()
        if code is not None:
            raise ServerFailed(f"The server ended with exit code {code}. {self._log_end()}")

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def _log_end(self) -> str:
        return f"The end of {self.log}:\n{self._session.last_lines(25)}"


def varied_prompt(tokens: int, seed: int = 0) -> list[int]:
    """`tokens` random ids: different ones, so that the router spreads them over the experts."""
    return random.Random(f"{seed}/{tokens}").choices(_TEXT_TOKENS, k=tokens)


def write_tiny_model(out: Path, log: Path, python: Path = Path(sys.executable)) -> None:
    """Make the model that is served, with the command of this package in the environment of `python`.

    Raises:
        ServerFailed: it could not be made.
    """
    command: list[str | Path] = [python.parent / "vllm-glm-patch", "model", out, "--preset", "tiny"]
    session = Session(command, log, folder=out.parent)
    try:
        code = session.wait()
    finally:
        session.stop()
    if code != 0:
        raise ServerFailed(f"`vllm-glm-patch model` ended with exit code {code}. The end of {log}:\n{session.last_lines(25)}")


def in_words(length: int, steps: Sequence[int]) -> str:
    """The steps of one prompt: «8192 + 1, then 3 × 1» for a prompt of 8193 tokens and steps of 8192, 1, 1, 1, 1."""
    sums = list(accumulate(steps))
    if length not in sums:
        return f"{', '.join(map(str, steps))} (they do not add up to the prompt)"
    count = sums.index(length) + 1
    rest = len(steps) - count
    return " + ".join(map(str, steps[:count])) + (f", then {rest} × 1" if rest else "")


def patch_table(log: str) -> tuple[str, list[tuple[str, str, str]]]:
    """The table that the plugin wrote into the log of a server: its title, and id, state and reason of each patch.

    Raises:
        ServerFailed: there is none.
    """
    found = re.search(rf"(vllm-glm-patch \S+ on vLLM .*)((?:\n.*?  [a-z-]+ +(?:{_STATES})\b.*)+)", log)
    if found is None:
        raise ServerFailed("The log of the server holds no table of patches: the plugin did not run.")
    return found[1], [row.groups() for row in re.finditer(rf"  ([a-z-]+) +({_STATES}) *(.*)", found[2])]  # type: ignore[misc]


_STATES = "applied|not needed|switched off|refused|not in this release"
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business between us


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
