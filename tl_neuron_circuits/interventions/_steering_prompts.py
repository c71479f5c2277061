"""Prompts given as text or as tokens, one by one and unpadded, in batches of one length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import PairsError
from ..bases._runs import Values, capture, require_fired
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ..tasks._pairs import PromptPairs
from ..tasks._text_tokens import text_tokens
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._ablation import Hooks

Prompts = str | Sequence[str] | Int[Tensor, "batch pos"] | PromptPairs | TokenizedPairs
"""Text, tokens, or pairs, whose clean prompts are run up to where their metric reads."""


@dataclass(frozen=True, eq=False)
class ReadPrompts:
    """Tokens and text of every prompt; of pairs the answers too, and the wrong answers where they have any."""

    tokens: tuple[Int[Tensor, " _"], ...]
    texts: tuple[str, ...]
    answers: tuple[int, ...] | None = None
    wrong_answers: tuple[int, ...] | None = None
    labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Int[Tensor, "batch pos"]]]:
        """(places of the rows, their tokens), at most `batch_size` prompts of one length each."""
        lengths: dict[int, list[int]] = {}
        for index, prompt in enumerate(self.tokens):
            lengths.setdefault(len(prompt), []).append(index)
        for rows in lengths.values():
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                yield part, torch.stack([self.tokens[row] for row in part])


def read_prompts(model: TransformerLensModel, prompts: Prompts, prepend_bos: bool | None = None) -> ReadPrompts:
    """The prompts as `model(prompt)` would see them; those that begin with BOS get no other.

    Raises:
        PairsError: no prompts, an empty one, text without a tokenizer, tokens with `prepend_bos`, or pairs that do not
            fit the model's tokenizer.
    """
    if isinstance(prompts, PromptPairs | TokenizedPairs):
        return _read_pairs(model, tokenize(model, prompts, prepend_bos=prepend_bos))
    if isinstance(prompts, Tensor):
        if prepend_bos is not None:
            raise PairsError("prepend_bos cannot be applied to tokens: put BOS into them.")
        rows = tuple(prompts.to(device_of(model)))
        texts = tuple(text_of(model, row) for row in rows)
    else:
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if getattr(model, "tokenizer", None) is None:
            raise PairsError(f"this {type(model).__name__} has no tokenizer: give the prompts as tokens [batch, pos].")
        device = device_of(model)
        rows = tuple(text_tokens(model, text, prepend_bos, truncate=False)[0].to(device) for text in texts)
    if not rows or not all(len(row) for row in rows):
        raise PairsError(f"expected prompts of at least one token; got {list(texts)!r}.")
    return ReadPrompts(rows, texts)


def _read_pairs(model: TransformerLensModel, pairs: TokenizedPairs) -> ReadPrompts:
    rows = [row[: int(end) + 1] for row, end in zip(pairs.clean, pairs.position, strict=True)]
    rows = tuple(row.to(device_of(model)) for row in rows)
    wrong = None if pairs.wrong_answer is None else tuple(pairs.wrong_answer.tolist())
    labels = None if pairs.labels is None else tuple(pairs.labels)
    return ReadPrompts(rows, tuple(text_of(model, row) for row in rows), tuple(pairs.answer.tolist()), wrong, labels)


def run(
    model: TransformerLensModel, tokens: Int[Tensor, "batch pos"], names: Sequence[str] = (), hooks: Hooks | None = None
) -> tuple[Tensor, Values]:
    """Logits `[batch, pos, d_vocab]` and the values at `names`, without a graph, with `hooks` before the captures."""
    store: Values = {}
    with torch.no_grad(), hooked(model, [*(hooks or ()), *(capture(store, name) for name in names)]):
        logits = model(tokens)
    return logits, require_fired(store, names, model)


def text_of(model: Any, tokens: Int[Tensor, " pos"]) -> str:
    """The tokens as text; as numbers where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return " ".join(str(token) for token in tokens.tolist()) if tokenizer is None else tokenizer.decode(tokens.tolist())


def token_names(model: Any, tokens: Sequence[int]) -> list[str]:
    """Every token as text of its own, with the space that begins it; as a number where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(token) for token in tokens]
    names = [tokenizer.decode([token]) for token in tokens]
    pieces = tokenizer.convert_ids_to_tokens(list(tokens))
    # Sentencepiece writes a word's space as this sign, and decoding a single token drops it.
    dropped = [str(p).startswith("▁") and not name.startswith(" ") for p, name in zip(pieces, names, strict=True)]
    return [f" {name}" if space else name for space, name in zip(dropped, names, strict=True)]


def text_pieces(model: Any, tokens: Int[Tensor, " pos"]) -> list[str]:
    """A prompt cut at its tokens; joined, they are its text wherever the tokenizer decodes prefixes to prefixes."""
    tokenizer = getattr(model, "tokenizer", None)
    names = token_names(model, tokens.tolist())
    if tokenizer is None:
        return [name if place == 0 else f" {name}" for place, name in enumerate(names)]
    pieces, before = [], ""
    for place, name in enumerate(names):
        text = tokenizer.decode(tokens[: place + 1].tolist())
        pieces.append(text[len(before) :] if text.startswith(before) else name)
        before = text
    return pieces


def device_of(model: TransformerLensModel) -> torch.device:
    """Where the model expects its tokens."""
    return torch.device(model.cfg.device or "cpu")
