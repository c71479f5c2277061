"""What the tasks share: choosing words, coupling them, and drawing distinct contrasts.

A task describes its contrasts as a product of choices; `draw` picks distinct ones, and every contrast gives two
adjacent pairs, one in each direction. The first n pairs of a longer draw with the same seed are the draw of n.
"""

import math
from collections.abc import Callable, Sequence

import torch

from .._errors import PairsError
from ._fitting import Fitting
from ._pairs import PromptPair, PromptPairs


def choose(
    words: Sequence[str] | None, known: Sequence[str], kind: str, at_least: int = 1, argument: str = "words"
) -> list[str]:
    """Return `words`, checked against the known ones, or all known ones."""
    if words is None:
        return list(known)
    unknown = [word for word in words if word not in known]
    if isinstance(words, str) or unknown:
        raise PairsError(
            f"{argument}= must be a list of {kind}; {unknown} are not known. Choose among {', '.join(known)}."
        )
    if len(set(words)) < len(words) or len(words) < at_least:
        raise PairsError(f"{argument}= needs at least {at_least} different {kind}, each once, got {list(words)}.")
    return list(words)


def choose_phrasing(phrasings: Sequence[str], phrasing: int) -> str:
    """Return one phrasing, or raise an error that lists them all."""
    if not 0 <= phrasing < len(phrasings):
        raise PairsError(f"phrasing must be 0 to {len(phrasings) - 1}, or None for all, got {phrasing}: {phrasings}.")
    return phrasings[phrasing]


def couple(
    words: Sequence[str], seed: int, kind: str, allowed: Callable[[str, str], bool] = lambda a, b: True
) -> list[tuple[str, str]]:
    """Divide the words into couples by chance, so that no two couples share a word."""
    if len(words) < 2 or len(words) % 2:
        raise PairsError(f"words are contrasted in couples, so their number must be even, got {len(words)} {kind}.")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10_000):
        order = [int(place) for place in torch.randperm(len(words), generator=generator)]
        couples = [(words[a], words[b]) for a, b in zip(order[::2], order[1::2], strict=True)]
        if all(allowed(a, b) for a, b in couples):
            return couples
    raise PairsError(f"found no way to couple these {kind} so that the answers differ: {', '.join(words)}. Add others.")


def groups_by_length(
    words: Sequence[str], size: int, seed: int, kind: str, length: Callable[[str], int], fitting: Fitting | None
) -> list[tuple[str, ...]]:
    """Words of one token length in groups of `size` by chance; words that are left over are reported."""
    by_length: dict[int, list[str]] = {}
    for word in words:
        by_length.setdefault(length(word), []).append(word)
    groups = []
    for _, same in sorted(by_length.items()):
        order = torch.randperm(len(same), generator=torch.Generator().manual_seed(seed)).tolist()
        whole = len(order) // size * size
        groups += [tuple(same[place] for place in order[start : start + size]) for start in range(0, whole, size)]
        if fitting is not None:
            fitting.leave_out(f"{kind} without a partner", [same[place] for place in order[whole:]])
    return groups


def draw(
    n: int,
    seed: int,
    sizes: Sequence[int],
    contrast: Callable[..., tuple[PromptPair, PromptPair]],
    fitting: Fitting | None = None,
) -> PromptPairs:
    """`n` pairs: both directions of n/2 distinct contrasts, each made from one choice of every size.

    With `fitting` only contrasts that fit its tokenizer, all of one length.

    Raises:
        PairsError: `n` is odd or below 2, or there are fewer than `n` distinct pairs.
    """
    total = math.prod(sizes)
    if n < 2 or n % 2:
        raise PairsError(f"n counts pairs in both directions of every contrast, so it must be even, got {n}.")
    if fitting is not None:
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        return fitting.draw(n, (contrast(*_digits(index, sizes)) for index in shuffled))
    if n > 2 * total:
        raise PairsError(
            f"n={n} pairs were asked for, but with these words only {2 * total} distinct ones exist. "
            "Ask for fewer, or give more words."
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return PromptPairs.from_pairs(
        [pair for index in order[: n // 2].tolist() for pair in contrast(*_digits(index, sizes))]
    )


def both(first: tuple[str, str], second: tuple[str, str], labels: tuple[str, str]) -> tuple[PromptPair, PromptPair]:
    """Two (prompt, answer) as a pair in each direction."""
    (prompt, answer), (other, other_answer) = first, second
    return (
        PromptPair(prompt, answer, other, other_answer, labels[0]),
        PromptPair(other, other_answer, prompt, answer, labels[1]),
    )


def _digits(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    digits = []
    for size in reversed(sizes):
        index, digit = divmod(index, size)
        digits.append(digit)
    return tuple(reversed(digits))
