"""`tokenize`: from text pairs to the tokens of one TransformerLens model, checked pair by pair.

A prompt becomes exactly what `model(prompt)` would see (`model.to_tokens`, one prompt at a time, so unpadded). Answers
are tokenized in context: tokens(prompt + answer) must begin with tokens(prompt), and the answer is what follows. On
sentencepiece tokenizers " She" alone is two tokens, after a prompt it is one.

Every check names the pair: an answer that merges with its prompt, an answer of several tokens, words unknown to the
tokenizer, clean and corrupt of different lengths or with the same tokens, prompts beyond the model's context.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from .._errors import PairsError, SettingsError
from .._typing import checked
from ..models._protocol import TransformerLensModel
from ._pairs import PromptPair, PromptPairs
from ._tokenized import TokenizedPairs

MultiToken = Literal["error", "first_difference"]
Tokens = tuple[int, ...]

_logger = logging.getLogger(__name__)


@checked
def tokenize(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    prepend_bos: bool | None = None,
    multi_token: MultiToken = "error",
    aligned: bool = True,
) -> TokenizedPairs:
    """Tokens of `pairs` for `model` (HookedTransformer or TransformerBridge).

    Args:
        model: only its `to_tokens`, `tokenizer` and `cfg` are used.
        pairs: text pairs; pairs that are tokenized already come back as they are.
        prepend_bos: None means the model's default.
        multi_token: what to do with an answer of several tokens. "first_difference" asks for the first token in which
            answer and wrong answer differ (without a wrong answer: the first token), and appends the tokens that they
            share before it to the prompts.
        aligned: clean and corrupt of a pair must have the same number of tokens.

    Raises:
        PairsError: a pair does not fit the tokenizer; the message names it and says what to do.
        SettingsError: `prepend_bos` is given for pairs that are tokens already.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tnc.tasks.tokenize(model, tnc.PromptPairs(clean=["The dogs"], answer=[" are"]))
        TokenizedPairs(n=1, length=3, with=answers only)
    """
    if isinstance(pairs, TokenizedPairs):
        if prepend_bos is not None:
            raise SettingsError("prepend_bos cannot be applied to tokenized pairs: put BOS into their tokens.")
        return pairs
    encode = _encoder(model, prepend_bos)
    return _assemble(encode, pairs, [_tokens_of(encode, i, pair, multi_token, aligned) for i, pair in enumerate(pairs)])


@checked
def keep_fitting(
    model: TransformerLensModel,
    pairs: PromptPairs,
    *,
    prepend_bos: bool | None = None,
    multi_token: MultiToken = "error",
    aligned: bool = True,
) -> PromptPairs:
    """Only the pairs that `tokenize` accepts with these options; both directions of a contrast stay or go together.

    This is the filter of Marks et al. (single-token answers, equal lengths) for templates made without a tokenizer in
    mind. How many were dropped, and why the first one was, is logged at level INFO.

    Raises:
        PairsError: no pair fits; the message says why the first does not.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs", "The cats"], answer=[" are", " are near"])
        >>> tnc.tasks.keep_fitting(model, pairs)  # the second answer is two tokens
        PromptPairs(n=1, first='The dogs' → ' are')
    """
    encode = _encoder(model, prepend_bos)
    problems: list[PairsError] = []
    misfits: set[frozenset[str]] = set()
    for index, pair in enumerate(pairs):
        try:
            _tokens_of(encode, index, pair, multi_token, aligned)
        except PairsError as error:
            problems.append(error)
            misfits.add(_contrast(pair))
    kept = [index for index, pair in enumerate(pairs) if _contrast(pair) not in misfits]
    if not kept:
        raise PairsError(
            f"none of the {len(pairs)} pairs fits this model's tokenizer. The first problem: {problems[0]}"
        )
    if problems:
        _logger.info("kept %d of %d pairs; the first problem: %s", len(kept), len(pairs), problems[0])
    return pairs[kept]


class _PairTokens(NamedTuple):
    clean: Tokens
    corrupt: Tokens | None
    answer: int
    wrong_answer: int | None


@dataclass(frozen=True)
class _Encoder:
    """`model.to_tokens` for single strings, remembered; and how tokens read in messages."""

    model: Any
    options: dict[str, bool]
    unknown: int | None
    known: dict[str, Tokens] = field(default_factory=dict)

    def __call__(self, text: str) -> Tokens:
        if text not in self.known:
            tokens = self.model.to_tokens(text, truncate=False, move_to_device=False, **self.options)
            self.known[text] = tuple(tokens[0].tolist())
        return self.known[text]

    def show(self, tokens: Sequence[int]) -> str:
        names = self.model.tokenizer.convert_ids_to_tokens(list(tokens))
        return f"{len(tokens)} token{'' if len(tokens) == 1 else 's'} {names}"


def _encoder(model: TransformerLensModel, prepend_bos: bool | None) -> _Encoder:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PairsError(
            f"this {type(model).__name__} has no tokenizer, so text pairs cannot become tokens. "
            "Give tokens instead: TokenizedPairs.from_tokens(clean, answer, corrupt, wrong_answer)."
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    # GPT-2's unknown token is its end of text, which is also its BOS: there it says nothing.
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None
    return _Encoder(model, {} if prepend_bos is None else {"prepend_bos": prepend_bos}, unknown)


def _contrast(pair: PromptPair) -> frozenset[str]:
    return frozenset((pair.clean, pair.corrupt or pair.clean))


def _tokens_of(encode: _Encoder, index: int, pair: PromptPair, multi_token: MultiToken, aligned: bool) -> _PairTokens:
    clean = _prompt(encode, index, pair.clean)
    answer = _continuation(encode, index, pair.clean, pair.answer)
    wrong = None if pair.wrong_answer is None else _continuation(encode, index, pair.clean, pair.wrong_answer)
    if multi_token == "error":
        for text, tokens in ((pair.answer, answer), (pair.wrong_answer, wrong)):
            if tokens is not None and len(tokens) > 1:
                raise PairsError(
                    f"pair {index} ({pair.clean!r}): the answer {text!r} is {encode.show(tokens)}, expected one. "
                    "Choose single-token answers, or pass multi_token='first_difference' for the first that differs."
                )
    shared = _first_difference(encode, index, pair, answer, wrong)
    corrupt = None
    if pair.corrupt is not None:
        corrupt = _corrupt(encode, index, pair, answer, wrong)
        _check_contrast(encode, index, pair, clean, corrupt, aligned)
        corrupt += answer[:shared]
    clean += answer[:shared]
    for name, prompt in (("clean", clean), ("corrupt", corrupt or ())):
        if len(prompt) > encode.model.cfg.n_ctx:
            raise PairsError(
                f"pair {index}: the {name} prompt {getattr(pair, name)[:60]!r}... has {len(prompt)} tokens, but the "
                f"model's context holds {encode.model.cfg.n_ctx}. Shorten it."
            )
    return _PairTokens(clean, corrupt, answer[shared], None if wrong is None else wrong[shared])


def _prompt(encode: _Encoder, index: int, prompt: str) -> Tokens:
    tokens = encode(prompt)
    if encode.unknown is not None and encode.unknown in tokens:
        raise PairsError(
            f"pair {index}: the tokenizer does not know every word of {prompt!r}: {encode.show(tokens)}. "
            "Use words of the model's vocabulary (mind capitals), or the task's vocabulary= made for this model."
        )
    if not tokens:
        raise PairsError(f"pair {index}: the prompt {prompt!r} has no tokens. Give a longer one.")
    return tokens


def _continuation(encode: _Encoder, index: int, prompt: str, answer: str) -> Tokens:
    before, together = encode(prompt), encode(prompt + answer)
    if len(together) <= len(before) or together[: len(before)] != before:
        raise PairsError(
            f"pair {index}: after {prompt!r} ({encode.show(before)}) the answer {answer!r} merges with the prompt: "
            f"together they are {encode.show(together)}, which must begin with the prompt's tokens. End the prompt "
            "without a space and begin the answer with one (' are'), or choose another answer."
        )
    tokens = together[len(before) :]
    if encode.unknown is not None and encode.unknown in tokens:
        raise PairsError(
            f"pair {index} ({prompt!r}): the tokenizer does not know the answer {answer!r}: {encode.show(tokens)}. "
            "Choose a word of its vocabulary; word-level tokenizers need the space before it (' are')."
        )
    return tokens


def _first_difference(encode: _Encoder, index: int, pair: PromptPair, answer: Tokens, wrong: Tokens | None) -> int:
    """Return the number of leading tokens that the two answers share."""
    if wrong is None:
        return 0
    for place, (right, other) in enumerate(zip(answer, wrong, strict=False)):
        if right != other:
            return place
    raise PairsError(
        f"pair {index} ({pair.clean!r}): no token tells the answer {pair.answer!r} ({encode.show(answer)}) from the "
        f"wrong answer {pair.wrong_answer!r} ({encode.show(wrong)}). Choose answers neither of which begins the other."
    )


def _corrupt(encode: _Encoder, index: int, pair: PromptPair, answer: Tokens, wrong: Tokens | None) -> Tokens:
    """Return the corrupt prompt's tokens; the answers must be the same tokens after it as after the clean prompt."""
    prompt = pair.corrupt or ""
    tokens = _prompt(encode, index, prompt)
    for text, expected in ((pair.answer, answer), (pair.wrong_answer, wrong)):
        if text is None or expected is None:
            continue
        found = _continuation(encode, index, prompt, text)
        if found != expected:
            raise PairsError(
                f"pair {index}: the answer {text!r} is {encode.show(expected)} after {pair.clean!r} but "
                f"{encode.show(found)} after {prompt!r}. Choose prompts that end alike."
            )
    return tokens


