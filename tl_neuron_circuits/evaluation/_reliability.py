"""How far a linear score can be trusted: curvature of the metric for groups of nodes, and the best nodes patched.

A group is all nodes of one site at one position, moved together from the clean run to the baseline by d:

    support = m(clean) - m(clean + d)
            = - grad . d  -  d' H d / 2  - ...             first order, second order
    ratio   = mean |d' H d / 2| / mean |grad . d|          over pairs; above about 1 the first order says little

A Hessian-vector product belongs to one change. That of all nodes at once would hold interactions across layers, where
what is upstream already moves what is downstream; so each product is restricted to its group. Inside a group

    interaction(n) = - d_n (H d)_n / 2                     a node's share of the second order; they add up to it

For single nodes patch instead: `screen` does it for the best k. Gradients are plain ones: RelP's backward pass is the
gradient of no function, so it has no curvature. Beside the second order stands the trapezoid rule, integrated gradients
with both ends, - (grad(clean) + grad(clean + d)) . d / 2, for which a pass at the other end takes the product's place.

Sign: positive supports the answer. Cost: per site a forward and a backward, per group one more backward; with `exact`
also a forward and a backward per group. Source: METHODS 5.10; arXiv 2606.09899.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import _html
from .._errors import SettingsError
from .._processes import current_processes
from .._typing import checked
from ..bases._activations import Neurons
from ..bases._runs import answers_only, mean_parts, run_logits
from ..bases._site import Basis, Parts, Site, basis_name, basis_sites, refuse_cross_layer
from ..models._protocol import TransformerLensModel
from ..models._threads import holding, hooked
from ..nodes._attribute import attribute, check_pairs
from ..nodes._patching import Patching
from ..nodes._scope import Baseline, Scope
from ..nodes._scores import NodeScores, require_finite, site_labels
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import frozen
from ..tasks._metrics import Metric, logit_difference, measure, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import provenance
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs

try:  # fused attention has no second derivative
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain_attention = partial(sdpa_kernel, SDPBackend.MATH)
except ImportError:  # torch 2.2
    plain_attention = nullcontext


@dataclass(frozen=True, eq=False, repr=False)
class Reliability:
    """First and second order of every group's effect, and every node's share of the second.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> found = tnc.reliability(model, pairs, exact=True)
        >>> found.to_dataframe().columns.tolist()[:6]
        ['hook', 'layer', 'position', 'first_order', 'second_order', 'corrected']
        >>> found.by_ratio(bins=2).columns.tolist()
        ['ratio', 'groups', 'first_order', 'corrected', 'trapezoid']
    """

    groups: pd.DataFrame
    interactions: NodeScores
    """- d_n (H d)_n / 2, averaged over pairs: how much of a node's score depends on the other nodes of its group, and
    on itself."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site and position: first_order, second_order, corrected (their sum), ratio, exact, trapezoid."""
        return self.groups.copy()

    def by_ratio(self, bins: int = 10) -> pd.DataFrame:
        """Mean |estimate - exact| of groups by quantile of their ratio; `ratio` is the bin's median.

        Raises:
            SettingsError: exact effects were not measured.
        """
        if self.groups["exact"].isna().all():
            raise SettingsError("expected exact effects to compare with; call reliability with exact=True.")
        rows = self.groups[self.groups["ratio"].notna()].sort_values("ratio", kind="stable")
        found = []
        for part in np.array_split(np.arange(len(rows)), min(bins, len(rows))):
            group = rows.iloc[part]
            errors = {
                name: float((group[name] - group["exact"]).abs().mean())
                for name in ("first_order", "corrected", "trapezoid")
            }
            found.append({"ratio": float(group["ratio"].median()), "groups": len(group), **errors})
        return pd.DataFrame(found)

    def __repr__(self) -> str:
        s, ratio = self.interactions.settings, self.groups["ratio"]
        return (
            f"Reliability({len(self.groups)} groups of {s['basis']} on {s['model']}, {s['n_pairs']} pairs, median "
            f"ratio {ratio.median():.2g}, {int((ratio > 1).sum())} above 1)"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.to_dataframe(), bars=("ratio",), rows=60))


