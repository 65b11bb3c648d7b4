"""`vllm_glm_patch.tools.processes` for the tools of this tree, also before anything that the package needs is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_glm_patch.tools.processes import Interrupted, Session, interruptible

    __all__ = ["Interrupted", "Session", "interruptible"]
else:
    try:
        from vllm_glm_patch.tools import processes as _module
    except ImportError:  # the set-up, on a Python that has nothing yet
        _file = Path(__file__).parents[1] / "vllm_glm_patch" / "tools" / "processes.py"
        _spec = importlib.util.spec_from_file_location("vllm_glm_patch_tools_processes", _file)
        _module = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(_module)
    sys.modules[__name__] = _module  # that very module, so that there is one list of what runs
