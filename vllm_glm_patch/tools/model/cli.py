"""The command `vllm-glm-patch model OUT`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from vllm_glm_patch.tools.model.report import ModelReport
from vllm_glm_patch.tools.model.spec import ModelSpec, spec_for
from vllm_glm_patch.tools.model.write import write_config, write_model


class Preset(str, Enum):
    """Sizes to pick from; the same names as `PRESETS`."""

    tiny = "tiny"
    tp8_rank = "tp8-rank"
    tp4_rank = "tp4-rank"
    full = "full"


class WeightFormat(str, Enum):
    """How the linear layers are stored."""

    bf16 = "bf16"
    fp8 = "fp8"


def command(
    out: Path = typer.Argument(..., metavar="OUT", help="Folder to make; it must not exist or be empty."),
    preset: Preset = typer.Option(
        Preset.tiny,
        help="tiny: served by a CPU in seconds. tp8-rank, tp4-rank: what one rank of tensor parallel 8 or 4 holds, "
        "as a model of its own. full: GLM-4.6.",
    ),
    layers: Optional[int] = typer.Option(
        None, help="Layers in all; the dense ones come first (up to 3, 1 for tiny) and the last is always MoE."
    ),
    weight_format: Optional[WeightFormat] = typer.Option(
        None, "--format", help="bf16, or fp8 as in GLM-4.6-FP8. [default: bf16 for tiny, else fp8]"
    ),
    seed: int = typer.Option(0, help="The same seed gives the same bytes; fp8 and bf16 are then the same model."),
    vocab: Optional[int] = typer.Option(None, help="Vocabulary size. [default: 1024 for tiny, else 151552]"),
    config_only: bool = typer.Option(
        False,
        "--config-only",
        help="No weights: config, tokenizer and chat template for `vllm serve OUT --load-format glm_patch_synthetic`.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON; the progress bar stays on stderr."),
) -> None:
    """Write a synthetic GLM-4.6: real names, dtypes and shapes, seeded weights, tokens spread over all experts.

    Exit codes: 0 written; 2 OUT is taken or cannot be written, the disk is too small, or an option does not work.
    """
    spec = spec_for(
        preset.value,
        layers=layers,
        weight_format=weight_format.value if weight_format else None,
        seed=seed,
        vocab=vocab,
    )
    if config_only:
        with _stopped_cleanly():
            path = write_config(out, spec)
        _tell_config(path, spec, as_json)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        _stopped_cleanly(),
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task(f"Writing {out.name}", total=None)
        report = write_model(out, spec, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        Console().print(_table(report))


def _tell_config(path: Path, spec: ModelSpec, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"path": str(path), "spec": asdict(spec)}, indent=2))
    else:
        typer.echo(f"{path} has config and tokenizer of {spec.preset} in {spec.weight_format}, and no weights. Serve it with")
        typer.echo(f"vllm serve {path} --load-format glm_patch_synthetic")


def _table(report: ModelReport) -> Table:
    spec, load = report.spec, report.load
    table = Table(title=f"Synthetic GLM-4.6 in {report.path}", show_header=False, title_justify="left")
    dense, moe = spec.num_dense_layers, spec.num_layers - spec.num_dense_layers
    spread = "spread over all" if load.is_spread else "NOT spread"
    for name, value in (
        ("preset", f"{spec.preset}, {spec.weight_format}, seed {spec.seed}"),
        ("layers", f"{dense} dense, {moe} MoE of {spec.num_experts} experts, top {spec.top_k}"),
        ("weights", f"{report.parameters / 1e6:,.1f} million, {report.nbytes / 1e9:,.3f} GB, {report.shards} shards"),
        ("written in", f"{report.seconds:.1f} s"),
        ("expert load", f"{spread}: {load.tokens} random tokens at the gate of layer {dense}"),
        ("", f"variation {load.variation:.3f} (0 is even), busiest {load.busiest:.2f} x mean, unused {load.unused}"),
    ):
        table.add_row(name, value)
    return table


@contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """Turn SIGTERM into an exit that removes the temporary folder on its way."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
