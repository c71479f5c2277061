"""Resume an interrupted `compare` from its directory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._errors import FileFormatError
from .._files import recover
from ._comparison import INDEX, Comparison, CurveKey


def resume(directory: Path, settings: Mapping[str, Any], keys: Iterable[CurveKey]) -> Comparison:
    """What an earlier call with the same settings has saved in `directory`; empty where there is nothing yet.

    Raises:
        FileFormatError: it holds something else, a comparison with other settings, or a damaged one.
    """
    empty = Comparison({}, settings)
    if not directory.exists():
        return empty
    if not directory.is_dir():
        raise FileFormatError(f"expected a directory for the comparison at {directory}; there is a file.")
    recover(directory / INDEX)
    names = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    if INDEX in names:
        found = Comparison.load(directory)
        differing = [name for name, value in settings.items() if found.settings.get(name) != value]
        if differing:
            raise FileFormatError(
                f"{directory} holds a comparison with other {differing}. Choose another directory, or remove it to "
                "start anew."
            )
        return found
    foreign = sorted(set(names) - {key.folder for key in keys})  # a call may have stopped before the first index
    if foreign:
        raise FileFormatError(
            f"expected {directory} to be absent, empty or a comparison; it holds {foreign[:3]}. Choose another "
            "directory."
        )
    return empty
