"""Calls of the command `vllm` in children of one process, which has imported vLLM: that takes longer than many a run.

    python -m vllm_glm_patch.tools.bench.resident SOCKET

Listens on a Unix socket. One connection is one call: a line of JSON, [log file, argument, ...], is answered with the exit
code. A connection that is closed before ends its child.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

_IMPORTS = (  # what `vllm bench serve` imports in one release or another, the heavy ones first
    *("torch", "transformers", "vllm", "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve"),
    *("vllm.entrypoints.cli.openai", "vllm.entrypoints.cli.benchmark.main", "vllm.benchmarks.serve"),
)
_POLL = 0.1  # seconds between two looks at a child


def main() -> None:
    """Serve calls until the process is ended."""
    with socket.socket(socket.AF_UNIX) as listener:
        for name in _IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        listener.bind(sys.argv[1])
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # the other side has gone
                log, *arguments = json.loads(connection.makefile().readline())
                child = os.fork()
                if not child:
                    listener.close()
                    connection.close()
                    _be_vllm(Path(log), arguments)
                connection.sendall(f"{_code_of(child, connection)}\n".encode())


def _be_vllm(log: Path, arguments: list[str]) -> None:
    """Be the command `vllm` with these arguments; does not return."""
    code = 1
    try:
        with log.open("ab") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        sys.argv = ["vllm", *arguments]
        importlib.import_module("vllm.entrypoints.cli.main").main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _code_of(child: int, connection: socket.socket) -> int:
    """Wait for the child, and end it where the connection closes; its exit code."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if select.select([connection], [], [], _POLL)[0] and not connection.recv(1):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL


if __name__ == "__main__":
    main()
