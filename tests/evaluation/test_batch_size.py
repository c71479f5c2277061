"""Batches that memory does not hold: halved, reported, and the same curve."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models
from tests.nodes.plain import random_pairs
from tests.propagation.readings import model_of
from tl_neuron_circuits import SparsityCurve, attribute, compare, evaluate, trace
from tl_neuron_circuits._memory import FILL
from tl_neuron_circuits._meter import Meter
from tl_neuron_circuits.bases import Neurons
from tl_neuron_circuits.evaluation import evaluate_edges
from tl_neuron_circuits.evaluation._evaluate import sparsity_curve
from tl_neuron_circuits.tasks import logit_difference
from tl_neuron_circuits.tasks._tokenized import Batch

models = pytest.mark.parametrize("case", all_models("gpt2"))
one_model = pytest.mark.parametrize("case", all_models("gpt2")[:1])


def short_of_memory(logits: Tensor, batch: Batch) -> Tensor:
    """A metric for which more than two prompts are too many."""
    if len(batch) > 2:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB")
    return logit_difference(logits, batch)


def assert_same(found: SparsityCurve, expected: SparsityCurve) -> None:
    assert found.sizes == expected.sizes
    for name in ("kept", "removed", "full", "empty"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ablation", ["mean", "resample"])
@models
def test_a_curve_of_halved_batches_is_that_of_small_ones(
    case: ModelCase, ablation: Any, untouched: Any, caplog: Any
) -> None:
    """Eight prompts of one length and three of another; two at a time is what fits."""
    model, pairs = model_of(case), random_pairs(4, 4, 5, 4, 4, 5, 4, 4, 5, 4, 4)
    scores = attribute(model, pairs, positions="sum")
    expected = evaluate(model, pairs, scores, sizes=[0, 3, 48], ablation=ablation, batch_size=2)
    with untouched(model):
        found = evaluate(
            model, pairs, scores, sizes=[0, 3, 48], ablation=ablation, metric=short_of_memory, batch_size="auto"
        )
    assert_same(found, expected)
    assert found.settings["batch_size"] == 2 and caplog.text.count("not enough memory") == 2


@models
def test_baselines_that_memory_does_not_hold_are_computed_in_smaller_batches(case: ModelCase, caplog: Any) -> None:
    model, pairs = model_of(case), random_pairs(4, 4, 4, 4, 4)
    scores = attribute(model, pairs)
    expected = evaluate(model, pairs, scores, sizes=[3], batch_size=2)

    def fail(value: Tensor, hook: Any) -> None:
        if len(value) > 2:
            raise MemoryError

    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", fail)]):
        assert_same(evaluate(model, pairs, scores, sizes=[3], batch_size="auto"), expected)
    assert "not enough memory for 5 prompts (MemoryError)" in caplog.text


@one_model
def test_a_number_is_never_halved(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(4, 4, 4)
    scores = attribute(model, pairs)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(model, pairs, scores, sizes=[3], metric=short_of_memory)
    assert evaluate(model, pairs, scores, sizes=[3], batch_size=2).settings["batch_size"] == 2


@one_model
def test_auto_begins_with_what_fits(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = model_of(case), random_pairs(*[4] * 8)
    scores = attribute(model, pairs)
    given: Any = {"ablation": "mean", "reference": None, "ranking": None, "error_nodes": "rank", "seed": 0}
    given |= {"metric": logit_difference, "verbose": False}
    with Meter() as meter:  # of the runs alone: notes draw pairs, which on a model this small shows
        expected = sparsity_curve(model, pairs, scores, sizes=[3], batch_size=3, **given)
    for available, fewest, most in ((int(meter.peak / FILL), 2, 4), (1, 1, 1), (None, 8, 8)):
        monkeypatch.setattr("tl_neuron_circuits.evaluation._ablated_runs.available_memory", lambda _, a=available: a)
        found = evaluate(model, pairs, scores, sizes=[3], batch_size="auto")
        assert fewest <= found.settings["batch_size"] <= most
        assert_same(found, expected)


@one_model
def test_compare_halves_for_scores_and_for_curves(case: ModelCase) -> None:
    model, train, test = model_of(case), random_pairs(4, 4, 4), random_pairs(4, 4, 4, 4)
    same: dict[str, Any] = {"bases": [Neurons()], "methods": ["relp"], "sizes": [3, 10]}
    found = compare(model, train, test, **same, metric=short_of_memory, batch_size="auto")
    expected = compare(model, train, test, **same, batch_size=2)
    for curve, other in zip(found.curves.values(), expected.curves.values(), strict=True):
        assert_same(curve, other)
        assert curve.settings["batch_size"] == 2


@pytest.mark.parametrize("protocol", ["nodes", "edges"])
@one_model
def test_curves_over_edges_halve_too(case: ModelCase, protocol: Any) -> None:
    model, pairs = model_of(case), random_pairs(4, 4, 4, 4)
    circuit = trace(model, pairs.clean[0][None], nodes=6)
    common: dict[str, Any] = {"sizes": [1, 3], "protocol": protocol}
    found = evaluate_edges(model, pairs, circuit, **common, metric=short_of_memory, batch_size="auto")
    assert_same(found, evaluate_edges(model, pairs, circuit, **common, batch_size=1))
    assert found.settings["batch_size"] == 2
