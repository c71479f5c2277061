"""`tokenize`: from text pairs to the tokens of one TransformerLens model, checked pair by pair.

A prompt becomes exactly what `model(prompt)` would see (`model.to_tokens`, one prompt at a time, so unpadded). Answers
are tokenized in context: tokens(prompt + answer) must begin with tokens(prompt), and the answer is what follows. On
sentencepiece tokenizers " She" alone is two tokens, after a prompt it is one.

Text that begins with BOS (what a chat template renders) gets no second one. Pairs that were drawn for a model remember
its tokenizer and their BOS setting: the setting is used, and another tokenizer is refused.

Every check names the pair: an answer that merges with its prompt, an answer of several tokens, words unknown to the
tokenizer, clean and corrupt of different lengths or with the same tokens, prompts beyond the model's context.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from .._errors import PairsError, SettingsError
from .._typing import checked
from ..models._protocol import TransformerLensModel
from ._pairs import PromptPair, PromptPairs, directions
from ._selection import MadeFor, Selection
from ._text_tokens import TokenizerAlone, text_tokens, tokenizer_fingerprint
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
        prepend_bos: None means the model's default, or the setting that the pairs were drawn with.
        multi_token: what to do with an answer of several tokens. "first_difference" asks for the first token in which
            answer and wrong answer differ (without a wrong answer: the first token), and appends the tokens that they
            share before it to the prompts.
        aligned: clean and corrupt of a pair must have the same number of tokens.

    Raises:
        PairsError: a pair does not fit the tokenizer, which the message names; or the pairs were made for another
            tokenizer or BOS setting.
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
    encode = _encoder_for_pairs(model, pairs, prepend_bos)
    _require_same_tokenizer(encode, pairs)
    try:
        rows = [_tokens_of(encode, i, pair, multi_token, aligned) for i, pair in enumerate(pairs)]
    except PairsError as error:
        if len(pairs) == 1:
            raise
        raise PairsError(
            f"{error} To leave out pairs that do not fit: tasks.keep_fitting(model, pairs); built-in tasks draw only "
            "those that fit with model=model."
        ) from None
    _warn_of_glued_answers(encode, pairs)
    return _assemble(encode, pairs, rows)


def tokens_after(model: TransformerLensModel, prompts: Sequence[str], answers: Sequence[str]) -> list[int]:
    """The one token that each answer is after its prompt.

    Raises:
        PairsError: an answer of several tokens, or one that merges with its prompt.
    """
    encode, pairs = encoder(model, None), PromptPairs(clean=prompts, answer=answers)
    return [_tokens_of(encode, index, pair, "error", True).answer for index, pair in enumerate(pairs)]


@checked
def keep_fitting(
    model: TransformerLensModel,
    pairs: PromptPairs,
    *,
    prepend_bos: bool | None = None,
    multi_token: MultiToken = "error",
    aligned: bool = True,
    same_length: bool = False,
) -> PromptPairs:
    """Only the pairs that `tokenize` accepts with these options; both directions of a contrast stay or go together.

    This is the filter of Marks et al. (single-token answers, equal lengths) for templates made without a tokenizer in
    mind. `.selection` of the result says how many were left out and why; so does its repr, and the log at level INFO.

    Args:
        model: as in `tokenize`.
        pairs: text pairs; what they were made for before does not matter.
        prepend_bos: as in `tokenize`.
        multi_token: as in `tokenize`.
        aligned: as in `tokenize`.
        same_length: keep prompts of one token length only, the most frequent one, as kept positions and circuits need.

    Raises:
        PairsError: no pair fits; the message says why the first does not.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs", "The cats"], answer=[" are", " are near"])
        >>> tnc.tasks.keep_fitting(model, pairs)
        PromptPairs(n=1, first='The dogs' → ' are'; 1 of 2 qualified (50%), left out 1 with an answer of
        several tokens)
    """
    encode = _encoder_for_pairs(model, pairs, prepend_bos)
    contrast = directions(pairs)
    first_problem: PairsError | None = None
    reasons: dict[int, str] = {}  # why a contrast is left out
    lengths: dict[int, int] = {}
    for index, pair in enumerate(pairs):
        try:
            lengths[index] = len(_tokens_of(encode, index, pair, multi_token, aligned).clean)
        except PairsError as error:
            first_problem = first_problem or error
            reasons.setdefault(contrast[index], reason_of(error))
    fitting = [index for index in range(len(pairs)) if contrast[index] not in reasons]
    if same_length and fitting:
        counts = Counter(lengths[index] for index in fitting)
        common = min(counts, key=lambda length: (-counts[length], length))
        for index in fitting:
            if lengths[index] != common:
                reasons.setdefault(contrast[index], f"of another length than {common} tokens")
    kept = [index for index in range(len(pairs)) if contrast[index] not in reasons]
    if not kept:
        why = str(first_problem) if first_problem else "the two directions of every contrast differ in length."
        raise PairsError(f"none of the {len(pairs)} pairs fits this model's tokenizer. The first problem: {why}")
    _warn_of_glued_answers(encode, pairs)
    left_out = Counter(reasons[group] for group in contrast if group in reasons)
    selection = Selection(len(kept), len(pairs), dict(left_out))
    if left_out:
        _logger.info("%s; the first problem: %s", selection, first_problem)
    mark = pairs.made_for
    same = mark is not None and mark == made_for(encode, pairs.clean[0])
    return pairs[kept].remember(mark if same else None, selection)


class _PairTokens(NamedTuple):
    clean: Tokens
    corrupt: Tokens | None
    answer: int
    wrong_answer: int | None


@dataclass(frozen=True)
class Encoder:
    """`model.to_tokens` for single strings, remembered; and how tokens read in messages."""

    model: Any
    prepend_bos: bool | None
    unknown: int | None
    n_ctx: int | None
    known: dict[str, Tokens] = field(default_factory=dict)

    def __call__(self, text: str) -> Tokens:
        if text not in self.known:
            tokens = text_tokens(self.model, text, self.prepend_bos, truncate=False, move_to_device=False)
            self.known[text] = tuple(tokens[0].tolist())
        return self.known[text]

    def show(self, tokens: Sequence[int]) -> str:
        names = self.model.tokenizer.convert_ids_to_tokens(list(tokens))
        return f"{len(tokens)} token{'' if len(tokens) == 1 else 's'} {names}"


def encoder(model: Any, prepend_bos: bool | None) -> Encoder:
    """How a model, or a tokenizer by itself, makes tokens of text.

    Raises:
        PairsError: the model has no tokenizer.
    """
    n_ctx = None
    if hasattr(model, "to_tokens"):
        tokenizer, n_ctx = getattr(model, "tokenizer", None), model.cfg.n_ctx
    else:
        tokenizer, model = model, TokenizerAlone(model)
    if tokenizer is None:
        raise PairsError(
            f"this {type(model).__name__} has no tokenizer, so text pairs cannot become tokens. "
            "Give tokens instead: TokenizedPairs.from_tokens(clean, answer, corrupt, wrong_answer)."
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    # GPT-2's unknown token is its end of text, which is also its BOS: there it says nothing.
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None
    return Encoder(model, prepend_bos, unknown, n_ctx)


def made_for(encode: Encoder, prompt: str) -> MadeFor:
    """What pairs with this prompt remember of the tokenizer."""
    tokenizer = encode.model.tokenizer
    begins = tokenizer.bos_token_id is not None and encode(prompt)[:1] == (tokenizer.bos_token_id,)
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    return MadeFor(name, tokenizer_fingerprint(tokenizer), encode.prepend_bos, begins)


def _encoder_for_pairs(model: Any, pairs: PromptPairs, prepend_bos: bool | None) -> Encoder:
    """With the BOS setting that the pairs were made with, unless another is given."""
    mark = pairs.made_for
    if mark is not None and prepend_bos is None:
        prepend_bos = mark.prepend_bos
    return encoder(model, prepend_bos)


def _require_same_tokenizer(encode: Encoder, pairs: PromptPairs) -> None:
    """Raise where the pairs were made for another tokenizer or BOS setting."""
    mark = pairs.made_for
    if mark is None:
        return
    found = made_for(encode, pairs.clean[0])
    if found.fingerprint != mark.fingerprint:
        raise PairsError(
            f"these pairs were made for the tokenizer {mark.tokenizer!r} (fingerprint {mark.fingerprint[:8]}), and "
            f"this model has {found.tokenizer!r} ({found.fingerprint[:8]}). Draw them again with model=model, or fit "
            "their text to this one: tasks.keep_fitting(model, pairs)."
        )
    if found.begins_with_bos != mark.begins_with_bos:
        with_or_without = {True: "with", False: "without"}
        raise PairsError(
            f"these pairs were made {with_or_without[mark.begins_with_bos]} BOS, and would be tokenized "
            f"{with_or_without[found.begins_with_bos]} it. Leave prepend_bos out, which uses their own setting, or "
            "draw them again with prepend_bos=."
        )


def _misfit(reason: str, message: str) -> PairsError:
    """An error that also has a short reason, by which losses are counted."""
    error = PairsError(message)
    vars(error)["reason"] = reason
    return error


def reason_of(error: PairsError) -> str:
    """The short reason of an error of `_tokens_of`."""
    return vars(error).get("reason", "that do not fit")


def fit_pair(encode: Encoder, pair: PromptPair) -> tuple[int, str]:
    """The length of a pair's prompts and "", or 0 and the short reason why it does not fit."""
    try:
        return len(_tokens_of(encode, 0, pair, "error", True).clean), ""
    except PairsError as error:
        return 0, reason_of(error)


