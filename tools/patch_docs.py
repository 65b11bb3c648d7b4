"""Writes docs/patches.md from the catalog.

python -m tools.patch_docs              write it
python -m tools.patch_docs --check      change nothing; exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_glm_patch import catalog
from vllm_glm_patch.tools.output import version_range

DOCUMENT = Path(__file__).parent.parent / "docs" / "patches.md"
UPSTREAM = "https://github.com/vllm-project/vllm/issues"
HEAD = """<!-- Made by `python -m tools.patch_docs` from patches/*.toml; not to be edited. -->
# Patches

What vllm-glm-patch corrects in vLLM {oldest} to {newest}. Each patch is one file in [patches/](../patches), can be left
out with `VLLM_GLM_PATCH_DISABLE=ID`, and is refused where the functions it replaces are not those of a known release.
`vllm-glm-patch doctor` says what is applied here, `vllm-glm-patch scan TARGET` which defects another vLLM has.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the file is out of date")
    arguments = parser.parse_args()
    broken = [entry for entry in catalog.load() if isinstance(entry, catalog.Broken)]
    for entry in broken:
        print(f"The catalog entry {entry.id} is broken: {entry.reason}. Correct it and run this again.", file=sys.stderr)
    if broken:
        return 2
    text = render(catalog.patches())
    if DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == text:
        return 0
    if arguments.check:
        print("docs/patches.md is out of date. Run `python -m tools.patch_docs` and commit it.", file=sys.stderr)
        return 1
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(text, encoding="utf-8")
    print("docs/patches.md written")
    return 0


def render(patches: list[catalog.Patch]) -> str:
    """The whole document."""
    known = catalog.releases()
    rows = [f"| [{p.id}](#{p.id}) | {_cell(p.title)} | {version_range(p.affects)} |" for p in patches]
    table = "\n".join(["| patch | what is wrong | releases |", "|---|---|---|", *rows])
    sections = ["\n\n".join(_section(patch)) for patch in patches]
    return "\n\n".join([HEAD.format(oldest=known[0], newest=known[-1]).rstrip(), table, *sections]) + "\n"


def _section(patch: catalog.Patch) -> Iterator[str]:
    yield f"## {patch.id}"
    yield f"**{patch.title[:1].upper()}{patch.title[1:]}.** vLLM {version_range(patch.affects)}."
    yield patch.summary
    if patch.issues:
        yield "Upstream: " + ", ".join(f"[#{number}]({UPSTREAM}/{number})" for number in patch.issues) + "."
    if patch.relies_on:
        yield "Its default depends on: " + ", ".join(f"[{other}](#{other})" for other in patch.relies_on) + "."
    if patch.sites:
        rows = [f"| `{site.module}` | `{site.name}` | {version_range(site.versions)} |" for site in patch.sites]
        yield "\n".join(["| module it replaces in | function | releases |", "|---|---|---|", *rows])
    if patch.evidence:
        yield "How `scan` tells it from a source tree; the first line that is found decides:"
        yield "\n".join(_evidence(patch))
    else:
        yield "`scan` tells it from the version alone."


def _evidence(patch: catalog.Patch) -> Iterator[str]:
    for number, rule in enumerate(patch.evidence, 1):
        yield f"{number}. {'present' if rule['present'] else 'absent'}: {rule['why']} (`{rule['file']}`)"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
