"""Checks every published vLLM release against the catalog and the fixes, and writes docs/versions.md.

python -m tools.matrix                    all releases this package knows; writes the document and the stored records
python -m tools.matrix 0.17.1 0.33.0      these only; writes nothing

For each release: the fingerprints of all that is replaced, what the catalog decides, whether the evidence rules agree,
what each replacement does when it is called as that release calls it, and whether this package calls that release from
outside as it declares its functions. Nothing of vLLM is imported or run. Sources that are not in the cache are fetched.
Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

from packaging.version import Version
from rich.console import Console
from rich.progress import track

from tools import matrix_calls, matrix_document, matrix_entries, matrix_source
from tools.matrix_result import Result
from vllm_glm_patch import catalog
from vllm_glm_patch.settings import Settings
from vllm_glm_patch.tools import scan
from vllm_glm_patch.tools.scan import evidence
from vllm_glm_patch.upstream import Upstream, fingerprint

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "vllm-sources"
RECORDS = ROOT / "tests" / "unit" / "data" / "calls"
STORED = ("0.10.1.1", "0.10.2", "0.13.0", "0.17.1", "0.32.0")
"""One release of each way of calling the MoE layer, and of being called from outside; their records are what `make test`
checks without a network."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="releases to check; all that the catalog knows unless given")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the sources are kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    known = catalog.releases()
    for version in arguments.versions:
        if version not in known:
            parser.error(f"vLLM {version} is not a release this package knows; `python -m tools.fingerprint {version}` adds it")
    wanted = sorted(set(arguments.versions or known), key=Version)
    folders = _folders(wanted, arguments.cache)
    console = Console(stderr=True)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(check, version, folders[version]) for version in wanted]
        finished = track(as_completed(running), "Checking releases", len(running), console=console)
        results = sorted((done.result() for done in finished), key=lambda result: Version(result.version))
    problems = [f"vLLM {result.version}: {problem}" for result in results for problem in result.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    calls = sum(result.calls for result in results)
    print(f"{len(results)} releases, {calls} calls of replacements, {len(problems)} problems")
    if not arguments.versions:
        matrix_document.DOCUMENT.write_text(matrix_document.render(results), encoding="utf-8")
        _store(results)
        print("docs/versions.md and the records of tests/unit/data/calls written")
    return 1 if problems else 0


def check(version: str, folder: Path) -> Result:
    """All checks of one release."""
    logging.getLogger("vllm_glm_patch").setLevel(logging.CRITICAL)
    release, upstream = Version(version), Upstream(folder / "vllm", version)
    problems = [f"the catalog entry {e.id} is broken: {e.reason}" for e in catalog.load() if isinstance(e, catalog.Broken)]
    for patch in catalog.patches():
        if patch.affects.contains(version):
            problems += [text for site in patch.sites_for(release) if (text := _fingerprint_problem(site, upstream))]
    decisions = catalog.decide(upstream, Settings(moe_backend="auto"))
    problems += [f"{d.id} is refused: {d.reason}" for d in decisions if d.state == catalog.REFUSED]
    target = scan.identify(str(folder), evidence.wanted_files())
    for found, patch in zip(evidence.judge(target), [p for p in catalog.patches() if p.defect]):
        expected = patch.affects.contains(version)
        if found.present is not expected:
            problems.append(f"{patch.id} should be {'present' if expected else 'absent'} and the evidence says: {found.why}")
    record = matrix_source.read(folder, version)
    outcome = matrix_calls.check(record)
    problems += matrix_entries.check(record)
    states = {d.id: "applied" if d.state == catalog.APPLY else d.state for d in decisions}
    return Result(version, target.has_kernel_source, states, record, outcome.calls, tuple(problems) + outcome.problems)


def _fingerprint_problem(site: catalog.Site, upstream: Upstream) -> str:
    source = upstream.source_of(site.module)
    found = fingerprint(source.read_text(encoding="utf-8"), site.name) if source.is_file() else None
    if found is None:
        return f"{site} does not exist"
    recorded = site.fingerprints.get(found, ())
    return "" if upstream.version in recorded else f"{site} has the fingerprint {found}, which is recorded for {recorded}"


def _folders(versions: list[str], cache: Path) -> dict[str, Path]:
    """The sources of each release; asks the registry only for those that are not there."""
    missing = [version for version in versions if not (cache / version).is_dir()]
    if missing:
        from tools import published

        files = published.available()
        with ThreadPoolExecutor(2) as pool:
            fetching = pool.map(lambda version: published.fetch(version, files[version], cache), missing)
            list(track(fetching, "Fetching releases", len(missing), console=Console(stderr=True)))
    return {version: cache / version for version in versions}


def _store(results: list[Result]) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    for result in results:
        if result.version in STORED:
            text = json.dumps(result.record.to_json(), separators=(",", ":"))
            (RECORDS / f"{result.version}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
