"""Drawing a task for one tokenizer: words that it does not cut up, then contrasts that fit, all of one token length.

A task first drops words that cannot fit (`keep`), so that what is left nearly always does. `draw` then goes through the
contrasts in their random order and checks each as `tokenize` would. The length is the one that most of the first
contrasts have, so a longer draw with the same seed begins with the shorter one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .._errors import PairsError
from ._pairs import PromptPair, PromptPairs
from ._selection import Selection
from ._text_tokens import ModelOrTokenizer
from ._tokenize import encoder, fit_pair, made_for

T = TypeVar("T")
_FIRST = 64  # contrasts that decide the length


class Fitting:
    """What one tokenizer makes of words and contrasts, and what was left out on the way."""

    def __init__(self, model: ModelOrTokenizer, prepend_bos: bool | None) -> None:
        self._encode = encoder(model, prepend_bos)
        self.words: dict[str, tuple[str, ...]] = {}

    def length(self, prompt: str) -> int:
        """Number of tokens, 0 where a word is unknown."""
        tokens = self._encode(prompt)
        return 0 if self._encode.unknown is not None and self._encode.unknown in tokens else len(tokens)

    def single_tokens(self, prompt: str, *answers: str) -> bool:
        """Whether each answer is one known token after the prompt."""
        before = self._encode(prompt)
        for answer in answers:
            together = self._encode(prompt + answer)
            if len(together) != len(before) + 1 or together[:-1] != before or together[-1] == self._encode.unknown:
                return False
        return True

    def keep(self, kind: str, words: Sequence[T], fits: Callable[[T], bool], name: Callable[[T], str] = str) -> list[T]:
        """The words that fit; the others are reported under `kind`."""
        kept = [word for word in words if fits(word)]
        self.leave_out(kind, [name(word) for word in words if word not in kept])
        return kept

    def leave_out(self, kind: str, words: Sequence[str]) -> None:
        """Report words that a task goes without."""
        if words:
            self.words[kind] = (*self.words.get(kind, ()), *words)

    def draw(self, n: int, contrasts: Iterable[tuple[PromptPair, PromptPair]]) -> PromptPairs:
        """`n` pairs of one token length: both directions of the first n/2 contrasts that have it.

        Raises:
            PairsError: there are fewer; the message says how many, and why the others do not fit.
        """
        by_length: dict[int, list[tuple[PromptPair, PromptPair]]] = {}
        left_out: Counter[str] = Counter()
        examined, chosen = 0, 0
        for contrast in contrasts:
            examined += 1
            (length, reason), (other, other_reason) = (fit_pair(self._encode, pair) for pair in contrast)
            if reason or other_reason or length != other:
                left_out[reason or other_reason or "with directions of different lengths"] += 2
            else:
                by_length.setdefault(length, []).append(contrast)
            if examined == _FIRST and by_length:
                chosen = _most_frequent(by_length)
            if len(by_length.get(chosen, ())) >= max(1, n // 2) and examined >= _FIRST:
                break
        if by_length and len(by_length.get(chosen, ())) < n // 2:
            chosen = _most_frequent(by_length)
        found = by_length.pop(chosen, [])
        others = sum(map(len, by_length.values()))
        if others:
            left_out[f"of another length than {chosen} tokens"] += 2 * others
        there = 2 * len(found)
        pairs = [pair for contrast in found[: n // 2] for pair in contrast]
        selection = Selection(there, 2 * examined, dict(left_out), dict(self.words))
        if there < n:
            raise PairsError(
                f"n={n} pairs were asked for, but only {there} fit this tokenizer with prompts of one token length: "
                f"{selection}. Ask for fewer, give other words, or draw text without model= and take what fits with "
                "tasks.keep_fitting(model, pairs, multi_token='first_difference')."
            )
        made = made_for(self._encode, pairs[0].clean)
        return PromptPairs.from_pairs(pairs).remember(made, selection)


def _most_frequent(by_length: dict[int, list[tuple[PromptPair, PromptPair]]]) -> int:
    return min(by_length, key=lambda length: (-len(by_length[length]), length))
