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
from tl_neuron_circuits.components._streams import run_with_edges
from tl_neuron_circuits.nodes._masked_runs import draw_budget
from tl_neuron_circuits.tasks import logit_difference
from tl_neuron_circuits.tasks._metrics import measure


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


def plain_scores(model: Any, pairs: Any, method: LearnedMask, budgets: list[float]) -> list[torch.Tensor]:
    """The scores after each step, every edge's threshold found by halving and every gradient by torch through a smooth
    solution: tau is put right by one differentiable step of Newton's method at the halved one.
    """
    graph = component_graph(model)
    question = EdgeQuestion(model, graph, pairs, logit_difference, len(pairs), False)
    group = next(pairs.batches(len(pairs)))
    known, n = method._references(question, group), int(graph.edges.sum())
    scores, found = torch.zeros(n, dtype=torch.float64, requires_grad=True), []
    adam = torch.optim.Adam([scores], lr=method.lr, eps=method.eps)
    for budget in budgets:
        low, high = -100.0, 100.0
        for _ in range(80):
            tau = (low + high) / 2
            over = float(((scores.detach() - tau) / method.temperature).sigmoid().sum()) > budget
            low, high = (tau, high) if over else (low, tau)
        at = ((scores - tau) / method.temperature).sigmoid()
        slope = (at.detach() * (1 - at.detach())).sum() / method.temperature
        mask = ((scores - (tau + (at.sum() - budget) / slope)) / method.temperature).sigmoid()
        soft = torch.zeros(graph.edges.shape).masked_scatter(graph.edges, mask.float())
        logits = run_with_edges(model, graph, group, soft[None], known.clean, known.corrupt)[0]
        d = measure(logit_difference, logits, group)
        if method.loss == "metric":
            loss = -d.mean()
        else:
            span = torch.maximum((known.full - known.empty).abs(), 0.1 * known.full.abs())
            loss = ((d - known.full).abs() / span).mean()
        adam.zero_grad()
        loss.backward()
        assert scores.grad is not None
        found.append(scores.grad.clone())
        if method.learn:
            adam.step()
            found[-1] = scores.detach().clone()
    return found


@pytest.mark.parametrize("loss", ["metric", "matching"])
def test_learning_is_the_slow_plain_one_step_for_step(loss: str) -> None:
    model = all_models("gpt2")[0].values[0].build()
    model.requires_grad_(False)
    pairs, method = some_pairs(model), LearnedMask(steps=4, loss=loss, pairs_per_step=99)
    n = int(component_graph(model).edges.sum())
    budgets = [budget for _, (_, budget) in zip(range(4), method._draws(len(pairs), n), strict=False)]
    plain = plain_scores(model, pairs, method, budgets)[-1]
    found = component_edges(model, pairs, method=method, batch_size=99)
    own = found.scores[component_graph(model).edges]
    assert torch.allclose(own, (plain - plain.min()).float(), rtol=1e-6, atol=1e-6) and float(own.max()) > 0.05


def test_without_learning_scores_are_the_mean_negative_gradient_at_zero() -> None:
    model = all_models("gpt2")[0].values[0].build()
    model.requires_grad_(False)
    pairs, method = some_pairs(model), LearnedMask(steps=3, loss="metric", learn=False)
    n = int(component_graph(model).edges.sum())
    budgets = [draw_budget((step + 0.5) / 3, n, "uniform") for step in range(3)]
    plain = -torch.stack(plain_scores(model, pairs, method, budgets)).mean(0)
    found = component_edges(model, pairs, method=method, batch_size=99)
    own = found.scores[component_graph(model).edges]
    assert (
        torch.allclose(own, (plain - plain.min()).float(), rtol=1e-6, atol=1e-6 * float(own.max()))
        and float(own.max()) > 1e-4
    )


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
