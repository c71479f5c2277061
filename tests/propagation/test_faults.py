"""Whatever breaks off a forward or a backward pass inside `relp`, wherever, leaves nothing behind."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models
from tests.propagation.readings import by_capture, expected_gradients, model_of, next_token_loss, tokens_of
from tl_neuron_circuits._meter import Meter
from tl_neuron_circuits.propagation import _wiring, relp
from tl_neuron_circuits.propagation.rules import ALL_RULES

Untouched = Callable[[Any], AbstractContextManager[None]]
CASES = all_models("gpt2", "llama", "gemma2", "solu_ln")
POST = "blocks.0.mlp.hook_post"
FAULTS = (torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError, MemoryError)


def assert_nothing_is_left_open() -> None:
    """No saved-tensor hook of ours is in force: x * x has its gradient."""
    x = torch.full((3,), 3.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((x * x).sum(), x)
    assert torch.equal(gradient, torch.full((3,), 6.0))


class Fuse:
    """Raises when it was called for the `at`-th time; counts calls."""

    def __init__(self, at: int, fault: type[BaseException]) -> None:
        self.at, self.fault, self.calls = at, fault, 0

    def burn(self, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.fault("injected")
        return real(*arguments, **named)


OURS = ("_read", "_relay", "_make_leaf", "_end_of_forward", "_enter_attention", "_enter_scale")


def wire(monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    """Every hook of ours, and every rule in the backward pass, passes the fuse first."""
    for name in OURS:
        real = getattr(_wiring.Wiring, name)

        def burning(self: Any, *arguments: Any, real: Any = real) -> Any:
            return fuse.burn(partial(real, self), *arguments)

        monkeypatch.setattr(_wiring.Wiring, name, burning)
    real_backward = _wiring.Relay.backward
    monkeypatch.setattr(
        _wiring.Relay, "backward", staticmethod(lambda *arguments: fuse.burn(real_backward, *arguments))
    )


@pytest.mark.parametrize("case", CASES)
def test_a_fault_at_any_of_our_hooks_leaves_nothing(
    case: ModelCase, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caught outside the context, or inside it, where the next pass gives the right gradients."""
    model, tokens = model_of(case), tokens_of(case)
    expected = expected_gradients(case, ALL_RULES)[POST]
    counting = Fuse(0, RuntimeError)
    with relp(model):  # the first use measures conservation, with a pass of its own
        pass
    with monkeypatch.context() as patch:
        wire(patch, counting)
        with relp(model):
            by_capture(model, tokens, [POST])
    assert counting.calls > 10
    for at in range(1, counting.calls + 1):
        fault = FAULTS[at % len(FAULTS)]
        with monkeypatch.context() as patch:
            wire(patch, Fuse(at, fault))
            with untouched(model):
                with pytest.raises(fault, match="injected"), relp(model):
                    by_capture(model, tokens, [POST])
                assert_nothing_is_left_open()
        with monkeypatch.context() as patch:
            wire(patch, Fuse(at, fault))
            with untouched(model), relp(model):
                with pytest.raises(fault, match="injected"):
                    by_capture(model, tokens, [POST])
                assert_nothing_is_left_open()
                found = by_capture(model, tokens, [POST])[POST]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["hook_pre", "hook_post"])
@pytest.mark.parametrize("case", CASES)
def test_an_out_of_memory_error_is_raised_as_what_it_is(case: ModelCase, name: str, untouched: Untouched) -> None:
    """Inside an activation, at either end, and in a batch of gradients."""
    model, tokens = model_of(case), tokens_of(case)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with untouched(model), relp(model):
        handle = model.hook_dict[f"blocks.0.mlp.{name}"].register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(tokens)
        handle.remove()
        assert_nothing_is_left_open()
        by_capture(model, tokens, [POST])


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_gradients_meets_an_out_of_memory_error(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(case), tokens_of(case)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    store: list[Tensor] = []
    with relp(model), model.hooks(fwd_hooks=[(POST, lambda value, hook: store.append(value))]):
        outputs = model(tokens)[0, -1, :3]
        monkeypatch.setattr(_wiring.Relay, "backward", staticmethod(fail))
        grid = torch.eye(3).to(outputs)
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(outputs, store, grad_outputs=grid, is_grads_batched=True)


def test_the_fuse_burns() -> None:
    with pytest.raises(KeyboardInterrupt):
        Fuse(1, KeyboardInterrupt).burn(print)


@pytest.mark.parametrize("case", CASES)
def test_what_autograd_saves_inside_a_piece_is_freed(case: ModelCase) -> None:
    """The graph of a forward pass inside `relp` holds less than the plain one."""
    model, tokens = model_of(case), tokens_of(case)

    def held(rules: tuple[str, ...]) -> int:
        with Meter() as meter, relp(model, rules):
            loss = next_token_loss(model(tokens), tokens)
            now = meter._now
        del loss
        return now

    assert held(ALL_RULES) < 0.85 * held(())
