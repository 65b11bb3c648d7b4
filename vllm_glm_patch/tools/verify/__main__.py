"""`python -m vllm_glm_patch.tools.verify JOB.json`: the child process of a run, see child.py."""

from __future__ import annotations

import sys
from pathlib import Path

from .child import Job, Server

if __name__ == "__main__":
    sys.exit(Server(Job.load(Path(sys.argv[1]))).run())
