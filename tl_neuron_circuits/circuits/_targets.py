"""What a circuit explains: targets, each one number read from a run and one logit node of the circuit.

Tokens and directions are read from the logits before any soft cap, where relevance is conserved; a token's logit is
taken minus the mean over the vocabulary, so that centering an unembedding changes nothing (raw with `center=False`, as
in the seed paper's code: what every logit has in common is then explained too). A metric is read from the
model's own logits, and what it is not linear in shows as a linearization error. A target is read where its prompt ends,
or at a position of its own.

A target is what `trace` explains, never the end of an edge: the nodes that edges lead to are *receivers* in this code,
although the table of edges calls its columns `source` and `target`, as graphs do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric, measure, metric_name
from ..tasks._tokenize import tokens_after
from ..tasks._tokenized import Batch, TokenizedPairs
from ._prompt_graph import PromptRun

ANSWER = "answer_logit"
Token = str | int
Tokens = Token | list[str] | list[int] | tuple[Token, Token]
TargetLike = (
    Tokens | list[tuple[Token, Token]] | Mapping[int, Tokens] | Float[Tensor, " d"] | Callable[..., Tensor] | None
)
"""A token; a list of tokens (for several prompts, one each); a tuple of two tokens (their logit difference), or a list
of such for several prompts; a token, list or tuple by the position that predicts it; a direction over the logits
(`d_vocab`) or over what the unembedding reads (`d_model`); a metric."""


@dataclass(frozen=True)
class Target:
    """One number that a run gives.

    `linear` in the logits before any soft cap: then its incoming edges sum to it.
    """

    name: str
    value: Callable[[PromptRun, Batch], Float[Tensor, ""]]
    tokens: tuple[int, ...] = ()
    """A token, or a token and the one it is compared with; none for anything else."""
    linear: bool = True
    position: int | None = None
    """Where it is read, counted from the end if negative; None is where the prompt's answer is predicted."""
    by_prompt: tuple[int, ...] = ()
    """Of a rollout: each prompt's own token."""

    def at(self, end: int) -> int:
        """Where it is read in a run whose prompt ends at `end`."""
        position = -1 if self.position is None else self.position
        return position if position >= 0 else end + 1 + position


def token_target(token: int, position: int | None = None, *, center: bool = True) -> Target:
    """The logit of a token, minus the mean logit if centered."""

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        logits = _logits(run, batch, position)
        return logits[token] - logits.mean() if center else logits[token]

    return Target(f"logit/{token}{_at(position)}", value, (token,), position=position)


def difference_target(token: int, other: int, position: int | None = None) -> Target:
    """The logit of a token minus that of another."""

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        logits = _logits(run, batch, position)
        return logits[token] - logits[other]

    return Target(f"logit/{token}-{other}{_at(position)}", value, (token, other), position=position)


def answer_target(*, against_wrong: bool, center: bool = True) -> Target:
    """Each pair's answer: its logit minus the wrong answer's; alone, minus the mean logit if centered."""

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        logits = _logits(run, batch)
        answer, wrong = logits[int(batch.answer[0])], batch.wrong_answer if against_wrong else None
        if wrong is not None:
            return answer - logits[int(wrong[0])]
        return answer - logits.mean() if center else answer

    return Target("logit_difference" if against_wrong else ANSWER, value)


def rollout_targets(continued: Sequence[Sequence[int]], *, center: bool = True) -> list[Target]:
    """Every token that prompts go on with, where it is predicted: of several prompts, each one's own."""
    count = len(continued[0])

    def own_token(place: int, tokens: tuple[int, ...]) -> Target:
        def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
            logits, token = _logits(run, batch, place - count), tokens[int(batch.index[0])]
            return logits[token] - logits.mean() if center else logits[token]

        return Target(f"rollout/{place}", value, position=place - count, by_prompt=tokens)

    return [own_token(place, tokens) for place, tokens in enumerate(zip(*continued, strict=True))]


def direction_target(model: TransformerLensModel, direction: Tensor) -> Target:
    """A direction over the logits, or over what the unembedding reads.

    Raises:
        SettingsError: a direction of another size.
    """
    d_model, d_vocab = int(model.cfg.d_model), int(model.cfg.d_vocab)
    if direction.dim() != 1 or len(direction) not in (d_model, d_vocab) or not torch.isfinite(direction).all():
        raise SettingsError(
            f"expected a finite direction of {d_vocab} (over the logits) or {d_model} numbers (over what the "
            f"unembedding reads); got shape {list(direction.shape)}."
        )

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        source = run.raw_logits if len(direction) == d_vocab else run.final
        return source[0, int(batch.position[0])] @ direction.to(source)

    return Target("direction", value)


