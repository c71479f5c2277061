"""Attribution prompt by prompt: the same numbers as `attribute` gives on average."""

from typing import Any

import pytest
import torch

from tests.families import ModelCase, random_tokens, typical_models
from tl_neuron_circuits._errors import PairsError, SettingsError
from tl_neuron_circuits.explain import prompt_scores
from tl_neuron_circuits.nodes import attribute
from tl_neuron_circuits.tasks import TokenizedPairs

few_models = pytest.mark.parametrize("case", typical_models("gpt2", "gemma2"))


def pairs_of(model: Any, n: int = 4, pos: int = 5) -> TokenizedPairs:
    tokens = random_tokens(model, 3 * n, pos)
    answers = torch.arange(2, n + 2)
    return TokenizedPairs.from_tokens(tokens[:n], answers, tokens[n : 2 * n], answers + n)


@few_models
@pytest.mark.parametrize("baseline", ["zero", "corrupt"])
def test_their_mean_is_what_attribute_gives(case: ModelCase, baseline: Any, untouched: Any) -> None:
    model = case.build()
    pairs = pairs_of(model)
    model(pairs.clean[0][None])
    with untouched(model):
        scores = prompt_scores(model, pairs, baseline=baseline, batch_size=3)
    expected = attribute(model, pairs, baseline=baseline, positions="sum").to_dataframe()
    assert list(scores.nodes["label"]) == list(expected["label"])
    torch.testing.assert_close(
        scores.values.mean(0), torch.tensor(expected["score"].to_numpy(copy=True)), rtol=1e-4, atol=1e-5
    )
    for row in (0, 3):
        one = TokenizedPairs.from_tokens(
            [pairs.clean[row]], pairs.answer[row : row + 1], [pairs.corrupt[row]], pairs.wrong_answer[row : row + 1]
        )
        alone = attribute(model, one, baseline=baseline, positions="sum").flat()
        torch.testing.assert_close(scores.values[row], alone, rtol=1e-4, atol=1e-5)


@few_models
def test_positions_polarity_and_absence(case: ModelCase) -> None:
    model = case.build()
    pairs = pairs_of(model)
    kept = attribute(model, pairs, baseline="zero")
    fixed = prompt_scores(model, pairs, ["L1/N3@2", "L0/N5@4"])
    expected = torch.stack([kept.values["blocks.1.mlp.hook_post"][2, 3], kept.values["blocks.0.mlp.hook_post"][4, 5]])
    torch.testing.assert_close(fixed.values.mean(0), expected, rtol=1e-4, atol=1e-6)

    labels = ["L1/N3", "L0/N5@4", "L0/N7"]
    whole, apart = prompt_scores(model, pairs, labels), prompt_scores(model, pairs, labels, polarity=True)
    assert list(apart.nodes["label"]) == ["L1/N3+", "L0/N5+@4", "L0/N7+", "L1/N3-", "L0/N5-@4", "L0/N7-"]
    torch.testing.assert_close(apart.values[:, :3] + apart.values[:, 3:], whole.values)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.stack(list(pairs.clean)))
    positive = cache["blocks.0.mlp.hook_post"][:, 4, 5] > 0
    assert ((apart.values[:, 1] != 0) == positive).all() and ((apart.values[:, 4] != 0) == ~positive).all()

    share = 0.02
    pruned = prompt_scores(model, pairs, [f"L1/N{unit}" for unit in range(24)], share=share)
    with torch.no_grad():
        logits = model(torch.stack(list(pairs.clean)))[:, -1]
    rows = torch.arange(4)
    metric = (logits[rows, pairs.answer] - logits[rows, pairs.wrong_answer]).abs()
    labels = [f"L1/N{unit}@{position}" for unit in range(24) for position in range(5)]
    each = prompt_scores(model, pairs, labels).values
    present = each.abs() >= (share * metric)[:, None]
    assert 0 < present.float().mean() < 1
    summed = torch.where(present, each, 0.0).unflatten(1, (24, 5)).sum(-1)
    torch.testing.assert_close(pruned.values, summed)


@few_models
def test_errors(case: ModelCase) -> None:
    model = case.build()
    pairs = pairs_of(model)
    with pytest.raises(SettingsError, match="positions below 5"):
        prompt_scores(model, pairs, "L0/N3@5")
    with pytest.raises(SettingsError, match="units below 24"):
        prompt_scores(model, pairs, "L0/N24")
    alone = TokenizedPairs.from_tokens(pairs.clean, pairs.answer, wrong_answer=pairs.wrong_answer)
    with pytest.raises(PairsError, match="needs corrupt prompts"):
        prompt_scores(model, alone, "L0/N3", baseline="corrupt")


def test_on_a_real_model(stories260K: Any) -> None:
    from tests.stories_tasks import PRONOUN_TEMPLATES, pronoun_pairs

    pairs = pronoun_pairs(PRONOUN_TEMPLATES[0], "attribution", 6)
    scores = prompt_scores(stories260K, pairs, share=0.005)
    assert scores.values.shape == (12, 5 * 172) and 0.2 < (scores.values != 0).float().mean() < 0.8
    assert "12 prompts" in repr(scores) and "<table" in scores._repr_html_()
    assert list(scores.to_dataframe().columns) == list(scores.nodes["label"])
