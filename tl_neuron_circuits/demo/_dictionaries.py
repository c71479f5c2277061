"""The dictionaries of `demo-gelu` inside the package: an SAE on every MLP's output and a transcoder of every MLP.

Trained by `python -m tl_neuron_circuits.demo.train_dictionaries` on text like the model's own. SAELens' format, weights
stored in float16 and exact in float32.
"""

from importlib.metadata import version
from pathlib import Path

from .._errors import SettingsError
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..bases._dictionary_files import load_dictionary

DEMO_DICTIONARIES: tuple[str, ...] = ("sae", "transcoder")
"""The names that `load_demo_dictionaries` takes."""

_FOLDER = Path(__file__).parent / "dictionaries"


def demo_dictionaries_path(kind: str = "transcoder") -> Path:
    """The directory with one SAELens folder per layer, `layer-00` and so on.

    Raises:
        SettingsError: there are no demo dictionaries of that kind.
    """
    if kind not in DEMO_DICTIONARIES:
        raise SettingsError(f"expected one of {', '.join(DEMO_DICTIONARIES)}; got {kind!r}.")
    return _FOLDER / kind


@checked
def load_demo_dictionaries(kind: str) -> list[Dictionary]:
    """The demo dictionaries of `load_demo_model("demo-gelu")`, by layer, in float32.

    Args:
        kind: "sae" (`blocks.L.hook_mlp_out` to itself) or "transcoder" (`blocks.L.ln2.hook_normalized` to it).

    Raises:
        SettingsError: the kind is unknown, or transcoders are asked for on TransformerLens 2, whose
            `ln2.hook_normalized` is another value where norms are not folded.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> [dictionary.layer for dictionary in tnc.load_demo_dictionaries("sae")]
        [0, 1, 2, 3]
    """
    folder = demo_dictionaries_path(kind)
    if kind == "transcoder" and int(version("transformer-lens").split(".")[0]) < 3:
        raise SettingsError(
            f"the demo transcoders read ln2.hook_normalized before the norm's weight; TransformerLens "
            f"{version('transformer-lens')} has the value after it there. Install transformer-lens>=3, or use 'sae'."
        )
    return [load_dictionary(path) for path in sorted(folder.glob("layer-*"))]
