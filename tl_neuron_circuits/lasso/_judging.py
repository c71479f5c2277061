"""Features ranked by a label node, by support for a probe or by chance, and which of them a judge finds spurious."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from .._auroc import auroc
from .._errors import SettingsError
from ._feature_ranking import PooledFeatures, rank_features
from ._labeled_texts import LabeledTexts

Judge = Callable[[pd.DataFrame], Sequence[str]]
"""From candidates (label, hook, layer, unit, weight, share, contrast) to the labels of those about the attribute."""


def contrast_judge(threshold: float = 0.75) -> Judge:
    """A judge that takes a feature to be about the attribute if it tells it on the concept texts.

    Args:
        threshold: AUROC of the pooled feature, in either direction.

    Raises:
        SettingsError: a threshold outside .5 to 1.

    Example:
        >>> import pandas as pd
        >>> import tl_neuron_circuits as tnc
        >>> candidates = pd.DataFrame({"label": ["L0/F1", "L0/F2"], "contrast": [0.1, 0.6]})
        >>> tnc.lasso.contrast_judge(0.8)(candidates)
        ['L0/F1']
    """
    if not 0.5 <= threshold <= 1:
        raise SettingsError(f"expected an AUROC between 0.5 and 1; got {threshold}.")

    def judge(candidates: pd.DataFrame) -> Sequence[str]:
        return candidates.loc[(candidates["contrast"] - 0.5).abs() >= threshold - 0.5, "label"].tolist()

    return judge


@dataclass(frozen=True, eq=False)
class Jury:
    """The judge, what it is told about every feature, and how many features it is shown."""

    judge: Judge
    contrast: Mapping[str, float]
    n_candidates: int

    def verdict(self, features: pd.DataFrame) -> pd.DataFrame:
        """The first candidates, with columns contrast and chosen."""
        shown = features.head(self.n_candidates).reset_index(drop=True)
        shown = shown.assign(contrast=shown["label"].map(self.contrast))
        return shown.assign(chosen=shown["label"].isin(list(self.judge(shown))))


def contrasts(features: PooledFeatures, attribute: Sequence[int]) -> dict[str, float]:
    """AUROC of every feature for the attribute; .5 where it never differs."""
    area = auroc(features.values, (torch.tensor(attribute) == 1)[:, None])[0]
    return dict(zip(features.nodes["label"], area.tolist(), strict=True))


def by_label_node(features: PooledFeatures, texts: LabeledTexts, jury: Jury, rounds: int) -> pd.DataFrame:
    """By |weight| in the label's regression; in further rounds without what was chosen before, until nothing is."""
    tables: list[pd.DataFrame] = []
    for _ in range(rounds):
        taken = [label for table in tables for label in table.loc[table["chosen"], "label"]]
        ranked = rank_features(features, list(texts.label), n_features=jury.n_candidates, without=taken)
        tables.append(jury.verdict(ranked.features))
        if not tables[-1]["chosen"].any():
            break
    rows = [table[table["chosen"]] for table in tables[:-1]]
    return pd.concat([*rows, tables[-1]], ignore_index=True)


def by_support(features: PooledFeatures, support: Tensor, jury: Jury) -> pd.DataFrame:
    """By their support for the probe; those that do not support it are left out."""
    order = support.argsort(descending=True, stable=True)
    return jury.verdict(_rows(features, order[support[order] > 0], support))


def drawn(features: PooledFeatures, count: int, seed: int, jury: Jury) -> pd.DataFrame:
    """`count` features that differ between texts, by chance; all of them chosen."""
    live = (features.values != features.values[:1]).any(0).nonzero().flatten()
    chosen = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[:count]]
    found = _rows(features, chosen, torch.zeros(len(features.nodes)))
    return found.assign(contrast=found["label"].map(jury.contrast), chosen=True)


def _rows(features: PooledFeatures, places: Tensor, weight: Tensor) -> pd.DataFrame:
    share = (features.values[:, places] != 0).double().mean(0)
    rows = features.nodes.iloc[places.tolist()].reset_index(drop=True)
    return rows.assign(weight=weight[places].numpy(), share=share.numpy())
