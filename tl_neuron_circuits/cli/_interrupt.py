"""Ctrl-C: one line and exit code 130, at any moment.

While modules are imported a KeyboardInterrupt may come out as anything (NumPy makes an ImportError of it), and between
commands there is nothing to clean up: there the process leaves at once. While a command works it is a KeyboardInterrupt
as usual, so that hooks are removed and stages swept, and whatever it turns into on its way out counts as one.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED = 130


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line, without unwinding."""
    with _handling(_leave):
        try:
            yield
        except SystemExit as end:
            if end.code != INTERRUPTED:
                raise
            # Python would kill itself by SIGINT, and show no exit code, where the key was hit inside some exec().
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


@contextmanager
def unwinding() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is a KeyboardInterrupt; yields a function that says whether there was one."""
    pressed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            _leave(number, frame)  # the second time: at once
        pressed = True
        raise KeyboardInterrupt

    with _handling(interrupt):
        yield lambda: pressed


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
