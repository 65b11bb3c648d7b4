"""Writes the files of a plan, all of them or none; modes are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...errors import UserError
from .plan import FilePlan

_NEW, _OLD = ".vllm-glm-patch.new", ".vllm-glm-patch.old"


def write(plans: list[FilePlan]) -> None:
    """Put the new text of each file in place, by renaming a complete new file over it.

    Raises:
        UserError: a file could not be written; all are as they were.
    """
    renamed: list[FilePlan] = []
    try:
        for one in plans:
            for suffix, content in ((_NEW, one.after), (_OLD, one.before)):
                _beside(one, suffix).write_bytes(content)
                shutil.copymode(one.path, _beside(one, suffix))
        for one in plans:
            _beside(one, _NEW).replace(one.path)
            renamed.append(one)
    except OSError as error:
        for one in renamed:
            _beside(one, _OLD).replace(one.path)
        raise UserError(
            f"{error.filename or one.path} cannot be written: {error.strerror}. Nothing in the tree was changed. Make the "
            "tree writable and run this again."
        ) from error
    finally:
        for one in plans:
            for suffix in (_NEW, _OLD):
                _remove(_beside(one, suffix))


def _beside(one: FilePlan, suffix: str) -> Path:
    return one.path.with_name(one.path.name + suffix)


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:  # a folder that nothing can be written to holds nothing of ours either
        return
