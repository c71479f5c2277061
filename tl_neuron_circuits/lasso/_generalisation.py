"""Unlearning a spurious attribute by ablating dictionary features: the protocol of Bias in Bios, on any texts.

A probe is trained on texts in which the label and a spurious attribute always agree, and judged on texts in which they
are independent. Features are ranked, a judge says which of the best ones are about the attribute, those are set to
zero at every position, and the probe is used again as it is, or trained anew on the same biased texts.

    original        the probe, nothing done                        oracle    the probe of balanced texts: the ceiling
    lasso           features by |weight| in the regression of the label node on pooled features
    lasso_rounds    the same, regressed again without what the judge chose until it chooses nothing more (ours, not the
                    paper's: of features that say the same, one regression takes one)
    attribution     features by their support for the probe's log odds: activation * W_dec . gradient (SHIFT's ranking)
    random          as many live features as were ablated at most, drawn by chance
    concept_blind   no features: the attribute's direction, from the concept texts, is projected out (LEACE)

The judge is a human's part in the paper. Here it is a callable, by default one that looks at `concept`: other texts that
show the attribute but say nothing about the label. Nothing but the oracle sees a training text in which they disagree.
Source: Marks et al. 2025, arXiv 2403.19647 (SHIFT); Yin et al. 2026; Belrose et al. 2023 (LEACE); METHODS 3.2, 5.1.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .._errors import SettingsError
from .._files import versions
from .._typing import checked
from ..bases import Basis, name_of, sites_of
from ..explain import auroc
from ..models import TransformerLensModel
from ._ablated import Ablation, probe_support, pooled_activations
from ._feature_ranking import PooledFeatures, pooled_features, rank_features
from ._inputs import same_start, to_tokens
from ._labelled_texts import LabelledTexts
from ._probe import Probe, fit_probe

Judge = Callable[[pd.DataFrame], Sequence[str]]
"""From the candidates (label, hook, layer, unit, weight, share, contrast) to the labels of those about the attribute."""
RANKINGS = ("lasso", "lasso_rounds", "attribution", "random")
_ROUNDS = 10


@dataclass(frozen=True, eq=False, repr=False)
class Generalisation:
    """What every method makes of the probe on balanced texts.

    `table`: method; label_accuracy (higher is better); spurious_accuracy (share of predictions that equal the
    attribute, .5 is blind to it); worst_group (least accuracy of the four groups); n_ablated; seconds (of ranking, or
    of the projection; CPU time of the process). `candidates`: by ranking, the features that the judge saw, with its
    verdict in `chosen`. `probes`: the original probe and the oracle's.
    """

    table: pd.DataFrame
    candidates: Mapping[str, pd.DataFrame]
    probes: Mapping[str, Probe]
    settings: Mapping[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a method."""
        return self.table

    def __repr__(self) -> str:
        s = self.settings
        return f"Generalisation({len(self.table)} methods, {s['n_biased']} biased and {s['n_test']} test texts, {s['hook']})"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.table.to_html(index=False, float_format='%.3f')}"


def contrast_judge(threshold: float = 0.75) -> Judge:
    """A judge that takes a feature to be about the attribute if it tells it on the concept texts.

    Args:
        threshold: AUROC of the pooled feature, in either direction.

    Raises:
        SettingsError: a threshold outside .5 to 1.

    Example:
        >>> contrast_judge(0.8)(pd.DataFrame({"label": ["L0/F1", "L0/F2"], "contrast": [0.1, 0.6]}))
        ['L0/F1']
    """
    if not 0.5 <= threshold <= 1:
        raise SettingsError(f"expected an AUROC between 0.5 and 1; got {threshold}.")

    def judge(candidates: pd.DataFrame) -> Sequence[str]:
        return candidates.loc[(candidates["contrast"] - 0.5).abs() >= threshold - 0.5, "label"].tolist()

    return judge