def _tokens_of(encode: Encoder, index: int, pair: PromptPair, multi_token: MultiToken, aligned: bool) -> _PairTokens:
    clean = _prompt(encode, index, pair.clean)
    answer = _continuation(encode, index, pair.clean, pair.answer)
    wrong = None if pair.wrong_answer is None else _continuation(encode, index, pair.clean, pair.wrong_answer)
    if multi_token == "error":
        for text, tokens in ((pair.answer, answer), (pair.wrong_answer, wrong)):
            if tokens is not None and len(tokens) > 1:
                raise _misfit(
                    "with an answer of several tokens",
                    f"pair {index} ({pair.clean!r}): the answer {text!r} is {encode.show(tokens)}, expected one. "
                    "Choose answers of one token. For pairs, tasks.tokenize(model, pairs, "
                    "multi_token='first_difference') takes the first that differs.",
                )
    shared = _first_difference(encode, index, pair, answer, wrong)
    corrupt = None
    if pair.corrupt is not None:
        corrupt = _corrupt(encode, index, pair, answer, wrong)
        _check_contrast(encode, index, pair, clean, corrupt, aligned)
        corrupt += answer[:shared]
    clean += answer[:shared]
    for name, prompt in (("clean", clean), ("corrupt", corrupt or ())):
        if encode.n_ctx is not None and len(prompt) > encode.n_ctx:
            raise _misfit(
                "longer than the context",
                f"pair {index}: the {name} prompt {getattr(pair, name)[:60]!r}... has {len(prompt)} tokens, but the "
                f"model's context holds {encode.n_ctx}. Shorten it.",
            )
    return _PairTokens(clean, corrupt, answer[shared], None if wrong is None else wrong[shared])


