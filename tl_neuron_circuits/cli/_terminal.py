"""What commands print and how they end: tables and JSON on stdout, progress and errors on stderr, exit codes."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from typer.models import OptionInfo

from ._interrupt import INTERRUPTED, unwinding

console = Console()
errors = Console(stderr=True)
F = TypeVar("F", bound=Callable[..., Any])

FAILED, BAD_INPUT = 1, 2


def guarded(command: F) -> F:
    """Turn an error of this package or of the file system into one message and an exit code, and Ctrl-C into 130."""
    options = options_of(command)

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unwinding() as interrupted, _log_in_options(options):
            try:
                return command(*args, **kwargs)
            except BaseException as error:
                if interrupted() or isinstance(error, KeyboardInterrupt):
                    errors.print("\ninterrupted")
                    raise typer.Exit(INTERRUPTED) from None
                _explain(error, options)
                raise

    return run  # pyright: ignore[reportReturnType]


def _explain(error: BaseException, options: Mapping[str, str]) -> None:
    """End the command with a message and an exit code, if the error comes from this package or the file system.

    Args:
        error: what happened.
        options: the command's, by the name of their parameter.

    Raises:
        typer.Exit: with the code.
    """
    from torch import OutOfMemoryError

    from .._errors import NeuronCircuitsError, NumericalError, ProcessesError, PropagationError
    from .._typing import ArgumentError

    message, kind = str(error), type(error).__name__
    if isinstance(error, OutOfMemoryError):
        code, message = FAILED, f"{error}\nGive a smaller --batch-size, or another --device."
        error.__traceback__ = None
    elif isinstance(error, NumericalError | PropagationError | ProcessesError):
        code = FAILED
    elif isinstance(error, NeuronCircuitsError | ArgumentError | OSError):
        code = BAD_INPUT
    else:
        return
    errors.print(f"[bold red]{kind}[/]: ", end="")
    tell(in_options(message, options))
    raise typer.Exit(code) from None


def options_of(command: Callable[..., Any]) -> dict[str, str]:
    """A command's options, such as --batch-size, by the name of their parameter."""
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                found[name] = (info.param_decls or ["--" + name.replace("_", "-")])[0]
    return found


@contextmanager
def _log_in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Inside, what is logged names a command's options."""

    def translate(record: logging.LogRecord) -> bool:
        record.msg, record.args = in_options(record.getMessage(), options), ()
        return True

    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(translate)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(translate)


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Write what a message tells a caller in Python to pass as the options that a command has for it."""

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        value = value if " " in value else value.strip("'")
        if name not in options:
            return found[0]
        if value == "None":
            return f"no {options[name]}"
        return f"{options[name]} {value}"

    if "keep_fitting" in options:
        message = re.sub(r"tasks\.keep_fitting\([^)]*\)", options["keep_fitting"], message)
    if "where_right" in options:
        message = re.sub(r"pairs\.where_model_is_right\([^)]*\)", options["where_right"], message)
    if "multi_token" in options:
        message = re.sub(r"tasks\.tokenize\(model, pairs, (multi_token='\w+')\)", r"\1", message)
    return re.sub(r"\b(?P<name>\w+)=(?P<value>'[^']+'|[\d.]*\d|None)", option, message)


def progress() -> bool:
    """Whether to show progress bars: only where stderr is a terminal."""
    return errors.is_terminal


def say(text: str) -> None:
    """Announce a step, in a terminal only."""
    if progress():
        errors.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def tell(text: str) -> None:
    """Print a line on stderr."""
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def show(frame: Any, title: str) -> None:
    """Print a DataFrame as a table under its title."""
    console.print(title, style="italic", markup=False, highlight=False)
    table = Table()
    for column in frame.columns:
        is_number = frame[column].dtype.kind in "if"
        table.add_column(str(column), justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for row in frame.itertuples(index=False):
        table.add_row(*map(_cell, row))
    console.print(table, markup=False)


def show_written(files: Sequence[Path]) -> None:
    """List the files that were written, without breaking a path across lines."""
    console.print("written: " + ", ".join(map(str, files)), soft_wrap=True, markup=False, highlight=False)


def print_json(command: str, content: Mapping[str, Any]) -> None:
    """Print what `_outputs.py` describes and nothing else; NaN and infinity become null."""
    from ._outputs import SCHEMA

    typer.echo(json.dumps({"command": command, "schema": SCHEMA} | plain(content), allow_nan=False))


def plain(content: Any) -> Any:
    """Convert tables, paths and tensors' numbers to what JSON has; NaN and infinity become None."""
    if hasattr(content, "to_dict"):
        return plain(content.to_dict("records"))
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, Path):
        return str(content)
    if isinstance(content, str):
        return content
    if isinstance(content, Iterable):
        return [plain(value) for value in content]
    number = content.item() if hasattr(content, "item") else content
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _cell(cell: Any) -> str:
    """Three decimals, fewer for large numbers, two digits for tiny ones, empty where there is nothing; no new lines."""
    import pandas as pd

    if pd.isna(cell):
        return ""
    if not isinstance(cell, float):
        return str(cell).replace("\n", "\\n")
    if abs(cell) >= 100:
        return f"{cell:.0f}"
    return f"{cell:.3f}" if cell == 0 or abs(cell) >= 0.001 else f"{cell:.1e}"
