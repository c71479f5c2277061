"""Many dictionaries at once: one folder a layer, as collections of them are laid out."""

from collections.abc import Iterable
from pathlib import Path

from .._errors import FileFormatError
from ._dictionary import Dictionary
from ._dictionary_files import CONFIG_FILE, load_dictionary


def load_dictionaries(paths: Iterable[str | Path]) -> list[Dictionary]:
    """The dictionaries of several folders, each a SAELens folder or a folder of such folders.

    Raises:
        FileFormatError: a folder is missing or holds no dictionary, or one is damaged.
        DictionaryError: as in `load_dictionary`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> found = tnc.bases.load_dictionaries([tnc.bases.demo_dictionaries_path("sae")])
        >>> [dictionary.hook_out for dictionary in found][:2]
        ['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out']
    """
    found: list[Dictionary] = []
    for path in map(Path, paths):
        inside = sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}"))
        if not (path / CONFIG_FILE).exists() and path.is_dir() and not inside:
            raise FileFormatError(f"expected {CONFIG_FILE} in {path} or in the folders in it; found none.")
        found += [load_dictionary(folder) for folder in (inside or [path])]
    return found
