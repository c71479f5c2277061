"""Reading what the other commands saved: a folder, or the folder of a command that has it inside."""

from pathlib import Path
from typing import Any

from .._errors import FileFormatError, SettingsError


def load_saved(path: Path) -> Any:
    """The `Circuit` or the `NodeScores` in a folder.

    Raises:
        FileFormatError: there is neither, or it is damaged.
    """
    from ..circuits._circuit import Circuit
    from ..nodes._scores import NodeScores

    for folder in (path, path / "circuit"):
        if (folder / "circuit.json").is_file():
            return Circuit.load(folder)
    if (path / "scores.json").is_file():
        return NodeScores.load(path)
    found = "no such folder" if not path.is_dir() else ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
    raise FileFormatError(
        f"expected a saved circuit (circuit.json) or saved scores (scores.json) in {path}; found: {found}. "
        "Give a folder that trace, lasso or attribute wrote."
    )


def load_circuit(path: Path) -> Any:
    """The `Circuit` in a folder.

    Raises:
        FileFormatError: there is none, or it is damaged.
        SettingsError: scores were saved there, which are no circuit.
    """
    from ..circuits._circuit import Circuit

    saved = load_saved(path)
    if not isinstance(saved, Circuit):
        raise SettingsError(f"expected a circuit in {path}; got {saved!r}. Give a folder that trace or lasso wrote.")
    return saved
