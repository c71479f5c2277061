"""Two threads on one model: one works, the other is refused at once, and the model is as it was found."""

import copy
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.families import ModelCase, all_models
from tests.propagation.readings import by_capture, expected_gradients, model_of, next_token_loss, tokens_of
from tl_neuron_circuits._errors import PropagationError
from tl_neuron_circuits.models._threads import hooked
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.propagation.rules import ALL_RULES

Untouched = Callable[[Any], AbstractContextManager[None]]
both_classes = pytest.mark.parametrize("case", all_models("llama"))
POST = "blocks.0.mlp.hook_post"


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What the work returns or raises in another thread, which must end soon: nothing here may wait."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - the caller looks at it
            result.append(error)

    thread = threading.Thread(target=run, name="other", daemon=True)
    thread.start()
    thread.join(60)
    assert result, "the thread waits"
    return result[0]


@both_classes
def test_another_thread_is_refused_while_relp_is_active(case: ModelCase, untouched: Untouched) -> None:
    model, tokens, expected = model_of(case), tokens_of(case), expected_gradients(case, ALL_RULES)

    def enter() -> None:
        with relp(model):
            pass

    others = (enter, lambda: model(tokens), lambda: tnc.steer(model, tokens, ["L0/N1"], scale=0.0))
    with untouched(model), relp(model):
        for work in others:
            error = in_a_thread(work)
            assert isinstance(error, PropagationError) and "one thread at a time" in str(error), error
        found = by_capture(model, tokens, [POST])  # this thread's context is still whole
        assert torch.allclose(found[POST], expected[POST], atol=1e-5)
    with untouched(model):
        assert in_a_thread(enter) is None


@both_classes
def test_a_backward_pass_may_run_in_another_thread(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    with relp(model):
        store: dict[str, Any] = {}

        def capture(value: torch.Tensor, hook: Any) -> torch.Tensor:
            store[POST] = value
            return value

        loss = next_token_loss(model.run_with_hooks(tokens, fwd_hooks=[(POST, capture)]), tokens)
        (gradient,) = in_a_thread(lambda: torch.autograd.grad(loss, [store[POST]]))
    assert torch.allclose(gradient, expected_gradients(case, ALL_RULES)[POST], atol=1e-5)


@both_classes
def test_steering_in_two_threads_is_right_or_refused(case: ModelCase, untouched: Untouched) -> None:
    model, tokens = model_of(case), tokens_of(case)
    amounts = (0.0, 2.0, -3.0)
    expected = {amount: tnc.steer(model, tokens, ["L0/N1"], scale=amount).after for amount in amounts}
    together, results = threading.Barrier(len(amounts)), []

    def work(amount: float) -> None:
        together.wait(60)
        for _ in range(8):
            try:
                after = tnc.steer(model, tokens, ["L0/N1"], scale=amount).after
            except PropagationError:
                continue
            results.append(torch.equal(after, expected[amount]))

    with untouched(model):
        threads = [threading.Thread(target=work, args=(amount,)) for amount in amounts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results and all(results)
        assert torch.equal(tnc.steer(model, tokens, ["L0/N1"], scale=2.0).after, expected[2.0])


def test_a_thread_that_ended_does_not_pass_its_hold_on(untouched: Untouched) -> None:
    """Systems give a new thread the number of one that ended."""
    model = tnc.load_demo_model()
    model("the dog")  # TransformerLens 4.3 completes its own hooks at the first run
    context = relp(model)
    with untouched(model):
        in_a_thread(context.__enter__)
        assert all(isinstance(in_a_thread(lambda: model("the dog")), PropagationError) for _ in range(3))
        in_a_thread(lambda: context.__exit__(None, None, None))
        assert isinstance(tnc.steer(model, "the dog", ["L0/N1"], scale=0.0), tnc.SteeringResult)


@both_classes
def test_a_copy_is_free_and_works_in_another_thread(case: ModelCase) -> None:
    model, tokens = copy.deepcopy(model_of(case)), tokens_of(case)
    other = copy.deepcopy(model)
    with relp(model):
        result = in_a_thread(lambda: tnc.steer(other, tokens, ["L0/N1"], scale=0.0))
        assert isinstance(result, tnc.SteeringResult)
        inside = copy.deepcopy(model)  # with hooks of its own
        found = by_capture(inside, tokens, [POST])
    with relp(model):
        assert torch.equal(found[POST], by_capture(model, tokens, [POST])[POST])
    assert torch.equal(found[POST], by_capture(inside, tokens, [POST])[POST])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_does_not_inherit_what_other_threads_hold() -> None:
    from tl_neuron_circuits.models._threads import held

    model = tnc.load_demo_model()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with held(model, "attribute"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert entered.wait(60)
    child = os.fork()
    if child == 0:
        try:
            with held(model, "attribute"):
                os._exit(0)
        finally:
            os._exit(1)
    leave.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@both_classes
def test_hooks_are_added_as_the_models_own_context_does_and_a_users_hooks_stay(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    names = [POST, "blocks.1.attn.hook_z", POST]
    hooks = [(name, lambda value, hook, k=k: value * (1 + 0.1 * k)) for k, name in enumerate(names)]
    point, seen = model.hook_dict[POST], []
    point.add_hook(lambda value, hook: seen.append(hook.name))
    try:
        level, count = model.context_level, len(point.fwd_hooks)
        with model.hooks(fwd_hooks=hooks):
            expected = model(tokens)
        with hooked(model, hooks):
            assert len(point.fwd_hooks) == count + 2 and torch.equal(model(tokens), expected)
        with pytest.raises(ZeroDivisionError), hooked(model, hooks):
            raise ZeroDivisionError
        assert len(point.fwd_hooks) == count and model.context_level == level
        model(tokens)
        assert len(seen) == 3 and not torch.equal(model(tokens), expected)
    finally:
        point.remove_hooks("fwd")
