"""What autograd would save inside an activation or a norm is not kept, unless somebody may need it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models
from tests.propagation.readings import model_of, settled, tokens_of
from tl_neuron_circuits._meter import Meter
from tl_neuron_circuits.propagation import _unsaved, relp

CASES = all_models("gpt2", "llama", "gemma2", "solu_ln")


def dropped(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    seen: list[torch.Size] = []
    real = _unsaved._drop

    def counting(value: Tensor) -> Any:
        seen.append(value.shape)
        return real(value)

    monkeypatch.setattr(_unsaved, "_drop", counting)
    return seen


def keeps_outside() -> bool:
    """Whether autograd keeps what it saves now."""
    x = torch.full((3,), 2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((x * x).sum(), x)
    return torch.equal(gradient, torch.full((3,), 4.0))


@pytest.mark.parametrize("case", CASES)
def test_every_activation_drops_what_it_saved(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of(case), dropped(monkeypatch)
    with relp(model):
        model(tokens_of(case))
        assert keeps_outside()
    assert sum(shape[-1] == model.cfg.d_mlp for shape in seen) >= model.cfg.n_layers


@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_the_users_at_the_same_hook_point_is_whole(case: ModelCase) -> None:
    """Their hook computes something of its own from the activation's input: its gradient is that without relp."""
    model, tokens, name = model_of(case), tokens_of(case), "blocks.1.mlp.hook_pre"

    def own_gradient(context: Any) -> Tensor:
        kept: list[Tensor] = []

        def square(value: Tensor, hook: Any) -> None:
            kept.extend([value, (value * value).sum()])

        with context, model.hooks(fwd_hooks=[(name, square)]):
            model(tokens)
            (found,) = torch.autograd.grad(kept[1], kept[0])
        assert torch.equal(found, 2 * kept[0])
        return found

    own_gradient(relp(model))


@pytest.mark.parametrize("case", all_models("gpt2", "llama"))
def test_a_raw_hook_inside_the_mlp_keeps_its_tensors(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.backend == "HookedTransformer":
        pytest.skip("its activation is a function: no module to hook")
    model, seen = settled(case.build()), dropped(monkeypatch)
    mlp = model.blocks[1].mlp.original_component
    activation = getattr(mlp, "act", None) or mlp.act_fn
    handle = activation.register_forward_hook(lambda *_: None)
    with relp(model):
        model(tokens_of(case))
    handle.remove()
    inside = sum(shape[-1] == model.cfg.d_mlp for shape in seen)
    seen.clear()
    with relp(model):
        model(tokens_of(case))
    assert sum(shape[-1] == model.cfg.d_mlp for shape in seen) == 2 * inside


@pytest.mark.parametrize("case", all_models("gpt2", "llama"))
def test_a_run_that_breaks_off_inside_leaves_nothing_open(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    grid = []

    def fail(*_: Any) -> None:
        raise MemoryError

    with relp(model):
        handle = model.hook_dict["blocks.0.mlp.hook_post"].register_forward_pre_hook(fail)  # before the relay closes
        with pytest.raises(MemoryError):
            model(tokens)
        handle.remove()
    assert keeps_outside()
    with relp(model), model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: grid.append(value))]):
        torch.autograd.grad(model(tokens)[:, -1, 3].sum(), grid)


@pytest.mark.parametrize("case", CASES)
def test_the_graph_is_smaller(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(case), tokens_of(case)

    def held() -> int:
        with Meter() as meter, relp(model):
            logits = model(tokens)
            now = meter._now
        del logits
        return now

    small = held()
    monkeypatch.setattr(_unsaved.Unsaved, "open", lambda self: None)
    assert small < held()
