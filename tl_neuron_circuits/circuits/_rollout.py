"""A rollout: the tokens that a model generates after a prompt, each a target where it is predicted.

The prompt and all but the last generated token are one run, whose position n - 1 + i predicts the i-th token. Attention
is causal, so every target has the value, and every node the score for it, that a trace of its own prompt would give.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import SettingsError
from ..bases._runs import run_logits
from ..models._protocol import TransformerLensModel

Rollout = int | str | Sequence[int] | None
"""How many tokens to generate, or the continuation as text or tokens."""


def roll_out(
    model: TransformerLensModel, tokens: Int[Tensor, "1 pos"], prompt: str | None, rollout: int | str | Sequence[int]
) -> tuple[Int[Tensor, "1 longer"], dict[int, int]]:
    """The tokens to run, and every continued token by the position that predicts it.

    Greedy generation ends at the end-of-text token, which is still a target; without a cache.

    Raises:
        SettingsError: no token to continue by, or text whose tokens do not begin with the prompt's.
    """
    if isinstance(rollout, int):
        continued = _greedy(model, tokens, rollout)
    elif isinstance(rollout, str):
        continued = _read(model, tokens, prompt, rollout)
    else:
        continued = [int(token) for token in rollout]
    if not continued or not all(0 <= token < int(model.cfg.d_vocab) for token in continued):
        raise SettingsError(f"expected a rollout of at least one token of the vocabulary; got {rollout!r}.")
    start = tokens.shape[1]
    longer = torch.cat([tokens, tokens.new_tensor([continued[:-1]]).reshape(1, -1)], 1)
    return longer, {start - 1 + place: token for place, token in enumerate(continued)}


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
