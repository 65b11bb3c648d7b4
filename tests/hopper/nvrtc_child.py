"""One of several processes that want the same kernels at once. Arguments: cache, log, start file, what goes wrong ("" or
"die"). Waits for the start file, then asks; the compiler is a stand-in that is slow and writes a line a source."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

from vllm_glm_patch.moe.hopper import library

SOURCES = {"abi.h": "constexpr int abi_version = 7;", "flags.txt": "--one\n", "a.cu": "A", "b.cu": "B"}


class SlowCompiler:
    """Takes what Nvrtc takes."""

    path = "stand-in"
    identity = "stand-in 1.0"

    def __init__(self, log: Path, goes_wrong: str = "") -> None:
        self.log, self.goes_wrong = log, goes_wrong

    def compile(self, name: str, text: str, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
        with self.log.open("a") as log:
            log.write(f"{os.getpid()} {name}\n")
        time.sleep(0.5)
        if self.goes_wrong == "die":
            os._exit(9)
        return f"cubin of {text} with {headers} and {options}".encode() * 1000


def main() -> None:
    cache, log, start, goes_wrong = sys.argv[1:]
    print("ready", flush=True)
    while not Path(start).exists():
        time.sleep(0.001)
    images = library.compiled(SlowCompiler(Path(log), goes_wrong), SOURCES, Path(cache))  # type: ignore[arg-type]
    print(hashlib.sha256(b"".join(images.files[name] for name in sorted(images.files))).hexdigest())


if __name__ == "__main__":
    main()
