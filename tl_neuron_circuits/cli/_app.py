"""The application: its commands, in the order of the help. Heavy imports wait for a command."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from .._version import versions
from ._circuits import export, lasso, steer, trace
from ._demo import demo
from ._schema import schema
from ._scores import attribute, check, compare
from ._terminal import errors, guarded

COMMANDS: tuple[Callable[..., None], ...] = (demo, check, attribute, compare, trace, steer, lasso, export, schema)

app = typer.Typer(
    help="Neuron circuits with RelP on any TransformerLens model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in COMMANDS:
    app.command()(guarded(_command))


def _version(requested: bool) -> bool:
    if requested:
        typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit
    return requested


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Neuron circuits with RelP on any TransformerLens model.

    Start with [bold]demo[/], which needs nothing else; then [bold]check[/] your model. MODEL is demo-gelu, demo-swiglu,
    a name that TransformerLens can load, or a local Hugging Face folder.
    """


def run(arguments: Sequence[str] | None) -> None:
    """Run a command, with messages and warnings on stderr as plain text."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _print_warning
    app(arguments)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one message on stderr, without the line of code that gave it."""
    errors.print("[yellow]warning[/]: ", end="")
    errors.print(str(message), markup=False, highlight=False, soft_wrap=True)
