"""Steered features write their change through the decoder, and nothing else changes."""

from typing import Any

import pandas as pd
import pytest
import torch

from tests.bases.site_dictionaries import D_DICT, dictionaries
from tests.bases.tiny_dictionaries import RANDOM
from tests.families import ModelCase, all_models, random_tokens, typical_models
from tests.interventions.test_steering import activations, logits_with
from tests.loops import for_each
from tl_neuron_circuits import attribute, trace
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.bases import Dictionaries
from tl_neuron_circuits.interventions import (
    direct_logit_effects,
    interchange,
    node_values,
    steer,
    steering_hooks,
    sweep,
)
from tl_neuron_circuits.tasks import TokenizedPairs, answer_logit

few = pytest.mark.parametrize("case", typical_models("gpt2", "gemma2"))
one = all_models("gpt2")[:1]
places = pytest.mark.parametrize("place", ["transcoder", "skip_transcoder", "sae_mlp_out", "sae_attention"])


def firing(model: Any, tokens: Any, basis: Dictionaries, layer: int = 0, position: int = 3) -> list[int]:
    """Features of a layer that fire at a position of the first prompt."""
    site = basis.sites(model)[layer]
    values = {name: activations(model, tokens, [], name) for name in site.reads}
    return site.take_apart(values).nodes[0, position].nonzero()[:, 0].tolist()


@few
@places
def test_scale_one_is_the_identity_bit_for_bit(case: ModelCase, place: str, untouched: Any) -> None:
    model = case.build(dtype=torch.float32)
    tokens, basis = random_tokens(model), dictionaries(place, dtype=torch.float32)
    labels = [f"L{layer}/F{unit}@{at}" for layer in (0, 1) for unit in range(D_DICT) for at in (1, 3)]
    before = logits_with(model, tokens, [])
    with untouched(model):
        same = logits_with(model, tokens, steering_hooks(model, labels, scale=1, basis=basis))
        other = logits_with(model, tokens, steering_hooks(model, labels, scale=0, basis=basis))
    assert torch.equal(same, before)
    assert not torch.equal(other, before)


@for_each("case", all_models("gpt2"))
@places
@for_each(("how", "amount"), [("scale", -2.0), ("value", 0.7), ("add", 0.3)])
def test_the_change_is_that_of_the_feature_times_its_decoder_row(
    case: ModelCase, place: str, how: str, amount: float
) -> None:
    model, basis = case.build(), dictionaries(place)
    tokens = random_tokens(model)
    site: Any = basis.sites(model)[0]
    fixed, free = firing(model, tokens, basis)[:2]
    change_of: dict[str, Any] = {how: amount}
    hooks = steering_hooks(model, [f"L0/F{fixed}@3", f"L0/F{free}"], basis=basis, **change_of)
    before = {name: activations(model, tokens, [], name) for name in site.reads}
    nodes = site.take_apart(before).nodes
    change = {"scale": (amount - 1) * nodes, "value": amount - nodes, "add": torch.full_like(nodes, amount)}[how]
    expected = before[site.hook].flatten(2).clone()
    expected[:, 3] += change[:, 3, fixed, None] * site.dictionary.W_dec[fixed]
    expected += change[..., free, None] * site.dictionary.W_dec[free]
    after = activations(model, tokens, hooks, site.hook)
    torch.testing.assert_close(after.flatten(2), expected)


@few
def test_a_feature_set_to_its_value_on_another_prompt_is_an_interchange(case: ModelCase) -> None:
    """Every feature and the same errors: the layer writes what its features wrote there."""
    model, basis = case.build(), dictionaries("transcoder")
    here, there = random_tokens(model, 1, 5), random_tokens(model, 1, 5, seed=1)
    labels = [f"L1/F{unit}@{position}" for unit in range(D_DICT) for position in range(5)]
    values = node_values(model, there, labels, basis=basis)
    site: Any = basis.sites(model)[1]
    nodes, other = (
        site.take_apart({name: activations(model, tokens, [], name) for name in site.reads}) for tokens in (here, there)
    )
    torch.testing.assert_close(values[0].reshape(D_DICT, 5).T, other.nodes[0])
    after = activations(model, here, steering_hooks(model, labels, value=values, basis=basis), site.hook)
    expected = other.nodes @ site.dictionary.W_dec + site.dictionary.b_dec + nodes.vectors["error"]
    torch.testing.assert_close(after, expected)
    result = interchange(model, here, there, labels, basis=basis)
    torch.testing.assert_close(result.after[0], logits_with(
        model, here, steering_hooks(model, labels, value=values, basis=basis)
    )[0, -1].float())  # fmt: skip


