"""Unlearning a spurious attribute by ablating dictionary features: the protocol of Bias in Bios, on any texts.

A probe is trained on texts in which the label and a spurious attribute always agree, and judged on texts in which they
are independent. Features are ranked, a judge says which of the best are about the attribute, those are set to zero at
every position, and the probe is used again as it is, or retrained on the same biased texts.

    original        the probe, nothing done                        oracle    the probe of balanced texts: the ceiling
    lasso           features by |weight| in the regression of the label node on pooled features
    lasso_rounds    the same, regressed again without what the judge chose until it chooses nothing more (ours, not the
                    paper's: of features that say the same, one regression takes one)
    attribution     features by their support for the probe's log odds: activation * W_dec . gradient (SHIFT's ranking)
    random          as many live features as were ablated at most, drawn by chance
    concept_blind   no features: the attribute's direction, from the concept texts, is projected out (LEACE)

In the paper the judge is a person. Here it is a callable, by default one that looks at `concept`: other texts
that show the attribute but say nothing about the label. Nothing but the oracle sees training texts where they disagree.
Source: Marks et al. 2025, arXiv 2403.19647 (SHIFT); Yin et al. 2026; Belrose et al. 2023 (LEACE); METHODS 3.2, 5.1.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .. import _html
from .._auroc import auroc
from .._errors import NumericalError, SettingsError
from .._files import versions
from .._progress import progress
from .._typing import checked
from ..bases._runs import Values, capture, list_reads, require_fired, run_logits, values_at
from ..bases._site import Basis, Parts, Site, basis_name, basis_sites, refuse_cross_layer
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding, hooked
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import relp
from ..tasks._tokenized import TokenizedPairs
from ._feature_ranking import PooledFeatures, pooled_features, rank_features
from ._labeled_texts import LabeledTexts
from ._observations import shared_start, tokenize_inputs
from ._statistics import Statistics, standardize

# --- A linear probe: logistic regression with a small ridge on standardized activations, solved by Newton's method ---
#     minimize over w, b:  mean of log(1 + exp(z)) - y z  +  ridge / 2 * ||w||^2,   z = standardized(x) w + b
#
# Standardization is of the data it is fitted to and goes into the weights, so that a probe can be applied, and its
# gradient taken, on activations themselves.


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """`log_odds(x) = x @ weights + bias` of the label being 1; made by `fit_probe`."""

    weights: Float64[Tensor, " d"]
    bias: float

    def log_odds(self, x: Float[Tensor, "... d"]) -> Float64[Tensor, "..."]:
        """Of activations as they are."""
        return x.double() @ self.weights.to(x.device) + self.bias

    def predictions(self, x: Float[Tensor, "n d"]) -> Tensor:
        """0 or 1."""
        return (self.log_odds(x) > 0).long()

    def __repr__(self) -> str:
        return f"Probe({len(self.weights)} activations)"


def fit_probe(x: Float[Tensor, "n d"], y: Tensor, ridge: float = 1e-2, steps: int = 50) -> Probe:
    """Fit a probe; constant columns get no weight.

    Raises:
        SettingsError: labels are not zeros and ones, or all the same.
        NumericalError: an activation is not finite, or the fit did not converge.
    """
    y = y.double()
    if not bool(((y == 0) | (y == 1)).all()) or len(y.unique()) < 2:
        raise SettingsError("expected labels of both 0 and 1 for a probe, and no others.")
    statistics = Statistics.from_rows(x)
    problem = standardize(statistics)
    keep = (~problem.constant).double() / problem.scale
    standard = torch.cat([(x.double() - statistics.mean) * keep, torch.ones(len(y), 1).double()], 1)
    penalty = torch.full((standard.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 1e-9
    weights = torch.zeros_like(penalty)

    def loss(w: Tensor) -> Tensor:
        z = standard @ w
        return (torch.nn.functional.softplus(z) - y * z).mean() + 0.5 * (penalty * w.square()).sum()

    for _ in range(steps):
        p = torch.sigmoid(standard @ weights)
        gradient = standard.T @ (p - y) / len(y) + penalty * weights
        if float(gradient.abs().max()) < 1e-8:
            break
        hessian = (standard.T * (p * (1 - p))) @ standard / len(y) + penalty.diag()
        step = torch.linalg.solve(hessian, gradient)
        length = 1.0
        while length > 1e-6 and loss(weights - length * step) > loss(weights) - 1e-4 * length * (gradient @ step):
            length /= 2
        weights = weights - length * step
    else:
        raise NumericalError("the probe did not converge. Give a larger ridge.")
    scaled = weights[:-1] * keep
    return Probe(scaled, float(weights[-1] - scaled @ statistics.mean))


def eraser(x: Tensor, attribute: Tensor) -> Callable[[Tensor], Tensor]:
    """The projection after which no linear probe predicts the attribute on `x`: LEACE's, of rank one.

    x - d (v . (x - mean)) / (v . d),   d the difference of class means, v = covariance^-1 d

    Raises:
        SettingsError: the attribute is the same everywhere.

    Source: Belrose et al. 2023, arXiv 2306.03819.
    """
    x = x.double()
    mean = x.mean(0)
    centered = x - mean
    covariance = centered.T @ centered / len(x)
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    difference = x[attribute == 1].mean(0) - x[attribute == 0].mean(0)
    if not bool(torch.isfinite(difference).all()):
        raise SettingsError(
            "all concept texts have the same value of the attribute, so there is nothing to contrast. Give both values."
        )
    v = torch.linalg.solve(covariance, difference)
    scale = (v @ difference).clamp(min=torch.finfo(torch.float64).tiny)
    return lambda values: values.double() - ((values.double() - mean) @ v / scale)[:, None] * difference


# --- Activations pooled over positions while features are zero, and the features' support for a probe of them ---


@dataclass(frozen=True, eq=False)
class Ablation:
    """Which units of which sites are zero, and where activations are read: their mean from position `skip` on.

    Without `errors` a site's value is what its dictionary makes of it.
    """

    sites: Sequence[Site]
    units: Mapping[str, Sequence[int]]
    hook: str
    skip: int
    batch_size: int
    errors: bool = True

    def with_features(self, features: pd.DataFrame) -> "Ablation":
        """The same with these features (columns hook and unit) at zero."""
        units = {str(hook): rows["unit"].tolist() for hook, rows in features.groupby("hook")}
        return replace(self, units=units)

    def hooks(self, store: Values) -> list[tuple[str, Any]]:
        """What a site reads is kept on the way; where it writes, its units are taken out of the value."""
        ablated = [site for site in self.sites if self.units.get(site.hook) or not self.errors]
        reads = [name for name in list_reads(ablated) if name not in {site.hook for site in ablated}]
        return [*(capture(store, name) for name in reads), *(self._take_out(site, store) for site in ablated)]

    def _take_out(self, site: Site, store: Values) -> tuple[str, Any]:
        units = list(self.units.get(site.hook, ()))

        def without(value: Tensor, hook: Any) -> Tensor:
            parts = site.take_apart({name: value if name == site.hook else store[name] for name in site.reads})
            nodes = parts.nodes.clone()
            nodes[..., units] = 0
            vectors = {name: v for name, v in parts.vectors.items() if self.errors or name != "error"}
            return site.put_together(Parts(nodes, vectors), value)

        return site.hook, without


def pooled_activations(
    model: TransformerLensModel, tokens: TokenizedPairs, ablation: Ablation
) -> Float[Tensor, "text d"]:
    """Mean over positions at `ablation.hook`, float32 on the CPU."""
    rows: list[Tensor] = [torch.empty(0)] * len(tokens)
    for batch in tokens.batches(ablation.batch_size):
        hooks, mask = ablation.hooks({}), batch.attention_mask
        value = values_at(model, batch.clean, [ablation.hook], attention_mask=mask, hooks=hooks)[ablation.hook]
        value = value.flatten(2)
        for row, mean in zip(batch.index.tolist(), value[:, ablation.skip :].mean(1).float().cpu(), strict=True):
            rows[row] = mean
    return torch.stack(rows)


def probe_support(
    model: TransformerLensModel,
    tokens: TokenizedPairs,
    ablation: Ablation,
    probe: Probe,
    label: Tensor,
    rules: str | Sequence[str],
) -> Float[Tensor, " node"]:
    """Mean over texts of sum over positions of activation * d(log odds of the text's label) / d activation, by node.

    The gradient is the model's own, or RelP's with `rules`. Nothing is ablated, and errors are kept.
    """
    total: Tensor | None = None
    names = list(dict.fromkeys([*list_reads(ablation.sites), ablation.hook]))
    for batch in tokens.batches(ablation.batch_size):
        store: Values = {}
        hooks = [_leaf(store, name) for name in names]
        with torch.enable_grad(), relp(model, rules), hooked(model, hooks):
            run_logits(model, batch.clean, batch.attention_mask)
        values = require_fired(store, names, model)
        pooled = values[ablation.hook].flatten(2)[:, ablation.skip :].mean(1)
        sign = 2.0 * label[batch.index.cpu()].to(pooled) - 1
        target = (sign * (pooled @ probe.weights.to(pooled))).sum()
        order = list(values)  # as they fired: the probe reads before the sites that fire after it
        reached = [site.hook for site in ablation.sites if order.index(site.hook) <= order.index(ablation.hook)]
        gradients = gradients_by_name(target, {hook: values[hook] for hook in reached}) if reached else {}
        parts = []
        for site in ablation.sites:
            nodes = site.take_apart({name: values[name].detach() for name in site.reads}).nodes[:, ablation.skip :]
            if site.hook in gradients:
                parts.append((nodes * site.node_gradient(gradients)[:, ablation.skip :]).sum((0, 1)))
            else:
                parts.append(nodes.new_zeros(nodes.shape[2]))
        batch_sum = torch.cat([part.double().cpu() for part in parts])
        total = batch_sum if total is None else total + batch_sum
    assert total is not None  # there is at least one text
    return total / len(tokens)


def _leaf(store: Values, name: str) -> tuple[str, Any]:
    """Keep the value in the graph; parameters are frozen inside `relp`, so where no graph has begun, begin one."""

    def keep(value: Tensor, hook: Any) -> Tensor:
        store[name] = value if value.requires_grad else value.detach().requires_grad_(True)
        return store[name]

    return name, keep


# --- The protocol ---


RANKINGS = ("lasso", "lasso_rounds", "attribution", "random")
_ROUNDS = 10

Judge = Callable[[pd.DataFrame], Sequence[str]]
"""From candidates (label, hook, layer, unit, weight, share, contrast) to the labels of those about the attribute."""


def _judge_by_contrast(threshold: float) -> Judge:
    """A feature is about the attribute if, pooled, it predicts it on the concept texts with this AUROC either way."""
    if not 0.5 <= threshold <= 1:
        raise SettingsError(f"expected a judge that is a function, or an AUROC between 0.5 and 1; got {threshold}.")

    def judge(candidates: pd.DataFrame) -> Sequence[str]:
        return candidates.loc[(candidates["contrast"] - 0.5).abs() >= threshold - 0.5, "label"].tolist()

    return judge


@dataclass(frozen=True, eq=False, repr=False)
class Generalization:
    """How the probe does on balanced texts under every method.

    `table`: method; label_accuracy (higher is better); spurious_accuracy (share of predictions that equal the
    attribute, .5 is blind to it); worst_group (least accuracy of the four groups); n_ablated; seconds (of ranking, or
    of the projection; CPU time of the process). `candidates`: by ranking, the features that the judge saw, with its
    verdict in `chosen`. `probes`: the original probe and the oracle's.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> words = [("doctor", 0), ("farmer", 1)]
        >>> rows = [(f"The {w}{e}", label, k) for w, label in words for k, e in enumerate((" is old.", "s are old."))]
        >>> texts = tnc.lasso.LabeledTexts(*zip(*rows))
        >>> basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")[1:2])
        >>> found = tnc.lasso.generalize(tnc.load_demo_model(), texts, texts, texts, basis, n_candidates=3)
        >>> sorted(found.candidates)
        ['attribution', 'lasso', 'lasso_rounds', 'random']
    """

    table: pd.DataFrame
    candidates: Mapping[str, pd.DataFrame]
    probes: Mapping[str, Probe]
    settings: Mapping[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per method."""
        return self.table

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"Generalization({len(self.table)} methods, {s['n_biased']} biased, {s['n_test']} test texts, {s['hook']})"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.table, bars=("label_accuracy", "spurious_accuracy")))


