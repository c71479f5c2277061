"""Profiles are gradients times values under RelP."""

from typing import Any

import pytest
import torch

from tests.families import ModelCase, random_tokens, typical_models
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.explain import profiles, prompt_scores
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.tasks import TokenizedPairs

few_models = pytest.mark.parametrize("case", typical_models("gpt2", "gemma2"))


@few_models
def test_profiles_are_gradients_times_values(case: ModelCase, untouched: Any) -> None:
    model = case.build()
    tokens = random_tokens(model, 2, 5)
    labels = ["L1/N3@2", "L0/N5", "L1/N8@4"]
    model(tokens)
    with untouched(model):
        found = profiles(model, tokens, labels, targets=3, chunk=2)
    assert found.attribution.shape == (3, 10) and found.contribution.shape == (3, 6)
    for prompt in range(2):
        kept = {}

        def keep(value: Any, hook: Any, kept: dict = kept) -> Any:
            kept[hook.name] = value
            return value

        names = ["hook_embed", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
        points = {model.hook_dict[name].name: name for name in names}
        with relp(model), model.hooks(fwd_hooks=[(name, keep) for name in names]):
            logits = model(tokens[prompt][None])[0, -1]
            embed, zero, one = (kept[next(n for n, m in points.items() if m == name)] for name in names)
            targets = [one[0, 2, 3], zero[0, :, 5].sum(), one[0, 4, 8]]
            for row, target in enumerate(targets):
                (gradient,) = torch.autograd.grad(target, embed, retain_graph=True)
                expected = (gradient * embed).sum(-1)[0].detach().float()
                torch.testing.assert_close(
                    found.attribution[row, prompt * 5 : prompt * 5 + 5], expected, rtol=1e-4, atol=1e-5
                )
            for column, token in enumerate(logits.topk(3).indices.tolist()):
                a, b = torch.autograd.grad(logits[token] - logits.mean(), [zero, one], retain_graph=True)
                expected = (
                    torch.stack([(b * one)[0, 2, 3], (a * zero)[0, :, 5].sum(), (b * one)[0, 4, 8]]).detach().float()
                )
                torch.testing.assert_close(found.contribution[:, prompt * 3 + column], expected, rtol=1e-4, atol=1e-5)
    assert set(found.to_dataframe()["view"]) == {"attribution", "contribution"} and "3 nodes" in repr(found)
    with pytest.raises(SettingsError, match="positions below 5"):
        profiles(model, tokens, "L0/N3@7")


@few_models
def test_contributions_are_prompt_scores_of_the_same_target(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 5)
    found = profiles(model, tokens, ["L0/N3", "L1/N4"], targets=1)
    pairs = TokenizedPairs.from_tokens(tokens, model(tokens)[:, -1].argmax(-1))
    scores = prompt_scores(
        model, pairs, ["L0/N3", "L1/N4"], metric=lambda logits, batch: logits[:, -1].amax(-1) - logits[:, -1].mean(-1)
    )
    torch.testing.assert_close(scores.values[0], found.contribution[:, 0], rtol=1e-4, atol=1e-6)
