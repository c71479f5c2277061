"""The named rule sets against the slow replicas; what each conserves; what each refuses."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models
from tests.propagation.readings import (
    READINGS,
    STEPWISE_NORMS,
    assert_close,
    by_capture,
    expected_gradients,
    model_of,
    settled,
    tokens_of,
)
from tests.propagation.test_forward import everything
from tests.replicas import RULE_SETS as SWITCHES
from tl_neuron_circuits import UnsupportedModelError
from tl_neuron_circuits.models._sites import find_sites, require
from tl_neuron_circuits.propagation import RULE_SETS, relp
from tl_neuron_circuits.propagation.rules import SoftmaxRule

Untouched = Callable[[Any], AbstractContextManager[None]]
NEW = ("attnlrp", "gim")


NO_SCORES = {("opt", "TransformerBridge"), ("gptj", "TransformerBridge")}
"""Adapters that compute the softmax without `hook_attn_scores`."""


def lacks_scores(case: ModelCase) -> bool:
    return (case.family, case.backend) in NO_SCORES


@STEPWISE_NORMS
@pytest.mark.parametrize("rules", NEW)
@pytest.mark.parametrize("case", all_models())
def test_gradients_of_a_set_are_the_replicas(case: ModelCase, rules: str, untouched: Untouched) -> None:
    """At every hook, read in three ways; the forward pass keeps its bits."""
    if rules == "gim" and lacks_scores(case):
        with untouched(model_of(case)), pytest.raises(UnsupportedModelError, match="hook_attn_scores to fire"):
            with relp(model_of(case), rules):
                model_of(case)(tokens_of(case))
        return
    model, tokens = model_of(case), tokens_of(case)
    expected = expected_gradients(case, SWITCHES[rules])
    outside = everything(model, tokens)
    with untouched(model), relp(model, rules):
        for reading in READINGS.values():
            assert_close(reading(model, tokens, list(expected)), expected, case, rules)
        inside = everything(model, tokens)
    for name, value in outside.items():
        assert torch.equal(inside[name], value), name


@pytest.mark.parametrize("rules", NEW)
@pytest.mark.parametrize("case", all_models("gpt2", "llama", "gemma2"))
def test_a_set_differs_from_relp_and_from_the_gradient(case: ModelCase, rules: str) -> None:
    """Without this, a set that does nothing would agree with a replica that does nothing."""
    found = expected_gradients(case, SWITCHES[rules])["hook_embed"]
    for other in ("relp", "attnlrp", "gim"):
        if other != rules:
            rival = expected_gradients(case, SWITCHES[other])["hook_embed"]
            assert (found - rival).abs().max() > 1e-3 * rival.abs().max(), other


@pytest.mark.parametrize("case", all_models("gpt2", "llama"))
def test_cp_is_relp_and_a_tuple_of_all_rules_is_relp(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    names = list(expected_gradients(case, SWITCHES["relp"]))
    runs = []
    for rules in ("relp", "cp", ("attention", "half", "identity", "ln")):
        with relp(model, rules):
            runs.append(by_capture(model, tokens, names))
    for name in names:
        assert torch.equal(runs[0][name], runs[1][name]) and torch.equal(runs[0][name], runs[2][name])


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("case", all_models("gpt2", "llama", "gemma2"))
def test_batches_of_gradients_pass(case: ModelCase, rules: str) -> None:
    if rules == "gim" and lacks_scores(case):
        pytest.skip("no scores to hook: refused, see above")
    model, tokens = model_of(case), tokens_of(case)
    store: list[Tensor] = []
    with relp(model, rules), model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: store.append(value))]):
        outputs = model(tokens)[0, -1, :3]
        alone = [torch.autograd.grad(output, store, retain_graph=True)[0] for output in outputs]
        (batch,) = torch.autograd.grad(outputs, store, grad_outputs=torch.eye(3).to(outputs), is_grads_batched=True)
    torch.testing.assert_close(batch, torch.stack(alone), atol=1e-9, rtol=1e-6)


def test_a_warm_softmax_has_the_gradient_of_its_definition() -> None:
    """Against finite differences of T softmax(scores / T), masked scores included."""
    scores = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64)
    g = torch.tensor([1.0, -2.0, 0.3, 5.0], dtype=torch.float64)

    def value(s: Tensor) -> Tensor:
        return (2 * torch.softmax(s / 2, -1) * g).sum()

    found = SoftmaxRule(2.0).gradients(g, scores)
    for place in range(3):
        step = torch.zeros(4, dtype=torch.float64)
        step[place] = 1e-6
        torch.testing.assert_close(
            found[place], (value(scores + step) - value(scores - step)) / 2e-6, atol=1e-8, rtol=0
        )
    assert found[3] == 0
    plain = torch.softmax(scores, -1)
    torch.testing.assert_close(SoftmaxRule(1.0).gradients(g, scores), plain * (g - (g * plain).sum()))


@pytest.mark.parametrize("case", all_models("gpt2", "llama"))
def test_a_set_is_refused_where_its_hook_points_are_missing(case: ModelCase) -> None:
    model = settled(case.build())
    for hidden, rules in (("hook_attn_scores", "gim"), ("hook_v", "attnlrp")):
        points = {name: point for name, point in model.hook_dict.items() if not name.endswith(hidden)}
        with pytest.raises(UnsupportedModelError, match=f"blocks.1.attn has no {hidden}"):
            require(find_sites(model, points), RULE_SETS[rules].needs)
        require(find_sites(model, points), RULE_SETS["relp"].needs)
