"""A rollout: the tokens that a model generates after each prompt, each a target where it is predicted.

A prompt and all but the last generated token are one run, whose position n - 1 + i predicts the i-th token. Attention
is causal, so every target has the value, and every node the score for it, that a trace of its own prompt would give.
Several prompts go on for equally many tokens: the i-th target is each prompt's own i-th token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import SettingsError
from ..bases._runs import run_logits
from ..models._protocol import TransformerLensModel

Rollout = int | str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | None
"""How many tokens to generate, or the continuation as text or tokens; for several prompts a list with one for each."""


def roll_out(
    model: TransformerLensModel, prompts: Sequence[Int[Tensor, " _"]], texts: Sequence[str] | None, rollout: Any
) -> list[list[int]]:
    """Every prompt's continuation, as many tokens for each.

    Greedy generation ends at the end-of-text token, which is still a target, and where the first prompt ends, all end;
    without a cache.

    Raises:
        SettingsError: no token to continue by, continuations of several lengths or not one for each prompt, or text
            whose tokens do not begin with the prompt's.
    """
    rollouts = [rollout] * len(prompts)
    if len(prompts) > 1 and not isinstance(rollout, int | str):
        rollouts = list(rollout)
        if len(rollouts) != len(prompts) or any(isinstance(one, int) for one in rollouts):
            raise SettingsError(
                f"expected a number of tokens as rollout, or one continuation, text or tokens, for each of the "
                f"{len(prompts)} prompts; got {rollout!r}."
            )
    found = []
    for row, (tokens, one) in enumerate(zip(prompts, rollouts, strict=True)):
        if isinstance(one, int):
            found.append(_greedy(model, tokens[None], one))
        elif isinstance(one, str):
            found.append(_read(model, tokens[None], None if texts is None else texts[row], one))
        else:
            found.append([int(token) for token in one])
    if not all(own and all(0 <= token < int(model.cfg.d_vocab) for token in own) for own in found):
        raise SettingsError(f"expected a rollout of at least one token of the vocabulary; got {rollout!r}.")
    lengths = sorted({len(own) for own in found})
    if len(lengths) > 1 and not isinstance(rollout, int):
        raise SettingsError(
            f"expected as many tokens after every prompt, since targets are their i-th tokens; the continuations have "
            f"{lengths}. Cut them to one length, or trace each prompt alone."
        )
    return [own[: lengths[0]] for own in found]


def _greedy(model: TransformerLensModel, tokens: Int[Tensor, "1 pos"], count: int) -> list[int]:
    end = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    found: list[int] = []
    with torch.no_grad():
        while len(found) < count and (not found or found[-1] != end):
            best = int(run_logits(model, tokens)[0, -1].argmax())
            found.append(best)
            tokens = torch.cat([tokens, tokens.new_tensor([[best]])], 1)
    return found


def _read(model: Any, tokens: Int[Tensor, "1 pos"], prompt: str | None, text: str) -> list[int]:
    """Tokens in context: those of prompt and text must begin with the prompt's."""
    if prompt is None:
        raise SettingsError(
            "a rollout given as text is tokenized after its prompt; give the prompt as text too, or the rollout "
            "as tokens."
        )
    length = tokens.shape[1]
    bos = bool(length and int(tokens[0, 0]) == getattr(model.tokenizer, "bos_token_id", None))
    whole = model.to_tokens(prompt + text, prepend_bos=bos)
    if not torch.equal(whole[:, :length].to(tokens), tokens):
        raise SettingsError(
            f"the tokens of prompt and rollout together do not begin with the prompt's: {text!r} changes its last "
            "token. Begin the rollout with a space, or give it as tokens."
        )
    return whole[0, length:].tolist()
