"""Learned masks of edges: their gradient against differences, and the planted circuit first."""

from typing import Any

import pytest
import torch

from tests.components.test_component_edges import some_pairs
from tests.families import all_models
from tests.model_state import unchanged
from tests.planted.load import load_planted
from tl_neuron_circuits import SettingsError
from tl_neuron_circuits.components import LearnedMask, component_edges, component_graph
from tl_neuron_circuits.components._method import EdgeQuestion
from tl_neuron_circuits.tasks import logit_difference


@pytest.mark.parametrize("case", all_models("gpt2"))
@pytest.mark.parametrize("loss", ["metric", "matching"])
def test_the_gradient_at_a_mask_is_its_slope(case: Any, loss: str) -> None:
    model = case.build()
    pairs, graph = some_pairs(model), component_graph(model)
    question, method = EdgeQuestion(model, graph, pairs, logit_difference, 4, False), LearnedMask(loss=loss)
    group = next(pairs.batches(4))
    known = method._references(question, group)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(int(graph.edges.sum()), generator=generator)
    direction = torch.randn(len(mask), generator=generator)
    with unchanged(model):
        at = lambda m, rows: method._gradient(question, group, rows, known, m, graph.edges)  # noqa: E731
        _, gradient = at(mask, [0, 1, 2, 3])
        step = 3e-3
        above, below = (sum(at(mask + sign * step * direction, [row])[0] for row in range(4)) for sign in (1, -1))
    assert float(gradient @ direction) == pytest.approx((above - below) / (2 * step), rel=0.02, abs=1e-3)
    assert float(gradient.abs().max()) > 1e-3


def test_the_planted_circuit_comes_first_and_the_order_is_one_of_size() -> None:
    planted = load_planted(3)
    pairs = planted.pairs(48, seed=1)
    settings: dict[str, Any] = {"metric": planted.metric(pairs), "batch_size": 48}
    found = component_edges(planted.model, pairs, method="learned_mask(steps=100)", **settings)
    again = component_edges(planted.model, pairs, method=LearnedMask(100), **settings)
    table = found.to_dataframe()
    assert planted.truth.auroc(found) > 0.95 and torch.equal(found.scores.nan_to_num(), again.scores.nan_to_num())
    assert table["score"].min() == 0 and table["score"].is_monotonic_decreasing


def test_what_has_no_answer_is_refused() -> None:
    model = all_models("gpt2")[0].values[0].build()
    for method, message in (("learned_mask(loss=kl)", "out of"), ("learned_mask(lr=0)", "positive number")):
        with pytest.raises(SettingsError, match=message):
            component_edges(model, some_pairs(model), method=method)
