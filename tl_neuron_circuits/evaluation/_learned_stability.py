"""Learned masks under resampling: a mask is no mean over pairs, so every draw of words learns one of its own.

In draw b a pair is taken w_b times, the product of its words' Poisson weights (`_stability.py`), and the mask is
learned from its start on these pairs, in the same order of steps and budgets. Over draws

    best_b = the best nodes of draw b          se = standard deviation of a node's score over draws

which is all that is kept, so that memory does not grow with draws. Null scores are learned once for each null set.

Cost: one learning per draw and per null set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError
from .._progress import progress
from ..nodes._scores import NodeScores
from ..tasks._tokenized import TokenizedPairs

Learn = Callable[[TokenizedPairs], NodeScores]
"""The scores that some pairs give."""


@dataclass(frozen=True)
class LearnedDraws:
    """What is left of the draws."""

    best: Int[Tensor, "draw rank"]
    deviation: Float[Tensor, " node"]


def learn_draws(
    learn: Learn, tokens: TokenizedPairs, weights: Float[Tensor, "draw pair"], size: int, shown: bool | None
) -> LearnedDraws:
    """Learn a mask in every draw that has two pairs or more.

    Raises:
        SettingsError: fewer than two such draws.
    """
    best: list[Tensor] = []
    mean = squares = torch.zeros(())
    for row in progress(weights.long(), desc="stability", verbose=shown, unit="draw"):
        chosen = torch.arange(len(tokens)).repeat_interleave(row).tolist()
        if len(chosen) < 2:
            continue
        flat = learn(tokens.select(chosen)).flat().double().cpu()
        best.append(flat.topk(min(size, len(flat))).indices)
        before = flat - mean  # Welford's recurrence: no draw is kept
        mean = mean + before / len(best)
        squares = squares + before * (flat - mean)
    if len(best) < 2:
        raise SettingsError(f"only {len(best)} of {len(weights)} draws had pairs to learn on. Use more draws or words.")
    return LearnedDraws(torch.stack(best), (squares / (len(best) - 1)).sqrt().float())


def learned_nulls(
    learn: Learn, tokens: TokenizedPairs, words: Sequence[str], draws: int, seed: int
) -> list[Float[Tensor, " node"]]:
    """Scores learned on pairs whose answers are swapped, or not, by a coin for each word."""
    names = list(dict.fromkeys(words))
    place = torch.tensor([names.index(word) for word in words], device=tokens.answer.device)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        swapped = torch.randint(2, (len(names),), generator=generator).bool().to(place.device)[place]
        found.append(learn(swap_answers(tokens, swapped)).flat().cpu())
    return found


def swap_answers(tokens: TokenizedPairs, swapped: Tensor | None = None) -> TokenizedPairs:
    """These pairs, answer and wrong answer exchanged: in all of them, or where `swapped` is true."""
    assert tokens.wrong_answer is not None
    mask = torch.ones_like(tokens.answer, dtype=torch.bool) if swapped is None else swapped
    answer = torch.where(mask, tokens.wrong_answer, tokens.answer)
    return replace(tokens, answer=answer, wrong_answer=torch.where(mask, tokens.answer, tokens.wrong_answer))
