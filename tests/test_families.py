"""The tiny models are what the other tests take them for."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import ModelCase, model_cases, random_tokens, typical_models, unsupported_models
from tests.loops import for_each
from tests.real_models import load_stories260K

Untouched = Callable[[Any], AbstractContextManager[None]]


@for_each("case", model_cases() + model_cases(supported=False), ids=lambda case: case.id)
def test_a_seed_fixes_the_model(case: ModelCase) -> None:
    """The same seed gives equal logits, another seed gives others."""
    model = case.build()
    tokens = random_tokens(model)
    logits = model(tokens)
    assert logits.isfinite().all()
    assert torch.equal(logits, case.build()(tokens))
    assert not torch.allclose(logits, case.build(seed=1)(tokens))


@for_each("case", model_cases() + model_cases(supported=False), ids=lambda case: case.id)
def test_no_parameter_is_trivial(case: ModelCase) -> None:
    """Every parameter is spread out, so that a rule that drops one changes the numbers."""
    parameters = dict(case.build().named_parameters())
    trivial = [name for name, parameter in parameters.items() if parameter.std() < 0.05]
    # TransformerLens 3's Bridge adds an unembedding bias of zeros.
    assert trivial in ([], ["lm_head._original_component.bias"], ["unembed._original_component.bias"])


@for_each("case", typical_models() + unsupported_models())
def test_a_plain_forward_leaves_no_trace(case: ModelCase, untouched: Untouched) -> None:
    """`untouched` accepts what changes nothing, a run with temporary hooks included."""
    model = case.build()
    tokens = random_tokens(model)
    model(tokens)
    with untouched(model):
        model(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: value)])


def _add_hook(model: Any) -> None:
    model.hook_dict["blocks.1.mlp.hook_post"].add_hook(lambda value, hook: value)


def _add_backward_hook(model: Any) -> None:
    model.hook_dict["blocks.0.mlp.hook_post"].add_hook(lambda gradient, hook: None, dir="bwd")


def _add_torch_hook(model: Any) -> None:
    next(iter(model.hook_dict.values())).register_forward_pre_hook(lambda module, inputs: None)


def _freeze(model: Any) -> None:
    list(model.parameters())[-1].requires_grad_(False)


def _collect_gradients(model: Any) -> None:
    model(random_tokens(model)).sum().backward()


def _change_a_parameter(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.0)


def _train(model: Any) -> None:
    next(iter(model.hook_dict.values())).train()


def _set_a_flag(model: Any) -> None:
    model.cfg.use_attn_result = not model.cfg.use_attn_result


def _draw(model: Any) -> None:
    torch.rand(1)


@for_each(
    "change",
    [
        _add_hook,
        _add_backward_hook,
        _add_torch_hook,
        _freeze,
        _collect_gradients,
        _change_a_parameter,
        _train,
        _set_a_flag,
        _draw,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in model_cases("llama")])
def test_untouched_sees_each_trace(case: ModelCase, change: Callable[[Any], None], untouched: Untouched) -> None:
    """`untouched` can fail: every kind of trace is noticed."""
    model = case.build()
    model(random_tokens(model))
    with pytest.raises(AssertionError, match="left changed"), untouched(model):
        change(model)


def test_stories260K_tells_a_story(stories260K: Any) -> None:
    """The real model with its tokenizer continues as its card says."""
    tokens = stories260K.to_tokens("Once upon a time", prepend_bos=True)
    for _ in range(12):
        tokens = torch.cat([tokens, stories260K(tokens)[:, -1:].argmax(-1)], dim=-1)
    assert stories260K.to_string(tokens[0, 1:]).startswith("Once upon a time, there was a little girl named Lily")


def test_stories260K_is_the_same_in_both_classes(shared_models: Path) -> None:
    """Both model classes compute the same logits."""
    hooked = load_stories260K(shared_models, "HookedTransformer")
    bridge = load_stories260K(shared_models, "TransformerBridge")
    tokens = hooked.to_tokens("Lily saw a big ball.")
    assert torch.equal(tokens, bridge.to_tokens("Lily saw a big ball."))
    torch.testing.assert_close(hooked(tokens), bridge(tokens), atol=5e-5, rtol=0)


def test_toy_nano_sort_sorts(toy_nano_sort: Any) -> None:
    """The toy sorter sorts."""
    symbols = torch.tensor([[2, 0, 1, 2, 1, 0], [1, 1, 0, 0, 2, 2]])
    expected = symbols.sort(dim=-1).values
    logits = toy_nano_sort(torch.cat([symbols, expected[:, :-1]], dim=-1))
    assert torch.equal(logits[:, 5:].argmax(-1), expected)


def test_tracr_programs_run(tracr: tuple[Any, Path]) -> None:
    """The compiled programs load and give finite outputs."""
    model, folder = tracr
    assert (folder / "ground_truth.json").is_file()
    assert model(torch.zeros(1, model.cfg.n_ctx, dtype=torch.long)).isfinite().all()
