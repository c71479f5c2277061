"""RelP and attribution patching are the plain loop, with either class, basis, direction, baseline and batch size."""

from typing import Any

import pytest
import torch

from tests.families import ModelCase, typical_models
from tests.loops import for_each
from tests.methods import with_steps
from tests.nodes.plain import (
    POSTS,
    assert_scores,
    gradients_of,
    mean_over_pairs,
    plain_scores,
    random_pairs,
    values_of,
)
from tests.propagation.readings import ALL_RULES, model_of
from tests.propagation.test_conservation import without_biases
from tl_neuron_circuits import RelP
from tl_neuron_circuits.bases import AttentionBlockOutputs, HeadOutputs, MLPOutputs, Neurons, ResidualStream
from tl_neuron_circuits.nodes import attribute
from tl_neuron_circuits.tasks import answer_logit

METHODS = {"relp": ALL_RULES, "gradient": ()}
BASES = (Neurons(), MLPOutputs(), HeadOutputs(), ResidualStream(), AttentionBlockOutputs())
models = pytest.mark.parametrize("case", typical_models("gpt2", "llama", "gemma2", "solu_ln"))
few_models = pytest.mark.parametrize("case", typical_models("gpt2", "llama"))


@for_each("method", METHODS)
@models
def test_scores_are_the_plain_loop(case: ModelCase, method: Any) -> None:
    """Every basis at once; prompts of mixed lengths, summed over positions."""
    model, pairs = model_of(case), random_pairs(5, 4, 5)
    found = attribute(model, pairs, method=method, basis=BASES, positions="sum", batch_size=2)
    names = list(found.values)
    assert len(names) == 10
    expected = mean_over_pairs(plain_scores(case, model, pairs, names, rules=METHODS[method]))
    for name in names:
        assert_scores(found.values[name], expected[name], case, name)


@pytest.mark.parametrize("method", METHODS)
@few_models
def test_kept_positions_are_the_plain_loop(case: ModelCase, method: Any) -> None:
    model, pairs = model_of(case), random_pairs(5, 5, 5)
    found = attribute(model, pairs, method=method, batch_size=2)
    rows = plain_scores(case, model, pairs, POSTS, rules=METHODS[method])
    for name in POSTS:
        assert_scores(found.values[name], torch.stack([row[name] for row in rows]).mean(0), case, name)


@pytest.mark.parametrize("rules", [("ln",), ("ln", "identity", "half")])
@few_models
def test_rules_can_be_chosen(case: ModelCase, rules: tuple[str, ...]) -> None:
    model, pairs = model_of(case), random_pairs(5, 5)
    found = attribute(model, pairs, method=RelP(rules), positions="sum")
    expected = mean_over_pairs(plain_scores(case, model, pairs, POSTS, rules=rules))
    for name in POSTS:
        assert_scores(found.values[name], expected[name], case)


@pytest.mark.parametrize("method", METHODS)
@few_models
def test_denoising_takes_the_gradient_on_the_corrupt_run(case: ModelCase, method: Any) -> None:
    """RelP's own protocol; the sign stays: positive supports the answer."""
    model, pairs = model_of(case), random_pairs(5, 4, 5)
    found = attribute(model, pairs, method=method, direction="denoising", positions="sum", batch_size=2)
    expected = mean_over_pairs(plain_scores(case, model, pairs, POSTS, rules=METHODS[method], denoising=True))
    noising = mean_over_pairs(plain_scores(case, model, pairs, POSTS, rules=METHODS[method]))
    for name in POSTS:
        assert_scores(found.values[name], expected[name], case, name)
        assert (expected[name] - noising[name]).abs().max() > 1e-3


