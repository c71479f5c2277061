"""Reliability: second derivatives against finite differences, and scores of the best nodes against patching."""

from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.families import ModelCase, all_models
from tests.model_state import unchanged
from tests.nodes.plain import POSTS, metric_at, random_pairs, values_of
from tests.propagation.readings import model_of, settled
from tl_neuron_circuits import SettingsError, attribute, reliability
from tl_neuron_circuits.evaluation import screen

models = pytest.mark.parametrize("case", all_models("gpt2", "llama"))


@models
def test_terms_are_those_of_a_taylor_series_along_each_groups_change(case: ModelCase) -> None:
    model = settled(case.build(torch.float64))
    pairs = random_pairs(4, 4)
    with unchanged(model):
        found = reliability(model, pairs, exact=True)
    table = found.to_dataframe().set_index(["hook", "position"])
    for name in POSTS:
        for position in range(4):
            terms = {"first_order": 0.0, "second_order": 0.0, "exact": 0.0}
            for index in range(2):
                assert pairs.corrupt is not None
                clean = values_of(model, pairs.clean[index], [name])[name]
                corrupt = values_of(model, pairs.corrupt[index], [name])[name]

                def metric(t: float) -> float:
                    moved = clean.clone()
                    moved[position] += t * (corrupt - clean)[position]
                    hook = [(name, lambda value, hook: moved.reshape(value.shape))]
                    with torch.no_grad():
                        logits = model.run_with_hooks(pairs.clean[index][None], fwd_hooks=hook)
                    return float(metric_at(logits, pairs, index))

                h = 1e-3
                terms["first_order"] -= (metric(h) - metric(-h)) / (2 * h) / 2
                terms["second_order"] -= (metric(h) - 2 * metric(0) + metric(-h)) / (2 * h * h) / 2
                terms["exact"] += (metric(0) - metric(1)) / 2
            for term, value in terms.items():
                assert table.loc[(name, position), term] == pytest.approx(value, abs=2e-4), (name, position, term)


def test_first_orders_are_summed_gradients_and_interactions_sum_to_the_second_order() -> None:
    model, pairs = model_of(all_models("llama")[0].values[0]), random_pairs(4, 4, 4)
    bases: Any = [tnc.bases.Neurons(), tnc.bases.ResidualStream()]
    for baseline in ("corrupt", "mean", "zero"):
        found = reliability(model, pairs, basis=bases, baseline=baseline, batch_size=2)
        gradient = attribute(model, pairs, method="gradient", basis=bases, baseline=baseline)
        for hook, rows in found.to_dataframe().groupby("hook"):
            first, second = torch.tensor(rows["first_order"].to_numpy()), torch.tensor(rows["second_order"].to_numpy())
            assert torch.allclose(first.float(), gradient.values[hook].sum(-1), atol=1e-5)
            assert torch.allclose(second.float(), found.interactions.values[hook].sum(-1), atol=1e-5)


def test_the_correction_and_the_trapezoid_are_judged_by_exact_groups() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
    found = reliability(model, pairs, exact=True)
    table = found.by_ratio(bins=3)
    assert table["groups"].sum() == found.to_dataframe()["ratio"].notna().sum()
    assert table["ratio"].is_monotonic_increasing and (table["first_order"] >= 0).all()
    with pytest.raises(SettingsError, match="exact=True"):
        reliability(model, pairs).by_ratio()


def test_screening_says_which_of_the_best_are_misjudged() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
    scores = attribute(model, pairs)
    table = screen(model, pairs, scores, 6)
    exact = attribute(model, pairs, method=tnc.Patching(scores.top(6))).to_dataframe().dropna(subset="score")
    assert table["label"].tolist() == scores.top(6)["label"].tolist()
    assert dict(zip(table["label"], table["exact"], strict=True)) == dict(
        zip(exact["label"], exact["score"], strict=True)
    )
    off = (table["score"] - table["exact"]).abs() / table["exact"].abs()
    assert not table["misjudged"][off < 0.4].any() and table["misjudged"][off > 1.1].all()
    with pytest.raises(SettingsError, match="an order"):
        screen(model, pairs, attribute(model, pairs, method="mask_gradient"))
