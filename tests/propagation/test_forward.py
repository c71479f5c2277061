"""Forward values inside `relp` are those outside, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, each_model, random_tokens
from tests.loops import for_each
from tests.propagation.readings import ALL_RULES, STEPWISE_NORMS, model_of, tokens_of
from tests.real_models import load_stories260K
from tl_neuron_circuits.propagation import relp


def everything(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Logits and every value that some hook sees."""
    logits, cache = model.run_with_cache(tokens)
    tensors = {name: cache[name] for name in cache if isinstance(cache[name], Tensor)}
    return {"logits": logits.detach(), **{name: value.detach().clone() for name, value in tensors.items()}}


def assert_identical(model: Any, tokens: Tensor, rules: tuple[str, ...] = ALL_RULES, **settings: Any) -> None:
    outside = everything(model, tokens)
    with relp(model, rules, **settings):
        inside = everything(model, tokens)
    assert inside.keys() == outside.keys() and len(outside) > 20
    for name, value in outside.items():
        assert torch.equal(inside[name], value), name


@each_model()
def test_forward_is_bit_identical(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    assert_identical(model, tokens)
    assert_identical(model, tokens, ("half",), stabilizer=1e-6)


@each_model()
@for_each("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_bit_identical_in_other_dtypes(case: ModelCase, dtype: torch.dtype) -> None:
    model = case.build(dtype=dtype)
    assert_identical(model, random_tokens(model))


@each_model(backend="TransformerBridge")
def test_forward_is_bit_identical_in_compatibility_mode(case: ModelCase) -> None:
    """Folded and centered weights, and TransformerLens' old hook names."""
    model = case.build(dtype=torch.float32)
    model.enable_compatibility_mode(disable_warnings=True)
    assert_identical(model, random_tokens(model))


@pytest.mark.parametrize("backend", ["HookedTransformer", "TransformerBridge"])
def test_forward_of_a_real_model_is_bit_identical(backend: str, shared_models: Any) -> None:
    model = load_stories260K(shared_models, backend)
    assert_identical(model, model.to_tokens("Once upon a time, there was a kid named Mia."))


@STEPWISE_NORMS
@each_model()
def test_values_at_hooks_with_backward_hooks_are_bit_identical(case: ModelCase) -> None:
    """A backward hook at a norm makes the Bridge compute it another way; relp must not add to that."""
    model, tokens = model_of(case), tokens_of(case)
    noted: list[Tensor] = []
    names = [n for n in ("blocks.0.ln1.hook_normalized", "blocks.0.mlp.hook_pre") if n in model.hook_dict]
    hooks = [(name, lambda gradient, hook: noted.append(gradient)) for name in names]
    with model.hooks(bwd_hooks=hooks):
        outside = model(tokens)
        with relp(model):
            inside = model(tokens)
            inside.sum().backward()
    assert torch.equal(inside, outside)
    assert len(noted) == len(names)
