"""Direct logit effects against gradients with frozen norms."""

from typing import Any

import pytest
import torch

from tests.families import ModelCase, random_tokens, typical_models
from tests.loops import for_each
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.interventions import direct_logit_effects
from tl_neuron_circuits.interventions._direct_logit_effects import effects_on_logits, output_weights
from tl_neuron_circuits.propagation import relp

few_models = pytest.mark.parametrize("case", typical_models("gpt2", "gemma2"))
_CAPS = {"HookedTransformer": {"output_logits_soft_cap": -1.0}, "TransformerBridge": {"final_logit_softcapping": None}}


def gradients_of_logits(model: Any, tokens: Any, name: str) -> torch.Tensor:
    """d (logit - mean logit) / d unit at the last position, norms frozen: [d_vocab, unit]."""
    kept = {}

    def keep(value: Any, hook: Any) -> Any:
        kept["value"] = value
        return value

    with relp(model, rules=("ln",)), model.hooks(fwd_hooks=[(name, keep)]):
        last = model(tokens)[0, -1]
        centered = last - last.mean()
        rows = [torch.autograd.grad(c, kept["value"], retain_graph=True)[0][0, -1] for c in centered]
    return torch.stack(rows)


@for_each(
    "case",
    typical_models(
        "gpt2", "gpt2_folded", "llama", "llama_folded", "gemma2", "gemma3", "pythia", "opt", "solu_ln", "no_norm"
    ),
)
def test_the_effect_is_the_gradient_through_frozen_norms_up_to_their_scale(case: ModelCase, untouched: Any) -> None:
    overrides = _CAPS[case.backend] if case.family == "gemma2" else {}
    model = case.build(**overrides)
    tokens = random_tokens(model, 1)
    gradient = gradients_of_logits(model, tokens, "blocks.1.mlp.hook_post")
    with untouched(model):
        weights = output_weights(model, 1)
        effects = effects_on_logits(model, 1, weights).T.to(gradient)
    scale = (effects * gradient).sum() / (gradient * gradient).sum()
    assert scale > 0
    torch.testing.assert_close(effects, gradient * scale, rtol=1e-3, atol=1e-4 * float(effects.abs().max()))


@few_models
def test_the_table_lists_the_extremes(case: ModelCase) -> None:
    model = case.build()
    effects = effects_on_logits(model, 0, output_weights(model, 0)[[3, 9]])
    found = direct_logit_effects(model, ["L0/N3@2", "L1/N4", "L0/N9"], k=4, batch_size=1)
    table = found.to_dataframe()
    assert len(table) == 3 * 8 and set(table["label"]) == {"L0/N3", "L0/N9", "L1/N4"}
    for label, effect in zip(("L0/N3", "L0/N9"), effects, strict=True):
        rows = table[table["label"] == label]
        up, down = (rows[rows["direction"] == d] for d in ("promoted", "suppressed"))
        assert list(up["token_id"]) == effect.topk(4).indices.tolist()
        assert list(down["token_id"]) == effect.topk(4, largest=False).indices.tolist()
        assert up["effect"].is_monotonic_decreasing and down["effect"].is_monotonic_increasing
    torch.testing.assert_close(effects.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    assert len(found.summary()) == 3 and "3 neurons" in repr(found) and "<table" in found._repr_html_()
    with pytest.raises(SettingsError, match="expected neurons"):
        direct_logit_effects(model, "L0/R3")
    with pytest.raises(SettingsError, match="units below 24"):
        direct_logit_effects(model, "L0/N24")
    with pytest.raises(SettingsError, match="k and batch_size"):
        direct_logit_effects(model, "L0/N3", k=0)


def test_html_of_tokens_is_escaped(stories260K: Any) -> None:
    found = direct_logit_effects(stories260K, [f"L4/N{unit}" for unit in range(172)], k=20)
    assert (found.table["token"] == "<").any() or (found.table["token"].str.contains("<")).any()
    assert "'<'" not in found._repr_html_()