def _prompt(encode: Encoder, index: int, prompt: str) -> Tokens:
    tokens = encode(prompt)
    if encode.unknown is not None and encode.unknown in tokens:
        raise _misfit(
            "with unknown words",
            f"pair {index}: the tokenizer does not know every word of {prompt!r}: {encode.show(tokens)}. "
            "Use words of the model's vocabulary (mind capitals).",
        )
    if not tokens:
        raise _misfit("without tokens", f"pair {index}: the prompt {prompt!r} has no tokens. Give a longer one.")
    return tokens


def _continuation(encode: Encoder, index: int, prompt: str, answer: str) -> Tokens:
    before, together = encode(prompt), encode(prompt + answer)
    if len(together) <= len(before) or together[: len(before)] != before:
        raise _misfit(
            "with an answer that merges with its prompt",
            f"pair {index}: after {prompt!r} ({encode.show(before)}) the answer {answer!r} merges with the prompt: "
            f"together they are {encode.show(together)}, which must begin with the prompt's tokens. End the prompt "
            "without a space and begin the answer with one (' are'), or choose another answer.",
        )
    tokens = together[len(before) :]
    if encode.unknown is not None and encode.unknown in tokens:
        raise _misfit(
            "with an unknown answer",
            f"pair {index} ({prompt!r}): the tokenizer does not know the answer {answer!r}: {encode.show(tokens)}. "
            "Choose a word of its vocabulary; word-level tokenizers need the space before it (' are').",
        )
    return tokens