@for_each("method", ["relp", "patching", "integrated_gradients"])
@few_models
def test_a_batch_is_its_members(case: ModelCase, method: Any) -> None:
    """Whatever the batch size and the order of lengths."""
    model, pairs = model_of(case), random_pairs(4, 3, 4)
    settings = {"method": with_steps(method, 2), "positions": "sum", "basis": Neurons(layers=[1])}
    expected = attribute(model, pairs, batch_size=1, **settings).values[POSTS[1]]
    for batch_size in (2, 100):
        assert_scores(attribute(model, pairs, batch_size=batch_size, **settings).values[POSTS[1]], expected, case)


@few_models
def test_the_mean_baseline_is_the_mean_over_clean_prompts_of_one_length(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(4, 5, 4, 5, 4, corrupt=False)
    found = attribute(model, pairs, baseline="mean", positions="sum", batch_size=2)
    values = [values_of(model, tokens, POSTS) for tokens in pairs.clean]
    rows = []
    for index, tokens in enumerate(pairs.clean):
        alike = [v for v, length in zip(values, pairs.lengths, strict=True) if length == len(tokens)]
        gradient = gradients_of(case, pairs, index, tokens, ALL_RULES)
        mean = {name: torch.stack([v[name] for v in alike]).mean(0) for name in POSTS}
        rows.append({name: (values[index][name] - mean[name]) * gradient[name] for name in POSTS})
    for name, expected in mean_over_pairs(rows).items():
        assert_scores(found.values[name], expected, case, name)


@for_each("case", typical_models("gpt2", "pythia", "llama", "gemma2", "qwen3", "opt", "solu", "bloom"))
def test_relevance_of_every_layer_is_the_metric_without_biases(case: ModelCase) -> None:
    """Zero baseline: the residual stream after any layer carries the logits of the metric, unpaired."""
    model, pairs = without_biases(case), random_pairs(4, 4, corrupt=False)
    if getattr(model.cfg, "output_logits_soft_cap", 0) > 0:
        pytest.skip("a soft cap is not conserved by the metric itself; see tests/propagation/test_conservation.py")
    found = attribute(model, pairs, baseline="zero", metric=answer_logit, basis=ResidualStream())
    (batch,) = pairs.batches(8)
    metric = float(answer_logit(model(batch.clean), batch).mean().detach())
    for name, scores in found.values.items():
        size = float(scores.abs().sum())
        assert abs(float(scores.double().sum()) - metric) < max(1e-6, 2 * case.tolerance) * size, name


@few_models
def test_summed_units_are_sums_of_units(case: ModelCase) -> None:
    """The maps over layer and position of RelP's protocol."""
    model, pairs = model_of(case), random_pairs(5, 5)
    basis = [ResidualStream(), AttentionBlockOutputs(), MLPOutputs()]
    single = attribute(model, pairs, basis=basis, direction="denoising")
    summed = attribute(model, pairs, basis=basis, direction="denoising", units="sum")
    assert list(summed.map().index) == list(single.values) and summed.map().shape == (6, 5)
    for name, scores in single.values.items():
        assert summed.values[name].shape == (5, 1)
        assert_scores(summed.values[name][:, 0], scores.double().sum(-1), case)
        assert_scores(torch.tensor(single.map().loc[name].to_numpy()), scores.double().sum(-1), case)


@few_models
def test_a_stabilizer_is_passed_on(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(5, 5)
    exact, forks = (attribute(model, pairs, method=RelP(stabilizer=stabilizer)).flat() for stabilizer in (None, 1e-6))
    assert not torch.equal(exact, forks) and (exact - forks).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@few_models
def test_scores_are_float32_and_near_in_any_dtype(case: ModelCase, dtype: torch.dtype) -> None:
    pairs = random_pairs(5, 5, 5)
    expected = attribute(model_of(case), pairs, positions="sum").flat().double()
    found = attribute(case.build(dtype=dtype), pairs, positions="sum").flat()
    assert found.dtype == torch.float32
    allowed = 1e-4 if dtype == torch.float32 else 0.1
    assert (found - expected).norm() < allowed * expected.norm()
