"""`relp` as a context: what it refuses, what it leaves behind (nothing), and what may be done inside it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models, model_cases, random_tokens
from tests.propagation.readings import by_capture, expected_gradients, model_of, next_token_loss, tokens_of
from tl_neuron_circuits._errors import PropagationError, SettingsError
from tl_neuron_circuits._typing import ArgumentError
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.propagation.rules import ALL_RULES

Untouched = Callable[[Any], AbstractContextManager[None]]
both_classes = pytest.mark.parametrize("case", all_models("gpt2", "llama"))
hooked = [
    pytest.param(case, id=case.id) for case in model_cases("gpt2", "llama") if case.backend == "HookedTransformer"
]
POSTS = [f"blocks.{layer}.mlp.hook_post" for layer in range(2)]


def captured_run(model: Any, tokens: Tensor, names: list[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits and the captured tensors, still in the graph."""
    store: dict[str, Tensor] = {}

    def capture(value: Tensor, hook: Any, name: str) -> Tensor:
        store[name] = value
        return value

    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, partial(capture, name=name)) for name in names])
    return logits, [store[name] for name in names]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.set_grad_enabled, False)])
@both_classes
def test_disabled_gradients_are_refused_at_once(case: ModelCase, mode: Any, untouched: Untouched) -> None:
    """Trap 2: around the context, and around a run inside it."""
    model, tokens = model_of(case), tokens_of(case)
    with untouched(model), mode(), pytest.raises(PropagationError, match="gradients to be enabled"), relp(model):
        model(tokens)
    with untouched(model), pytest.raises(PropagationError, match="Run it outside relp"), relp(model), mode():
        model(tokens)


@both_classes
def test_rules_cannot_be_stacked(case: ModelCase, untouched: Untouched) -> None:
    model = model_of(case)
    outer, expected = relp(model), expected_gradients(case, ALL_RULES)
    with untouched(model), outer:
        for inner in (relp(model, ("ln",)), outer):
            with pytest.raises(PropagationError, match="active on this model already"), inner:
                pass
        found = by_capture(model, tokens_of(case), POSTS)  # the outer context is still whole
        assert torch.allclose(found[POSTS[0]], expected[POSTS[0]], atol=1e-5)


@both_classes
def test_the_same_context_can_be_entered_again(case: ModelCase, untouched: Untouched) -> None:
    model, context = model_of(case), relp(model_of(case))
    with untouched(model):
        first, second = [], []
        for found in (first, second):
            with context:
                found.append(by_capture(model, tokens_of(case), POSTS)[POSTS[0]])
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@both_classes
def test_nothing_is_left_after_an_error(case: ModelCase, error: type[BaseException], untouched: Untouched) -> None:
    model, tokens = model_of(case), tokens_of(case)

    def fail(value: Tensor, hook: Any) -> None:
        raise error("inside the forward pass")

    with untouched(model):
        with pytest.raises(error, match="inside the forward"), relp(model):
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_pre", fail)])
        with pytest.raises(error, match="inside the backward"), relp(model):
            model(tokens)
            raise error("inside the backward")


@both_classes
def test_nothing_is_left_when_entering_fails(case: ModelCase, untouched: Untouched, monkeypatch: Any) -> None:
    from tl_neuron_circuits.propagation import _wiring

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_wiring, "find_activation", interrupted)
    with untouched(model_of(case)), pytest.raises(KeyboardInterrupt), relp(model_of(case)):
        pass


@both_classes
def test_hooks_of_the_user_survive_and_see_relp(case: ModelCase, untouched: Untouched) -> None:
    model, tokens = model_of(case), tokens_of(case)
    seen: list[Tensor] = []
    with model.hooks(bwd_hooks=[(POSTS[0], lambda gradient, hook: seen.append(gradient.clone()))]):
        with untouched(model), relp(model):
            next_token_loss(model(tokens), tokens).backward()
        next_token_loss(model(tokens), tokens).backward()
    for parameter in torch.nn.Module.parameters(model):
        parameter.grad = None
    inside, outside = seen
    for gradient, rules in ((inside, ALL_RULES), (outside, ())):
        torch.testing.assert_close(gradient, expected_gradients(case, rules)[POSTS[0]], atol=1e-5, rtol=0)


