"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import os

from . import installation, synthetic
from .log import follow_vllm, logger
from .settings import PREFIX, Settings


def register() -> None:
    """Install the patches in this process. May be called any number of times; initialises no CUDA.

    Raises:
        UserError, StrictRefusal: as `installation.install`; vLLM then does not start.
    """
    follow_vllm()
    if os.environ.get(f"{PREFIX}_FENCE"):
        from . import fence

        fence.install_from_environment()
    synthetic.offer()  # with VLLM_GLM_PATCH=0 too: both sides of a comparison load the same weights
    settings = Settings.from_environment()
    if not settings.enabled:
        logger.info("VLLM_GLM_PATCH=0: vLLM runs unpatched.")
        return
    installation.make_variables_known()
    installation.install(settings)
