"""`contributions`: what a feature's pre-activation is made of, one step back."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from .. import _html
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..models._protocol import TransformerLensModel
from ..nodes._scores import label
from ._explained import Target, explained, taken_apart, token_texts
from ._one_step import OneStep
from ._paths import head_label
from ._residual_run import Prompt, ResidualRun, one_prompt, residual_run

_COLUMNS = {
    "node": "object", "kind": "object", "layer": "int64", "unit": "int64", "position": "int64", "token": "object",
    "activation": "float64", "weight": "float64", "contribution": "float64",
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Contributions:
    """What `contributions` returns.

    `table` has one row a source, largest |contribution| first: node, kind ("feature", "error", "skip", "head",
    "embedding", "bias"), layer, unit (feature, head, or token), position (where it stands; a head's source), token,
    activation and weight of features (contribution = activation * weight), contribution.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> found = tnc.transcoders.contributions(model, transcoders, "The dog near the cats", "L3/F7@-1")
        >>> bool(abs(found.by("kind").sum() - found.value) < 1e-3)
        True
    """

    table: pd.DataFrame
    target: str
    value: float
    """The target's pre-activation (or logit) as the model computes it."""

    @property
    def residual(self) -> float:
        """`value` minus the sum of all contributions: rounding."""
        return self.value - float(self.table["contribution"].sum())

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def top(self, k: int = 10, kind: str | None = None) -> pd.DataFrame:
        """The `k` largest contributions in size, of one kind or of all."""
        rows = self.table if kind is None else self.table[self.table["kind"] == kind]
        return rows.head(k).reset_index(drop=True)

    def by(self, *columns: str) -> pd.Series:
        """Contributions added up, for example `by("kind")` or `by("kind", "layer")`."""
        return self.table.groupby(list(columns), sort=False)["contribution"].sum()

    def __repr__(self) -> str:
        return f"Contributions({self.target} = {self.value:.4g} from {len(self.table)} sources)"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.table, bars=("contribution",)))


@checked
def contributions(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    prompt: Prompt,
    target: Target,
    *,
    prepend_bos: bool | None = None,
) -> Contributions:
    """Take a feature's pre-activation apart into everything that it reads from the residual stream.

    Sources are the features that fire in earlier MLPs (activation times decoder . encoder), each MLP's error (all it
    writes, where it has no dictionary) and skip path, each attention head by source position (pattern frozen), the
    embedding, and biases by name. Norms are linear, their scales frozen. Positive raises the target; the sum is the
    pre-activation, which of a feature that fires is its activation.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, at most one a layer; SAEs on MLP outputs can be sources only.
        prompt: one prompt, text or tokens.
        target: "L3/F17@5" (a feature; -1 is the last position), "L3/N17@5" (what enters a neuron's nonlinearity, the
            gate's of a gated MLP), or a next token as text or number (its logit at the last position, before any soft
            cap and minus the mean over the vocabulary).
        prepend_bos: None means the model's default.

    Raises:
        DictionaryError: a dictionary writes no MLP output, reads no residual stream, or has an encoder of its own.
        SettingsError: the target is not there.
        NumericalError: the sources do not add up to the value that the model computes, to 1e-4 of their size.
        UnsupportedModelError: the model lacks hook points or weights.

    Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> found = tnc.transcoders.contributions(model, transcoders, "The dog near the cats", "L3/F7@-1")
        >>> abs(found.residual) < 1e-4
        True
    """
    tokens = one_prompt(model, prompt, prepend_bos)
    run = residual_run(model, dictionaries, tokens)
    found = explained(run, target, prompt if isinstance(prompt, str) else None)
    return Contributions(_table(run, taken_apart(run, found)), found.label, found.value)


def _table(run: ResidualRun, step: OneStep) -> pd.DataFrame:
    texts, t = token_texts(run.model, run.tokens), step.read.position
    parts = []
    for found in step.features:
        frame = pd.DataFrame(
            {
                "unit": found.units.tolist(), "activation": found.activations.tolist(),
                "weight": found.weights.tolist(), "contribution": found.contributions.tolist(),
            }
        )  # fmt: skip
        names = [label(found.layer, "F", unit, t, "node") for unit in frame["unit"]]
        parts.append(frame.assign(node=names, kind="feature", layer=found.layer, position=t, token=texts[t]))
    for layer, effects in step.heads.items():
        effects = effects[:, : t + 1]
        heads, sources = (axis.flatten().tolist() for axis in _places(effects.shape))
        names = [head_label(layer, head, source, t) for head, source in zip(heads, sources, strict=True)]
        frame = pd.DataFrame(
            {"node": names, "unit": heads, "position": sources, "contribution": effects.flatten().tolist()}
        )
        parts.append(frame.assign(kind="head", layer=layer, token=[texts[source] for source in sources]))
    rows = [{"node": f"embed@{t}", "kind": "embedding", "unit": int(run.tokens[t]), "contribution": step.embedding}]
    if step.positional is not None:
        rows.append({"node": "positions", "kind": "bias", "contribution": step.positional})
    for kind, values in (("error", step.errors), ("skip", step.skips)):
        rows += [
            {"node": label(layer, "", -1, t, kind), "kind": kind, "layer": layer, "contribution": value}
            for layer, value in values.items()
        ]
    for name, value in step.constants.items():
        found = re.match(r"L(\d+)/", name)
        place = {} if found is None else {"layer": int(found[1])}
        rows.append({"node": name, "kind": "bias", "contribution": value, **place})
    parts.append(pd.DataFrame(rows).assign(position=t, token=texts[t]))
    table = pd.concat([part for part in parts if len(part)], ignore_index=True).reindex(columns=list(_COLUMNS))
    table = table.fillna({"layer": -1, "unit": -1}).astype(_COLUMNS)
    order = table["contribution"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _places(shape: Sequence[int]) -> tuple:
    return tuple(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