@holding
@checked
def generalize(
    model: TransformerLensModel,
    train: LabeledTexts,
    test: LabeledTexts,
    concept: LabeledTexts,
    basis: Basis | Sequence[Basis],
    *,
    judge: Judge | float = 0.75,
    hook: str | None = None,
    n_candidates: int = 50,
    rules: str | Sequence[str] = (),
    errors: bool = True,
    ridge: float = 1e-2,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    seed: int = 0,
    verbose: bool | None = None,
) -> Generalization:
    """Train a probe on biased texts, ablate what the judge finds spurious, and test it on balanced texts.

    Args:
        model: a HookedTransformer or TransformerBridge.
        train: all groups; the biased part trains the probe, the balanced part only the oracle.
        test: all groups; its balanced part is what probes are judged on.
        concept: texts of other content with the spurious attribute; their labels must not go with it.
        basis: dictionaries whose features are ranked and ablated.
        judge: which candidates are about the attribute: those whose pooled feature predicts it on the concept texts
            with this AUROC, in either direction; or a function from their table to the labels of those that are.
        hook: where the probe reads, mean over positions; where the last dictionary writes unless given.
        n_candidates: how many of the best features the judge sees, of each ranking.
        rules: for the attribution, as in `relp`: a named set or a tuple of rules; () is the plain gradient.
        errors: keep what the dictionaries miss in what the probe reads. A retrained probe may find the attribute
            there; without errors every method reads reconstructions alone.
        ridge: of the probe.
        batch_size: texts in one pass.
        prepend_bos: None means the model's default.
        seed: of the draws of texts and of random features.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        SettingsError: groups are empty, no feature differs between the texts, or the judge's AUROC is not one.
        UnsupportedModelError: a hook point is missing.
        NumericalError: activations that are not finite.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> words = [("doctor", 0), ("farmer", 1)]
        >>> rows = [(f"The {w}{e}", label, k) for w, label in words for k, e in enumerate((" is old.", "s are old."))]
        >>> texts = tnc.lasso.LabeledTexts(*zip(*rows))
        >>> basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")[1:2])
        >>> found = tnc.lasso.generalize(tnc.load_demo_model(), texts, texts, texts, basis, n_candidates=3)
        >>> found.table["method"].tolist()[:3]
        ['original', 'oracle', 'concept_blind']
    """
    decide = judge if callable(judge) else _judge_by_contrast(judge)
    sites = basis_sites(model, basis)
    refuse_cross_layer(sites, "taking single features out")
    texts = {
        "biased": train.biased(seed=seed),
        "oracle": train.balanced(seed=seed),
        "test": test.balanced(seed=seed),
        "concept": concept,
    }
    tokens = {name: tokenize_inputs(model, list(some.texts), prepend_bos) for name, some in texts.items()}
    skip = shared_start(tokens["biased"])
    plain = Ablation(sites, {}, sites[-1].hook if hook is None else hook, skip, batch_size, errors)
    table: list[dict[str, Any]] = []

    def train_probe(x: Tensor, name: str) -> Probe:
        return fit_probe(x, torch.tensor(texts[name].label), ridge)

    def add_row(method: str, probe: Probe, x: Tensor, n_ablated: int = 0, seconds: float = 0.0) -> None:
        row = {"method": method, **_accuracies(probe, x, texts["test"])}
        table.append({**row, "n_ablated": n_ablated, "seconds": seconds})

    x = {name: pooled_activations(model, some, plain) for name, some in tokens.items()}
    probes = {"original": train_probe(x["biased"], "biased"), "oracle": train_probe(x["oracle"], "oracle")}
    for name, probe in probes.items():
        add_row(name, probe, x["test"])
    start = time.process_time()
    erase = eraser(x["concept"], torch.tensor(concept.spurious))
    blind = train_probe(erase(x["biased"]), "biased")
    add_row("concept_blind", blind, erase(x["test"]), seconds=time.process_time() - start)

    given: Any = {"skip_positions": skip, "batch_size": batch_size, "verbose": verbose}
    features, shown = (pooled_features(model, tokens[name], basis, **given) for name in ("biased", "concept"))
    area = auroc(shown.values, (torch.tensor(concept.spurious) == 1)[:, None])[0]  # .5 where it never differs
    contrast = dict(zip(shown.nodes["label"], area.tolist(), strict=True))

    def ask_judge(ranked: pd.DataFrame) -> pd.DataFrame:
        """The first candidates, with columns contrast and chosen."""
        seen = ranked.head(n_candidates).reset_index(drop=True)
        seen = seen.assign(contrast=seen["label"].map(contrast))
        return seen.assign(chosen=seen["label"].isin(list(decide(seen))))

    candidates: dict[str, pd.DataFrame] = {}
    for ranking in progress(RANKINGS, desc="rankings", verbose=verbose):
        start = time.process_time()
        if ranking.startswith("lasso"):
            rounds = 1 if ranking == "lasso" else _ROUNDS
            judged = _by_regression(features, texts["biased"].label, n_candidates, rounds, ask_judge)
        elif ranking == "attribution":
            label = torch.tensor(texts["biased"].label)
            support = probe_support(model, tokens["biased"], plain, probes["original"], label, rules)
            order = support.argsort(descending=True, stable=True)
            judged = ask_judge(_candidate_rows(features, order[support[order] > 0], support))
        else:
            count = max(int(frame["chosen"].sum()) for frame in candidates.values())
            judged = _live_by_chance(features, count, seed)
            judged = judged.assign(contrast=judged["label"].map(contrast), chosen=True)
        candidates[ranking] = judged
        seconds, chosen = time.process_time() - start, judged[judged["chosen"]]
        ablated = plain.with_features(chosen)
        without = pooled_activations(model, tokens["test"], ablated)
        again = train_probe(pooled_activations(model, tokens["biased"], ablated), "biased")
        add_row(ranking, probes["original"], without, len(chosen), seconds)
        add_row(f"{ranking}, retrained", again, without, len(chosen), seconds)
    settings = {
        "hook": plain.hook, "basis": basis_name(basis), "n_candidates": n_candidates,
        "rules": rules if isinstance(rules, str) else list(rules),
        "errors": errors, "ridge": ridge, "skip_positions": skip, "seed": seed, "versions": versions(),
        "model": model_name(model),
        **{f"n_{name}": len(some) for name, some in texts.items()},
    }  # fmt: skip
    return Generalization(pd.DataFrame(table), candidates, probes, settings)


