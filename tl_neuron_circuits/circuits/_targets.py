"""What `trace` explains, from what its caller wrote: tokens, a difference of two, a direction, a metric."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ..models._protocol import TransformerLensModel
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._target import Goal, answer_goal, difference_goal, direction_goal, metric_goal, token_goal

Token = str | int
Target = Token | list[str] | list[int] | tuple[Token, Token] | Float[Tensor, " d"] | Callable[..., Tensor] | None
"""A token; a list of tokens; a tuple of two tokens (their logit difference); a direction over the logits (`d_vocab`)
or over what the unembedding reads (`d_model`); a metric."""


def find_goals(
    model: TransformerLensModel, pairs: TokenizedPairs, target: Target, prompt: str | None, top_k: int | None
) -> list[Goal] | Callable[[Tensor], list[Goal]]:
    """The goals that `target` names. For None the pairs' answers, or what finds the `top_k` likeliest tokens.

    Raises:
        SettingsError: a token that is none, or a direction of another size.
    """
    token = lambda found: _token_id(model, found, prompt)  # noqa: E731
    if target is None:
        if top_k is not None:
            return lambda logits: [token_goal(one, f"logit/{one}") for one in logits.topk(top_k).indices.tolist()]
        return [answer_goal(against_wrong=pairs.wrong_answer is not None)]
    if isinstance(target, Tensor):
        return [_direction(model, target)]
    if callable(target):
        return [metric_goal(target)]
    if isinstance(target, tuple):
        first, second = (token(one) for one in target)
        if first == second:
            raise SettingsError(f"expected two different tokens in target={target!r}; both are token {first}.")
        return [difference_goal(first, second, f"logit/{first}-{second}")]
    several = list(target) if isinstance(target, list) else [target]
    ids = list(dict.fromkeys(token(one) for one in several))
    if not ids:
        raise SettingsError("expected at least one token in target; got an empty list.")
    return [token_goal(one, f"logit/{one}") for one in ids]


def token_text(model: Any, token: int) -> str:
    """A token as text, its leading space included; its number where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return str(token)
    text = tokenizer.convert_ids_to_tokens(token)
    return str(token) if text is None else str(text).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")


def _token_id(model: TransformerLensModel, token: Token, prompt: str | None) -> int:
    d_vocab = int(getattr(model.cfg, "d_vocab_out", -1))
    d_vocab = d_vocab if d_vocab > 0 else int(model.cfg.d_vocab)
    if isinstance(token, int):
        if not 0 <= token < d_vocab:
            raise SettingsError(f"expected a token between 0 and {d_vocab - 1} as target; got {token}.")
        return token
    if prompt is None:
        raise SettingsError(
            f"the target {token!r} is text, which is tokenized in the context of a prompt given as text. Give the "
            "token's number (for example model.to_single_token(...)), or the prompt as text."
        )
    return int(tokenize(model, PromptPairs(clean=[prompt], answer=[token])).answer[0])


def _direction(model: TransformerLensModel, direction: Tensor) -> Goal:
    d_model, d_vocab = int(model.cfg.d_model), int(model.cfg.d_vocab)
    if direction.dim() != 1 or len(direction) not in (d_model, d_vocab) or not torch.isfinite(direction).all():
        raise SettingsError(
            f"expected a finite direction of {d_vocab} (over the logits) or {d_model} numbers (over what the "
            f"unembedding reads); got shape {list(direction.shape)}."
        )
    return direction_goal(direction, "direction", of_logits=len(direction) == d_vocab)
