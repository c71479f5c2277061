"""Resume an interrupted `compare` from its directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._errors import FileFormatError
from .._files import present
from ._comparison import FILE, Comparison


def resume(directory: Path, settings: Mapping[str, Any]) -> Comparison:
    """What an earlier call with the same settings has saved in `directory`; empty where there is nothing yet.

    Raises:
        FileFormatError: it holds something else, a comparison with other settings, or a damaged one.
    """
    empty = Comparison({}, settings)
    if not directory.exists():
        return empty
    if not directory.is_dir():
        raise FileFormatError(f"expected a directory for the comparison at {directory}; there is a file.")
    names = {name for name in present(directory) if not name.startswith(".")}
    if FILE in names:
        found = Comparison.load(directory)
        differing = [name for name, value in settings.items() if found.settings.get(name) != value]
        if differing:
            raise FileFormatError(
                f"{directory} holds a comparison with other {differing}. Choose another directory, or remove it to "
                "start anew."
            )
        return found
    if names:
        raise FileFormatError(
            f"expected {directory} to be absent, empty or a comparison; it holds {sorted(names)[:3]}. Choose another "
            "directory."
        )
    return empty