@holding
@checked
def reliability(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    by: Literal["site_position"] = "site_position",
    exact: bool = False,
    basis: Basis | Sequence[Basis] | None = None,
    metric: Metric = logit_difference,
    baseline: Baseline = "corrupt",
    batch_size: int = 32,
    verbose: bool = False,
) -> Reliability:
    """Curvature of the metric along each group's change: where first-order scores can be trusted.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: as in `attribute`, of one token length.
        by: groups of nodes: those of one site and position.
        exact: also patch every group, and take the gradient there (columns `exact` and `trapezoid`).
        basis: as in `attribute`, and so are `metric` and `baseline`.
        batch_size: prompts in one pass.
        verbose: show progress.

    Returns:
        A `Reliability`, in the metric's units, averaged over pairs.

    Raises:
        PairsError: as `attribute` with positions kept.
        NumericalError: values or derivatives are not finite.

    Source: METHODS 5.10.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> found = tnc.reliability(model, tnc.tasks.subject_verb_agreement("simple", n=4))
        >>> bool((found.to_dataframe()["ratio"].dropna() >= 0).all())
        True
    """
    nodes_of = Neurons() if basis is None else basis
    scope = Scope(model, basis_sites(model, nodes_of), metric, baseline, "noising", "keep", "keep")
    tokens = tokenize(model, pairs)
    check_pairs(tokens, scope)
    settings = {
        "method": "interaction",
        "method_options": {"name": "interaction", "by": by},
        "positions": "keep",
        "units": "keep",
        "baseline": baseline,
        "direction": "noising",
        "metric": metric_name(metric),
        "basis": basis_name(nodes_of),
        "variance_unexplained": {},
        **provenance(model, tokens),
    }
    sums: dict[tuple[str, int], dict[str, float]] = {}
    blocks: dict[tuple[str, str], Tensor] = {}
    with current_processes().together("reliability", settings):
        means = mean_parts(model, scope.sites, tokens.batches(batch_size)) if baseline == "mean" else None
        total = len(scope.sites) * len(tokens)
        with tqdm(total=total, desc="reliability", disable=not verbose, unit="prompt") as bar:
            for batch in tokens.batches(batch_size):
                values, bases = scope.values(batch), scope.baseline_parts(batch, means)
                for site in scope.sites:
                    parts = site.take_apart(values)
                    rows, shares = _curvature(scope, batch, site, values[site.hook], parts, bases[site.hook], exact)
                    for position, row in enumerate(rows):
                        into = sums.setdefault((site.hook, position), dict.fromkeys(row, 0.0))
                        for name, value in row.items():
                            into[name] += value / len(tokens)
                    for kind, share in shares.items():
                        block = share / len(tokens)
                        key = site.hook, kind
                        blocks[key] = blocks[key] + block if key in blocks else block
                    bar.update(len(batch))
    layers = {site.hook: site.layer for site in scope.sites}
    table = [
        {
            "hook": hook, "layer": layers[hook], "position": position,
            "first_order": row["first"], "second_order": row["second"], "corrected": row["first"] + row["second"],
            "ratio": row["size_second"] / row["size_first"] if row["size_first"] > 0 else np.nan,
            "exact": row["exact"], "trapezoid": row["trapezoid"],
        }
        for (hook, position), row in sums.items()
    ]  # fmt: skip
    by_kind: dict[str, dict[str, Tensor]] = {"node": {}, "error": {}, "skip": {}}
    for (hook, kind), block in blocks.items():
        by_kind[kind][hook] = block
    shares = NodeScores(
        by_kind["node"], by_kind["error"], by_kind["skip"], site_labels(scope.sites), settings, nodes_of
    )
    return Reliability(pd.DataFrame(table), require_finite(shares))