@checked
def generalise(
    model: TransformerLensModel,
    train: LabelledTexts,
    test: LabelledTexts,
    concept: LabelledTexts,
    basis: Basis | Sequence[Basis],
    *,
    judge: Judge | None = None,
    hook: str | None = None,
    n_candidates: int = 50,
    rules: Sequence[str] = (),
    errors: bool = True,
    ridge: float = 1e-2,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Generalisation:
    """Train a probe on biased texts, ablate what its judge finds spurious, and see what it does on balanced ones.

    Args:
        model: a HookedTransformer or TransformerBridge.
        train: all groups; the biased part trains the probe, the balanced part only the oracle.
        test: all groups; its balanced part is what probes are judged on.
        concept: texts of other content with the spurious attribute; their labels must not go with it.
        basis: dictionaries whose features are ranked and ablated.
        judge: which candidates are about the attribute; `contrast_judge()` unless given.
        hook: where the probe reads, mean over positions; where the last dictionary writes unless given.
        n_candidates: how many of the best features the judge sees, of each ranking.
        rules: RelP's rules for the attribution; none is the plain gradient.
        errors: keep what the dictionaries miss in what the probe reads. A probe that is trained anew may find the
            attribute there; without errors every method reads reconstructions alone.
        ridge: of the probe.
        batch_size: texts in one pass.
        prepend_bos: None means the model's default.
        seed: of the draws of texts and of random features.

    Raises:
        SettingsError: groups are empty, or no feature differs between the texts.
        UnsupportedModelError: a hook point is missing.
        NumericalError: activations that are not finite.
    """
    sites = sites_of(model, basis)
    hook = sites[-1].hook if hook is None else hook
    sets = {
        "biased": train.biased(seed=seed),
        "oracle": train.balanced(seed=seed),
        "test": test.balanced(seed=seed),
        "concept": concept,
    }
    tokens = {name: to_tokens(model, list(texts.texts), prepend_bos) for name, texts in sets.items()}
    skip = same_start(tokens["biased"])
    plain = Ablation(sites, {}, hook, skip, batch_size, errors)
    x = {name: pooled_activations(model, tokens[name], plain) for name in sets}
    labels = {name: torch.tensor(texts.label) for name, texts in sets.items()}
    probe = fit_probe(x["biased"], labels["biased"], ridge)
    oracle = fit_probe(x["oracle"], labels["oracle"], ridge)
    rows = [
        {"method": "original", **_judged(probe, x["test"], sets["test"])},
        {"method": "oracle", **_judged(oracle, x["test"], sets["test"])},
    ]
    start = time.process_time()
    erase = eraser(x["concept"], torch.tensor(concept.spurious))
    blind = fit_probe(erase(x["biased"]), labels["biased"], ridge)
    took = {"seconds": time.process_time() - start}
    rows.append({"method": "concept_blind", **_judged(blind, erase(x["test"]), sets["test"]), **took})

    given = {"skip_positions": skip, "batch_size": batch_size}
    features = {name: pooled_features(model, tokens[name], basis, **given) for name in ("biased", "concept")}
    chooses = judge or contrast_judge()
    contrast = _contrasts(features["concept"], concept.spurious)
    candidates: dict[str, pd.DataFrame] = {}
    for ranking in RANKINGS:
        start = time.process_time()
        if ranking.startswith("lasso"):
            rounds = 1 if ranking == "lasso" else _ROUNDS
            found = _by_label_node(features["biased"], sets["biased"], n_candidates, contrast, chooses, rounds)
        elif ranking == "attribution":
            support = probe_support(model, tokens["biased"], plain, probe, labels["biased"], rules)
            found = _verdict(_by_support(features["biased"], support).head(n_candidates), contrast, chooses)
        else:
            count = max(int(table["chosen"].sum()) for table in candidates.values())
            drawn = _drawn(features["biased"], count, seed)
            found = _verdict(drawn, contrast, lambda frame: frame["label"].tolist())
        seconds = time.process_time() - start
        candidates[ranking] = found
        without = plain.of(found[found["chosen"]])
        ablated = {name: pooled_activations(model, tokens[name], without) for name in ("biased", "test")}
        again = fit_probe(ablated["biased"], labels["biased"], ridge)
        for suffix, used in (("", probe), (", retrained", again)):
            row = {"method": ranking + suffix, **_judged(used, ablated["test"], sets["test"])}
            rows.append({**row, "n_ablated": int(found["chosen"].sum()), "seconds": seconds})
    settings = {
        "hook": hook, "basis": name_of(basis), "n_candidates": n_candidates, "rules": list(rules), "errors": errors, "ridge": ridge,
        "n_biased": len(sets["biased"]), "n_oracle": len(sets["oracle"]), "n_test": len(sets["test"]),
        "n_concept": len(concept), "skip_positions": skip, "seed": seed, "versions": versions(),
        "model": str(getattr(model.cfg, "model_name", "unknown")),
    }  # fmt: skip
    return Generalisation(pd.DataFrame(rows), candidates, {"original": probe, "oracle": oracle}, settings)


def eraser(x: Tensor, attribute: Tensor) -> Callable[[Tensor], Tensor]:
    """A projection after which no linear probe tells the attribute on `x` better than its intercept: LEACE's, rank one.

    x - d (v . (x - mean)) / (v . d),   d the difference of class means, v = covariance^-1 d
    """
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    difference = x[attribute == 1].mean(0) - x[attribute == 0].mean(0)
    if not bool(torch.isfinite(difference).all()):
        raise SettingsError("the concept texts all have one value of the attribute: nothing to contrast.")
    v = torch.linalg.solve(covariance, difference)
    scale = (v @ difference).clamp(min=torch.finfo(torch.float64).tiny)
    return lambda values: values.double() - ((values.double() - mean) @ v / scale)[:, None] * difference


def _judged(probe: Probe, x: Tensor, texts: LabelledTexts) -> dict[str, float]:
    predicted, label, spurious = probe.predictions(x), torch.tensor(texts.label), torch.tensor(texts.spurious)
    right = (predicted == label).double()
    groups = [right[(label == a) & (spurious == b)].mean() for a in (0, 1) for b in (0, 1)]
    return {
        "label_accuracy": float(right.mean()),
        "spurious_accuracy": float((predicted == spurious).double().mean()),
        "worst_group": float(min(groups)),
        "n_ablated": 0,
        "seconds": 0.0,
    }


def _contrasts(features: PooledFeatures, attribute: Sequence[int]) -> dict[str, float]:
    """AUROC of every feature for the attribute; .5 where it never differs."""
    area = auroc(features.values, (torch.tensor(attribute) == 1)[:, None])[0]
    return dict(zip(features.nodes["label"], area.tolist(), strict=True))


def _by_label_node(
    features: PooledFeatures,
    texts: LabelledTexts,
    n_candidates: int,
    contrast: Mapping[str, float],
    judge: Judge,
    rounds: int,
) -> pd.DataFrame:
    tables: list[pd.DataFrame] = []
    for _ in range(rounds):
        taken = [label for table in tables for label in table.loc[table["chosen"], "label"]]
        ranked = rank_features(features, list(texts.label), n_features=n_candidates, without=taken)
        tables.append(_verdict(ranked.top(n_candidates), contrast, judge))
        if not tables[-1]["chosen"].any():
            break
    rows = [table[table["chosen"]] for table in tables[:-1]]
    return pd.concat([*rows, tables[-1]], ignore_index=True)


def _verdict(candidates: pd.DataFrame, contrast: Mapping[str, float], judge: Judge) -> pd.DataFrame:
    candidates = candidates.assign(contrast=candidates["label"].map(contrast)).reset_index(drop=True)
    return candidates.assign(chosen=candidates["label"].isin(list(judge(candidates))))


def _by_support(features: PooledFeatures, support: Tensor) -> pd.DataFrame:
    order = support.argsort(descending=True, stable=True)
    order = order[support[order] > 0]
    share = (features.values[:, order] != 0).double().mean(0)
    rows = features.nodes.iloc[order.tolist()].reset_index(drop=True)
    return rows.assign(weight=support[order].numpy(), share=share.numpy())


def _drawn(features: PooledFeatures, count: int, seed: int) -> pd.DataFrame:
    live = (features.values != features.values[:1]).any(0).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = live[torch.randperm(len(live), generator=generator)[:count]]
    share = (features.values[:, chosen] != 0).double().mean(0)
    return features.nodes.iloc[chosen.tolist()].reset_index(drop=True).assign(weight=0.0, share=share.numpy())
