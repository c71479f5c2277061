"""Agreement with exact patching, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from tests.bases.site_dictionaries import pairs
from tests.families import ModelCase, all_models
from tl_neuron_circuits import NodeScores, attribute, compare_with_patching
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.bases import MLPOutputs
from tl_neuron_circuits.nodes._scores import SiteLabels

HOOK = "blocks.0.mlp.hook_post"


def scores(values: list[float]) -> NodeScores:
    made = torch.tensor(values)[None]
    return NodeScores({HOOK: made}, {}, {}, {HOOK: SiteLabels(0, "N")}, {"positions": "keep"})


def test_the_three_numbers_are_their_definitions() -> None:
    ours, exact = [1.0, -2.0, 3.0, 0.5, 9.0], [2.0, -1.0, 4.0, 1.0, 0.0]
    found = compare_with_patching(scores(ours), scores(exact), top_k=2)
    assert found.pearson == pytest.approx(np.corrcoef(ours, exact)[0, 1], abs=1e-9)
    ranks = [[2, 0, 3, 1, 4], [3, 0, 4, 2, 1]]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    assert found.top_overlap == 0.5 and found.n_nodes == 5  # |ours|: 9, 3; |exact|: 4, 2


def test_what_was_not_measured_is_left_out() -> None:
    found = compare_with_patching(scores([1.0, 2.0, 3.0, -50.0]), scores([1.0, 2.0, 3.0, float("nan")]), top_k=100)
    assert (found.n_nodes, found.top_k) == (3, 3) and found.pearson == pytest.approx(1)
    with pytest.raises(SettingsError, match="at least three"):
        compare_with_patching(scores([1.0, 2.0, 3.0]), scores([1.0, 2.0, float("nan")]))
    with pytest.raises(SettingsError, match="the same nodes"):
        compare_with_patching(scores([1.0, 2.0, 3.0]), scores([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("case", all_models("no_norm"))
def test_exact_scores_agree_with_themselves_and_gradients_of_the_last_layer_with_them(case: ModelCase) -> None:
    """Nothing but the linear unembedding follows the last layer of a model without norms: gradients are exact there."""
    model = case.build()
    tokens = pairs(model, n=2)
    basis = MLPOutputs(layers=[1])
    exact = attribute(model, tokens, method="patching", basis=basis)
    assert compare_with_patching(exact, exact).pearson == pytest.approx(1)
    found = compare_with_patching(attribute(model, tokens, method="gradient", basis=basis), exact, top_k=10)
    assert found.pearson == pytest.approx(1, abs=1e-6) and found.top_overlap == 1
    noise = compare_with_patching(attribute(model, tokens, method="random", basis=basis), exact)
    assert abs(noise.pearson) < 0.5
