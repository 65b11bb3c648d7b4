"""`python -m vllm_glm_patch` is the same as `vllm-glm-patch`."""

from __future__ import annotations

from .cli import main

main()
