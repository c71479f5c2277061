"""Reliability: second derivatives against finite differences, and scores of the best nodes against patching."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.families import ModelCase, all_models, typical_models
from tests.model_state import unchanged
from tests.nodes.plain import POSTS, metric_with, random_pairs, values_of
from tests.propagation.readings import model_of, settled
from tl_neuron_circuits import SettingsError, attribute, reliability
from tl_neuron_circuits.evaluation import screen
from tl_neuron_circuits.tasks import TokenizedPairs

models = pytest.mark.parametrize("case", typical_models("gpt2", "llama"))


@models
def test_terms_are_those_of_a_taylor_series_along_each_groups_change(case: ModelCase) -> None:
    model = settled(case.build(torch.float64))
    pairs, rough = random_pairs(4, 4), case.tolerance > 1e-6  # some compute in float32 whatever is asked
    with unchanged(model):
        found = reliability(model, pairs, exact=True)
    table = found.to_dataframe().set_index(["hook", "position"])
    h, off = (0.03, 5e-3) if rough else (1e-3, 2e-4)
    for name, position in itertools.product(POSTS, range(4)):
        ends = [moved_metrics(model, pairs, index, name, position, (-h, 0, h, 1)) for index in range(2)]
        below, start, above, whole = (sum(values) / 2 for values in zip(*ends, strict=True))
        row = table.loc[(name, position)]
        assert row["first_order"] == pytest.approx((below - above) / (2 * h), abs=off), (name, position)
        assert row["second_order"] == pytest.approx(-(above - 2 * start + below) / (2 * h * h), abs=off)
        assert row["exact"] == pytest.approx(start - whole, abs=off)


def moved_metrics(
    model: Any, pairs: TokenizedPairs, index: int, name: str, position: int, shares: Sequence[float]
) -> list[float]:
    """The metric with the group moved by each share of its way to the corrupt run."""
    assert pairs.corrupt is not None
    clean, corrupt = (values_of(model, side[index], [name])[name] for side in (pairs.clean, pairs.corrupt))
    found = []
    for share in shares:
        moved = clean.clone()
        moved[position] += share * (corrupt - clean)[position]
        found.append(metric_with(model, pairs, index, pairs.clean[index], {name: moved}))
    return found


def test_first_orders_are_summed_gradients_and_interactions_sum_to_the_second_order() -> None:
    model, pairs = model_of(all_models("llama")[0].values[0]), random_pairs(4, 4, 4)
    bases: Any = [tnc.bases.Neurons(), tnc.bases.ResidualStream()]
    for baseline in ("corrupt", "mean", "zero"):
        found = reliability(model, pairs, basis=bases, baseline=baseline, batch_size=2)
        gradient = attribute(model, pairs, method="gradient", basis=bases, baseline=baseline)
        for hook, rows in found.to_dataframe().groupby("hook"):
            first, second = torch.tensor(rows["first_order"].to_numpy()), torch.tensor(rows["second_order"].to_numpy())
            assert torch.allclose(first.float(), gradient.values[str(hook)].sum(-1), atol=1e-5)
            assert torch.allclose(second.float(), found.interactions.values[str(hook)].sum(-1), atol=1e-5)


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


def test_the_nodes_of_a_circuit_can_be_screened() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
    of_circuit = screen(model, pairs, tnc.trace(model, pairs, nodes=12).to_scores(), 12).set_index("label")
    exact = screen(model, pairs, attribute(model, pairs), 200).set_index("label")["exact"]
    assert of_circuit["exact"].to_dict() == pytest.approx(exact.reindex(of_circuit.index).to_dict())
