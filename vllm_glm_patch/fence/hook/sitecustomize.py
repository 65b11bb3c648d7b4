"""Put first on PYTHONPATH by `vllm-glm-patch fence`: installs the fence as soon as a process imports torch.

Then runs the sitecustomize that this one hides, if there is one.
"""

# ruff: noqa: PTH100, PTH120
# os.path, because every Python process runs this file at its start and pathlib would cost it milliseconds.

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))


def _install_fence() -> None:
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))
    sys.path.append(package_root)  # last: another environment's Python finds its own packages first
    try:
        from vllm_glm_patch.fence import install_from_environment
    finally:
        sys.path.remove(package_root)
    install_from_environment()


class _AfterTorch:
    """Finds torch once, through the other finders, and installs the fence when torch's module has been run."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> "importlib.machinery.ModuleSpec | None":
        if name != "torch":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_install(module: ModuleType) -> None:
            run(module)
            try:
                _install_fence()
            except Exception as error:
                print(f"vllm-glm-patch fence: not installed in process {os.getpid()}: {error}", file=sys.stderr)

        spec.loader.exec_module = run_then_install  # type: ignore[method-assign]
        return spec


def _run_hidden_sitecustomize() -> None:
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get("VLLM_GLM_PATCH_FENCE", "") not in ("", "0"):
    sys.meta_path.insert(0, _AfterTorch)
_run_hidden_sitecustomize()
