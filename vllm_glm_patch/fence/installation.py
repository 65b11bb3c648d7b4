"""Makes the fence torch's CUDA allocator, in this process."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from . import accounting, dumping
from .launches import cupti_places, find_cupti
from .library import STACK_FUNCTION, FenceError, Library, library_path
from .options import Options
from .stacks import StackRecorder

_log = logging.getLogger("vllm_glm_patch")
_state: dict[str, Any] = {}  # what must live as long as the process: library, torch's allocator, patches

# torch's setter → our function. All exist from torch 2.1 on; seen in 2.7.1, 2.11.0 and 2.13.0.
_CALLBACKS = {
    "set_record_stream_fn": "glm_fence_record_stream",
    "set_begin_allocate_to_pool": "glm_fence_begin_pool",
    "set_end_allocate_to_pool_fn": "glm_fence_end_pool",
    "set_release_pool": "glm_fence_release_pool",
    "set_reset_fn": "glm_fence_empty_cache",
}


def installed() -> Library | None:
    """The library, once `install` has worked in this process."""
    return _state.get("library")


def install(options: Options) -> Library:
    """Fences all CUDA memory that torch allocates from now on. Does nothing where it is already installed.

    Args:
        options: see Options.

    Returns:
        The loaded library, for statistics.

    Raises:
        FenceError: torch has used CUDA before, has no CUDA, or the library is missing; nothing was changed.
    """
    already = installed()
    if already is not None:
        return already
    import torch

    if torch.version.cuda is None:
        raise FenceError(f"torch {torch.__version__} is built without CUDA; the fence needs a CUDA build.")
    if torch.cuda.is_initialized():
        raise FenceError(
            "torch has used CUDA in this process before the fence was installed. Install it earlier, or start the "
            "program with `vllm-glm-patch fence -- COMMAND`, which does."
        )
    path = library_path(options)
    library = Library(path)
    wrapper = torch.cuda.memory.CUDAPluggableAllocator(str(path), "glm_fence_torch_malloc", "glm_fence_free")
    native = wrapper.allocator()
    missing = [setter for setter in _CALLBACKS if not hasattr(native, setter)]
    for setter, function in _CALLBACKS.items():
        if setter not in missing:
            getattr(native, setter)(library.pointer(function))
    if missing:
        _log.warning(
            "torch %s has no %s: the fence waits for the whole device before it unmaps, and keeps what graphs used.",
            torch.__version__,
            ", ".join(missing),
        )
    library.configure(options, streams_recorded="set_record_stream_fn" not in missing)
    if (options.stacks or options.launches) and options.directory:
        stack_of_caller = STACK_FUNCTION(StackRecorder(options.directory).number)
        if options.stacks:
            library.set_stack_function(stack_of_caller)
        if options.launches:
            cupti = options.cupti or find_cupti(torch.__file__, torch.version.cuda)
            looked = "" if options.cupti else ", ".join(cupti_places(torch.__file__, torch.version.cuda))
            library.watch_launches(options, cupti, stack_of_caller, looked)
    torch.cuda.memory.change_current_allocator(wrapper)
    _state.update(library=library, wrapper=wrapper, patched=accounting.install(torch, library))
    _log.info("fence: every CUDA block %ss at an unmapped page, rounded up to %d bytes.", options.guard, options.align)
    return library


def install_from_environment() -> bool:
    """Installs what VLLM_GLM_PATCH_FENCE* ask for; a plugin or a sitecustomize calls it.

    Returns:
        Whether the fence is installed now. A process in which it cannot be (no CUDA build of torch) is left as it is,
        with a warning: a tool in the same environment must not stop.
    """
    options = Options.from_environment()
    if options is None:
        return False
    if options.directory:
        dumping.install(Path(options.directory))
    try:
        install(options)
    except FenceError as error:
        message = f"fence: not installed in this process ({sys.argv[0] if sys.argv else 'python'}): {error}"
        _log.warning("%s", message)
        return False
    return True


def release_graphs() -> None:
    """Says that no captured CUDA graph will be replayed any more, so that the memory kept for them can be unmapped."""
    library = installed()
    if library is not None:
        library.release_graphs()
