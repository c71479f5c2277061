"""The Identity rule's coefficient f(x) / x: exact closed forms, any other function, and the fork's stabilized form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, ModelCase, all_models, each_model, hooked_transformer, model_cases
from tests.propagation.readings import assert_close, model_of, tokens_of
from tests.replicas import _forward, replica_gradients, replica_of
from tl_neuron_circuits._errors import UnsupportedModelError
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.propagation._activations import KNOWN, Activation, find_activation

SITES = ["blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"]
plain_mlps = [pytest.param(c, id=c.id) for c in model_cases("gpt2", "pythia", "opt", "solu", "bloom", "phi")]


def values_and_gradients(model: Any, tokens: Tensor, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    store: dict[str, Tensor] = {}
    ups = [name.replace("hook_pre", "hook_pre_linear") for name in SITES if name.endswith("hook_pre")]
    names = [name for name in SITES + ups if name in model.hook_dict]
    hooks = [(name, lambda value, hook, name=name: store.update({name: value}) or value) for name in names]
    with relp(model, ("identity", "half"), **settings):
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        found = torch.autograd.grad(logits[:, -1, 3].sum(), [store[name] for name in names])
    return {name: value.detach() for name, value in store.items()}, dict(zip(names, found, strict=True))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known_ratios_are_exact(known: Activation) -> None:
    """ratio * x is f(x) to rounding, also near zero where f(x) / x has no digits left, and at zero it is the limit."""
    small = torch.logspace(-30, -1, 30, dtype=torch.float64)
    x = torch.cat([-small, torch.zeros(1), small])
    assert known.function is not None and known.exact_ratio is not None
    torch.testing.assert_close(known.ratio(x) * x, known.function(x), atol=0, rtol=1e-9, equal_nan=False)
    assert torch.isfinite(known.ratio(x)).all()
    wide = torch.linspace(-30, 30, 121, dtype=torch.float64)
    torch.testing.assert_close(known.ratio(wide) * wide, known.function(wide), atol=1e-15, rtol=1e-9)
    if known.name not in ("relu", "solu"):
        assert float(known.ratio(torch.zeros(1))) == 0.5


@each_model()
def test_the_models_own_activation_is_found(case: ModelCase) -> None:
    """By its values, on either model class; SoLU looks at all neurons together."""
    kinds = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "solu_ln": "solu"}
    kind = replica_of(case).architecture.activation
    for layer in range(2):
        found = find_activation(model_of(case), layer)
        assert found.name == kinds.get(kind, kind) and found.exact_ratio is not None


def strange(x: Tensor) -> Tensor:
    """An activation nobody uses, not zero at zero."""
    return torch.nn.functional.softplus(x) - 0.1 * torch.sin(3 * x)


@pytest.mark.parametrize("family", ["gpt2", "llama", "solu_ln"])
@pytest.mark.parametrize("function", [strange, torch.nn.functional.mish, torch.nn.functional.leaky_relu])
def test_any_other_activation_uses_its_value(family: str, function: Callable[[Tensor], Tensor]) -> None:
    """The ratio is then f(x) / x as observed."""
    model = hooked_transformer(family)
    for block in model.blocks:
        block.mlp.act_fn = function
    values, gradients = values_and_gradients(model, tokens_of(ModelCase(family, "HookedTransformer")))
    if family == "solu_ln":
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        return
    for name in SITES[::2]:
        pre, post = values[name], gradients[name.replace("hook_pre", "hook_post")]
        factor = 0.5 * values[name.replace("hook_pre", "hook_pre_linear")] if FAMILIES[family].gated else 1.0
        torch.testing.assert_close(gradients[name], factor * function(pre) / pre * post, atol=1e-12, rtol=1e-10)


def stabilized(kind: str, x: Tensor, rules: Any) -> Tensor:
    """What the published fork computes: x * sg(f(x) / (x + sign(x) * 1e-6))."""
    value = x * _forward.RATIOS[kind](x)
    return x * (value / (x + x.sign() * 1e-6)).detach() if "identity" in rules else value


@each_model()
def test_the_stabilizer_gives_the_forks_gradients(case: ModelCase, monkeypatch: Any) -> None:
    """The fork also moves the forward pass by 1e-6; relp does not, so the two agree to that."""
    model, tokens = model_of(case), tokens_of(case)
    monkeypatch.setattr(_forward, "_activation", stabilized)
    _, expected = replica_gradients(
        replica_of(case), tokens, lambda logits: logits[:, -1, 3].sum(), ("identity", "half")
    )
    _, found = values_and_gradients(model, tokens, stabilizer=1e-6)
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        assert float((gradient - expected[name]).abs().max()) < 2e-5 * size, name


@pytest.mark.parametrize("case", plain_mlps)
def test_near_zero_the_stabilizer_matters_and_the_exact_ratio_does_not_break(case: ModelCase) -> None:
    """At pre = 1e-6 the fork halves the ratio; at 0 it has none."""
    model, tokens = model_of(case), tokens_of(case)

    def tiny(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[..., 0], value[..., 1], value[..., 2] = 1e-6, -1e-6, 0.0
        return value

    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_pre", tiny)]):
        values, exact = values_and_gradients(model, tokens)
        _, forks = values_and_gradients(model, tokens, stabilizer=1e-6)
    pre, post = values["blocks.1.mlp.hook_pre"], exact["blocks.1.mlp.hook_post"]
    ratio = _forward.RATIOS[replica_of(case).architecture.activation](pre)
    close = {"atol": 1e-9, "rtol": 10 * case.tolerance}
    torch.testing.assert_close(exact["blocks.1.mlp.hook_pre"], ratio * post, **close)
    expected = torch.where(pre == 0, 0.0, pre * ratio / (pre + pre.sign() * 1e-6)) * forks["blocks.1.mlp.hook_post"]
    torch.testing.assert_close(forks["blocks.1.mlp.hook_pre"], expected, **close)
    torch.testing.assert_close(2 * expected[..., :2], ratio[..., :2] * post[..., :2], atol=1e-9, rtol=1e-4)


def test_an_activation_that_cannot_be_found_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match="found neither by name nor on the module"):
        Activation("unknown", None, None).value(torch.ones(3))


@pytest.mark.parametrize("case", all_models("llama", "gemma2"))
def test_the_half_rule_alone_uses_the_gates_true_slope(case: ModelCase) -> None:
    """d pre = up / 2 * f'(pre) * d post, by torch's own derivative."""
    model, tokens = model_of(case), tokens_of(case)
    _, expected = replica_gradients(replica_of(case), tokens, lambda logits: logits[:, -1, 3].sum(), ("half",))
    store: dict[str, Tensor] = {}
    hooks = [(name, lambda value, hook, name=name: store.update({name: value}) or value) for name in SITES]
    with relp(model, ("half",)):
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        found = torch.autograd.grad(logits[:, -1, 3].sum(), [store[name] for name in SITES])
    assert_close(dict(zip(SITES, found, strict=True)), {name: expected[name] for name in SITES}, case)