@both_classes
def test_two_forward_passes_and_one_backward(case: ModelCase) -> None:
    """Each pass gets its own gradients, together and one after the other, in either order."""
    model = model_of(case)
    prompts = [random_tokens(model, seed=seed) for seed in (1, 2)]
    with relp(model):
        alone = [by_capture(model, tokens, POSTS) for tokens in prompts]
        runs = [captured_run(model, tokens, POSTS) for tokens in prompts]
        losses = [next_token_loss(logits, tokens) for (logits, _), tokens in zip(runs, prompts, strict=True)]
        places = [value for _, captured in runs for value in captured]
        together = torch.autograd.grad(losses[0] + losses[1], places, retain_graph=True)
        first = torch.autograd.grad(losses[0], runs[0][1])
        second = torch.autograd.grad(losses[1], runs[1][1])
    expected = [gradients[name] for gradients in alone for name in POSTS]
    for found, gradient in zip((*together, *first, *second), (*expected, *expected), strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-12)


@both_classes
def test_many_backward_passes_through_one_forward(case: ModelCase) -> None:
    """Repeated with `retain_graph`, and batched with `is_grads_batched`."""
    model, tokens = model_of(case), tokens_of(case)
    with relp(model):
        logits, places = captured_run(model, tokens, POSTS)
        outputs = logits[0, -1, :3]
        one_by_one = [torch.autograd.grad(output, places, retain_graph=True) for output in outputs]
        again = [torch.autograd.grad(output, places, retain_graph=True) for output in outputs]
        batched = torch.autograd.grad(outputs, places, grad_outputs=torch.eye(3).to(outputs), is_grads_batched=True)
    for row, (gradients, repeated) in enumerate(zip(one_by_one, again, strict=True)):
        for site, gradient in enumerate(gradients):
            assert torch.equal(gradient, repeated[site])
            torch.testing.assert_close(batched[site][row], gradient, atol=1e-12, rtol=1e-12)


@both_classes
def test_a_graph_made_inside_stays_relps_after_leaving(case: ModelCase, untouched: Untouched) -> None:
    model, tokens = model_of(case), tokens_of(case)
    with untouched(model):
        with relp(model):
            expected = by_capture(model, tokens, POSTS)
            logits, places = captured_run(model, tokens, POSTS)
        found = torch.autograd.grad(next_token_loss(logits, tokens), places)
    for gradient, name in zip(found, POSTS, strict=True):
        assert torch.equal(gradient, expected[name])


@both_classes
def test_stopping_at_a_layer(case: ModelCase, untouched: Untouched) -> None:
    model, tokens = model_of(case), tokens_of(case)
    with untouched(model), relp(model):
        residual = model(tokens, stop_at_layer=1)
        assert residual.requires_grad
        _, (middle, post) = captured_run(model, tokens, ["blocks.1.hook_resid_pre", POSTS[0]])
        assert torch.equal(residual, middle)
        (expected,) = torch.autograd.grad(middle.square().sum(), post)
        seen: list[Tensor] = []
        with model.hooks(bwd_hooks=[(POSTS[0], lambda gradient, hook: seen.append(gradient.clone()))]):
            model(tokens, stop_at_layer=1).square().sum().backward()
    torch.testing.assert_close(seen[0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("case", hooked)
def test_starting_at_a_layer(case: ModelCase, untouched: Untouched) -> None:
    """A residual that needs a gradient gets RelP's; one that does not would give none anywhere: an error.

    (TransformerBridge knows no `start_at_layer`.)
    """
    model, tokens = model_of(case), tokens_of(case)
    with relp(model):
        residual = model(tokens, stop_at_layer=1).detach()
    with untouched(model), relp(model):
        start = residual.clone().requires_grad_()
        (found,) = torch.autograd.grad(next_token_loss(model(start, start_at_layer=1), tokens), start)
    expected = expected_gradients(case, ALL_RULES)["blocks.1.hook_resid_pre"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with untouched(model), pytest.raises(PropagationError, match="requires_grad: set it"), relp(model):
        model(residual, start_at_layer=1)


@both_classes
def test_wrong_arguments_are_refused(case: ModelCase) -> None:
    model = model_of(case)
    with pytest.raises(SettingsError, match=r"expected rules out of .*'layernorm'"):
        relp(model, ("ln", "layernorm"))
    for stabilizer in (0.0, -1e-6, 1.0):
        with pytest.raises(SettingsError, match="expected a stabilizer between 0 and 1"):
            relp(model, stabilizer=stabilizer)
    for wrong in (torch.nn.Linear(2, 2), "gpt2", None):
        with pytest.raises(ArgumentError):
            relp(wrong)
