#!/usr/bin/env python3
"""Holds what verify_session.sh wrote against what is known of a release: verify_expected.py OUT. Exit code 1: it differs.

Up to 0.19.1 the grouped GEMM runs past a_scales at multiples of 16 tokens. Up to 0.32.0 ids that name no expert make the layer
fault or err. With the patches nothing that vLLM runs does either. `ours` is only told: it has a table of its own above.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OVER_READ_BEFORE = (0, 20)
BAD_IDS_BEFORE = (0, 33)
BAD = ("minus-one", "past-end")


def release(result: dict[str, Any]) -> tuple[int, int]:
    major, minor = str(result["facts"]["vllm"]).split(".")[:2]
    return int(major), int(minor)


def differences(unpatched: dict[str, Any], patched: dict[str, Any]) -> list[str]:
    """What is not as known, in words; [] where all is."""
    found = []
    rows = [row for row in unpatched["rows"] if row["side"] == "upstream" and row["kernel"] != "triton layer"]
    bad = [row for row in rows if row["outcome"] in ("fault", "wrong")]
    over = [row for row in bad if row["routing"] not in BAD and row["outcome"] == "fault"]
    if release(unpatched) < OVER_READ_BEFORE:
        at = {(row["kernel"], row["tokens"]) for row in over if row["routing"] == "spread"}
        found += [
            f"{kernel} at 8192 tokens does not fault" for kernel in ("gemm1", "gemm2", "layer") if (kernel, 8192) not in at
        ]
        wrong = [row for row in over if row["kernel"] not in ("gemm1", "gemm2", "layer") or row["tokens"] % 16]
        found += [f"an unknown fault: {name(row)}" for row in wrong]
        gemms = [row for row in over if row["kernel"].startswith("gemm") and row["traced"] and row["buffers"] != ["a_scales"]]
        found += [f"traced to {row['buffers']}, not to a_scales alone: {name(row)}" for row in gemms]
    else:
        found += [f"an unknown fault: {name(row)}" for row in over]
    spoilt = {row["routing"] for row in bad if row["kernel"] == "layer" and row["routing"] in BAD}
    if release(unpatched) < BAD_IDS_BEFORE and "minus-one" not in spoilt:
        found.append("-1 ids do no harm to the unpatched layer")
    if release(unpatched) >= BAD_IDS_BEFORE and spoilt:
        found.append(f"ids that name no expert spoil the layer: {spoilt}")
    found += [f"an unknown wrong result: {name(row)}" for row in bad if row["outcome"] == "wrong" and row["routing"] not in BAD]
    found += [f"could not be called: {name(row)}" for row in rows if row["outcome"] == "error"]
    if patched["exit_code"] != 0:
        found.append(f"patched: {patched['verdict']}")
    return found


def name(row: dict[str, Any]) -> str:
    return f"{row['side']} {row['kernel']} {row['shape']} {row['routing']} {row['tokens']}: {row['text']}"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    unpatched, patched = (json.loads((out / f"verify-{state}.json").read_text()) for state in ("unpatched", "patched"))
    found = differences(unpatched, patched)
    faults = {state: "FAULT" in (out / f"reproduce-{state}.txt").read_text() for state in ("unpatched", "patched")}
    if faults != {"unpatched": release(unpatched) < OVER_READ_BEFORE, "patched": False}:
        found.append(f"the reproduction faults: {faults}")
    print("\n".join(found[:40]) or "as expected")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
