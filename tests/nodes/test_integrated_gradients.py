"""Integrated gradients: one step is attribution patching, many steps are the effect of patching the whole site."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, typical_models
from tests.loops import for_each
from tests.methods import with_steps
from tests.nodes.plain import POSTS, assert_scores, metric_at, metric_with, random_pairs, values_of
from tests.propagation.readings import ALL_RULES, model_of
from tl_neuron_circuits import IntegratedGradients
from tl_neuron_circuits.bases import ResidualStream
from tl_neuron_circuits.bases._activations import ActivationSite
from tl_neuron_circuits.nodes import Conductance, attribute

models = pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
rotary = pytest.mark.parametrize("case", typical_models("llama", "gemma2"))


@dataclass(frozen=True)
class Embeddings:
    """A basis of the user's own: the token embeddings, a full cut where positions are rotary."""

    name: str = "embeddings"

    def sites(self, model: Any) -> Sequence[Any]:
        return (ActivationSite("hook_embed", -1, "E"),)


def assert_converges(coarse: Tensor, fine: Tensor, effect: float) -> None:
    """The error of a left sum is c / K, so it halves with twice the steps and 2 * fine - coarse is without it."""
    first, second = float(coarse.double().sum()), float(fine.double().sum())
    assert abs(second - effect) < 0.1 * max(abs(effect), 0.1)
    assert abs(2 * second - first - effect) < 0.02 * max(abs(effect), 0.1)


@for_each("baseline", ["corrupt", "zero", "mean"])
@for_each("method", ["integrated_gradients", "integrated_gradients_inputs"])
@models
def test_one_step_is_attribution_patching(case: ModelCase, method: Any, baseline: Any) -> None:
    if (method, baseline) == ("integrated_gradients_inputs", "mean"):
        pytest.skip("inputs have no mean")
    model, pairs = model_of(case), random_pairs(5, 5)
    found = attribute(model, pairs, method=with_steps(method, 1), baseline=baseline)
    expected = attribute(model, pairs, method="gradient", baseline=baseline)
    assert_scores(found.flat(), expected.flat(), case)


@models
def test_one_step_with_rules_is_relp(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(5, 5)
    found = attribute(model, pairs, method=IntegratedGradients(steps=1, rules=ALL_RULES))
    assert_scores(found.flat(), attribute(model, pairs).flat(), case)


@models
def test_many_steps_sum_to_the_effect_of_patching_the_layer(case: ModelCase) -> None:
    """m(clean) - m(clean with that layer's MLP at its corrupt values)."""
    model, pairs = model_of(case), random_pairs(4)
    clean, corrupt = pairs.clean[0], pairs.corrupt[0]
    there = values_of(model, corrupt, POSTS)
    coarse, fine = (attribute(model, pairs, method=f"integrated_gradients(steps={k})").values for k in (20, 40))
    for name in POSTS:
        effect = metric_with(model, pairs, 0, clean, {}) - metric_with(model, pairs, 0, clean, {name: there[name]})
        assert_converges(coarse[name], fine[name], effect)


@pytest.mark.parametrize("method", ["integrated_gradients", "integrated_gradients_inputs"])
@rotary
def test_over_a_full_cut_many_steps_sum_to_the_whole_effect(case: ModelCase, method: Any) -> None:
    """At the embeddings: m(clean) - m(corrupt)."""
    model, pairs = model_of(case), random_pairs(4)
    whole = metric_at(model(pairs.clean[0][None]), pairs, 0) - metric_at(model(pairs.corrupt[0][None]), pairs, 0)
    coarse, fine = (attribute(model, pairs, method=with_steps(method, k), basis=Embeddings()).flat() for k in (20, 40))
    assert_converges(coarse, fine, float(whole.detach()))


@models
def test_the_residual_stream_is_a_full_cut_too(case: ModelCase) -> None:
    """At the residual stream after any layer: m(clean) - m(corrupt), the same for all layers."""
    model, pairs = model_of(case), random_pairs(4)
    effect = metric_with(model, pairs, 0, pairs.clean[0], {}) - metric_with(model, pairs, 0, pairs.corrupt[0], {})
    coarse, fine = (
        attribute(model, pairs, method=f"integrated_gradients(steps={k})", basis=ResidualStream()).values
        for k in (20, 40)
    )
    for name in fine:
        assert_converges(coarse[name], fine[name], effect)


@models
def test_conductance_of_any_full_cut_is_the_whole_effect(case: ModelCase) -> None:
    """At the residual stream after any layer: m(clean) - m(corrupt), each step counted once."""
    model, pairs = model_of(case), random_pairs(4)
    effect = metric_with(model, pairs, 0, pairs.clean[0], {}) - metric_with(model, pairs, 0, pairs.corrupt[0], {})
    coarse, fine = (
        attribute(model, pairs, method=Conductance(steps), basis=ResidualStream()).values for steps in (40, 80)
    )
    for name in fine:
        assert_converges(coarse[name], fine[name], effect)


@models
@pytest.mark.parametrize("baseline", ["corrupt", "zero"])
def test_conductance_is_each_steps_gradient_times_what_it_changes(case: ModelCase, baseline: Any) -> None:
    model, pairs = model_of(case), random_pairs(5)
    found = attribute(model, pairs, method="conductance(steps=3)", baseline=baseline).values
    with torch.no_grad():
        ends = [model.run_with_cache(row[0][None])[1]["hook_embed"] for row in (pairs.corrupt, pairs.clean)]
    ends[0] = ends[0] if baseline == "corrupt" else torch.zeros_like(ends[0])
    runs = []
    for k in range(4):
        kept: dict[str, Tensor] = {}
        point = (ends[0] + k / 3 * (ends[1] - ends[0])).requires_grad_(True)
        hooks = [("hook_embed", lambda value, hook, p=point: p)]
        hooks += [(name, lambda value, hook, n=name, kept=kept: kept.update({n: value}) or value) for name in POSTS]
        metric = metric_at(model.run_with_hooks(pairs.clean[0][None], fwd_hooks=hooks), pairs, 0)
        runs.append((dict(kept), torch.autograd.grad(metric, [kept[name] for name in POSTS])))
    for place, name in enumerate(POSTS):
        steps = [g[place] * (now[name] - before[name]) for (before, _), (now, g) in pairwise(runs)]
        assert torch.allclose(found[name].double(), sum(steps)[0].double().detach(), rtol=1e-4, atol=1e-5)