@RANDOM
@few
def test_circuits_and_scores_of_features_can_be_steered(case: ModelCase) -> None:
    model, basis = case.build(), dictionaries("transcoder")
    tokens = random_tokens(model, 1, 5)
    circuit = trace(model, tokens, basis=basis, nodes=6)
    features = circuit.nodes.query("kind == 'feature'")
    by_label = steer(model, tokens, list(features["node"]), scale=0, basis=basis)
    by_circuit = steer(model, tokens, circuit, scale=0, watch={"itself": circuit})
    assert torch.equal(by_circuit.after, by_label.after)
    assert sorted(by_circuit.nodes["label"]) == sorted(features["node"])
    options: Any = {"baseline": "zero", "metric": answer_logit}
    scores = attribute(model, TokenizedPairs.from_tokens(tokens, torch.tensor([3])), basis=basis, **options)
    top = scores.top(20).query("kind == 'node'")
    assert steer(model, tokens, top, scale=0, basis=basis).kl > 0
    swept = sweep(model, tokens, circuit, scales=(0, 1))
    assert torch.equal(swept.results[1].after, swept.results[1].before)


@few
def test_features_without_positions_are_steered_in_generated_tokens_too(case: ModelCase) -> None:
    """The continuation equals stepwise runs with the same hooks; `steer` makes one run a token."""
    model, basis = case.build(dtype=torch.float32), dictionaries("transcoder", dtype=torch.float32)
    tokens = random_tokens(model, 1, 5)
    hooks = steering_hooks(model, ["L0/F3", "L1/F5"], add=4.0, basis=basis)
    text = tokens
    for _ in range(3):
        text = torch.cat([text, logits_with(model, text, hooks)[:, -1:].argmax(-1)], 1)
    result = steer(model, tokens, ["L0/F3", "L1/F5"], add=4.0, basis=basis, generate=3)
    assert result.continuations is not None
    assert result.continuations[0][1].split() == [str(token) for token in text[0, 5:].tolist()]


@pytest.mark.parametrize("case", one)
def test_units_of_the_hook_point_and_features_written_there_are_two_things(case: ModelCase) -> None:
    model, basis = case.build(), dictionaries("sae_mlp_out")
    tokens = random_tokens(model)
    hooks = steering_hooks(model, ["L0/M3@2", "L0/F3@2"], add=1.0, basis=basis)
    before = activations(model, tokens, [], "blocks.0.hook_mlp_out")
    after = activations(model, tokens, hooks, "blocks.0.hook_mlp_out")
    expected = before.clone()
    expected[:, 2, 3] += 1
    expected[:, 2] += basis.dictionaries[0].W_dec[3]
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("case", one)
def test_features_that_cannot_be_found_are_refused(case: ModelCase) -> None:
    model, basis = case.build(), dictionaries("transcoder")
    tokens = random_tokens(model, 1, 5)
    circuit = trace(model, tokens, basis=basis, nodes=3)
    feature = circuit.nodes.query("kind == 'feature'")["node"].iloc[0]
    wide = pd.DataFrame({"hook": ["blocks.0.hook_mlp_out"], "unit": [3], "position": [0], "label": ["L0/F3@0"]})
    for call in (
        lambda: steering_hooks(model, feature, scale=0),
        lambda: steering_hooks(model, "L7/F3", scale=0, basis=basis),
        lambda: steering_hooks(model, wide, scale=0),
        lambda: steering_hooks(model, [feature, feature], scale=0, basis=basis),
        lambda: direct_logit_effects(model, circuit),
        lambda: logits_with(model, tokens, steering_hooks(model, f"L0/F{D_DICT}", scale=0, basis=basis)),
    ):
        with pytest.raises(SettingsError):
            call()