def _curvature(
    scope: Scope, batch: Batch, site: Site, clean: Tensor, parts: Parts, base: Parts | None, exact: bool
) -> tuple[list[dict[str, float]], Mapping[str, Tensor]]:
    """Sums over the batch of each position's terms, and of each node's share of the second order."""
    end = torch.zeros_like(clean) if base is None else site.put_together(base, clean)
    change = end - clean
    refuse_cross_layer([site], "reliability")
    metric, gradient, point = _gradient_at(scope, batch, site, clean, curved=True)
    products = torch.zeros_like(clean)
    rows = []
    for position in range(clean.shape[1]):
        first = (gradient[:, position] * change[:, position]).flatten(1).sum(1)
        (product,) = torch.autograd.grad(first.sum(), point, retain_graph=True)
        products[:, position] = product[:, position]
        second = (product[:, position] * change[:, position]).flatten(1).sum(1) / 2
        first = first.detach()
        row = {"first": -first, "second": -second, "size_first": first.abs(), "size_second": second.abs()}
        row |= {"exact": torch.full_like(first, torch.nan), "trapezoid": torch.full_like(first, torch.nan)}
        if exact:
            patched = clean.clone()
            patched[:, position] = end[:, position]
            after, there, _ = _gradient_at(scope, batch, site, patched, curved=False)
            row["exact"] = metric - after
            last = (there[:, position] * change[:, position]).flatten(1).sum(1)
            row["trapezoid"] = -(first + last) / 2
        rows.append({name: float(value.double().sum()) for name, value in row.items()})
    nodes = parts.nodes if base is None else parts.nodes - base.nodes  # minus the change: the sign of the share
    shares = {"node": (nodes * site.node_gradient({site.hook: products})).float().sum(0) / 2}
    for kind, vector in parts.vectors.items():
        vector = vector if base is None else vector - base.vectors[kind]
        shares[kind] = (vector * site.vector_gradient(products)).float().sum(-1).sum(0) / 2
    return rows, shares


def _gradient_at(
    scope: Scope, batch: Batch, site: Site, value: Tensor, *, curved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The metric of each prompt with the site at this value, its gradient there, and the leaf it was taken at.

    With `curved` the gradient has a graph of its own.
    """
    point = value.detach().clone().requires_grad_(True)
    put = [(site.hook, lambda value, hook: point.clone())]
    with torch.enable_grad(), frozen(scope.model), plain_attention():
        with answers_only(scope.model, batch, scope.metric) as narrowed, hooked(scope.model, put):
            logits = run_logits(scope.model, batch.clean, batch.attention_mask)
        metric = measure(scope.metric, logits, narrowed)
        gradient = gradients_by_name(metric.sum(), {site.hook: point}, create_graph=curved)[site.hook]
    return metric.detach(), gradient, point


@holding
@checked
def screen(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    scores: NodeScores,
    k: int = 100,
    *,
    metric: Metric = logit_difference,
    batch_size: int = 32,
    verbose: bool = False,
) -> pd.DataFrame:
    """Patch the `k` best nodes exactly: which of them their scores misjudge.

    Args:
        model: the model that the scores were computed on.
        pairs: to patch on; the scores' own unless others are to be asked.
        scores: from `attribute`, of effects in the metric's units (not a learned order).
        k: how many nodes to patch, one forward row per node and prompt.
        metric: as in `attribute`.
        batch_size: as in `attribute`.
        verbose: show progress.

    Returns:
        Rows of `scores.top(k)` with `exact`, and `misjudged`: another sign, or one of the two sizes is more than
        twice the other.

    Raises:
        SettingsError: the scores are an order, or lack their dictionaries.

    Source: METHODS 5.10.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.attribute(model, pairs)
        >>> len(tnc.evaluation.screen(model, pairs, scores, k=5))
        5
    """
    if scores.ranking == "signed":
        raise SettingsError(f"scores of {scores.settings['method']} are an order, not effects: nothing to misjudge.")
    if scores.basis is None:
        raise SettingsError("these scores were loaded without their dictionaries; attribute again to screen them.")
    best = scores.top(k)
    same: Any = {name: scores.settings[name] for name in ("positions", "baseline", "direction")}
    exact = attribute(
        model,
        pairs,
        method=Patching(nodes=best),
        basis=scores.basis,
        metric=metric,
        batch_size=batch_size,
        verbose=verbose,
        **same,
    )
    known = exact.to_dataframe().dropna(subset="score").set_index("label")["score"]
    table = best.assign(exact=known.reindex(best["label"]).to_numpy())
    low, high = np.sort(table[["score", "exact"]].abs().to_numpy(), axis=1).T
    other_sign = np.sign(table["score"]) != np.sign(table["exact"])
    return table.assign(misjudged=other_sign | (high > 2 * low))