def metric_target(metric: Metric) -> Target:
    """Any metric of this package, or a callable like one."""
    return Target(metric_name(metric), lambda run, batch: measure(metric, run.logits, batch)[0], linear=False)


def find_targets(
    model: TransformerLensModel,
    pairs: TokenizedPairs,
    target: TargetLike,
    prompt: str | None,
    top_k: int | None,
    *,
    center: bool = True,
) -> list[Target] | Callable[[Tensor], list[Target]]:
    """The targets that a caller of `trace` named.

    For None the pairs' answers, or a function that finds the `top_k` likeliest tokens from the logits.

    Raises:
        SettingsError: something that is not a token, a direction of another size, or a position outside the prompt.
    """
    if target is None:
        if top_k is not None:
            return lambda logits: [token_target(token, center=center) for token in logits.topk(top_k).indices.tolist()]
        return [answer_target(against_wrong=pairs.wrong_answer is not None, center=center)]
    if isinstance(target, Mapping):
        length = len(pairs.clean[0])
        if not target or not all(0 <= position < length for position in target):
            raise SettingsError(
                f"expected targets by the position that predicts them, 0 to {length - 1} (the last token's); got "
                f"positions {sorted(target)}."
            )
        pieces = [None] * length if prompt is None else _prompts_up_to(model, pairs.clean[0], prompt)
        found = []
        for position, one in sorted(target.items()):
            found += _token_targets(model, one, pieces[position], center=center, position=position)
        return found
    if isinstance(target, Tensor):
        return [direction_target(model, target)]
    if callable(target):
        return [metric_target(target)]
    return _token_targets(model, target, prompt, center=center, position=None)  # pyright: ignore[reportArgumentType]


def _token_targets(
    model: TransformerLensModel, target: Tokens, prompt: str | None, *, center: bool, position: int | None
) -> list[Target]:
    if isinstance(target, tuple):
        first, second = (token_id(model, token, prompt) for token in target)
        if first == second:
            raise SettingsError(f"expected two different tokens in target={target!r}; both are token {first}.")
        return [difference_target(first, second, position)]
    tokens = list(target) if isinstance(target, list) else [target]
    if any(isinstance(token, tuple) for token in tokens):
        raise SettingsError(f"expected tokens, or one tuple of two; got target={target!r} for one prompt.")
    ids = list(dict.fromkeys(token_id(model, token, prompt) for token in tokens))
    if not ids:
        raise SettingsError("expected at least one token in target; got an empty list.")
    return [token_target(token, position, center=center) for token in ids]


def target_label(model: Any, target: Target, answers: Sequence[int] = ()) -> str:
    """Its tokens as text, of several prompts the first three of `answers`; or its name."""
    each = answers if target.name == ANSWER else target.by_prompt
    if each:
        texts = list(dict.fromkeys(repr(token_text(model, token))[1:-1] for token in each))
        return " | ".join(texts[:3]) + (" | …" if len(texts) > 3 else "")
    return " - ".join(repr(token_text(model, token))[1:-1] for token in target.tokens) or target.name


def token_text(model: Any, token: int) -> str:
    """A token as text, its leading space included; its number where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return str(token)
    text = tokenizer.convert_ids_to_tokens(token)
    return str(token) if text is None else str(text).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")


def goal_positions(targets: Sequence[Target], end: int) -> list[int]:
    """Where targets are read, each position once; `end` is where the prompt ends."""
    return sorted({target.at(end) for target in targets})


def _at(position: int | None) -> str:
    return "" if position is None else f"@{position}"


def _logits(run: PromptRun, batch: Batch, position: int | None = None) -> Float[Tensor, " d_vocab"]:
    end = int(batch.position[0])
    return run.raw_logits[0, end if position is None else position if position >= 0 else end + 1 + position]


def _prompts_up_to(model: Any, tokens: Int[Tensor, " pos"], prompt: str) -> list[str | None]:
    """The text up to each position; None where the prompt's text cannot be cut there."""
    skip = 1 if int(tokens[0]) == getattr(model.tokenizer, "bos_token_id", None) else 0
    texts = [model.tokenizer.decode(tokens[skip : place + 1].tolist()) for place in range(len(tokens))]
    return [text if prompt.startswith(text) else None for text in texts]


def token_id(model: TransformerLensModel, token: Token, prompt: str | None) -> int:
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
    return tokens_after(model, [prompt], [token])[0]
