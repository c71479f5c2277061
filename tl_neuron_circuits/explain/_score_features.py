"""Which neurons tell prompts of one label from the others: AUROC of their attribution, on held-out prompts.

A neuron's attribution per prompt ranks the prompts; its AUROC for a label (one against the rest) says how well.
Features are chosen on one part of the prompts and reported on the other: on the same prompts the best of thousands of
noise features looks good. Source: METHODS 1.7.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .. import _html
from .._auroc import auroc
from .._errors import SettingsError
from .._typing import checked
from ._prompt_scores import PromptScores

Labels = Sequence[Hashable]


@dataclass(frozen=True, eq=False, repr=False)
class FeatureScores:
    """AUROC of every node for every label, on the prompts that choose and on held-out ones.

    `table` has columns label (the node's), hypothesis, value (the label, against the rest), auroc_selection,
    auroc_heldout, mean_inside (mean attribution inside the label, selection prompts), selected.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.prompt_scores(model, pairs, ["L2/N5", "L3/N7"])
        >>> features = tnc.score_features(scores, [prompt.endswith("s") for prompt in pairs.clean])
        >>> features.to_dataframe()[["label", "value"]].drop_duplicates().shape
        (4, 2)
    """

    table: pd.DataFrame
    settings: Mapping[str, Any]

    @property
    def selected(self) -> pd.DataFrame:
        """Rows chosen on the selection prompts, farthest from one half there first; judge them by `auroc_heldout`."""
        rows = self.table[self.table["selected"]]
        order = (rows["auroc_selection"] - 0.5).abs().sort_values(ascending=False, kind="stable").index
        return rows.loc[order].reset_index(drop=True)

    def to_dataframe(self) -> pd.DataFrame:
        """Every node and label."""
        return self.table.copy()

    def groups(self) -> dict[str, list[str]]:
        """Nodes by the set of labels they were selected for, as `Circuit.group` takes them. METHODS 1.7."""
        chosen = self.selected
        names = chosen["hypothesis"] + "=" + chosen["value"].map(str)
        out: dict[str, list[str]] = {}
        for node, tags in names.groupby(chosen["label"], sort=False):
            out.setdefault(" & ".join(sorted(tags)), []).append(str(node))
        return out

    def __repr__(self) -> str:
        chosen = self.selected
        held_out = (chosen["auroc_heldout"] - 0.5).abs().mean() + 0.5 if len(chosen) else float("nan")
        return (
            f"FeatureScores({self.table['label'].nunique():,} nodes, {len(chosen)} selected, their mean held-out AUROC "
            f"{held_out:.3f} (1 - AUROC below one half))"
        )

    def _repr_html_(self) -> str:
        table = self.selected.drop(columns="selected")
        above = table.assign(above_chance=table["auroc_heldout"] - 0.5)
        return _html.block(repr(self), _html.table(above, bars=("above_chance",), rows=30))


@checked
def score_features(
    scores: PromptScores | Sequence[pd.DataFrame],
    labels: Labels | Mapping[str, Labels] | None = None,
    *,
    fraction: float = 0.5,
    seed: int = 0,
    high: float = 0.8,
    low: float = 0.2,
    minimum: float = 0.0,
) -> FeatureScores:
    """Score hypotheses about neurons: does a neuron's attribution tell the prompts of a label from the others?

    Args:
        scores: from `prompt_scores`; or one table of nodes per prompt, such as circuits' `.nodes` or `NodeScores.top`
            (columns label or node, and score; positions are summed), where nodes that a prompt lacks count as 0.
        labels: one label per prompt, or several hypotheses by name; by default the pairs' own labels. Each label is
            compared with the rest; of two, both are listed.
        fraction: of the prompts of each label that choose; the others report. Equal prompts never stand on both sides.
        seed: of the split.
        high: select a node for a label where the AUROC on the selection prompts is at least this.
        low: or where it is at most this.
        minimum: and where the |mean attribution| inside the label is at least this.

    Raises:
        SettingsError: no labels, another number of labels than prompts, a single label, a label with fewer than two
            different prompts, equal prompts of different labels, or bounds out of order.

    Source: METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=32)
        >>> scores = tnc.prompt_scores(model, pairs, tnc.attribute(model, pairs).top(20))
        >>> features = tnc.score_features(scores, [prompt.endswith("s") for prompt in pairs.clean])
        >>> best = features.selected.head()
    """
    if not 0 < fraction < 1 or not 0 <= low < high <= 1:
        raise SettingsError(f"expected 0 < fraction < 1 and 0 <= low < high <= 1; got {fraction}, {low}, {high}.")
    values, names, keys, own = _read(scores)
    labels = own if labels is None else labels
    if labels is None:
        raise SettingsError("expected one label per prompt: these prompts have none of their own. Give labels=.")
    hypotheses = dict(labels) if isinstance(labels, Mapping) else {"label": labels}
    frames = []
    for name, column in hypotheses.items():
        first, second, found = _split(name, list(column), keys, fraction, seed)
        inside = torch.tensor([[label == value for value in found] for label in column])
        chosen = auroc(values[first], inside[first])
        report = auroc(values[second], inside[second])
        mean = (inside[first].double().T @ values[first].double()) / inside[first].sum(0).double()[:, None]
        picked = ((chosen >= high) | (chosen <= low)) & (mean.abs() >= minimum)
        for place, value in enumerate(found):
            columns = {"auroc_selection": chosen, "auroc_heldout": report, "mean_inside": mean, "selected": picked}
            numbers = {key: tensor[place].numpy() for key, tensor in columns.items()}
            frames.append(pd.DataFrame({"label": names, "hypothesis": name, "value": value, **numbers}))
    settings = {"fraction": fraction, "seed": seed, "high": high, "low": low, "minimum": minimum}
    return FeatureScores(pd.concat(frames, ignore_index=True), settings)


def _read(
    scores: PromptScores | Sequence[pd.DataFrame],
) -> tuple[Float[Tensor, "prompt node"], list[str], list[str], Labels | None]:
    if isinstance(scores, PromptScores):
        return scores.values, list(scores.nodes["label"]), list(scores.keys), scores.labels
    rows = []
    for number, table in enumerate(scores):
        name = "node" if "node" in table.columns else "label"
        if not {name, "score"} <= set(table.columns):
            raise SettingsError(
                f"expected tables with columns label (or node) and score; table {number} has "
                f"{list(table.columns)}. Give NodeScores.top(...) or Circuit.nodes of each prompt."
            )
        kept = table[table["kind"].isin(("neuron", "node", "feature"))] if "kind" in table.columns else table
        rows.append(kept["score"].groupby([str(label).partition("@")[0] for label in kept[name]]).sum())
    if not rows:
        raise SettingsError("expected one table per prompt; got none.")
    wide = pd.concat(rows, axis=1).T.fillna(0.0)
    values = torch.tensor(wide.to_numpy(dtype="float32", copy=True))
    return values, [str(name) for name in wide.columns], [str(n) for n in range(len(rows))], None


def _split(
    name: str, column: list[Hashable], keys: list[str], fraction: float, seed: int
) -> tuple[list[int], list[int], list[Hashable]]:
    """Rows that choose, rows that report, and the labels; within each label, equal prompts stay together."""
    if len(column) != len(keys):
        raise SettingsError(f"expected {len(keys)} labels, one per prompt, for {name!r}; got {len(column)}.")
    found = list(dict.fromkeys(column))
    if len(found) < 2:
        raise SettingsError(f"expected at least two different labels for {name!r}; got {found}.")
    owner = dict(zip(keys, column, strict=True))
    torn = [row for row, key in enumerate(keys) if owner[key] != column[row]]
    if torn:
        raise SettingsError(
            f"expected equal prompts to have equal labels for {name!r}; prompt {torn[0]} has two. "
            "Give it one, or leave out the repetition."
        )
    generator = torch.Generator().manual_seed(seed)
    choosing: set[str] = set()
    for label in found:
        prompts = list(dict.fromkeys(key for key, other in zip(keys, column, strict=True) if other == label))
        if len(prompts) < 2:
            raise SettingsError(
                f"expected at least two different prompts of every label of {name!r}, to choose on one and report on "
                f"another; {label!r} has {len(prompts)}. Add prompts, or merge labels."
            )
        order = torch.randperm(len(prompts), generator=generator).tolist()
        size = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
        choosing |= {prompts[place] for place in order[:size]}
    first = [row for row, key in enumerate(keys) if key in choosing]
    return first, [row for row, key in enumerate(keys) if key not in choosing], found
