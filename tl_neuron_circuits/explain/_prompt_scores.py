"""Attribution of chosen neurons prompt by prompt: what hypotheses about prompts are scored on.

    score(prompt, n) = sum over positions of (a - a_baseline) * d metric / d a      under RelP

`attribute` averages over prompts; here every prompt keeps its own number, and positive and negative activations of a
neuron may be kept apart as two features. Source: METHODS 1.6 and 1.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .. import _html
from .._errors import PairsError, SettingsError
from .._progress import show_batches
from .._typing import checked
from ..bases._activations import ActivationSite, Neurons
from ..bases._runs import Values, run_values
from ..interventions._direct_logit_effects import output_weights
from ..interventions._find_nodes import Nodes, find_nodes
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..nodes._scope import gradients_at
from ..propagation.rules import ALL_RULES
from ..tasks._metrics import Metric, logit_difference, measure, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs


@dataclass(frozen=True, eq=False, repr=False)
class PromptScores:
    """A number for every prompt and node, float32 on the CPU; 0 where the node is absent from a prompt's circuit.

    `nodes` has one row per column of `values`: label, hook, unit, position (-1: summed over positions) and polarity (+1
    and -1 for positive and negative activations kept apart, else 0). Prompts with equal `keys` are equal.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.prompt_scores(model, pairs, ["L2/N5", "L3/N7"])
        >>> scores, list(scores.to_dataframe().columns)
        (PromptScores(8 prompts, 2 nodes, logit_difference), ['L2/N5', 'L3/N7'])
    """

    values: Float[Tensor, "prompt node"]
    nodes: pd.DataFrame
    keys: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: str

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.values)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, one column per node."""
        return pd.DataFrame(self.values.numpy(), columns=list(self.nodes["label"]))

    def __repr__(self) -> str:
        return f"PromptScores({len(self)} prompts, {len(self.nodes):,} nodes, {self.metric})"

    def _repr_html_(self) -> str:
        mean = self.nodes.assign(mean=self.values.mean(0).numpy())
        best = mean.loc[mean["mean"].abs().sort_values(ascending=False, kind="stable").index]
        return _html.block(repr(self), _html.table(best.drop(columns="hook"), bars=("mean",)))


@holding
@checked
def prompt_scores(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    nodes: Nodes | None = None,
    *,
    metric: Metric = logit_difference,
    baseline: Literal["zero", "corrupt"] = "zero",
    polarity: bool = False,
    share: float = 0.0,
    rules: Sequence[str] = ALL_RULES,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    verbose: bool | None = None,
) -> PromptScores:
    """Score nodes on each prompt separately.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts with answers, in any lengths; only the clean ones are scored.
        nodes: as in `steering_hooks`; a node without a position is summed over positions. All neurons unless given.
        metric: what the scores support.
        baseline: what activations are compared with: zero (scores are relevances), or the corrupt prompt.
        polarity: keep a neuron's positive and negative activations apart, as "L3/N5+" and "L3/N5-".
        share: count a neuron at a position as absent (0) where |score| is below this share of |metric| (METHODS: .005).
        rules: of relevance propagation; () is the plain gradient.
        batch_size: prompts in one pass; one forward and one backward each (two forwards with baseline="corrupt").
        prepend_bos: as in `tasks.tokenize`.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        PairsError: baseline="corrupt" without corrupt prompts, or of other lengths.
        SettingsError: a node that cannot be read, or a position or unit out of range.

    Source: METHODS 1.6, 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> scores = tnc.prompt_scores(tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8))
        >>> scores.values.shape[0]
        8
    """
    tokens = tokenize(model, pairs, prepend_bos=prepend_bos)
    frame = _all_neurons(model) if nodes is None else find_nodes(model, nodes)
    features = _split_by_sign(frame) if polarity else frame.assign(polarity=0)
    sites = [ActivationSite(hook, -1, "N") for hook in frame["hook"].unique()]
    scores = torch.zeros(len(tokens), len(features))
    for batch in show_batches(tokens.batches(batch_size), len(tokens), desc="prompt scores", verbose=verbose):
        seen: list[Tensor] = []

        def recorded(logits: Tensor, batch: Batch, seen: list[Tensor] = seen) -> Tensor:
            seen.append(measure(metric, logits, batch))
            return seen[-1]

        clean, gradients = gradients_at(model, batch, sites, recorded, tuple(rules))
        corrupt: Values | None = None
        if baseline == "corrupt":
            if batch.corrupt is None or batch.corrupt.shape != batch.clean.shape:
                raise PairsError(
                    "baseline='corrupt' needs corrupt prompts as long as the clean ones; use baseline='zero'."
                )
            corrupt = run_values(model, batch.on_corrupt(), list(gradients))
        least = share * seen[-1].detach().abs().float()
        for hook, part in features.groupby("hook", sort=False):
            value, gradient = (values[str(hook)].flatten(2).float() for values in (clean, gradients))
            change = value if corrupt is None else value - corrupt[str(hook)].flatten(2).float()
            product = change * gradient
            product = torch.where(product.abs() >= least.to(product)[:, None, None], product, 0.0)
            columns = torch.as_tensor(part.index.to_numpy(copy=True))
            scores[batch.index.cpu()[:, None], columns] = _pick(part, product, value).cpu()
    keys = tuple(str(prompt.tolist()) for prompt in tokens.clean)
    labels = None if tokens.labels is None else tuple(tokens.labels)
    return PromptScores(scores, features, keys, labels, metric_name(metric))


def _all_neurons(model: TransformerLensModel) -> pd.DataFrame:
    parts = []
    for site in Neurons().sites(model):
        width = len(output_weights(model, site.layer))
        labels = [f"L{site.layer}/N{unit}" for unit in range(width)]
        parts.append(pd.DataFrame({"label": labels, "hook": site.hook, "unit": range(width), "position": -1}))
    return pd.concat(parts, ignore_index=True)


def _split_by_sign(frame: pd.DataFrame) -> pd.DataFrame:
    """Every node twice: for its positive and for its negative activations."""
    name, _, at = zip(*(label.partition("@") for label in frame["label"]), strict=True)
    parts = []
    for sign, mark in ((1, "+"), (-1, "-")):
        labels = [f"{n.rstrip('+-')}{mark}" + (f"@{p}" if p else "") for n, p in zip(name, at, strict=True)]
        parts.append(frame.assign(label=labels, polarity=sign))
    return pd.concat(parts, ignore_index=True)


def _pick(
    part: pd.DataFrame, product: Float[Tensor, "batch pos unit"], value: Float[Tensor, "batch pos unit"]
) -> Float[Tensor, "batch node"]:
    """The scores of the part's nodes, each at its position or summed, where the activation has its sign."""
    places: dict[str, Any] = {k: torch.as_tensor(part[k].to_numpy(copy=True)) for k in ("unit", "position", "polarity")}
    units, positions, signs = (places[key].to(product.device) for key in ("unit", "position", "polarity"))
    for name, index, size in (("units", units, product.shape[2]), ("positions", positions, product.shape[1])):
        if int(index.max()) >= size:
            raise SettingsError(f"expected {name} below {size} at {part['hook'].iloc[0]}; got {int(index.max())}.")
    out = product.new_zeros(len(product), len(part))
    for sign in (0, 1, -1):
        kept = product if sign == 0 else torch.where(value.sign() == sign, product, 0.0)
        free, fixed = (signs == sign) & (positions < 0), (signs == sign) & (positions >= 0)
        if free.any():
            out[:, free] = kept.sum(1)[:, units[free]]
        if fixed.any():
            out[:, fixed] = kept[:, positions[fixed], units[fixed]]
    return out
