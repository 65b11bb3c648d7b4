"""Run the MoE kernels where there is no card: Triton's interpreter must be on before they are imported."""

from __future__ import annotations

import os
import random

import pytest

torch = pytest.importorskip("torch")

# Before triton itself is imported: its own library functions are interpreted or not by this too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")


@pytest.fixture
def device() -> str:
    """Where the kernels run: the card if there is one, else the CPU through the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed so that a failure can be repeated with VGP_TEST_SEED."""
    value = int(os.environ.get("VGP_TEST_SEED", random.SystemRandom().randrange(1 << 31)))
    print(f"VGP_TEST_SEED={value}")
    return value
