"""The entry point: it imports nothing until Ctrl-C has a short answer."""

from collections.abc import Sequence

from ._interrupt import leave_at_once


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `tl-neuron-circuits`: it exits with the code of the command.

    Args:
        arguments: the command and its options; those of the process unless given.
    """
    with leave_at_once():  # what the imports below would make of a KeyboardInterrupt is a page of traceback
        from ._app import run

        run(arguments)
