"""The one logger, through vLLM's own handlers where vLLM has set them up."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm_glm_patch")


def follow_vllm() -> None:
    """Let our lines come out where, how and from the level on that vLLM's own do."""
    theirs = logging.getLogger("vllm")
    if theirs.handlers:
        logger.handlers = theirs.handlers
        logger.setLevel(theirs.level)
        logger.propagate = theirs.propagate