def _warn_of_glued_answers(encode: Encoder, pairs: PromptPairs) -> None:
    """Log answers that continue the prompt's last word, which a space would have made a word of their own."""
    glued = [
        pair for pair in pairs
        if _is_cased(pair.clean[-1:]) and _is_cased(pair.answer[:1])
        and encode(pair.clean + " " + pair.answer) != encode(pair.clean + pair.answer)
    ]  # fmt: skip
    if glued:
        _logger.warning(
            "%d of %d answers continue the last word of their prompt, as %r after %r. Did you mean %r, with a space?",
            len(glued), len(pairs), glued[0].answer, glued[0].clean, " " + glued[0].answer,
        )  # fmt: skip


def _is_cased(character: str) -> bool:
    """Whether it is a letter of a script that separates words by spaces, as all scripts with two cases do."""
    return character.lower() != character.upper()


def _first_difference(encode: Encoder, index: int, pair: PromptPair, answer: Tokens, wrong: Tokens | None) -> int:
    """Return the number of leading tokens that the two answers share."""
    if wrong is None:
        return 0
    for place, (right, other) in enumerate(zip(answer, wrong, strict=False)):
        if right != other:
            return place
    raise _misfit(
        "with answers that begin alike",
        f"pair {index} ({pair.clean!r}): no token tells the answer {pair.answer!r} ({encode.show(answer)}) from the "
        f"wrong answer {pair.wrong_answer!r} ({encode.show(wrong)}). Choose answers neither of which begins the other.",
    )


def _corrupt(encode: Encoder, index: int, pair: PromptPair, answer: Tokens, wrong: Tokens | None) -> Tokens:
    """Return the corrupt prompt's tokens; the answers must be the same tokens after it as after the clean prompt."""
    prompt = pair.corrupt or ""
    tokens = _prompt(encode, index, prompt)
    for text, expected in ((pair.answer, answer), (pair.wrong_answer, wrong)):
        if text is None or expected is None:
            continue
        found = _continuation(encode, index, prompt, text)
        if found != expected:
            raise _misfit(
                "with answers that depend on the prompt",
                f"pair {index}: the answer {text!r} is {encode.show(expected)} after {pair.clean!r} but "
                f"{encode.show(found)} after {prompt!r}. Choose prompts that end alike.",
            )
    return tokens


def _check_contrast(
    encode: Encoder, index: int, pair: PromptPair, clean: Tokens, corrupt: Tokens, aligned: bool
) -> None:
    if aligned and len(clean) != len(corrupt):
        raise _misfit(
            "with clean and corrupt of different lengths",
            f"pair {index}: clean and corrupt must have the same number of tokens, got {encode.show(clean)} for "
            f"{pair.clean!r} and {encode.show(corrupt)} for {pair.corrupt!r}. Choose words of equal length; "
            "tasks.tokenize(model, pairs, aligned=False) is for what compares nothing position by position.",
        )
    if clean == corrupt:
        raise _misfit(
            "with clean and corrupt of the same tokens",
            f"pair {index}: {pair.clean!r} and {pair.corrupt!r} are the same tokens {encode.show(clean)}: they "
            "contrast nothing. Change the corrupt prompt.",
        )


def _assemble(encode: Encoder, pairs: PromptPairs, rows: list[_PairTokens]) -> TokenizedPairs:
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
