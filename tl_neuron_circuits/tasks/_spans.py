"""Marked spans of a prompt: "The capital of the state containing {city:Dallas} is".

A mark is a name, a colon and text in braces; the model gets the text alone. What looks like a mark and is not is
written with double braces: "{{a:1}}" is the text "{a:1}". A chat template's turns are spans too, named after roles.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from .._errors import SettingsError

_MARK = re.compile(r"(?<!\{)\{([A-Za-z_]\w*):(\s*\w[^{}]*)\}(?!\})|\{(\{[A-Za-z_]\w*:\s*\w[^{}]*\})\}")


class TextSpan(NamedTuple):
    """A named stretch of text, in characters."""

    name: str
    start: int
    end: int


class TokenSpan(NamedTuple):
    """A named stretch of a prompt, in tokens."""

    name: str
    start: int
    end: int


class MarkedText(str):
    """Text that knows its spans: what a chat template rendered, or a prompt whose marks were read."""

    spans: tuple[TextSpan, ...] = ()

    def with_spans(self, spans: Sequence[TextSpan]) -> "MarkedText":
        """The same text with these spans."""
        new = type(self)(self)
        new.spans = tuple(spans)
        return new


def read_marks(text: str) -> MarkedText:
    """The text without its marks, with the spans that they name, and those that it knew.

    Raises:
        SettingsError: two spans of one name.
    """
    plain, moved, spans = [], [], []
    done, length = 0, 0
    for mark in _MARK.finditer(text):
        name, inside, literal = mark.groups()
        before, content = text[done : mark.start()], literal if name is None else inside
        length += len(before)
        if name is not None:
            spans.append(TextSpan(name, length, length + len(content)))
        length += len(content)
        plain += [before, content]
        done = mark.end()
        moved.append((done, length - done))  # from here on, by how much text has moved
    known = getattr(text, "spans", ())
    shift = lambda at: at + next((by for end, by in reversed(moved) if end <= at), 0)  # noqa: E731
    spans = sorted([*(TextSpan(n, shift(start), shift(end)) for n, start, end in known), *spans], key=lambda s: s.start)
    names = [span.name for span in spans]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"expected each span's name once in a prompt; {twice} are there twice in {text!r}.")
    kind = type(text) if isinstance(text, MarkedText) else MarkedText
    return kind("".join([*plain, text[done:]])).with_spans(spans)


def span_tokens(model: Any, text: str, tokens: Int[Tensor, " pos"]) -> list[TokenSpan]:
    """The spans that a text knows, in its tokens.

    Raises:
        SettingsError: a span that begins or ends inside a token, or a tokenizer that does not say where its tokens are.
    """
    spans = getattr(text, "spans", ())
    if not spans:
        return []
    tokenizer, ids = model.tokenizer, tokens.tolist()
    read = tokenizer(str(text), add_special_tokens=False, return_offsets_mapping=True) if tokenizer.is_fast else {}
    first = len(ids) - len(read.get("input_ids", ids))  # BOS, which the text may lack
    if not read or first < 0 or ids[first:] != list(read["input_ids"]):
        raise SettingsError(
            f"expected a tokenizer that says where its tokens are in the text, as fast tokenizers do; "
            f"{type(tokenizer).__name__} does not, so spans cannot be found. Give prompts without marks."
        )
    ends = [(at, *pair) for at, pair in enumerate(read["offset_mapping"], first)]
    found = []
    for name, start, end in spans:
        own = [(at, a, b) for at, a, b in ends if a < end and b > start and text[max(a, start) : min(b, end)].strip()]
        cut = [text[a:b] for _, a, b in own if text[a:start].strip() or text[end:b].strip()]
        if not own or cut:
            raise SettingsError(
                f"expected spans of whole tokens; {name!r} = {text[start:end]!r} "
                f"{'has none' if not own else f'cuts the token {cut[0]!r}'}. Mark whole words."
            )
        found.append(TokenSpan(name, own[0][0], own[-1][0] + 1))
    return found
