"""Leaving out the products with rows of zeros changes no gradient, and no hook of a user is passed over."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models
from tests.propagation.readings import model_of, tokens_of
from tl_neuron_circuits.propagation import _linear, _session, relp
from tl_neuron_circuits.propagation._biases import biases_in_graph

FEW = all_models("gpt2", "llama", "gemma2")


@contextmanager
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Rows that were multiplied and rows there were, a product."""
    seen: list[tuple[int, int]] = []
    real = _linear._times_nonzero

    def counting(rows: Tensor, weight: Tensor) -> Tensor:
        seen.append((int(rows.any(-1).sum()), len(rows)))
        return real(rows, weight)

    with monkeypatch.context() as patch:
        patch.setattr(_linear, "_times_nonzero", counting)
        yield seen


@contextmanager
def left_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model's own backward pass through every linear map."""
    with monkeypatch.context() as patch:
        patch.setattr(_session, "end_linears", lambda *_: ())
        yield


def gradients(model: Any, tokens: Tensor, position: int | None, **hooks: Any) -> list[Tensor]:
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    store: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> Tensor:
        store[hook.name] = value
        return value

    fwd = [("hook_embed", keep), *((name, keep) for name in names), *hooks.get("fwd_hooks", ())]
    with relp(model), model.hooks(fwd_hooks=fwd, bwd_hooks=hooks.get("bwd_hooks", [])):
        logits = model(tokens)
        chosen = logits if position is None else logits[:, position]
        return list(torch.autograd.grad((chosen[..., 3] - chosen[..., 5] ** 2).sum(), list(store.values())))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", all_models())
def test_the_gradient_is_the_models_own(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(case), tokens_of(case)
    for position in (-1, None):
        with left_out(monkeypatch):
            expected = gradients(model, tokens, position)
        assert_same(gradients(model, tokens, position), expected)


@pytest.mark.parametrize("case", FEW)
def test_only_rows_with_a_gradient_are_multiplied(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of six tokens: two rows of twelve at the unembedding, and on the Bridge in the last MLP."""
    model, tokens = model_of(case), tokens_of(case)
    with products(monkeypatch) as seen:
        gradients(model, tokens, position=-1)
    assert seen[0] == (2, 12)
    at_the_end = 1 if case.backend == "HookedTransformer" else 3
    assert seen[:at_the_end] == [(2, 12)] * at_the_end


def test_the_products_are_with_those_rows_alone() -> None:
    rows, weight = torch.zeros(8, 5), torch.randn(5, 3)
    rows[[1, 6]] = torch.randn(2, 5)
    poisoned = weight.clone()
    assert torch.equal(_linear._times_nonzero(rows, poisoned)[[0, 2, 3, 4, 5, 7]], torch.zeros(6, 3))
    torch.testing.assert_close(_linear._times_nonzero(rows, weight), rows @ weight)
    infinite = torch.full((5, 3), float("inf"))  # 0 * inf is nan: rows of zeros must not meet the weight
    assert torch.equal(_linear._times_nonzero(rows, infinite)[0], torch.zeros(3))
    rows[2, 4] = float("nan")
    assert _linear._times_nonzero(rows, weight)[2].isnan().all()


@pytest.mark.parametrize("case", FEW)
def test_a_users_hook_at_the_unembedding_is_obeyed(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit there takes part in the gradient, and a backward hook there hears it."""
    model, tokens = model_of(case), tokens_of(case)
    if "unembed.hook_in" not in model.hook_dict:
        pytest.skip("this TransformerLens has no hook point inside the unembedding")
    heard: list[Tensor] = []
    twice = [("unembed.hook_in", lambda value, hook: 2 * value)]
    listen = [("unembed.hook_in", lambda gradient, hook: heard.append(gradient.clone()))]
    for hooks in ({"fwd_hooks": twice}, {"bwd_hooks": listen}, {"fwd_hooks": twice, "bwd_hooks": listen}):
        found = gradients(model, tokens, -1, **hooks)
        with left_out(monkeypatch):
            assert_same(found, gradients(model, tokens, -1, **hooks))
    assert len(heard) == 4
    assert_same([heard[0]], [heard[1]])
    assert heard[0][:, -1].any()


@pytest.mark.parametrize("case", FEW)
def test_a_raw_torch_hook_on_the_module_is_obeyed(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(case), tokens_of(case)
    (*_, unembedding) = _linear.end_linears(model, model.cfg.n_layers)
    handle = unembedding.register_forward_hook(lambda _, arguments, output: 3 * output)
    try:
        found = gradients(model, tokens, -1)
        with left_out(monkeypatch):
            assert_same(found, gradients(model, tokens, -1))
    finally:
        handle.remove()


@pytest.mark.parametrize("case", FEW)
def test_batches_of_gradients_pass_through(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(case), tokens_of(case)

    def batched() -> Tensor:
        store: list[Tensor] = []
        with relp(model), model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: store.append(value))]):
            goal = model(tokens)[0, -1]
            each = torch.eye(3, len(goal), dtype=goal.dtype)
            (found,) = torch.autograd.grad(goal, store, grad_outputs=each, is_grads_batched=True)
        return found

    found = batched()
    with left_out(monkeypatch):
        assert_same([found], [batched()])


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_parameters_in_the_graph_get_their_gradient(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(case), tokens_of(case)

    def of_biases() -> list[Tensor]:
        with relp(model), biases_in_graph(model) as biases:
            goal = model(tokens)[:, -1, 3].sum()
            found = torch.autograd.grad(goal, list(biases.values()), allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    found = of_biases()
    with left_out(monkeypatch):
        assert_same(found, of_biases())


@pytest.mark.parametrize("case", FEW)
def test_no_hook_stays_on_the_modules(case: ModelCase) -> None:
    model = model_of(case)
    linears = list(_linear.end_linears(model, model.cfg.n_layers))
    assert linears
    before = [len(module._forward_hooks) for module in linears]
    with relp(model):
        assert [len(module._forward_hooks) for module in linears] == [n + 1 for n in before]
    assert [len(module._forward_hooks) for module in linears] == before
