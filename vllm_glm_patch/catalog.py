"""Reads patches/*.toml into `Patch` records and decides which of them a given vLLM needs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from .settings import Settings
from .upstream import Upstream, fingerprint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

APPLY, NOT_NEEDED, SWITCHED_OFF, REFUSED = "apply", "not needed", "switched off", "refused"
NOT_MADE = "not in this release"


@dataclass(frozen=True)
class Site:
    """One attribute of vLLM that a patch replaces."""

    role: str
    """Which replacement of the fix module goes here."""
    module: str
    name: str
    """``function`` or ``Class.method``."""
    versions: SpecifierSet
    """The releases that have it there."""
    fingerprints: Mapping[str, tuple[str, ...]]
    """Fingerprint -> the releases whose source has it."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Patch:
    """One defect and its correction, as patches/ID.toml describes them."""

    id: str
    title: str
    summary: str
    affects: SpecifierSet
    """The releases that carry the defect."""
    fix: str
    """The module of `vllm_glm_patch.fixes` that corrects it; empty where this release has none yet."""
    sites: tuple[Site, ...]
    issues: tuple[int, ...]
    """Numbers of issues and pull requests of vllm-project/vllm."""
    evidence: tuple[Mapping[str, Any], ...]
    """How the defect is told from a source tree; see `tools.scan`."""
    signatures: tuple[Mapping[str, Any], ...]
    """How the defect shows in a log; see `fence.diagnose`."""
    corrections: tuple[Mapping[str, Any], ...] = ()
    """How the source itself is corrected; see `tools.apply_source`."""
    defect: bool = True
    """False where the entry makes something faster that is not wrong."""
    relies_on: tuple[str, ...] = ()
    """Ids of patches that its default depends on."""

    def sites_for(self, release: Version) -> tuple[Site, ...]:
        """The sites that exist in one release."""
        return tuple(site for site in self.sites if site.versions.contains(release, prereleases=True))


@dataclass(frozen=True)
class Broken:
    """A catalog entry that could not be read."""

    id: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """What to do with one patch on one vLLM."""

    id: str
    state: str
    """`APPLY`, `NOT_NEEDED`, `SWITCHED_OFF`, `REFUSED` or `NOT_MADE`."""
    reason: str
    patch: Patch | None = None
    sites: tuple[Site, ...] = ()


def folder() -> Path:
    """Where the catalog lies: in the installed package, or beside it in a source tree."""
    installed = Path(__file__).parent / "patches"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "patches"


@functools.cache
def releases(path: Path | None = None) -> tuple[str, ...]:
    """The vLLM releases this package knows, oldest first."""
    with ((path or folder()) / "releases.toml").open("rb") as file:
        return tuple(tomllib.load(file)["releases"])


def patch_ids(path: Path | None = None) -> tuple[str, ...]:
    """The ids of all patches, whether or not their entries can be read."""
    return tuple(file.stem for file in _entries(path))


def _entries(path: Path | None) -> list[Path]:
    return sorted(file for file in (path or folder()).glob("*.toml") if file.stem != "releases")


def load(path: Path | None = None) -> list[Patch | Broken]:
    """Every entry of the catalog, in the order of their ids."""
    return [_read(file) for file in _entries(path)]


def patches(path: Path | None = None) -> list[Patch]:
    """The entries of the catalog that can be read."""
    return [entry for entry in load(path) if isinstance(entry, Patch)]


def _read(file: Path) -> Patch | Broken:
    try:
        with file.open("rb") as opened:
            table = tomllib.load(opened)
        if table["id"] != file.stem:
            raise ValueError(f"its id is {table['id']!r}")
        return Patch(
            id=table["id"],
            title=table["title"],
            summary=table["summary"].strip(),
            affects=SpecifierSet(table["affects"]),
            fix=table["fix"],
            sites=tuple(_site(site, table.get("fingerprints", {})) for site in table.get("site", [])),
            issues=tuple(table.get("issues", [])),
            evidence=tuple(table.get("evidence", [])),
            signatures=tuple(table.get("signature", [])),
            corrections=tuple(table.get("correction", [])),
            defect=bool(table.get("defect", True)),
            relies_on=tuple(table.get("relies_on", [])),
        )
    except KeyError as error:
        return Broken(file.stem, f"{file.name} lacks the key {error}")
    except (OSError, ValueError, TypeError, AttributeError, InvalidSpecifier) as error:
        return Broken(file.stem, f"{file.name} cannot be read: {error}")


def _site(table: Mapping[str, Any], fingerprints: Mapping[str, Any]) -> Site:
    known = fingerprints.get(f"{table['module']}:{table['name']}", {})
    return Site(
        role=table["role"],
        module=table["module"],
        name=table["name"],
        versions=SpecifierSet(table["versions"]),
        fingerprints={key: tuple(value) for key, value in known.items()},
    )


def known_release(upstream: Upstream) -> tuple[Version | None, str]:
    """The release as a version if this package knows it, else None and the reason why not."""
    known = releases()
    try:
        version = Version(upstream.release)
    except InvalidVersion:
        return None, f"vLLM states the version {upstream.version!r}, which is not a release"
    if str(version) in known:
        return version, ""
    if version > Version(known[-1]):
        return None, f"vLLM {version} is newer than this release knows ({known[-1]})"
    if version < Version(known[0]):
        return None, f"vLLM {version} is older than this release knows ({known[0]})"
    return None, f"vLLM {version} is not among the releases this package knows ({known[0]} to {known[-1]})"


def decide(upstream: Upstream, settings: Settings, path: Path | None = None) -> list[Decision]:
    """What to do with each patch of the catalog on this vLLM."""
    return [_decide(entry, upstream, settings) for entry in load(path)]


def _decide(entry: Patch | Broken, upstream: Upstream, settings: Settings) -> Decision:
    if not settings.enabled:
        return Decision(entry.id, SWITCHED_OFF, "VLLM_GLM_PATCH=0")
    if entry.id in settings.disable:
        return Decision(entry.id, SWITCHED_OFF, "named in VLLM_GLM_PATCH_DISABLE or in the setting `disable`")
    if isinstance(entry, Broken):
        return Decision(entry.id, REFUSED, f"its catalog entry is broken: {entry.reason}")
    release, why_unknown = known_release(upstream)
    if release is None:
        return Decision(entry.id, REFUSED, why_unknown, entry)
    if not entry.affects.contains(release, prereleases=True):
        return Decision(entry.id, NOT_NEEDED, f"vLLM {release} does not have this defect", entry)
    if not entry.fix:
        return Decision(entry.id, NOT_MADE, entry.title, entry)
    sites = entry.sites_for(release)
    for site in sites:
        reason = _why_not(site, upstream)
        if reason:
            return Decision(entry.id, REFUSED, reason, entry)
    return Decision(entry.id, APPLY, "", entry, sites)


def _why_not(site: Site, upstream: Upstream) -> str:
    source = upstream.source_of(site.module)
    try:
        found = fingerprint(source.read_text(encoding="utf-8"), site.name)
    except OSError as error:
        return f"{source} cannot be read ({error.strerror})"
    except SyntaxError as error:
        return f"{source} cannot be parsed ({error.msg}, line {error.lineno})"
    if found is None:
        return f"{source} does not define {site.name}"
    if found not in site.fingerprints:
        return f"{site} is not the function of any known release (fingerprint {found}, {source})"
    return ""
