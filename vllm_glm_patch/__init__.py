"""A corrected vLLM for GLM-4.6-FP8: patches vLLM 0.10.0 to 0.33.0 when it starts.

vLLM calls it by itself through its plugin entry point. By hand, before vLLM is used:

    import vllm_glm_patch
    print(vllm_glm_patch.install().table())
"""

from .errors import StrictRefusal, UserError
from .installation import PatchStatus, Status, install, status, uninstall
from .settings import Settings
from .version import __version__

__all__ = ["PatchStatus", "Settings", "Status", "StrictRefusal", "UserError", "__version__", "install", "status", "uninstall"]
