"""`tl-neuron-circuits schema`."""

import json
from typing import Annotated

import typer

from .._errors import SettingsError


def schema(
    command: Annotated[str, typer.Argument(help="demo, check, attribute, ...", metavar="COMMAND")],
) -> None:
    """Print the JSON Schema of what a command prints with --json."""
    from ._outputs import OUTPUTS, json_schema

    if command not in OUTPUTS:
        raise SettingsError(f"expected a command out of {', '.join(OUTPUTS)}; got {command!r}.")
    typer.echo(json.dumps(json_schema(command), indent=2))
