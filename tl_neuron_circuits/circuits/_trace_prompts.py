"""What `trace` is asked: one prompt, several, or pairs, as tokens, with the spans that are marked in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import PairsError, SettingsError
from ..bases._runs import run_logits
from ..tasks._chat import special_by_prompt
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import require_corrupt
from ..tasks._spans import MarkedText, TokenSpan, read_marks, span_tokens
from ..tasks._text_tokens import text_tokens
from ..tasks._tokenize import tokenize, tokens_after
from ..tasks._tokenized import TokenizedPairs, unanswered
from ._alignment import Places, align
from ._rollout import Rollout, roll_out
from ._targets import TargetLike, token_id

Prompt = str | Sequence[str] | Int[Tensor, " pos"] | Int[Tensor, "prompt pos"] | PromptPairs | TokenizedPairs


@dataclass(frozen=True)
class TracedPrompts:
    """Prompts as tokens, and what is left to say of their target."""

    pairs: TokenizedPairs
    texts: Sequence[str] | None
    """Without marks; None where tokens were given."""
    spans: Sequence[Sequence[TokenSpan]]
    target: TargetLike
    """None where the pairs' answers say it, or where a single prompt's likeliest tokens are to be found."""
    single: bool
    """One prompt, that no pair gave an answer."""
    listed: bool
    """Several prompts, given as such."""
    continued: Sequence[Sequence[int]]
    """Each prompt's tokens of a rollout; empty without one."""

    @property
    def text(self) -> str | None:
        """Of a single prompt."""
        return self.texts[0] if self.single and self.texts is not None else None


def read_question(
    model: Any, prompts: Prompt, target: TargetLike, rollout: Rollout, *, prepend_bos: bool | None, top_k: int
) -> TracedPrompts:
    """Tokens, spans and target of whatever `trace` was given.

    Raises:
        PairsError: prompts without tokens, or targets that are not one token.
        SettingsError: arguments that contradict each other.
    """
    if isinstance(prompts, PromptPairs | TokenizedPairs):
        asked = _of_pairs(model, prompts, target, prepend_bos)
    else:
        asked = _of_prompts(model, prompts, target, prepend_bos, top_k)
    if rollout is None:
        return asked
    if not (asked.single or asked.listed) or target is not None:
        raise SettingsError("rollout= takes prompts, and is their target: leave target= out, and pairs.")
    rows = list(asked.pairs.clean)
    continued = roll_out(model, rows, asked.texts, rollout)
    longer = [torch.cat([own, own.new_tensor(more[:-1])]) for own, more in zip(rows, continued, strict=True)]
    pairs = TokenizedPairs.from_tokens(longer, torch.tensor([more[-1] for more in continued]).to(rows[0]))
    first = len(rows[0]) - 1  # one prompt's targets are its tokens, by position; of several, each one's own
    goals = {first + place: token for place, token in enumerate(continued[0])} if asked.single else None
    return replace(asked, pairs=pairs, texts=None, target=goals, continued=continued)


def _of_pairs(
    model: Any, pairs: PromptPairs | TokenizedPairs, target: TargetLike, prepend_bos: bool | None
) -> TracedPrompts:
    texts = None
    if isinstance(pairs, PromptPairs):
        texts = [read_marks(text) for text in pairs.clean]
        corrupt = None if pairs.corrupt is None else tuple(read_marks(text) for text in pairs.corrupt)
        if tuple(texts) != pairs.clean or corrupt != pairs.corrupt:
            pairs = replace(pairs, clean=texts, corrupt=corrupt)
    tokens = tokenize(model, pairs, prepend_bos=prepend_bos)
    return TracedPrompts(tokens, texts, _spans(model, texts, tokens), target, False, False, [])


