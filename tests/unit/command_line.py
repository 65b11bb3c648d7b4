"""Runs `vllm-glm-patch` in this process, as a shell would."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest import mock

from vllm_glm_patch import cli


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object) -> Result:
    """Call it with these arguments and catch what it prints and how it leaves."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["vllm-glm-patch", *map(str, arguments)]
    with mock.patch("sys.argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    return Result(code, out.getvalue(), err.getvalue())
