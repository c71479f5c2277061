"""`TrainingReport`: the dictionaries of a training run and how it went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .. import _html
from ..bases._dictionary import Dictionary
from ..bases._dictionary_files import save_dictionary
from ._config import TrainingConfig


@dataclass(frozen=True, eq=False, repr=False)
class TrainingReport:
    """What `train` returns.

    Attributes:
        dictionaries: one a layer, by layer.
        config: the settings.
        history: a row every `log_every` steps and layer: step, layer, loss, l0 (features that fire),
            variance_explained, dead_share; means over the steps since the row before, on the batches trained on.
        positions: activations seen, a position of a prompt counted whenever it was in a batch.
        seconds: where the time went: "collect" (forward passes with hooks), "update" (weights), "total".

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=64)
        >>> tokens = torch.stack(list(tnc.tasks.tokenize(model, pairs).clean))
        >>> config = tnc.transcoders.TrainingConfig(layers=(0,), d_dict=64, steps=20, batch_size=64, buffer_size=256)
        >>> report = tnc.transcoders.train(model, tokens, config, verbose=False)
        >>> [folder.name for folder in report.save("mine")]
        ['layer-00']
    """

    dictionaries: tuple[Dictionary, ...]
    config: TrainingConfig
    history: Sequence[Mapping[str, Any]]
    positions: int
    seconds: Mapping[str, float]

    def __getitem__(self, layer: int) -> Dictionary:
        """The dictionary of a layer."""
        by_layer = {dictionary.layer: dictionary for dictionary in self.dictionaries}
        if layer not in by_layer:
            raise KeyError(f"no dictionary of layer {layer} was trained; there are those of {sorted(by_layer)}.")
        return by_layer[layer]

    def to_dataframe(self) -> pd.DataFrame:
        """The history as a table."""
        return pd.DataFrame(list(self.history))

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every dictionary as a SAELens folder, `path/layer-00` and so on; `load_dictionary` reads them.

        Raises:
            FileFormatError: a folder exists and `overwrite` is not given.
        """
        return [
            save_dictionary(dictionary, Path(path) / f"layer-{dictionary.layer:02d}", overwrite=overwrite)
            for dictionary in self.dictionaries
        ]

    def __repr__(self) -> str:
        last = self.to_dataframe().groupby("layer").last()
        return (
            f"TrainingReport({len(self.dictionaries)} x {self.config.dictionary_kind}, {self.config.d_dict} features, "
            f"{self.positions:,} positions, L0 {last['l0'].mean():.1f}, "
            f"variance explained {last['variance_explained'].mean():.3f}, {self.seconds['total']:.0f} s)"
        )

    def _repr_html_(self) -> str:
        last = self.to_dataframe().groupby("layer").last().reset_index()
        return _html.block(repr(self), _html.table(last, bars=("variance_explained",), rows=60))
