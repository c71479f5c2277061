"""Tokens that are the beginning of a word alone, and how the word goes on: " strugg" is read as "strugg(le)".

A byte-pair vocabulary is in the order in which pieces were joined, which is about that of their counts. So a piece that
hardly occurs by itself is followed, before its number has doubled, by a longer token that contains it. Words that
happen to begin longer ones (" horse", " horses") have a plural or a twin with the other case in the vocabulary.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

_MARKS = ("Ġ", "▁")


def word_ends(model: Any, tokens: Iterable[str]) -> dict[str, str]:
    """Of those tokens that are pieces of words, the letters that follow most often; none without such a vocabulary."""
    tokenizer = getattr(model, "tokenizer", None)
    vocabulary: Mapping[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    mark = next((mark for mark in _MARKS if f"{mark}the" in vocabulary), None)
    if mark is None:
        return {}
    words = sorted(word for word in vocabulary if _is_word(word, mark))
    found = {}
    for token in tokens:
        if token.startswith(" ") and _is_word(mark + token[1:], mark):
            begun = whole = mark + token[1:]
            while (longer := _goes_on(whole, words, vocabulary, mark)) is not None:
                whole = longer
            if whole != begun:
                found[token] = whole[len(begun) :]
    return found


def _is_word(text: str, mark: str) -> bool:
    letters = text.removeprefix(mark)
    return len(letters) == len(text) - 1 > 0 and letters.isascii() and letters.isalpha()


def _goes_on(word: str, words: list[str], vocabulary: Mapping[str, int], mark: str) -> str | None:
    """The first longer token in the vocabulary, if `word` is no word by itself."""
    letters = word[1:]
    other = letters[0].swapcase() + letters[1:]
    twins = [mark + other, *([letters] if letters[0].isupper() else [])]
    if word not in vocabulary or f"{word}s" in vocabulary or any(twin in vocabulary for twin in twins):
        return None
    longer = []
    for place in range(bisect_right(words, word), len(words)):
        if not words[place].startswith(word):
            break
        longer.append(words[place])
    if not longer:
        return None
    first = min(longer, key=lambda one: vocabulary[one])
    ratio = vocabulary[first] / max(1, vocabulary[word])
    return first if ratio < 2 and (ratio > 1 or len(longer) > 1) else None