def _of_prompts(
    model: Any, prompts: str | Sequence[str] | Tensor, target: TargetLike, prepend_bos: bool | None, top_k: int
) -> TracedPrompts:
    texts: list[MarkedText] | None = None
    if isinstance(prompts, Tensor):
        if prepend_bos is not None:
            raise SettingsError("prepend_bos cannot be applied to tokens: put BOS into them.")
        tokens = list(prompts.reshape(-1, prompts.shape[-1]).to(model.cfg.device or "cpu"))
    else:
        texts = [read_marks(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        tokens = [text_tokens(model, text, prepend_bos)[0] for text in texts]
    if not tokens or not all(map(len, tokens)) or not 1 <= top_k <= int(model.cfg.d_vocab):
        raise SettingsError(f"expected a prompt with tokens, and top_k between 1 and the vocabulary; got {top_k=}.")
    pairs = unanswered(tokens)
    single = isinstance(prompts, str) or len(tokens) == 1
    if callable(target) or (target is None and not single):
        pairs = TokenizedPairs.from_tokens(tokens, _likeliest(model, pairs))
    elif not single:
        pairs, target = _with_answers(pairs, texts, target, model)
    return TracedPrompts(pairs, texts, _spans(model, texts, pairs), target, single, not single, [])


def _with_answers(
    pairs: TokenizedPairs, texts: Sequence[str] | None, target: TargetLike, model: Any
) -> tuple[TokenizedPairs, TargetLike]:
    """The target of several prompts as their answers; as a token where it is the same one in all of them."""
    if not isinstance(target, str | int | tuple | list):
        return pairs, target
    each: list[Any] = list(target) if isinstance(target, list) else [target] * len(pairs)
    if len(each) != len(pairs):
        raise SettingsError(
            f"expected one target, or a list with one per prompt; got {len(each)} for {len(pairs)} prompts. Several "
            "tokens of one prompt are explained by tracing it alone, or by a direction over the logits."
        )
    compared = [isinstance(one, tuple) for one in each]
    if any(compared) != all(compared):
        raise SettingsError(f"expected a token for every prompt, or a tuple of two for every prompt; got {each!r}.")
    columns = list(zip(*(one if isinstance(one, tuple) else (one,) for one in each), strict=True))
    ids = [_token_ids(model, list(column), texts) for column in columns]
    if len(ids) > 1 and (same := [row for row, pair in enumerate(zip(*ids, strict=True)) if pair[0] == pair[1]]):
        raise SettingsError(f"expected two different tokens in each target; those of prompt {same[0]} are the same.")
    answers = [torch.tensor(column, device=pairs.answer.device) for column in ids]
    pairs = TokenizedPairs.from_tokens(list(pairs.clean), answers[0], wrong_answer=answers[1] if len(ids) > 1 else None)
    if any(len(set(column)) > 1 for column in ids):
        return pairs, None
    return pairs, ids[0][0] if len(ids) == 1 else (ids[0][0], ids[1][0])


def _token_ids(model: Any, tokens: list[Any], texts: Sequence[str] | None) -> list[int]:
    """One token per prompt; text is tokenized after its prompt."""
    if texts is not None and all(isinstance(token, str) for token in tokens):
        return tokens_after(model, texts, tokens)
    return [token_id(model, token, None if texts is None else texts[row]) for row, token in enumerate(tokens)]


def _likeliest(model: Any, pairs: TokenizedPairs) -> Int[Tensor, " prompt"]:
    """Every prompt's likeliest next token."""
    found = torch.zeros_like(pairs.answer)
    for batch in pairs.batches(8):
        with torch.no_grad():
            logits = run_logits(model, batch.clean)
        found[batch.index] = logits[:, -1].argmax(-1).to(found)
    return found


def _spans(model: Any, texts: Sequence[str] | None, pairs: TokenizedPairs) -> list[list[TokenSpan]]:
    if texts is None:
        return [[] for _ in pairs.clean]
    return [span_tokens(model, text, tokens) for text, tokens in zip(texts, pairs.clean, strict=True)]


def is_paired(pairs: TokenizedPairs, baseline: str) -> bool:
    """Whether differences to the corrupt prompts are explained.

    Raises:
        PairsError: they should be, and there are none.
    """
    if baseline == "corrupt" and pairs.corrupt is None:
        raise PairsError("baseline='corrupt' needs pairs with corrupt prompts. Give them, or baseline='zero'.")
    if baseline == "zero" or pairs.corrupt is None:
        return False
    require_corrupt(pairs, "a trace of pairs", instead="baseline='zero'")
    return True


def find_places(model: Any, asked: TracedPrompts, *, positions: str, keep_bos: bool, skip_special: bool) -> Places:
    """Where the prompts' tokens stand in the circuit, and where no nodes are chosen.

    Raises:
        PairsError: prompts of different lengths that nothing aligns.
        SettingsError: targets at positions that prompts do not share.
    """
    pairs = asked.pairs
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    starts = bos is not None and all(len(prompt) > 1 and int(prompt[0]) == bos for prompt in pairs.clean)
    skipped = [{0} if starts and not keep_bos else set[int]() for _ in pairs.clean]
    if skip_special:
        for row, special in enumerate(special_by_prompt(model, pairs)):
            skipped[row] |= set(special) - ({0} if keep_bos else set())
    places = align(model, list(pairs.clean), asked.spans, [sorted(one) for one in skipped], positions=positions)
    if (isinstance(asked.target, Mapping) and places.how != "keep") or (asked.continued and places.how == "sum"):
        raise SettingsError(
            "targets by position, and rollouts, need positions that are kept, and targets by position the same ones in "
            "every prompt. Leave positions='sum' out, or trace each prompt alone."
        )
    return places
