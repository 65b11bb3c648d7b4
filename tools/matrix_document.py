"""Makes docs/versions.md of what the matrix found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.matrix_result import Result
from tools.matrix_source import Parameter

DOCUMENT = Path(__file__).parent.parent / "docs" / "versions.md"
HEAD = """<!-- Made by `make matrix`; not to be edited. -->
# Releases

What becomes of each [patch](patches.md) in each release of vLLM, checked against the published package of that release.

- *applied*: the release has the defect, and every function that is replaced has the recorded fingerprint.
- *not needed*: the release does not have it. *not in this release*: this release of vllm-glm-patch has no fix yet.
- *refused*: something is not as recorded. {refusals}
- *kernels*: `source` where the published sources of the kernels show defect or correction, and agree with the catalog;
  `wheel` where no sources are published, so that the releases before and after speak for it.
- *calls*: how many calls of replacements were made. Each was called with the arguments that a place in that release
  passes, over a stand-in with that release's signature, on a CPU, and what arrived was checked: 32 bytes behind the scales,
  ids in range and weights zero, the scheduler's budget, the warm-up called once, an MoE layer served with the right result
  or left to vLLM. For the MoE kernel the classes and attributes that are read must exist, and its layers must be called inside
  an opaque operator. No code of vLLM was run."""
CHANGES = """## How the functions changed

Releases in which the parameters of a function that is replaced are other than in the release before."""


def render(results: list[Result]) -> str:
    """The whole document."""
    problems = [f"- vLLM {result.version}: {problem}" for result in results for problem in result.problems]
    refused = [r.version for r in results if "refused" in r.states.values()]
    refusals = f"Releases with one: {', '.join(refused)}." if refused else "No release has one."
    parts = [HEAD.format(refusals=refusals), "\n".join(_table(results))]
    if problems:
        parts.append("## Problems\n\n" + "\n".join(problems))
    parts += [CHANGES, "\n".join(_changes(results))]
    return "\n\n".join(parts) + "\n"


def _table(results: list[Result]) -> Iterator[str]:
    ids = list(results[0].states)
    yield f"| vLLM | {' | '.join(f'[{i}](patches.md#{i})' for i in ids)} | kernels | functions | calls |"
    yield "|" + "---|" * (len(ids) + 4)
    for result in results:
        states = " | ".join(result.states[i] for i in ids)
        kernels = "source" if result.has_kernel_source else "wheel"
        yield f"| {result.version} | {states} | {kernels} | {len(result.record.functions)} | {result.calls} |"


def _changes(results: list[Result]) -> Iterator[str]:
    yield "| function | releases | parameters changed in |"
    yield "|---|---|---|"
    sites = dict.fromkeys(function.site for result in results for function in result.record.functions)
    for site in sites:
        seen: list[tuple[str, tuple[Parameter, ...]]] = [
            (result.version, function.parameters)
            for result in results
            for function in result.record.functions
            if function.site == site
        ]
        changed = [now[0] for before, now in zip(seen, seen[1:]) if before[1] != now[1]]
        yield f"| `{site}` | {seen[0][0]} – {seen[-1][0]} | {', '.join(changed) or 'none'} |"
