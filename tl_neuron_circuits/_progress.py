"""Progress bars that appear by themselves: after two seconds, where somebody watches, and nowhere else.

`verbose=None`, the default of everything that can be long, means so; True shows a bar at once and everywhere, False
never. Somebody watches in a notebook, and where stderr is a terminal; TQDM_DISABLE=1 in the environment says no.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm as Bar

_DELAY = 2.0
T = TypeVar("T")


def progress(iterable: Iterable[Any] | None = None, *, verbose: bool | None, **options: Any) -> Bar:
    """A tqdm bar over `iterable`, or one to update by hand; one that stands inside another goes when it is done."""
    by_itself = verbose is None
    shown = _watched() if by_itself else verbose
    return Bar(iterable, disable=not shown, delay=_DELAY if by_itself else 0, **{"leave": None, **options})


def show_batches(batches: Iterable[T], n: int, *, verbose: bool | None, **options: Any) -> Iterator[T]:
    """The batches (or tuples that begin with one) of n prompts, under a bar that counts prompts."""
    with progress(total=n, verbose=verbose, **{"unit": "prompt", **options}) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0] if isinstance(batch, tuple) else batch))  # pyright: ignore[reportArgumentType]


def _watched() -> bool:
    """Whether somebody sees what goes to stderr: a notebook's, whose class is ipykernel's, or a terminal."""
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") or sys.stderr is None:
        return False
    return type(sys.stderr).__module__.startswith("ipykernel") or sys.stderr.isatty()
