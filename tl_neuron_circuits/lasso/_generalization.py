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

The judge is a human's part in the paper. Here it is a callable, by default one that looks at `concept`: other texts
that show the attribute but say nothing about the label. Nothing but the oracle sees training texts where they disagree.
Source: Marks et al. 2025, arXiv 2403.19647 (SHIFT); Yin et al. 2026; Belrose et al. 2023 (LEACE); METHODS 3.2, 5.1.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .. import _html
from .._files import versions
from .._typing import checked
from ..bases._site import Basis, name_of, sites_of
from ..models._protocol import TransformerLensModel
from ..tasks._tokenized import TokenizedPairs
from ._ablated import Ablation, pooled_activations, probe_support
from ._feature_ranking import pooled_features
from ._inputs import same_start, to_tokens
from ._judging import Judge, Jury, by_label_node, by_support, contrast_judge, contrasts, drawn
from ._labeled_texts import LabeledTexts
from ._probe import Probe, eraser, fit_probe

RANKINGS = ("lasso", "lasso_rounds", "attribution", "random")
_ROUNDS = 10


@dataclass(frozen=True, eq=False, repr=False)
class Generalization:
    """What every method makes of the probe on balanced texts.

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
        """One row a method."""
        return self.table

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"Generalization({len(self.table)} methods, {s['n_biased']} biased, {s['n_test']} test texts, {s['hook']})"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.table, bars=("label_accuracy", "spurious_accuracy")))


@checked
def generalize(
    model: TransformerLensModel,
    train: LabeledTexts,
    test: LabeledTexts,
    concept: LabeledTexts,
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
) -> Generalization:
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
    sites = sites_of(model, basis)
    texts = {
        "biased": train.biased(seed=seed),
        "oracle": train.balanced(seed=seed),
        "test": test.balanced(seed=seed),
        "concept": concept,
    }
    tokens = {name: to_tokens(model, list(some.texts), prepend_bos) for name, some in texts.items()}
    skip = same_start(tokens["biased"])
    plain = Ablation(sites, {}, sites[-1].hook if hook is None else hook, skip, batch_size, errors)
    run = _Run(model, texts, tokens, plain, ridge)
    table, probes = _baselines(run)
    given: Any = {"skip_positions": skip, "batch_size": batch_size}
    features, shown = (pooled_features(model, tokens[name], basis, **given) for name in ("biased", "concept"))
    see = Jury(judge or contrast_judge(), contrasts(shown, concept.spurious), n_candidates)
    candidates: dict[str, pd.DataFrame] = {}
    for ranking in RANKINGS:
        start = time.process_time()
        if ranking.startswith("lasso"):
            found = by_label_node(features, texts["biased"], see, 1 if ranking == "lasso" else _ROUNDS)
        elif ranking == "attribution":
            label = torch.tensor(texts["biased"].label)
            support = probe_support(model, tokens["biased"], plain, probes["original"], label, rules)
            found = by_support(features, support, see)
        else:
            count = max(int(frame["chosen"].sum()) for frame in candidates.values())
            found = drawn(features, count, seed, see)
        candidates[ranking] = found
        table += _ablated(run, ranking, found, probes["original"], time.process_time() - start)
    settings = {
        "hook": plain.hook, "basis": name_of(basis), "n_candidates": n_candidates, "rules": list(rules),
        "errors": errors, "ridge": ridge, "skip_positions": skip, "seed": seed, "versions": versions(),
        "model": str(getattr(model.cfg, "model_name", "unknown")),
        **{f"n_{name}": len(some) for name, some in texts.items()},
    }  # fmt: skip
    return Generalization(pd.DataFrame(table), candidates, probes, settings)


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same for every method."""

    model: TransformerLensModel
    texts: Mapping[str, LabeledTexts]
    tokens: Mapping[str, TokenizedPairs]
    plain: Ablation
    ridge: float

    def pooled(self, name: str, ablation: Ablation | None = None) -> Tensor:
        return pooled_activations(self.model, self.tokens[name], ablation or self.plain)

    def probe(self, x: Tensor, name: str) -> Probe:
        return fit_probe(x, torch.tensor(self.texts[name].label), self.ridge)

    def row(self, method: str, probe: Probe, x: Tensor, n_ablated: int = 0, seconds: float = 0.0) -> dict[str, Any]:
        """What a probe does on the test texts' activations."""
        test = self.texts["test"]
        predicted, label, spurious = probe.predictions(x), torch.tensor(test.label), torch.tensor(test.spurious)
        right = (predicted == label).double()
        groups = [right[(label == a) & (spurious == b)].mean() for a in (0, 1) for b in (0, 1)]
        return {
            "method": method,
            "label_accuracy": float(right.mean()),
            "spurious_accuracy": float((predicted == spurious).double().mean()),
            "worst_group": float(min(groups)),
            "n_ablated": n_ablated,
            "seconds": seconds,
        }


def _baselines(run: _Run) -> tuple[list[dict[str, Any]], dict[str, Probe]]:
    x = {name: run.pooled(name) for name in run.texts}
    probes = {"original": run.probe(x["biased"], "biased"), "oracle": run.probe(x["oracle"], "oracle")}
    rows = [run.row(name, probe, x["test"]) for name, probe in probes.items()]
    start = time.process_time()
    erase = eraser(x["concept"], torch.tensor(run.texts["concept"].spurious))
    blind = run.probe(erase(x["biased"]), "biased")
    seconds = time.process_time() - start
    return [*rows, run.row("concept_blind", blind, erase(x["test"]), 0, seconds)], probes


def _ablated(run: _Run, ranking: str, found: pd.DataFrame, probe: Probe, seconds: float) -> list[dict[str, Any]]:
    """The original probe without the chosen features, and one that is trained without them."""
    without = run.plain.of(found[found["chosen"]])
    test = run.pooled("test", without)
    again = run.probe(run.pooled("biased", without), "biased")
    both = ((ranking, probe), (f"{ranking}, retrained", again))
    return [run.row(name, one, test, int(found["chosen"].sum()), seconds) for name, one in both]