def _check_contrast(
    encode: _Encoder, index: int, pair: PromptPair, clean: Tokens, corrupt: Tokens, aligned: bool
) -> None:
    if aligned and len(clean) != len(corrupt):
        raise PairsError(
            f"pair {index}: clean and corrupt must have the same number of tokens, got {encode.show(clean)} for "
            f"{pair.clean!r} and {encode.show(corrupt)} for {pair.corrupt!r}. Choose words of equal length, filter "
            "with keep_fitting(model, pairs), or pass aligned=False if nothing is compared position by position."
        )
    if clean == corrupt:
        raise PairsError(
            f"pair {index}: {pair.clean!r} and {pair.corrupt!r} are the same tokens {encode.show(clean)}: they "
            "contrast nothing. Change the corrupt prompt."
        )


def _assemble(encode: _Encoder, pairs: PromptPairs, rows: list[_PairTokens]) -> TokenizedPairs:
    cfg, pad_token = encode.model.cfg, encode.model.tokenizer.pad_token_id
    device = torch.device(cfg.device or "cpu")
    answers = [row.answer for row in rows]
    wrong = [row.wrong_answer for row in rows if row.wrong_answer is not None]
    largest = [max(*row.clean, *(row.corrupt or ()), row.answer, row.wrong_answer or 0) for row in rows]
    beyond = next((index for index, token in enumerate(largest) if token >= cfg.d_vocab), None)
    if beyond is not None:
        raise PairsError(
            f"pair {beyond} ({pairs[beyond].clean!r}) has a token beyond the model's vocabulary of {cfg.d_vocab}: this "
            "tokenizer does not belong to this model."
        )
    corrupt = [torch.tensor(row.corrupt, device=device) for row in rows if row.corrupt is not None]
    return TokenizedPairs.from_tokens(
        [torch.tensor(row.clean, device=device) for row in rows],
        torch.tensor(answers, device=device),
        corrupt or None,
        torch.tensor(wrong, device=device) if wrong else None,
        labels=pairs.labels,
        pad_token=0 if pad_token is None else pad_token,
    )
