"""The traps that silently give wrong gradients: each is either right or an error (ECOSYSTEM.md, traps 1 to 12)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models, hooked_transformer, model_cases, unsupported_models
from tests.loops import for_each
from tests.propagation.readings import (
    ALL_RULES,
    assert_close,
    by_capture,
    expected_gradients,
    model_of,
    settled,
    tokens_of,
)
from tests.replicas import _forward, replica_gradients, replica_of
from tl_neuron_circuits._errors import NumericalError, PropagationError, UnsupportedModelError
from tl_neuron_circuits.propagation import check_model, relp

Untouched = Callable[[Any], AbstractContextManager[None]]
both_classes = pytest.mark.parametrize("case", all_models("gpt2", "llama", "gemma2"))
bridges = [
    pytest.param(case, id=case.id) for case in model_cases("gpt2", "llama") if case.backend != "HookedTransformer"
]
hooked = [
    pytest.param(case, id=case.id) for case in model_cases("gpt2", "llama") if case.backend == "HookedTransformer"
]


@pytest.mark.parametrize("case", unsupported_models())
def test_mixtures_of_experts_are_refused(case: ModelCase, untouched: Untouched) -> None:
    """Their hook_post is the block's output: conservation would hold and the neurons would be none."""
    model = settled(case.build())
    with untouched(model):
        with (
            pytest.raises(UnsupportedModelError, match=r"mixture of experts \(\w+\).*basis=bases.MLPOutputs"),
            relp(model),
        ):
            pass
        report = check_model(model)
    assert not report.ok and any("mixture of experts" in problem for problem in report.problems)
    assert report.conservation != report.conservation  # nan: not measured


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("case", bridges)
def test_flags_that_bypass_the_norms_hooks_are_refused_on_the_bridge(case: ModelCase, flag: str) -> None:
    """Trap 5."""
    model = case.build()
    getattr(model, f"set_{flag}")(True)
    with pytest.raises(UnsupportedModelError, match=rf"Call model.set_{flag}\(False\)"), relp(model):
        pass
    assert flag in check_model(model).problems[0]
    getattr(model, f"set_{flag}")(False)
    expected = expected_gradients(case, ALL_RULES)
    with relp(model):
        assert_close(by_capture(model, tokens_of(case), list(expected)), expected, case)


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in"])
@pytest.mark.parametrize("case", hooked)
def test_flags_of_hooked_transformer_change_nothing(case: ModelCase, flag: str) -> None:
    if flag == "use_attn_in" and case.family == "llama":
        pytest.skip("TransformerLens itself cannot run it with grouped key-value heads")
    model = case.build()
    setattr(model.cfg, flag, True)
    expected = expected_gradients(case, ALL_RULES)
    with relp(model):
        assert_close(by_capture(model, tokens_of(case), list(expected)), expected, case, flag)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in model_cases("llama") if c.backend[0] == "H"])
def test_ungrouped_key_value_heads_change_nothing(case: ModelCase) -> None:
    model = hooked_transformer("llama", ungroup_grouped_query_attention=True)
    expected = expected_gradients(case, ALL_RULES)
    names = [name for name in expected if not name.endswith("hook_v")]  # which has the repeated heads then
    with relp(model):
        found = by_capture(model, tokens_of(case), names)
    assert_close(found, {name: expected[name] for name in names}, case)


@both_classes
def test_resetting_hooks_inside_does_not_disturb_relp(case: ModelCase, untouched: Untouched) -> None:
    """Trap 4: its hooks are torch's own."""
    model, tokens, expected = model_of(case), tokens_of(case), expected_gradients(case, ALL_RULES)
    with untouched(model), relp(model):
        model.reset_hooks()
        assert_close(by_capture(model, tokens, list(expected)), expected, case)


def edit_half_of_it(value: Tensor, hook: Any) -> Tensor:
    """Move every other neuron, so that the activation is taken elsewhere."""
    edited = value.clone()
    edited[..., ::2] = edited[..., ::2] * 0.5 + 0.3
    return edited