def _accuracies(probe: Probe, x: Float[Tensor, "text d"], texts: LabeledTexts) -> dict[str, float]:
    """What a probe does on the texts' activations: columns of the table."""
    predicted, label, spurious = probe.predictions(x), torch.tensor(texts.label), torch.tensor(texts.spurious)
    right = (predicted == label).double()
    groups = [right[(label == a) & (spurious == b)].mean() for a in (0, 1) for b in (0, 1)]
    return {
        "label_accuracy": float(right.mean()),
        "spurious_accuracy": float((predicted == spurious).double().mean()),
        "worst_group": float(min(groups)),
    }


def _by_regression(
    features: PooledFeatures, label: Sequence[int], count: int, rounds: int, ask: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """Candidates of one regression, or of several without what was chosen before, until nothing more is."""
    judged: list[pd.DataFrame] = []
    for _ in range(rounds):
        taken = [name for part in judged for name in part.loc[part["chosen"], "label"]]
        judged.append(ask(rank_features(features, list(label), n_features=count, without=taken).features))
        if not judged[-1]["chosen"].any():
            break
    return pd.concat([*(part[part["chosen"]] for part in judged[:-1]), judged[-1]], ignore_index=True)


def _live_by_chance(features: PooledFeatures, count: int, seed: int) -> pd.DataFrame:
    """Features that differ between texts."""
    live = (features.values != features.values[:1]).any(0).nonzero().flatten()
    drawn = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[:count]]
    return _candidate_rows(features, drawn, torch.zeros(len(features.nodes)))


def _candidate_rows(features: PooledFeatures, places: Tensor, weight: Tensor) -> pd.DataFrame:
    share = (features.values[:, places] != 0).double().mean(0)
    rows = features.nodes.iloc[places.tolist()].reset_index(drop=True)
    return rows.assign(weight=weight[places].numpy(), share=share.numpy())
