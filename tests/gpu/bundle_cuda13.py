#!/usr/bin/env python3
"""Pack a vLLM whose PyTorch is for CUDA 13, with that PyTorch but without CUDA's libraries, for a machine that has those.

    bundle_cuda13.py VENV OUTDIR --present present.txt [--part-mb 60]

As ../shared/gpu/bundle_own_torch.py, on which it builds, but for CUDA 13: of NVIDIA's packages only NCCL is kept, and nothing
is stubbed. There, `session_quick.sh unpack` links the machine's own. vLLM 0.33.0 with torch 2.14 has run so beside the
libraries of torch 2.11.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "shared/gpu"))

import bundle_own_torch as bundle  # type: ignore[import-not-found]

KEPT = {"nvidia-nccl-cu13"}


def main() -> None:
    bundle.NVIDIA_KEPT = KEPT
    bundle.OWN |= KEPT
    bundle.ALSO_LEFT_OUT = (bundle.ALSO_LEFT_OUT - {"nvidia-ml-py"}) | {"cupy-cuda13x"}
    bundle.write_stubs = lambda site, out: None
    bundle.main()


if __name__ == "__main__":
    main()
