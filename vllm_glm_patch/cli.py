"""The command line `vllm-glm-patch COMMAND`: registers the commands of `tools` and turns UserError into exit code 2."""

from __future__ import annotations

import sys
from typing import Optional

import typer

from .errors import UserError
from .tools import apply_source, bench, diagnose, doctor, fence, model, patches, scan, tune, verify
from .version import __version__

EXIT_CODES = """Exit codes of every command:

0  fine

1  a defect or a difference was found; each command's own help says which

2  what you gave is wrong: an option, a path, a package, a setting"""

app = typer.Typer(
    name="vllm-glm-patch",
    help="Keeps GLM-4.6-FP8 up on Hopper: what is patched in vLLM, and what is wrong with it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.command)
app.command("patches")(patches.command)
app.command("scan")(scan.command)
app.command("apply-source")(apply_source.command)
app.command("model")(model.command)
app.command("verify")(verify.command)
app.command("fence")(fence.command)
app.command("diagnose")(diagnose.command)
app.command("tune")(tune.command)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-glm-patch {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Optional[bool] = typer.Option(
        None, "--version", callback=_print_version, is_eager=True, help="Print the version of this package and leave."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        app(prog_name="vllm-glm-patch")
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
