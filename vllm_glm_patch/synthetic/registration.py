"""Makes the load format known to vLLM, once its loaders are imported; imports nothing itself."""

from __future__ import annotations

import os
from types import ModuleType

from vllm_glm_patch import patching
from vllm_glm_patch.log import logger

FORMAT = "glm_patch_synthetic"
_LOADERS = "vllm.model_executor.model_loader"
_MARK = "_glm_patch_synthetic"  # an attribute of that module: the format is known there
_TOLD = "_GLM_PATCH_NO_SYNTHETIC"  # an environment variable, so that child processes stay quiet


def offer() -> None:
    """Let `--load-format glm_patch_synthetic` work in this process. May be called any number of times.

    vLLM before 0.10.1 has no `register_model_loader`: this is said once, and vLLM is left alone.
    """
    try:
        patching.when_imported(_LOADERS, _register)
    except patching.CannotReplace as error:
        logger.warning("--load-format %s is not available: %s. Load the plugin before vLLM's model loaders.", FORMAT, error)


def _register(loaders: ModuleType) -> None:
    if hasattr(loaders, _MARK):
        return
    setattr(loaders, _MARK, True)
    register = getattr(loaders, "register_model_loader", None)
    if register is not None:
        from vllm_glm_patch.synthetic.loader import loader_class

        register(FORMAT)(loader_class(loaders.BaseModelLoader))
    elif not os.environ.get(_TOLD):
        os.environ[_TOLD] = "1"
        logger.info(
            "This vLLM takes no model loaders from plugins, so --load-format %s is not available. Use vLLM 0.10.1 or newer, "
            "or write a checkpoint with `vllm-glm-patch model`.",
            FORMAT,
        )
