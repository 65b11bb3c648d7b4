"""Compiled cubins on disk: one folder a key, owner-only, written whole or not at all, made once for all processes.

    <cache>/hopper/<key>/manifest.json, *.cubin      an entry; the manifest has each file's SHA-256
    <cache>/hopper/<key>.lock                        held by the process that compiles

What lies here is run on the card, so a folder that somebody else may write is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from .errors import HopperError

VARIABLE = "VLLM_GLM_PATCH_CACHE"
MANIFEST = "manifest.json"
PATIENCE = 600.0  # seconds that a process waits for the one that compiles
_UNFINISHED = ".new-"
_STALE = 3600.0  # seconds after which an unfinished entry is one of a process that died


def root(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that VLLM_GLM_PATCH_CACHE names, else vllm_glm_patch in the user's cache folder.

    Raises:
        HopperError: there is neither, nor a home.
    """
    if named := environ.get(VARIABLE):
        return Path(named).absolute()
    if base := environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "vllm_glm_patch"
    try:
        return Path.home() / ".cache" / "vllm_glm_patch"
    except RuntimeError as error:
        raise HopperError(f"There is no place for compiled kernels: {error} Set {VARIABLE} to a folder of your own.") from None


def owned_folder(path: Path) -> Path:
    """Makes the folder, for its owner only, where it is missing; returns it without symbolic links.

    Raises:
        HopperError: it cannot be made, or somebody else owns it, may write it, or may put another in its place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(exist_ok=True, mode=0o700)
        path = path.resolve(strict=True)
        states = {folder: folder.stat() for folder in (path, *path.parents)}
    except OSError as error:
        raise HopperError(
            f"The cache folder {path} for compiled kernels cannot be used: {error}. Set {VARIABLE} to a folder of your own."
        ) from None
    for folder, state in states.items():
        inside = folder == path
        mode = stat.S_IMODE(state.st_mode)
        others_may_write = mode & (stat.S_IWGRP | stat.S_IWOTH) and (inside or not mode & stat.S_ISVTX)
        trusted = (os.geteuid(),) if inside else (0, os.geteuid())
        if others_may_write or state.st_uid not in trusted:
            raise HopperError(
                f"The cache folder {path} for compiled kernels is refused: {folder} has mode {mode:04o} and belongs to user "
                f"{state.st_uid}, so that others may change what this process (user {os.geteuid()}) would run. "
                f"Set {VARIABLE} to a folder that only you may write, or chmod go-w this one after looking at what is in it."
            )
    return path


def key_of(sources: Mapping[str, str], options: tuple[str, ...], compiler: str) -> str:
    """SHA-256 over all sources with their names, the compiler's options, and the compiler."""
    digest = hashlib.sha256()
    for part in (compiler, "\n".join(options), *(item for name in sorted(sources) for item in (name, sources[name]))):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read(entry: Path) -> tuple[dict[str, object], dict[str, bytes]] | None:
    """The manifest and files of an entry; None where it is missing, incomplete or not as its manifest says."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        files = {name: (entry / name).read_bytes() for name in manifest["files"]}
        good = all(hashlib.sha256(data).hexdigest() == manifest["files"][name] for name, data in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (manifest, files) if good else None


def get(
    folder: Path, key: str, about: Mapping[str, object], names: Collection[str], make: Callable[[], Mapping[str, bytes]]
) -> dict[str, bytes]:
    """The files of the entry of that key; calls `make` for them where there is no good one, in one process at a time.

    Args:
        folder: from `owned_folder`.
        about: what the manifest says besides.
        names: the files it must hold, which `make` returns.

    Raises:
        HopperError: another process held the lock too long, or the folder cannot be written; and whatever `make` raises.
    """
    import filelock

    entry = folder / key
    said = json.loads(json.dumps(about))

    def known() -> dict[str, bytes] | None:
        found = read(entry)
        if found is None:
            return None
        manifest, files = found
        rest = {key: value for key, value in manifest.items() if key != "files"}
        return files if rest == said and set(files) == set(names) else None

    if (files := known()) is not None:
        return files
    try:
        with filelock.FileLock(folder / f"{key}.lock", timeout=PATIENCE, mode=0o600):
            if (files := known()) is not None:
                return files
            made = make()
            _sweep(folder)
            _write(entry, {**about, "files": {n: hashlib.sha256(d).hexdigest() for n, d in made.items()}}, made)
    except filelock.Timeout:
        raise HopperError(
            f"Another process has held {folder / key}.lock for {PATIENCE:.0f} s, which is longer than kernels take to compile. "
            "See which (fuser), end it, and start again."
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise HopperError(f"Compiled kernels cannot be kept in {folder}: {error}. Set {VARIABLE} to another folder.") from None
    if (files := known()) is None:
        raise HopperError(f"{entry} does not hold what was just written there. Check that file system, or set {VARIABLE}.")
    return files


def _write(entry: Path, manifest: Mapping[str, object], files: Mapping[str, bytes]) -> None:
    """Under the lock: a folder beside the entry, filled, then renamed."""
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=entry.parent))  # 0700
    try:
        for name, data in {**files, MANIFEST: json.dumps(manifest, indent=2).encode()}.items():
            with (unfinished / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if entry.exists():  # a damaged one
            shutil.rmtree(entry)
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what processes that died left unfinished."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        try:
            old = time.time() - left.stat().st_mtime > _STALE
        except OSError:
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)
