"""Writes into patches/*.toml the fingerprints of every function we replace, from vLLM's published packages.

    python -m tools.fingerprint              all releases from 0.10.0 on
    python -m tools.fingerprint 0.34.0       one more release; the others keep what is recorded
    python -m tools.fingerprint --check      change nothing; exit code 1 if something would change

After a new release: run it, read what it says of functions that are new, changed or gone, look at the change, adapt
the fix where needed, and commit.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.version import Version

from tools import published
from vllm_glm_patch import catalog
from vllm_glm_patch.upstream import Upstream, fingerprint

MARK = "# Made by `python -m tools.fingerprint` from the published packages; not to be edited.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="releases to read; all from 0.10.0 on unless given")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something would change")
    parser.add_argument("--cache", type=Path, default=published.CACHE, help="where the sources are kept")
    arguments = parser.parse_args()
    files = published.available()
    wanted = arguments.versions or list(files)
    for version in wanted:
        if version not in files:
            newest = list(files)[-1]
            parser.error(
                f"vLLM {version} is not published, the newest is {newest}; nothing was read or changed. "
                f"Name one of {', '.join(files)}."
            )
    with ThreadPoolExecutor(4) as pool:
        folders = dict(zip(wanted, pool.map(lambda v: published.fetch(v, files[v], arguments.cache), wanted)))
    try:
        known = set(catalog.releases())
    except FileNotFoundError:
        known = set()
    releases = sorted(known | set(wanted), key=Version)
    outdated = _write(catalog.folder() / "releases.toml", _releases(releases), arguments.check)
    problems = 0
    for patch in catalog.patches():
        recorded: dict[str, dict[str, list[str]]] = {}
        for site in patch.sites:
            table = recorded.setdefault(f"{site.module}:{site.name}", {})
            for found, versions in site.fingerprints.items():
                table[found] = [v for v in versions if v not in wanted]
            for version in wanted:
                if site.versions.contains(version) and patch.affects.contains(version):
                    present = _fingerprint(folders[version], version, site)
                    if present is None:
                        print(f"{patch.id}: vLLM {version} does not define {site}", file=sys.stderr)
                        problems += 1
                        continue
                    if present not in site.fingerprints:
                        print(f"{patch.id}: {site} of vLLM {version} is new: {present}")
                    table.setdefault(present, []).append(version)
        outdated |= _write_fingerprints(patch.id, recorded, arguments.check)
    return 1 if problems or (arguments.check and outdated) else 0


def _fingerprint(folder: Path, version: str, site: catalog.Site) -> str | None:
    source = Upstream(folder / "vllm", version).source_of(site.module)
    return fingerprint(source.read_text(encoding="utf-8"), site.name) if source.is_file() else None


def _write_fingerprints(patch_id: str, recorded: dict[str, dict[str, list[str]]], check: bool) -> bool:
    file = catalog.folder() / f"{patch_id}.toml"
    by_hand = file.read_text(encoding="utf-8").split(MARK)[0].rstrip() + "\n"
    lines = [by_hand, "\n", MARK]
    for key, table in recorded.items():
        lines.append(f'[fingerprints."{key}"]\n')
        ordered = sorted(((min(map(Version, v)), k, v) for k, v in table.items() if v))
        for _, found, versions in ordered:
            names = ", ".join(f'"{v}"' for v in sorted(set(versions), key=Version))
            lines.append(f"{found} = [{names}]\n")
    return _write(file, "".join(lines) if recorded else by_hand, check)


def _releases(versions: list[str]) -> str:
    rows = "".join(f'    "{version}",\n' for version in versions)
    return f"# The vLLM releases this package knows.\n{MARK}releases = [\n{rows}]\n"


def _write(file: Path, text: str, check: bool) -> bool:
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return False
    print(f"{file.name} {'is out of date' if check else 'written'}")
    if not check:
        file.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
