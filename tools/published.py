"""Fetches vLLM's published sources from the package registry into a cache folder, one folder a release."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from packaging.version import Version
from pypi_simple import DistributionPackage, PyPISimple

OLDEST = Version("0.10.0")
CACHE = Path(__file__).parent.parent / ".cache" / "vllm-sources"


def available() -> dict[str, list[DistributionPackage]]:
    """Every published release from 0.10.0 on with its files, oldest first."""
    with PyPISimple() as registry:
        packages = registry.get_project_page("vllm").packages
    found: dict[str, list[DistributionPackage]] = {}
    for package in packages:
        if package.version and not package.is_yanked:
            version = Version(package.version)
            if version >= OLDEST and not version.is_prerelease and not version.is_postrelease:
                found.setdefault(str(version), []).append(package)
    return dict(sorted(found.items(), key=lambda item: Version(item[0])))


def fetch(version: str, files: list[DistributionPackage], cache: Path = CACHE) -> Path:
    """The folder with a release's Python files, and its csrc where it has a source release.

    A release without an sdist is taken from its x86-64 wheel, of which only the Python files are kept.
    """
    folder = cache / version
    if folder.is_dir():
        return folder
    sources = [f for f in files if f.package_type == "sdist"]
    wheels = [f for f in files if f.package_type == "wheel" and "x86_64" in f.filename]
    chosen = (sources or wheels)[0]
    temporary = cache / f".{version}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    archive = temporary / chosen.filename
    with PyPISimple() as registry:
        registry.download_package(chosen, archive)
    _unpack(archive, temporary / "tree")
    (temporary / "tree").rename(folder)
    shutil.rmtree(temporary)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith(".py") or ".dist-info/" in name:
                    wheel.extract(name, folder)
        return
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            wanted = inside.parts[:1] in (("csrc",), ("vllm",)) or str(inside) == "PKG-INFO"
            if member.isfile() and wanted and ".." not in inside.parts:
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                content = source.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
