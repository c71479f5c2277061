"""The command line: thin, every command a call of the Python interface with the same words.

Exit codes: 0 done; 1 the model, or a computation, failed a check; 2 bad input; 130 interrupted.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `tl-neuron-circuits`: it exits with the code of the command.

    Args:
        arguments: the command and its options; those of the process unless given.
    """
    from ._interrupt import leave_at_once

    with leave_at_once():  # what the imports below would make of a KeyboardInterrupt is a page of traceback
        from ._app import run

        run(arguments)
