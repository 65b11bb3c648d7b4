"""Writes a checkpoint, whole or without weights: checks first, then a temporary folder, then one rename."""

from __future__ import annotations

import errno
import importlib.util
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.model.config import config_of, generation_config_of
from vllm_glm_patch.tools.model.report import ModelReport
from vllm_glm_patch.tools.model.routing import measure
from vllm_glm_patch.tools.model.shards import split, write_shards
from vllm_glm_patch.tools.model.spec import ModelSpec
from vllm_glm_patch.tools.model.tensors import Tensor, tensors_of
from vllm_glm_patch.tools.model.tokenizer import write_tokenizer

SHARD_BYTES = 4 << 30
_OTHER_FILES_BYTES = 32 << 20  # index, tokenizer and configs: 11 MB for the largest

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""


def write_model(out: Path, spec: ModelSpec, progress: Progress | None = None, *, shard_bytes: int = SHARD_BYTES) -> ModelReport:
    """Write a synthetic GLM-4.6 checkpoint that vLLM and transformers load.

    Args:
        out: the folder to make. It must not exist, or be empty; its parent must exist.
        spec: sizes, format and seed, from `spec_for`.
        progress: called as tensors are written.
        shard_bytes: the size of a safetensors file at most.

    Returns:
        What was written, with the measured expert load.

    Raises:
        UserError: `out` is taken or cannot be written, the disk has too little room, or torch, safetensors or
            tokenizers is missing. Nothing is left behind.

    Example:
        >>> write_model(Path("glm-tiny"), spec_for("tiny")).load.is_spread  # doctest: +SKIP
        True
    """
    started = time.monotonic()
    _check_packages("numpy", "safetensors", "tokenizers", "torch")
    tensors = list(tensors_of(spec))
    total = sum(tensor.nbytes for tensor in tensors)
    shards = split(tensors, shard_bytes)
    out = Path(out)
    target = _checked(out, total + _OTHER_FILES_BYTES)
    with _folder_for(out, target) as folder:
        _write_files(folder, spec)
        _write_weights(folder, spec, shards, total, progress)
        load = measure(folder, spec)
    parameters = sum(tensor.elements for tensor in tensors if tensor.fill != "scale")
    return ModelReport(target, spec, parameters, total, len(shards), time.monotonic() - started, load)


def write_config(out: Path, spec: ModelSpec) -> Path:
    """Write config, tokenizer and chat template of a synthetic GLM-4.6, and no weights: for a loader that makes them.

    Args:
        out: as in `write_model`.
        spec: sizes and format; its seed is not used, for the loader takes its own.

    Returns:
        The real path of the folder.

    Raises:
        UserError: as `write_model`; only tokenizers is needed.
    """
    _check_packages("tokenizers")
    out = Path(out)
    target = _checked(out, _OTHER_FILES_BYTES)
    with _folder_for(out, target) as folder:
        _write_files(folder, spec)
    return target


@contextmanager
def _folder_for(out: Path, target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` at the end, or leaves nothing behind."""
    folder = target.parent / f".glm-model-{secrets.token_hex(6)}.partial"
    try:
        folder.mkdir()
        yield folder
        folder.rename(target)
    except OSError as error:
        raise UserError(_why(out, error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after the rename there is none


def _check_packages(*names: str) -> None:
    """These come with every vLLM, and this package alone does not install them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed, and a model cannot be written without it. Run `pip install {name}`.")


def _checked(out: Path, needed: int) -> Path:
    """The real path of `out`, once it is free to be written and its disk has room."""
    try:
        target = out.resolve()
        if not target.parent.is_dir():
            raise UserError(f"{target.parent} is no folder, so {out.name} cannot be made in it. Create it first.")
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{out} exists already and is not overwritten. Remove it, or name another folder.")
        free = shutil.disk_usage(target.parent).free
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise UserError(_why(out, error)) from error
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free. "
            "Name a folder on a larger disk, or ask for less with --layers, --preset or --format fp8."
        )
    return target


def _write_files(folder: Path, spec: ModelSpec) -> None:
    for name, content in (("config", config_of(spec)), ("generation_config", generation_config_of(spec))):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, spec)


def _write_weights(folder: Path, spec: ModelSpec, shards: list[list[Tensor]], total: int, progress: Progress | None) -> None:
    from vllm_glm_patch.tools.model.weights import pieces  # imports torch

    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    write_shards(folder, shards, lambda tensor: pieces(tensor, spec.seed), wrote)


def _why(out: Path, error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk filled up while {out} was written; nothing was kept. Free some room, or name another disk."
    if code in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return f"{out} was made by somebody else meanwhile and is not overwritten. Name another folder."
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{out} cannot be written: {reason}. Name a folder that you may write."
