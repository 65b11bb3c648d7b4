"""The fence: a CUDA allocator whose blocks end at unmapped pages, so that a read past one faults where it happens.

    from vllm_glm_patch import fence
    fence.install(fence.Options(align=512, stacks=True))  # before anything uses CUDA

Limits. Pools with an allocator of their own (vLLM's sleep mode, NCCL symmetric memory) and CUDA IPC do not work under
a pluggable allocator: run vLLM with --disable-custom-all-reduce on several cards. Blocks that a graph used stay mapped
until the graph is destroyed, or until `release_graphs` says that none will be replayed.
"""

from .guards import Guards
from .installation import install, install_from_environment, installed, release_graphs
from .library import FenceError
from .options import Options

__all__ = ["FenceError", "Guards", "Options", "install", "install_from_environment", "installed", "release_graphs"]
