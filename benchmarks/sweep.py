"""Sweep the kernels' configurations on the card and print the best of each step; also writes a tuned table.

    python benchmarks/sweep.py --out $OUT [--shapes TP8] [--tokens 1,8,64,256,1024,8192] [--seconds 280]

Writes $OUT/sweep.jsonl (one measurement a line, as made) and $OUT/<card>.json (the table, for moe/tuned/).
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from vllm_glm_patch.moe import tune
from vllm_glm_patch.moe.problem import GLM_SHAPES


def short(group: str, config: dict[str, Any]) -> str:
    """A configuration's numbers on one line: only the part the group times."""

    def part(name: str) -> str:
        return " ".join(str(int(v) if isinstance(v, bool) else v) for v in config.get(name, {}).values())

    if group == "pairs":
        return part("pairs")
    if group.startswith("gemm1"):
        return part("gemm1")
    if group.startswith("gemm2"):
        return part("gemm2") + " / " + part("sum")
    return " | ".join(part(name) for name in ("gemm1", "gemm2", "sum"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", default="TP8")
    parser.add_argument("--tokens", default="8192,1024,64,1,256,8")
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--top", type=int, default=4)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    rows: dict[tuple[str, int, str], list[tuple[float, str]]] = collections.defaultdict(list)
    errors: collections.Counter[str] = collections.Counter()
    log = (options.out / "sweep.jsonl").open("a")

    def report(row: dict[str, Any]) -> None:
        log.write(json.dumps(row) + "\n")
        log.flush()
        if "us" in row:
            text = short(row["group"], row["config"])
            rows[row["shape"], row["tokens"], row["group"]].append((row["us"], text))
        elif "error" in row:
            errors[f"{row['group']}: {row['error'][:100]}"] += 1
        elif "done" not in row:
            print(row, flush=True)

    problems = []
    for shape in options.shapes.split(","):
        problems += [GLM_SHAPES[shape].with_tokens(int(tokens)) for tokens in options.tokens.split(",")]
    try:
        tune.tune(problems, seconds=options.seconds, report=report, folder=options.out)
    finally:
        for (shape, tokens, group), found in rows.items():
            print(f"{shape.split(',K')[0]} M={tokens} {group}: {len(found)} timed")
            for us, text in sorted(found)[: options.top]:
                print(f"  {us:9.2f} us  {text}")
        for text, count in errors.most_common(12):
            print(f"  {count} × {text}")
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
