"""Turns a result of `bench kernel` into a tuned table: at each count the faster of our kernel and the one vLLM would run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_glm_patch.errors import UserError

MARGIN = 0.97
"""vLLM's kernel gets a count only if it takes at most this share of our time: less is within what repeats differ by."""


def entries(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Entries of a table by shape (as `--shape` names them) and token count.

    A count gets an entry where both were timed. vLLM's is the time of its CUTLASS kernel, which it runs for these layers, or of
    its Triton kernel where there is no other; a Triton kernel with a table that vLLM does not ship counts for nothing.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    best: dict[tuple[str, int], float] = {}
    for row in result["rows"]:
        ours = row["ours_us"]
        theirs = row["cutlass_us"] if row["cutlass_us"] is not None else row["triton_us"]
        case = row["shape"], row["tokens"]
        if ours is None or theirs is None or ours >= best.get(case, float("inf")):
            continue
        best[case] = ours
        mine = row["config"] if row["backend"] == "triton" else {"backend": row["backend"], **row["config"]}
        found.setdefault(row["shape"], {})[str(row["tokens"])] = {"backend": "upstream"} if theirs < MARGIN * ours else mine
    return found


def write(file: Path, out: Path | None, folder: Path | None) -> tuple[Path, int, int]:
    """Put what a result of `bench kernel` says into the table of its card.

    Args:
        file: the result.
        out: the table's file; None: one for the card in `folder`.

    Returns:
        The table, how many counts were entered, and how many of them are vLLM's.

    Raises:
        UserError: the file is no such result, or has nothing to enter, or its card is not known here.
    """
    from vllm_glm_patch.moe import tables
    from vllm_glm_patch.tools.bench import schema
    from vllm_glm_patch.tools.tune import problem_of, table_file

    result = schema.read(file)
    if result["kind"] != schema.KERNEL:
        raise UserError(f"{file} is a result of {result['kind']}; --from takes one of `bench kernel`.")
    made = entries(result)
    if not made:
        raise UserError(f"{file} has no count at which both kernels were timed. Run `bench kernel` beside a vLLM.")
    name = result["machine"]["card"]
    path = table_file(out, name, folder)
    table = tables.read(path) if path.exists() else {**_card(name), "shapes": {}}
    for shape, counts in made.items():
        table["shapes"].setdefault(problem_of(shape).shape_key, {}).update(counts)
    try:
        tables.check(table)
    except ValueError as error:
        raise UserError(f"{file} does not fit this release: {error}. Measure again with this release.") from error
    tables.write(path, table)
    told = [entry for counts in made.values() for entry in counts.values()]
    return path, len(told), sum(entry.get("backend") == "upstream" for entry in told)


def _card(name: str) -> dict[str, Any]:
    """What a table says of its card: from a table of that card, or from the card here."""
    from vllm_glm_patch.moe import tables

    for table in tables.read_all():
        if table["card"] == name:
            return {key: table[key] for key in ("card", "multiprocessors", "capability")}
    import torch

    if torch.cuda.is_available():
        from vllm_glm_patch.moe.dispatch import read_card

        card = read_card(torch.cuda.current_device())
        if card.name == name:
            return {"card": name, "multiprocessors": card.multiprocessors, "capability": list(card.capability)}
    raise UserError(f"The result is of {name!r}, of which there is neither a table nor a card here. Run this on that machine.")
