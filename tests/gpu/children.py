"""Runs each case in a forked child, so that a CUDA fault in one does not reach the next. The parent stays off CUDA."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def run(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns in a child, with "outcome": "ok", or {"outcome": "fault" | "error", "text": ...}."""
    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        try:
            result = {"outcome": "ok", **call()}
        except BaseException as error:  # a child reports whatever happened to it
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            fault = "CUDA error" in str(error) or "device-side assert" in str(error)
            result = {"outcome": "fault" if fault else "error", "text": text}
            if not fault:
                traceback.print_exc()
        with os.fdopen(write, "w") as pipe:
            json.dump(result, pipe)
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.wait()
    return json.loads(text) if text else {"outcome": "fault", "text": f"the child died with status {status}"}


def machine() -> dict[str, Any]:
    """The card, driver and versions that a measured number belongs to. Call it in a child."""
    import subprocess

    import torch

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "sms": properties.multi_processor_count,
        "driver": driver.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": os.environ.get("COMMIT", "unknown"),
    }
