"""Label nodes: the ranking is the regression's, and prompt scores are |A| x |z|."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.lasso import CircuitLasso, Share, pooled_features, rank_features
from tl_neuron_circuits.lasso._feature_ranking import PooledFeatures, solve_labels
from tl_neuron_circuits.lasso._solver import largest_penalty, solve_lasso
from tl_neuron_circuits.lasso._statistics import Statistics, standardize

TEXTS = ["The dogs near the girl are old.", "The dog is here.", "She lives in Dallas Texas.", "The cats have time."]


def features(n: int = 120, p: int = 9) -> PooledFeatures:
    """Sparse activations of which the fifth is silent."""
    values = torch.randn(n, p, generator=torch.Generator().manual_seed(0)).relu()
    values[:, 4] = 0
    nodes = pd.DataFrame(
        {"label": [f"L1/F{k}" for k in range(p)], "hook": "blocks.1.hook_mlp_out", "layer": 1, "unit": range(p)}
    )
    return PooledFeatures(values, nodes, tuple(map(str, range(n))), "mean")


@pytest.fixture(scope="module")
def model():
    return tnc.load_demo_model()


@pytest.fixture(scope="module")
def saes():
    return tnc.load_demo_dictionaries("sae")


def test_a_class_is_ranked_by_the_logistic_regression() -> None:
    pooled = features()
    label = (pooled.values[:, 3] - pooled.values[:, 7] > 0.1).long()
    ranking = rank_features(pooled, label.tolist(), penalty=2.0)
    live = [k for k in range(9) if k != 4]
    slow = solve_labels(pooled.values[:, live], label[:, None].double(), 2.0, tolerance=1e-4)
    expected = dict(zip((f"L1/F{live[k]}" for k in range(8)), slow.weights[:, 0].tolist(), strict=True))
    found = dict(zip(ranking.features["label"], ranking.features["weight"], strict=True))
    assert list(found)[:2] == ["L1/F3", "L1/F7"] and ranking.n_silent == 1
    assert found == pytest.approx({name: weight for name, weight in expected.items() if weight})
    assert ranking.features["weight"].abs().is_monotonic_decreasing


def test_a_number_is_ranked_by_the_lasso() -> None:
    pooled = features()
    number = 3 * pooled.values[:, 2] - pooled.values[:, 6]
    ranking = rank_features(pooled, number.tolist(), n_features=2, loss="squared")
    problem = standardize(Statistics.from_rows(pooled.values, number[:, None]))
    slow = solve_lasso(problem, ranking.penalty).weights[:, 0]
    best = slow.abs().argsort(descending=True)[:2].tolist()
    assert ranking.top(2)["unit"].tolist() == best == [2, 6]
    assert ranking.top(2)["weight"].tolist() == pytest.approx(slow[best].tolist(), abs=1e-6)
    assert ranking.penalty < largest_penalty(problem)


def test_scores_of_a_prompt_are_weight_times_activation() -> None:
    pooled = features()
    ranking = rank_features(pooled, (pooled.values[:, 0] > 0.5).long().tolist(), n_features=3)
    scores = ranking.prompt_scores(pooled)
    first = ranking.features.iloc[0]
    expected = abs(first["raw_weight"]) * pooled.values[:, first["unit"]].abs()
    assert torch.allclose(scores.values[:, 0], expected)
    assert first["raw_weight"] == pytest.approx(
        first["weight"] / pooled.values[:, first["unit"]].std(correction=0).item()
    )
    with pytest.raises(SettingsError, match="nodes that were ranked"):
        ranking.prompt_scores(PooledFeatures(pooled.values[:, :1], pooled.nodes.iloc[8:], pooled.keys, "mean"))


def test_what_is_left_out_makes_room_for_what_says_the_same() -> None:
    pooled = features()
    pooled.values[:, 8] = pooled.values[:, 0] * 1.01 + 0.05 * pooled.values[:, 1]
    label = (pooled.values[:, 0] > 0.5).long().tolist()
    first = rank_features(pooled, label, n_features=1).top(1)["label"].tolist()
    second = rank_features(pooled, label, n_features=1, without=first).top(1)["label"].tolist()
    assert {first[0], second[0]} == {"L1/F0", "L1/F8"}


def test_pooled_features_are_means_of_the_encoded_cache(model, saes) -> None:
    pooled = pooled_features(model, TEXTS, tnc.bases.Dictionaries(saes[:2]), batch_size=3)
    _, cache = model.run_with_cache(model.to_tokens(TEXTS[1]))
    slow = torch.cat([sae.encode(cache[sae.hook_in])[0, 1:].mean(0) for sae in saes[:2]])
    assert torch.allclose(pooled.values[1], slow.detach(), atol=1e-5)
    assert pooled.nodes["label"].tolist()[-1] == "L1/F767" and len(pooled.nodes) == 2 * 768
    largest = pooled_features(model, TEXTS[1:2], tnc.bases.Dictionaries(saes[:1]), pool="max", skip_positions=0)
    assert torch.allclose(largest.values[0], saes[0].encode(cache[saes[0].hook_in])[0].amax(0).detach(), atol=1e-5)


def test_features_that_never_fire_are_refused_with_a_reason(model, saes) -> None:
    pooled = features()
    with pytest.raises(SettingsError, match="never fire"):
        rank_features(PooledFeatures(0 * pooled.values, pooled.nodes, pooled.keys, "mean"), [0, 1] * 60)
    with pytest.raises(SettingsError, match="one label per prompt"):
        rank_features(pooled, [0, 1])
    with pytest.raises(SettingsError, match="nothing to tell apart"):
        rank_features(pooled, [1] * 120)
    dead = [replace(sae, b_enc=torch.full((768,), -1e6)) for sae in saes[:2]]
    lasso = CircuitLasso(nodes=tnc.bases.Dictionaries(dead), readout="none", penalty=Share(0.5), blocks=1)
    with pytest.raises(SettingsError, match="nothing varies"):
        lasso.fit(model, TEXTS)


def test_a_dictionary_of_which_some_never_fire_is_fitted_on_the_rest(model, saes) -> None:
    basis = tnc.bases.Dictionaries(saes[:2])
    lasso = CircuitLasso(nodes=basis, readout="none", penalty=Share(0.3), shares=(0.6,), blocks=1, joint="adjacent")
    circuit = lasso.fit(model, tnc.tasks.subject_verb_agreement("simple", n=24))
    silent = set(circuit.nodes.loc[circuit.nodes["r2"].isna() & (circuit.nodes["layer"] == 1), "node"])
    assert 0 < len(silent) < 768 and len(circuit.edges) > 0
    assert not silent & set(circuit.edges["target"])
    assert np.isfinite(circuit.edges["weight"]).all()
