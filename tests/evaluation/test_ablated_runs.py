"""What an ablated run computes: every ablation written out prompt by prompt, and that kept nodes stay live."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluation.plain import ablated_metric, baselines
from tests.families import ModelCase, all_models, typical_models
from tests.loops import for_each
from tests.nodes.plain import POSTS, random_pairs, values_of
from tests.propagation.readings import model_of
from tl_neuron_circuits.bases import HeadOutputs, Neurons
from tl_neuron_circuits.evaluation import evaluate
from tl_neuron_circuits.evaluation._node_sets import RankedNodes
from tl_neuron_circuits.nodes import NodeScores, attribute

Untouched = Callable[[Any], AbstractContextManager[None]]
models = pytest.mark.parametrize("case", all_models("gpt2"))


def kept_masks(scores: NodeScores, size: int) -> dict[str, Tensor]:
    """The `size` largest |scores|, written out."""
    order = sorted(range(len(scores)), key=lambda i: -abs(float(scores.flat()[i])))
    flat = torch.zeros(len(scores), dtype=torch.bool)
    flat[order[:size]] = True
    masks, start = {}, 0
    for name, value in scores.values.items():
        masks[name] = flat[start : start + value.numel()].reshape(value.shape)
        start += value.numel()
    return masks


@for_each("ablation", ["mean", "zero", "resample", "corrupt"])
@for_each("case", typical_models("gemma2", "pythia"))
def test_endpoints_are_exact_for_every_ablation(case: ModelCase, ablation: Any) -> None:
    """All nodes: faithfulness 1, completeness 0. No node: the reverse."""
    model, pairs = model_of(case), random_pairs(4, 4, 4)
    scores = attribute(model, pairs, basis=[Neurons(), HeadOutputs()], method="random")
    curve = evaluate(model, pairs, scores, sizes=[0, len(scores)], ablation=ablation)
    assert curve.faithfulness.tolist() == pytest.approx([0, 1], abs=1e-4)
    assert curve.completeness.tolist() == pytest.approx([1, 0], abs=1e-4)
    assert curve.metric_full != pytest.approx(curve.metric_empty, abs=1e-3)


@for_each("ablation", ["mean", "zero", "corrupt"])
@models
def test_ablations_are_the_plain_loop(case: ModelCase, ablation: Any) -> None:
    """Per prompt, several lengths, kept nodes live; whatever the batch size."""
    model, pairs = model_of(case), random_pairs(4, 5, 4)
    scores = attribute(model, pairs, positions="sum")
    base = baselines(model, pairs, list(POSTS), ablation)
    for batch_size in (1, 64):
        curve = evaluate(model, pairs, scores, sizes=[5, 20], ablation=ablation, batch_size=batch_size)
        for row, size in enumerate((5, 20)):
            keep = kept_masks(scores, size)
            rest = {name: ~mask for name, mask in keep.items()}
            for index in range(3):
                kept = ablated_metric(model, pairs, index, base[index], keep)
                removed = ablated_metric(model, pairs, index, base[index], rest)
                assert float(curve.kept[row, index]) == pytest.approx(kept, abs=1e-5, rel=1e-5)
                assert float(curve.removed[row, index]) == pytest.approx(removed, abs=1e-5, rel=1e-5)


@models
def test_kept_positions_are_ablated_one_by_one(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(4, 4, 4)
    scores = attribute(model, pairs)
    curve, base = evaluate(model, pairs, scores, sizes=[12]), baselines(model, pairs, list(POSTS), "mean")
    for index in range(3):
        expected = ablated_metric(model, pairs, index, base[index], kept_masks(scores, 12))
        assert float(curve.kept[0, index]) == pytest.approx(expected, abs=1e-5, rel=1e-5)


@models
def test_kept_nodes_stay_live_and_are_not_reset_to_clean(case: ModelCase) -> None:
    """Layer 1 is kept, layer 0 ablated: what layer 1 computes from that is far from its clean values."""
    model, pairs = model_of(case), random_pairs(4, 4, 4)
    scores = attribute(model, pairs, method="random")
    scores.values[POSTS[0]].zero_()
    curve, base = evaluate(model, pairs, scores, sizes=[4 * 24]), baselines(model, pairs, list(POSTS), "mean")
    keep = {POSTS[0]: torch.zeros(4, 24, dtype=torch.bool), POSTS[1]: torch.ones(4, 24, dtype=torch.bool)}
    for index, tokens in enumerate(pairs.clean):
        clean = values_of(model, tokens, POSTS)
        live = ablated_metric(model, pairs, index, base[index], keep)
        reset = ablated_metric(model, pairs, index, base[index], keep, reset=clean)
        assert abs(live - reset) > 1e-2
        assert float(curve.kept[0, index]) == pytest.approx(live, abs=1e-5)


@models
def test_rankings_by_size_and_by_sign(case: ModelCase) -> None:
    scores = attribute(model_of(case), random_pairs(4, 4))
    flat = scores.flat()
    for ranking, key in (("abs", flat.abs()), ("signed", flat)):
        ranked = RankedNodes(scores, ranking)
        best = torch.cat([mask.reshape(-1) for mask in ranked.best(30).values()])
        assert int(best.sum()) == 30 and float(key[best].min()) >= float(key[~best].max())
        assert ranked.sum_of_best(30) == pytest.approx(float(flat[best].sum()), rel=1e-5)
        rest = torch.cat([mask.reshape(-1) for mask in ranked.all_but_best(30).values()])
        assert torch.equal(rest, ~best)


@models
def test_nothing_is_left_on_the_model(case: ModelCase, untouched: Untouched) -> None:
    model, pairs = model_of(case), random_pairs(4, 4)
    scores = attribute(model, pairs)

    def fail(logits: Tensor, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    with untouched(model):
        evaluate(model, pairs, scores, sizes=[3], ablation="resample")
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, pairs, scores, metric=fail)
