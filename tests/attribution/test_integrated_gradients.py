"""Integrated gradients: one step is attribution patching, many steps are the effect of patching the whole site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.attribution.plain import POSTS, assert_scores, metric_at, metric_with, random_pairs, values_of
from tests.families import ModelCase, all_models
from tests.propagation.readings import ALL_RULES, model_of
from tl_neuron_circuits.attribution import attribute
from tl_neuron_circuits.bases import ResidualStream
from tl_neuron_circuits.bases._activations import ActivationSite

models = pytest.mark.parametrize("case", all_models("gpt2", "llama", "gemma2"))
rotary = pytest.mark.parametrize("case", all_models("llama", "gemma2"))


@dataclass(frozen=True)
class Embeddings:
    """A basis of the user's own: the token embeddings, a full cut where positions are rotary."""

    name: str = "embeddings"

    def sites(self, model: Any) -> Sequence[Any]:
        return (ActivationSite("hook_embed", -1, "E"),)


@pytest.mark.parametrize("baseline", ["corrupt", "zero", "mean"])
@pytest.mark.parametrize("method", ["integrated_gradients", "integrated_gradients_inputs"])
@models
def test_one_step_is_attribution_patching(case: ModelCase, method: Any, baseline: Any) -> None:
    if (method, baseline) == ("integrated_gradients_inputs", "mean"):
        pytest.skip("inputs have no mean")
    model, pairs = model_of(case), random_pairs(5, 5)
    found = attribute(model, pairs, method=method, steps=1, baseline=baseline)
    expected = attribute(model, pairs, method="gradient", baseline=baseline)
    assert_scores(found.flat(), expected.flat(), case)


@models
def test_one_step_with_rules_is_relp(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(5, 5)
    found = attribute(model, pairs, method="integrated_gradients", steps=1, rules=ALL_RULES)
    assert_scores(found.flat(), attribute(model, pairs).flat(), case)


@models
def test_many_steps_sum_to_the_effect_of_patching_the_layer(case: ModelCase) -> None:
    """m(clean) - m(clean with that layer's MLP at its corrupt values); the left sum's error halves as steps double."""
    model, pairs = model_of(case), random_pairs(4)
    clean, corrupt = pairs.clean[0], pairs.corrupt[0]
    there = values_of(model, corrupt, POSTS)
    coarse, fine = (attribute(model, pairs, method="integrated_gradients", steps=k).values for k in (40, 80))
    for name in POSTS:
        effect = metric_with(model, pairs, 0, clean, {}) - metric_with(model, pairs, 0, clean, {name: there[name]})
        first, second = (float(scores[name].double().sum()) - effect for scores in (coarse, fine))
        assert abs(second) < 0.05 * max(abs(effect), 0.1)
        assert second == pytest.approx(first / 2, rel=0.15, abs=1e-3), name


@pytest.mark.parametrize("method", ["integrated_gradients", "integrated_gradients_inputs"])
@rotary
def test_over_a_full_cut_many_steps_sum_to_the_whole_effect(case: ModelCase, method: Any) -> None:
    """At the embeddings: m(clean) - m(corrupt)."""
    model, pairs = model_of(case), random_pairs(4)
    whole = metric_at(model(pairs.clean[0][None]), pairs, 0) - metric_at(model(pairs.corrupt[0][None]), pairs, 0)
    sums = [
        float(attribute(model, pairs, method=method, steps=k, basis=Embeddings()).flat().double().sum()) for k in (60, 120)
    ]
    first, second = (total - float(whole.detach()) for total in sums)
    assert abs(second) < 0.1 * abs(float(whole.detach()))
    assert second == pytest.approx(first / 2, rel=0.25, abs=1e-4)


@models
def test_the_residual_stream_is_a_full_cut_too(case: ModelCase) -> None:
    """At the residual stream after any layer: m(clean) - m(corrupt), the same for all layers."""
    model, pairs = model_of(case), random_pairs(4)
    effect = metric_with(model, pairs, 0, pairs.clean[0], {}) - metric_with(model, pairs, 0, pairs.corrupt[0], {})
    coarse, fine = (
        attribute(model, pairs, method="integrated_gradients", steps=k, basis=ResidualStream()).values for k in (60, 120)
    )
    for name in fine:
        first, second = (float(scores[name].double().sum()) - effect for scores in (coarse, fine))
        assert abs(second) < 0.1 * abs(effect)
        assert second == pytest.approx(first / 2, rel=0.25, abs=1e-3), name
