"""Gradients inside `relp` are those of the slow replicas, at every hook, however a user reads them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from tests.families import ModelCase, all_models, each_model
from tests.loops import for_each
from tests.propagation.readings import (
    ALL_RULES,
    PAIRS_OF_RULES,
    READINGS,
    SINGLE_RULES,
    STEPWISE_NORMS,
    assert_close,
    by_capture,
    expected_gradients,
    model_of,
    rules_that_matter,
    settled,
    tokens_of,
)
from tl_neuron_circuits.propagation import relp

THOROUGH = ("gpt2", "pythia", "llama", "gemma2", "solu_ln")  # one of each kind: every rule alone, read in two ways
Untouched = Callable[[Any], AbstractContextManager[None]]


@STEPWISE_NORMS
@each_model()
@for_each("reading", READINGS)
def test_gradients_are_the_replicas(case: ModelCase, reading: str, untouched: Untouched) -> None:
    """Each rule alone and all together; three ways of reading; the parameters get no `.grad`."""
    model, tokens = model_of(case), tokens_of(case)
    thorough = reading == "capture" or (reading == "backward_hooks" and case.family in THOROUGH)
    choices = (*SINGLE_RULES, ALL_RULES) if thorough else (ALL_RULES,)
    everything = [expected_gradients(case, rules) for rules in choices]
    with untouched(model):
        for rules, expected in zip(choices, everything, strict=True):
            assert {"hook_embed", "blocks.0.mlp.hook_pre", "blocks.1.mlp.hook_post"} <= set(expected)
            with relp(model, rules):
                found = READINGS[reading](model, tokens, list(expected))
            assert_close(found, expected, case, rules)
    assert all(parameter.grad is None for parameter in torch.nn.Module.parameters(model))


@each_model()
def test_gradients_are_the_replicas_for_every_pair_of_rules(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    apart = {"half"} - rules_that_matter(case)  # where no product is, half changes nothing: no need to try its pairs
    for rules in (rules for rules in PAIRS_OF_RULES if not apart & set(rules)):
        expected = expected_gradients(case, rules)
        with relp(model, rules):
            assert_close(by_capture(model, tokens, list(expected)), expected, case, rules)


@each_model()
def test_no_rules_are_the_plain_gradient(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    names = list(expected_gradients(case, ()))
    plain = by_capture(model, tokens, names)
    with relp(model, ()):
        inside = by_capture(model, tokens, names)
    for name in names:
        assert torch.equal(inside[name], plain[name]), name


@each_model()
def test_each_rule_that_applies_changes_the_gradient(case: ModelCase) -> None:
    """Without this, a rule that does nothing would agree with a replica that does nothing."""
    plain = expected_gradients(case, ())["hook_embed"]
    for rule in rules_that_matter(case):
        with_rule = expected_gradients(case, (rule,))["hook_embed"]
        assert (with_rule - plain).abs().max() > 1e-3 * plain.abs().max(), rule


@STEPWISE_NORMS
@pytest.mark.parametrize("case", all_models("gpt2", "llama", "gemma2", "opt"))
def test_frozen_parameters_change_nothing(case: ModelCase, untouched: Untouched) -> None:
    """Trap 1: without a leaf, backward hooks would silently see nothing."""
    model, tokens = settled(case.build()), tokens_of(case)
    for parameter in torch.nn.Module.parameters(model):
        parameter.requires_grad_(False)
    expected = expected_gradients(case, ALL_RULES)
    for read in READINGS.values():
        with untouched(model), relp(model):
            assert_close(read(model, tokens, list(expected)), expected, case)
