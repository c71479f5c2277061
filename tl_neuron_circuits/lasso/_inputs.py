"""What may be observed: prompts, tokens, or pairs, of which the clean prompts are used."""

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import SettingsError
from ..models._protocol import TransformerLensModel
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs

Inputs = str | list[str] | Int[Tensor, "batch pos"] | PromptPairs | TokenizedPairs


def to_tokens(model: TransformerLensModel, inputs: Inputs, prepend_bos: bool | None) -> TokenizedPairs:
    """Tokens of prompts, or of pairs with their answers.

    Raises:
        SettingsError: no prompts.
    """
    if isinstance(inputs, PromptPairs | TokenizedPairs):
        return tokenize(model, inputs, prepend_bos=prepend_bos, aligned=False)
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, list):
        given = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        clean = [model.to_tokens(prompt, **given)[0] for prompt in inputs]
    else:
        clean = list(inputs)
    if not clean:
        raise SettingsError("expected at least one prompt; got none.")
    return TokenizedPairs.from_tokens(clean, torch.zeros(len(clean), dtype=torch.long, device=clean[0].device))


def same_start(tokens: TokenizedPairs) -> int:
    """1 where all prompts begin with one token and go on after it, else 0."""
    same = len({int(prompt[0]) for prompt in tokens.clean}) == 1 and len(tokens) > 1
    return int(same and min(tokens.lengths) > 1 and bool((tokens.position > 0).all()))
