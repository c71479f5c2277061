"""Reading values ends the forward pass at the last of them, and changes nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models, random_tokens
from tests.model_state import unchanged
from tl_neuron_circuits.bases._runs import values_at

CASES = all_models("gpt2", "llama", "gemma2", "opt")
NAMES = ("blocks.0.hook_resid_pre", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post")


def of_the_whole_run(model: Any, tokens: Tensor, hooks: Any = ()) -> dict[str, Tensor]:
    store: dict[str, Tensor] = {}
    keep = [(name, lambda value, hook, name=name: store.update({name: value.clone()})) for name in NAMES]
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *keep]):
        model(tokens)
    return store


def calls_of(model: Any) -> tuple[list[str], Any]:
    seen: list[str] = []
    return seen, model.unembed.register_forward_hook(lambda *_: seen.append("unembed"))


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_whole_run_and_no_logits_are_computed(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model)
    twice = [("blocks.0.hook_resid_pre", lambda value, hook: 2 * value)]
    for hooks in ((), twice):
        expected = of_the_whole_run(model, tokens, hooks)
        seen, handle = calls_of(model)
        with unchanged(model):
            found = values_at(model, tokens, NAMES, hooks=hooks)
        handle.remove()
        assert not seen
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("case", CASES)
def test_offloaded_models_run_to_their_end(case: ModelCase) -> None:
    """accelerate puts weights back after a module's forward pass: it must not be cut short."""
    model = case.build()
    model.unembed._hf_hook = object()
    seen, _ = calls_of(model)
    values_at(model, random_tokens(model), NAMES)
    assert seen == ["unembed"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_of_a_value_is_the_callers_choice(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model)
    found = values_at(model, tokens, NAMES, kept=lambda value: value.sum(-1))
    expected = of_the_whole_run(model, tokens)
    assert all(torch.equal(found[name], expected[name].sum(-1)) for name in NAMES)