@pytest.mark.parametrize("case", hooked)
def test_a_piece_that_no_longer_computes_what_its_rule_says_is_an_error(case: ModelCase, untouched: Untouched) -> None:
    """Trap 4: here the activation is replaced under our feet."""
    model = case.build()
    with untouched(model), pytest.raises(PropagationError, match=r"blocks\.1\.mlp\..*does not rebuild"), relp(model):
        model.blocks[1].mlp.act_fn = torch.tanh
        model(tokens_of(case))


@for_each("when", ["before relp", "inside relp"])
@for_each("name", ["mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "attn.hook_v", "hook_resid_pre"])
@both_classes
def test_a_users_edit_is_part_of_the_model(case: ModelCase, name: str, when: str, monkeypatch: Any) -> None:
    """The replica with the same edit gives the same gradients, whoever came first."""
    model, tokens, hook = model_of(case), tokens_of(case), f"blocks.1.{name}"
    if hook not in model.hook_dict:
        pytest.skip("no second branch")
    forward = _forward.forward

    def edited_forward(replica: Any, tokens: Tensor, rules: Any, record: Any) -> Tensor:
        def edit(place: str, value: Tensor) -> Tensor:
            return edit_half_of_it(record(place, value), None) if place == hook else record(place, value)

        return forward(replica, tokens, rules, edit)

    def last(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].sum()

    monkeypatch.setattr("tests.replicas._gradients.forward", edited_forward)
    _, everything = replica_gradients(replica_of(case), tokens, last, ALL_RULES)
    upstream = ["hook_embed", "blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post"]
    store: dict[str, Tensor] = {}
    hooks = [(place, lambda value, hook, place=place: store.update({place: value}) or value) for place in upstream]
    edited = model.hooks(fwd_hooks=[(hook, edit_half_of_it)])
    first, second = (edited, relp(model)) if when == "before relp" else (relp(model), edited)
    with first, second, model.hooks(fwd_hooks=hooks):
        found = torch.autograd.grad(last(model(tokens)), [store[place] for place in upstream])
    assert_close(dict(zip(upstream, found, strict=True)), {place: everything[place] for place in upstream}, case)


@both_classes
def test_a_hook_may_edit_neurons_and_embeddings_in_place(case: ModelCase) -> None:
    """As steering code often does; the gradient before the edit knows of it."""
    model, tokens = model_of(case), tokens_of(case)

    def silence(value: Tensor, hook: Any) -> Tensor:
        value[:, 2] = 0
        return value

    for name in ("hook_embed", "blocks.0.mlp.hook_post", "blocks.1.hook_resid_pre"):
        before = [(name, silence)]
        with model.hooks(fwd_hooks=before):
            outside = model(tokens)
            with relp(model):
                inside = model(tokens)
                inside.sum().backward()
        with relp(model):
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=before), outside)
        assert torch.equal(inside, outside), name


@both_classes
def test_embeddings_that_cut_the_graph_are_an_error(case: ModelCase) -> None:
    """Trap 1 again: a hook that returns constants leaves nothing for a backward hook to see."""
    model, tokens = model_of(case), tokens_of(case)
    cut = [
        (name, lambda value, hook: value.detach())
        for name in ("hook_embed", "hook_pos_embed")
        if name in model.hook_dict
    ]
    with pytest.raises(PropagationError, match="leave a graph"), relp(model):
        model.run_with_hooks(tokens, fwd_hooks=cut)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@both_classes
def test_values_that_are_not_finite_are_an_error(case: ModelCase, value: float, untouched: Untouched) -> None:
    model, tokens = settled(case.build()), tokens_of(case)
    weights = [p for name, p in torch.nn.Module.named_parameters(model) if "mlp" in name and p.dim() > 1]
    with torch.no_grad():
        weights[0][0, 0] = value
    with untouched(model), pytest.raises(NumericalError, match="expected finite activations at blocks"), relp(model):
        model(tokens)
    assert not check_model(model).ok


@pytest.mark.parametrize("case", bridges)
def test_views_that_hooks_see_stay_in_the_graph(case: ModelCase) -> None:
    """Trap 3: OPT works on [batch * pos, d]; a hook that returns what it saw must not cut the graph (see readings)."""
    (opt,) = [c for c in model_cases("opt") if c.backend == case.backend]
    expected = expected_gradients(opt, ALL_RULES)
    with relp(model_of(opt)):
        assert_close(by_capture(model_of(opt), tokens_of(opt), list(expected)), expected, opt)
