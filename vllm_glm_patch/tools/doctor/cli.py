"""The command `vllm-glm-patch doctor`."""

from __future__ import annotations

import typer

from ..output import on_terminal, show, show_json
from . import report


def command(
    plain: bool = typer.Option(False, "--plain", help="Plain text for a bug report, as when the output is not a terminal."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say what is installed, which defects this vLLM has, and which patches apply; made to be pasted into a bug report.

    Nothing of vLLM or torch is imported.

    Exit codes: 0 nothing is in the way; 1 no vLLM here, a needed patch is refused, or the plugin would not be loaded;
    2 a setting has a value that is not allowed.
    """
    made = report.make()
    if as_json:
        show_json(made.as_dict())
    else:
        for index, table in enumerate(made.tables()):
            if index:
                typer.echo()
            show(table, plain=plain or not on_terminal())
    if made.exit_code == 2:
        typer.echo(f"Error: {made.settings_error}", err=True)
    if made.exit_code:
        raise typer.Exit(made.exit_code)
