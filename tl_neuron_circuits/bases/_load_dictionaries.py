"""Every dictionary of a folder, of a list, or of a SAELens release."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from .._errors import FileFormatError
from .._typing import checked
from ._dictionary import Dictionary
from ._dictionary_files import CONFIG_FILE, WEIGHTS_FILE, load_dictionary
from ._dictionary_formats import read_other_format
from ._dictionary_objects import as_dictionary


@checked
def load_dictionaries(source: str | Path | Iterable[str | Path], *, lazy: bool = False) -> list[Dictionary]:
    """The dictionaries of a folder, of several, or of a SAELens release.

    Args:
        source: a folder or file that `load_dictionary` reads; a folder of such folders; a folder of circuit-tracer
            (`layer_0.safetensors`, ... or a cross-layer transcoder's `W_enc_0.safetensors`, ..., with `config.yaml`); a
            release ("gemma-scope-2b-pt-res-canonical") or one of its SAEs ("RELEASE/SAE_ID"), which sae-lens
            downloads; or a list of these.
        lazy: leave the weights of circuit-tracer's and Gemma Scope 2's .safetensors files there, for dictionaries that
            are larger than memory: pages of encoders come and go, and of decoders only rows of active features are
            read where no gradient is wanted. Results equal those of loaded weights to rounding. The files must stay.

    Returns:
        One dictionary per place; one per layer for a cross-layer transcoder, which `Dictionaries` joins.

    Raises:
        FileFormatError: a folder is missing or holds no dictionary, one is damaged, or sae-lens is not there or does
            not know the release.
        DictionaryError: as in `load_dictionary`.
        SettingsError: `lazy` for a format that is read whole.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> for sae in tnc.load_demo_dictionaries("sae"):
        ...     folder = tnc.save_dictionary(sae, f"saes/layer-{sae.layer:02d}")
        >>> [sae.hook_out for sae in tnc.bases.load_dictionaries("saes")][:2]
        ['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out']
    """
    if not isinstance(source, str | Path):
        return [dictionary for one in source for dictionary in load_dictionaries(one, lazy=lazy)]
    path = Path(source)
    if lazy:
        if not path.exists():
            raise FileFormatError(f"no file or folder {path}. Weights can be left in files that are there.")
        return read_other_format(path, lazy=True) or []
    if not path.exists():
        return _load_release(str(source))
    if (path / WEIGHTS_FILE).is_file() or path.is_file():
        return [load_dictionary(path)]
    others = read_other_format(path)
    if others is not None:
        return others
    inside = sorted((folder for folder in path.iterdir() if folder.is_dir()), key=_natural)
    found = [folder for folder in inside if (folder / CONFIG_FILE).is_file() or list(folder.glob("params.*"))]
    if not found and not (path / CONFIG_FILE).exists():
        raise FileFormatError(
            f"expected a dictionary in {path} or in the folders in it ({CONFIG_FILE} and {WEIGHTS_FILE}, "
            "params.npz, or circuit-tracer's config.yaml); found none."
        )
    return [load_dictionary(folder) for folder in (found or [path])]


def _natural(folder: Path) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", folder.name)]


def _load_release(name: str) -> list[Dictionary]:
    """The SAEs that sae-lens knows under a release, or under a release and an id."""
    try:
        from sae_lens import SAE  # pyright: ignore[reportMissingImports]
        from sae_lens.loading.pretrained_saes_directory import (  # pyright: ignore[reportMissingImports]
            get_pretrained_saes_directory,
        )
    except ImportError as error:
        raise FileFormatError(
            f"no file or folder {name}. If it is the name of a SAELens release, install sae-lens, which downloads it "
            "(pip install sae-lens, TransformerLens below 4)."
        ) from error
    known = get_pretrained_saes_directory()
    release, _, sae_id = name.partition("/")
    if release not in known or (sae_id and sae_id not in known[release].saes_map):
        what = (
            f"release {release!r} has no SAE {sae_id!r}" if release in known else "no file, folder or SAELens release"
        )
        near = get_close_matches(sae_id or release, known[release].saes_map if release in known else known, 3)
        raise FileFormatError(f"{name}: {what}. " + (f"Did you mean {', '.join(near)}?" if near else "Check the path."))
    ids = [sae_id] if sae_id else list(known[release].saes_map)
    return [as_dictionary(SAE.from_pretrained(release, one)) for one in ids]
