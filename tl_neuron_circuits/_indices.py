"""Integers, counts and indices as users have them: Python, NumPy and torch integers, ranges, arrays, Series, masks.

Everything else (floats, text, a lone boolean, a mask of another length) is refused by the argument's name. A boolean is
an integer to Python, so a mask that is taken for indices would silently read the entries 1 and 0.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from ._errors import SettingsError

Indices = Any
"""Integers as `as_indices` takes them: one, several, a range, an array, a tensor, a Series, or a boolean mask."""


def is_integer(value: Any) -> bool:
    """Whether it is one integer: of Python, NumPy or torch (0-dimensional), and not a boolean."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return False
    return isinstance(value.item(), int) and not isinstance(value.item(), bool)


def as_integer(value: Any, name: str) -> int:
    """The integer as Python's.

    Raises:
        SettingsError: it is not one.
    """
    if not is_integer(value):
        raise SettingsError(f"expected {name} to be an integer; got {brief(value)}.")
    return int(value)


def as_count(value: Any, name: str, least: int = 1) -> int:
    """The integer as Python's, if it is at least `least`.

    Raises:
        SettingsError: it is not.
    """
    count = as_integer(value, name)
    if count < least:
        raise SettingsError(f"expected {name} to be at least {least}; got {count}.")
    return count


def as_list(value: Any) -> list[Any] | None:
    """The entries of a sequence, range, one-dimensional array, tensor or Series as Python's; None for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist() if len(value.shape) == 1 else None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    return [
        entry.item() if getattr(entry, "shape", None) == () and hasattr(entry, "item") else entry for entry in value
    ]


def as_indices(value: Any, name: str, length: int | None = None) -> list[int]:
    """Indices as Python integers, from one integer, several, a slice, or a boolean mask.

    With `length` (what is indexed), masks must be as long, and negative indices count from the end. Without it masks
    stand for where they are true, and slices are refused.

    Raises:
        SettingsError: it is none of these, or an index is out of range.
    """
    if is_integer(value):
        entries: list[Any] | None = [int(value)]
    elif isinstance(value, slice) and length is not None:
        return list(range(length)[value])
    else:
        entries = as_list(value)
    if entries is not None and entries and all(isinstance(entry, bool) for entry in entries):
        if length is not None and len(entries) != length:
            raise SettingsError(f"expected {name} to be a mask of {length} entries; got one of {len(entries)}.")
        return [index for index, chosen in enumerate(entries) if chosen]
    if entries is None or not all(is_integer(entry) for entry in entries):
        raise SettingsError(f"expected {name} to be integers or a boolean mask; got {brief(value)}.")
    wrong = [] if length is None else [index for index in entries if not -length <= index < length]
    if wrong:
        raise SettingsError(f"expected {name} between 0 and {(length or 0) - 1}; got {brief(wrong)}.")
    return [index + length if length is not None and index < 0 else index for index in entries]


def as_layers(value: Any, n_layers: int) -> list[int]:
    """Layers of a model with `n_layers`, counted from 0: as `as_indices`, but none counts from the end.

    Raises:
        SettingsError: as `as_indices`, or the model does not have one of them.
    """
    is_mask = all(isinstance(entry, bool) for entry in as_list(value) or [0])
    layers = as_indices(value, "layers", n_layers if is_mask or isinstance(value, slice) else None)
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong:
        raise SettingsError(f"expected layers between 0 and {n_layers - 1}; got {wrong}.")
    return layers


def brief(value: Any) -> str:
    """What came, in one line: small values as they are, arrays by dtype and shape, anything else by its type."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shown = _shown(value)
    if shown is None:
        return _article(kind)
    return shown if getattr(value, "shape", ()) != () else f"{shown}, {_article(kind)}"


def _shown(value: Any) -> str | None:
    """The value's text, None where it would not be short."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if tuple(value.shape) == ():
            return repr(value.item())
        return f"{_article(type(value).__name__)} of {value.dtype} with shape {list(value.shape)}"
    if isinstance(value, str | bytes | bool | int | float | complex | range | slice) or value is None:
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, list | tuple | set | frozenset):
        entries = [_shown(entry) or type(entry).__name__ for entry in list(_first(value))]
        more = [f"... {len(value)} in all"] if len(value) > len(entries) else []
        opened, closed = {list: "[]", tuple: "()"}.get(type(value), "{}")
        return f"{opened}{', '.join([*entries, *more])}{closed}"
    return None


def _first(values: Iterable[Any], n: int = 4) -> Iterable[Any]:
    return (value for _, value in zip(range(n), values, strict=False))


def _article(kind: str) -> str:
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"
