"""Attribution written out: one prompt at a time, one formula, gradients from the replicas."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.families import ModelCase
from tests.replicas import replica_gradients, replica_of
from tl_neuron_circuits.tasks import TokenizedPairs

POSTS = ("blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post")


def random_pairs(*lengths: int, seed: int = 0, corrupt: bool = True) -> TokenizedPairs:
    """Random prompts of the given lengths with random answers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(2, 26, shape, generator=generator)

    clean = [draw(length) for length in lengths]
    other = [draw(length) for length in lengths]
    answer, wrong = draw(len(lengths)), draw(len(lengths)) + 24
    return TokenizedPairs.from_tokens(clean, answer, other if corrupt else None, wrong)


def metric_at(logits: Tensor, pairs: TokenizedPairs, index: int) -> Tensor:
    """Logit difference of one pair, in a batch of any number of copies of it."""
    assert pairs.wrong_answer is not None
    return logits[:, -1, pairs.answer[index]] - logits[:, -1, pairs.wrong_answer[index]]


def values_of(model: Any, tokens: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Values at hooks for one prompt, heads concatenated: [pos, unit]."""
    _, cache = model.run_with_cache(tokens[None])
    return {name: cache[name][0].detach().flatten(1) for name in names}


def gradients_of(
    case: ModelCase, pairs: TokenizedPairs, index: int, tokens: Tensor, rules: Sequence[str]
) -> dict[str, Tensor]:
    """Gradients of one pair's metric at every hook, from the replica: [pos, unit]."""
    _, found = replica_gradients(
        replica_of(case), tokens[None], lambda logits: metric_at(logits, pairs, index).sum(), rules
    )
    return {name: gradient[0].flatten(1) for name, gradient in found.items()}


def plain_scores(
    case: ModelCase,
    model: Any,
    pairs: TokenizedPairs,
    names: Sequence[str],
    *,
    rules: Sequence[str] = (),
    denoising: bool = False,
) -> list[dict[str, Tensor]]:
    """(a_clean - a_corrupt) * gradient of every prompt by itself, kept apart."""
    assert pairs.corrupt is not None
    scores = []
    for index, (clean, corrupt) in enumerate(zip(pairs.clean, pairs.corrupt, strict=True)):
        here = gradients_of(case, pairs, index, corrupt if denoising else clean, rules)
        high, low = values_of(model, clean, names), values_of(model, corrupt, names)
        scores.append({name: (high[name] - low[name]) * here[name] for name in names})
    return scores


def mean_over_pairs(scores: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average over prompts, each first summed over its positions."""
    return {name: torch.stack([score[name].sum(0) for score in scores]).mean(0) for name in scores[0]}


def metric_with(model: Any, pairs: TokenizedPairs, index: int, tokens: Tensor, replace: dict[str, Tensor]) -> float:
    """The metric of one prompt with the values at some hooks replaced."""
    hooks = [(name, lambda value, hook, new=new: new.reshape(value.shape).to(value)) for name, new in replace.items()]
    with torch.no_grad():
        return float(metric_at(model.run_with_hooks(tokens[None], fwd_hooks=hooks), pairs, index))


def assert_scores(found: Tensor, expected: Tensor, case: ModelCase, note: object = "") -> None:
    """Scores are float32, so 1e-6 of the largest one is as equal as can be (1e-5 where the model itself is)."""
    assert found.dtype == torch.float32 and found.shape == expected.shape, (found.dtype, found.shape, expected.shape)
    size = max(float(expected.abs().max()), 1e-6)
    off = float((found.double() - expected.double()).abs().max()) / size
    assert off < max(1e-6, 2 * case.tolerance), f"{case.id} {note}: off by {off:.1e} of the largest score"
