"""Scores of dictionary nodes need no splice, and features + error + skip are the MLP output's own scores."""

from typing import Any

import pytest
import torch

from tests.bases.tiny_dictionaries import RANDOM, tiny_dictionaries
from tests.families import ModelCase, typical_models
from tests.loops import for_each
from tests.methods import with_steps
from tests.nodes.plain import assert_scores, gradients_of, metric_with, random_pairs, values_of
from tests.propagation.readings import ALL_RULES, model_of
from tl_neuron_circuits.bases import MLPOutputs, Neurons
from tl_neuron_circuits.nodes import attribute

pytestmark = RANDOM
models = pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
kinds = pytest.mark.parametrize("kind", ["sae", "transcoder", "skip_transcoder"])


@for_each("method", ["relp", "integrated_gradients"])
@for_each("kind", ["sae", "skip_transcoder"])
@models
def test_features_and_errors_sum_to_the_mlp_outputs_and_the_neurons(case: ModelCase, kind: Any, method: Any) -> None:
    """Per layer and position, with whatever the dictionary misses in the error node."""
    model, pairs = model_of(case), random_pairs(4, 4, 4)
    settings = {"method": with_steps(method, 2), "batch_size": 2}
    found = attribute(model, pairs, basis=tiny_dictionaries(kind, model), **settings)
    whole = attribute(model, pairs, basis=MLPOutputs(), **settings)
    neurons = attribute(model, pairs, basis=Neurons(), **settings)
    assert (len(found.skips) > 0) == (kind == "skip_transcoder") and len(found.errors) == 2
    for layer, name in enumerate(found.values):
        total = found.values[name].double().sum(-1) + found.errors[name].double()
        total = total + found.skips[name].double() if found.skips else total
        assert found.values[name].shape == (4, 20) and found.errors[name].shape == (4,)
        assert float(found.errors[name].abs().max()) > 1e-3
        assert_scores(total.float(), whole.values[name].double().sum(-1), case)
        if method != "integrated_gradients":  # whose path runs through another point of the graph for neurons
            assert_scores(total.float(), neurons.values[f"blocks.{layer}.mlp.hook_post"].double().sum(-1), case)


@kinds
@models
def test_a_features_score_is_its_change_times_its_decoder_times_the_gradient(case: ModelCase, kind: Any) -> None:
    model, pairs, basis = model_of(case), random_pairs(4), tiny_dictionaries(kind, model_of(case))
    found = attribute(model, pairs, basis=basis)
    for dictionary in basis.dictionaries:
        names = [dictionary.hook_in, dictionary.hook_out]
        high, low = (values_of(model, tokens[0], names) for tokens in (pairs.clean, pairs.corrupt))
        gradient = gradients_of(case, pairs, 0, pairs.clean[0], ALL_RULES)[dictionary.hook_out]
        change = dictionary.encode(high[names[0]]) - dictionary.encode(low[names[0]])
        expected = change * (gradient @ dictionary.W_dec.mT)
        assert_scores(found.values[dictionary.hook_out], expected, case)
        rebuilt = [dictionary(values[names[0]]) for values in (high, low)]
        miss = (high[names[1]] - rebuilt[0]) - (low[names[1]] - rebuilt[1])
        products = miss * gradient  # which nearly cancel in the sum, in float32
        allowed = 1e-6 * float(products.abs().sum(-1).max()) * (1 if case.tolerance < 1e-6 else 20)
        expected = products.sum(-1).float()
        torch.testing.assert_close(found.errors[dictionary.hook_out], expected, atol=allowed, rtol=0)


@kinds
@models
def test_patching_a_feature_moves_the_output_by_its_decoder_row(case: ModelCase, kind: Any) -> None:
    model, pairs, basis = model_of(case), random_pairs(3), tiny_dictionaries(kind, model_of(case))
    found = attribute(model, pairs, method="patching", basis=basis)
    dictionary = basis.dictionaries[0]
    names = [dictionary.hook_in, dictionary.hook_out]
    high, low = (values_of(model, tokens[0], names) for tokens in (pairs.clean, pairs.corrupt))
    change = dictionary.encode(low[names[0]]) - dictionary.encode(high[names[0]])
    start, expected = metric_with(model, pairs, 0, pairs.clean[0], {}), torch.zeros(change.shape, dtype=torch.float64)
    for position in range(change.shape[0]):
        for unit in range(change.shape[1]):
            patched = high[names[1]].clone()
            patched[position] += change[position, unit] * dictionary.W_dec[unit].to(patched)
            expected[position, unit] = start - metric_with(model, pairs, 0, pairs.clean[0], {names[1]: patched})
    assert_scores(found.values[names[1]], expected, case)
