"""Reads the few files of a folder, wheel or sdist that a scan looks at; archives are not unpacked to disk."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ...errors import UserError

MAX_FILE = 8 << 20
"""Bytes of one file that is read; the largest of vLLM's own sources is below 1 MiB."""
MAX_FILES = 64 << 20
"""Bytes of all files together that are read."""
MAX_UNPACKED = 1 << 30
"""Bytes that an sdist may unpack to; vLLM's unpack to about 100 MB."""
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip


def matcher(glob: str) -> Callable[[str], bool]:
    """Whether a path inside a tree matches a glob: ``*`` within a name, ``**/`` over any number of folders."""
    parts = re.split(r"(\*\*/|\*|\?)", glob)
    meanings = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    pattern = re.compile("".join(meanings.get(part, re.escape(part)) for part in parts), re.DOTALL)
    return lambda name: pattern.fullmatch(name) is not None


def read_folder(root: Path, globs: Sequence[str]) -> dict[str, str]:
    """The text of every file below `root` that matches a glob, by its path from there.

    Raises:
        UserError: such a file cannot be read or is absurdly large.
    """
    files = _Files()
    for glob in globs:
        for path in sorted(root.glob(glob)):
            if path.is_file():
                files.add(path.relative_to(root).as_posix(), _head(path), path)
    return files.texts


def read_wheel(path: Path, globs: Sequence[str]) -> dict[str, str]:
    """The text of every member of a wheel that matches a glob.

    Raises:
        UserError: the file is damaged or no wheel.
    """
    wanted = [matcher(glob) for glob in globs]
    files = _Files()
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.is_dir() and any(matches(member.filename) for matches in wanted):
                    with archive.open(member) as file:
                        files.add(member.filename, file.read(MAX_FILE + 1), f"{path}, member {member.filename}")
    except _DAMAGED as error:
        raise _damaged(path, "wheel", error) from error
    return files.texts


def read_sdist(path: Path, globs: Sequence[str]) -> dict[str, str]:
    """The text of every member of an sdist that matches a glob, by its path below the sdist's one folder.

    Raises:
        UserError: the file is damaged, no sdist, or unpacks to an absurd size.
    """
    wanted = [matcher(glob) for glob in globs]
    files = _Files()
    try:
        with _BoundedGzip(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in iter(archive.next, None):
                archive.members = []  # type: ignore[attr-defined]  # a hostile file may have millions of headers
                name = PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix()
                if member.isreg() and any(matches(name) for matches in wanted):
                    content = archive.extractfile(member)
                    if content is not None:
                        files.add(name, content.read(MAX_FILE + 1), f"{path}, member {member.name}")
    except _DAMAGED as error:
        raise _damaged(path, "sdist", error) from error
    return files.texts


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}. Make it readable and scan again.") from error


class _Files:
    """Texts by path, kept from growing absurdly."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._size = 0

    def add(self, name: str, content: bytes, called: object) -> None:
        self._size += len(content)
        if len(content) > MAX_FILE or self._size > MAX_FILES:
            limit = f"{MAX_FILE >> 20} MiB, or all files together than {MAX_FILES >> 20} MiB"
            raise UserError(f"{called} is larger than {limit}, which no vLLM comes near. Give another TARGET.")
        self.texts[name] = content.decode("utf-8", errors="replace")


class _BoundedGzip(gzip.GzipFile):
    """A gzip stream that refuses to unpack more than is sane, at once or in all."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 2 * MAX_FILE:
            raise ValueError(f"a header in it asks for {size} bytes")
        self._check(self.tell() + size)
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check(offset)
        return super().seek(offset, whence)

    def _check(self, end: int) -> None:
        if end > MAX_UNPACKED + MAX_FILE:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED >> 30} GiB")


def _damaged(path: Path, kind: str, error: BaseException) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"{path} cannot be read: {error.strerror or error}. Make it readable and scan again.")
    reason = str(error) or type(error).__name__
    return UserError(f"{path} cannot be read as a {kind}: {reason}. Download it again, or give another TARGET.")
