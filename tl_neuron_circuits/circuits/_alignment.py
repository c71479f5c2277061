"""Where the tokens of prompts of different lengths stand in one circuit.

    positions kept     token i is place i; all prompts have one length
    marked spans       "The capital of the state containing {city:Dallas} is": between marks prompts have the same
                       number of tokens; a span that has several lengths is one place, and its numbers are sums
    positions summed   one place for all tokens; embeddings by their text

A node of the circuit stands at a place; scores, activations and edges of the tokens that share one are added up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import PairsError, SettingsError
from ..tasks._spans import TokenSpan
from ._targets import token_text

SUMMED, SKIPPED = 0, 1
"""Places where positions are summed: all tokens, and those where no node is chosen."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Of one prompt: where each token's nodes stand, its embedding, and its remainder and errors."""

    place: Int[Tensor, " pos"]
    token: Int[Tensor, " pos"]
    rest: Int[Tensor, " pos"]
    n_places: int
    n_tokens: int
    n_rests: int

    @cached_property
    def is_identity(self) -> bool:
        """Whether each token is a place of its own."""
        here = torch.arange(len(self.place))
        same = all(torch.equal(one, here) for one in (self.place, self.token, self.rest))
        return same and {self.n_places, self.n_tokens, self.n_rests} == {len(here)}


def identity(length: int) -> Alignment:
    """Each token a place of its own."""
    here = torch.arange(length)
    return Alignment(here, here, here, length, length, length)


@dataclass(frozen=True, eq=False)
class Places:
    """The places of a circuit, and where each prompt's tokens stand."""

    alignments: Sequence[Alignment]
    how: str
    """"keep", "spans" (some place is a whole span) or "sum"."""
    texts: Sequence[str]
    """Of the embeddings: a token, "…" where prompts differ, or a span's name in braces."""
    token_ids: Sequence[int]
    """Of the embeddings; -1 where prompts differ."""
    skipped: Sequence[int]
    """Places where no node is chosen."""
    spans: Mapping[str, tuple[int, int]]
    """First and last place of each span."""

    def position(self, place: int) -> int:
        """A place as tables have it: -1 where positions are summed."""
        return -1 if self.how == "sum" else place

    @property
    def n_positions(self) -> int:
        """Of remainders and errors."""
        return self.alignments[0].n_rests


def align(
    model: Any,
    prompts: Sequence[Int[Tensor, " _"]],
    spans: Sequence[Sequence[TokenSpan]],
    skipped: Sequence[Sequence[int]],
    *,
    positions: str,
) -> Places:
    """The places of prompts.

    Args:
        model: for its tokens' texts.
        prompts: their tokens.
        spans: of each prompt, in tokens.
        skipped: positions of each prompt at which no node is chosen.
        positions: "keep" or "sum".

    Raises:
        PairsError: prompts of different lengths, and no marks that say what differs.
        SettingsError: prompts whose spans have other names, or another order.
    """
    if positions == "sum":
        return _summed(model, prompts, skipped)
    pieces = [_pieces(len(tokens), own) for tokens, own in zip(prompts, spans, strict=True)]
    _require_same_spans(pieces)
    lengths = [[end - start for _, start, end in own] for own in pieces]
    places: list[list[int]] = [[] for _ in prompts]
    names: list[str | None] = []
    for number, columns in enumerate(zip(*lengths, strict=True)):
        name = pieces[0][number][0]
        if len(set(columns)) > 1 and name is None:
            raise _different_lengths(prompts, lengths, number)
        first, together = len(names), len(set(columns)) > 1
        for own, length in zip(places, columns, strict=True):
            own += [first] * length if together else range(first, first + length)
        names += [f"{{{name}}}"] if together else [None] * columns[0]
    n = len(names)
    alignments = [Alignment(place, place, place, n, n, n) for place in (torch.tensor(own) for own in places)]
    ids: list[set[int]] = [set() for _ in names]
    for own, tokens in zip(places, prompts, strict=True):
        for place, token in zip(own, tokens.tolist(), strict=True):
            ids[place].add(token)
    known = [one.pop() if len(one) == 1 and name is None else -1 for one, name in zip(ids, names, strict=True)]
    texts = [name or ("…" if token < 0 else token_text(model, token)) for token, name in zip(known, names, strict=True)]
    left = sorted({own[at] for own, rows in zip(places, skipped, strict=True) for at in rows})
    named = {one.name: (places[0][one.start], places[0][one.end - 1]) for one in spans[0]}
    return Places(alignments, "spans" if any(names) else "keep", texts, known, left, named)


def _summed(model: Any, prompts: Sequence[Int[Tensor, " _"]], skipped: Sequence[Sequence[int]]) -> Places:
    texts: dict[str, set[int]] = {}
    columns = []
    for tokens in prompts:
        own = []
        for token in tokens.tolist():
            texts.setdefault(token_text(model, token), set()).add(token)
            own.append(list(texts).index(token_text(model, token)))
        columns.append(torch.tensor(own))
    alignments = []
    for column, rows in zip(columns, skipped, strict=True):
        place = torch.full_like(column, SUMMED)
        place[list(rows)] = SKIPPED
        alignments.append(Alignment(place, column, torch.zeros_like(column), 2, len(texts), 1))
    ids = [one.pop() if len(one) == 1 else -1 for one in texts.values()]
    return Places(alignments, "sum", list(texts), ids, [SKIPPED] if any(skipped) else [], {})


def _pieces(length: int, spans: Sequence[TokenSpan]) -> list[tuple[str | None, int, int]]:
    """The prompt cut at all ends of spans: each piece with the innermost span it is in."""
    cuts = sorted({0, length, *(end for span in spans for end in (span.start, span.end))})
    pieces = []
    for start, end in pairwise(cuts):
        around = [span for span in spans if span.start <= start and end <= span.end]
        inner = min(around, key=lambda span: span.end - span.start, default=None)
        pieces.append((None if inner is None else inner.name, start, end))
    return pieces


def _require_same_spans(pieces: Sequence[Sequence[tuple[str | None, int, int]]]) -> None:
    names = [[name for name, *_ in own if name is not None] for own in pieces]
    other = next((index for index, own in enumerate(names) if own != names[0]), None)
    if other is not None:
        raise SettingsError(
            f"expected the same marked spans in every prompt, in one order; prompt 0 has {names[0]}, prompt {other} "
            f"has {names[other]}."
        )
    shapes = [[name for name, *_ in own] for own in pieces]
    other = next((index for index, own in enumerate(shapes) if own != shapes[0]), None)
    if other is not None:
        raise SettingsError(
            f"expected prompts with text between the same marks; prompt 0 goes {shapes[0]}, prompt {other} goes "
            f"{shapes[other]} (None is text outside of spans)."
        )


def _different_lengths(
    prompts: Sequence[Int[Tensor, " _"]], lengths: Sequence[Sequence[int]], number: int
) -> PairsError:
    found = sorted({len(prompt) for prompt in prompts})
    where = "" if len(lengths[0]) == 1 else f" (piece {number} of {len(lengths[0])} between marks)"
    return PairsError(
        f"a circuit has positions, so prompts need one token length, or marks that say what differs; got {found} "
        f"tokens{where}. Mark it in every prompt, as in 'The capital of the state containing {{city:Dallas}} is'; or "
        "add everything up over positions: positions='sum'; or keep one length: tasks.keep_fitting(model, pairs, "
        "same_length=True)."
    )
