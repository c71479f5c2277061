"""Greater-than (Hanna et al. 2023, arXiv 2305.00586; METHODS.md 4.4).

    The war lasted from the year 1732 | 1766 to the year 17      33 to 99 | 67 to 99

Any later year is right, so the metric is `ProbabilityDifference.for_years(model, pairs)`, and a pair's answer is the
boundary: the first right year, its wrong answer the last wrong one (the start year). YY is contrasted with 98 - YY:
then a model that finds all end years alike scores zero on the two directions together.

Tokenizers that take digit by digit are asked for the decade alone, from start years that end in 9: after "from the year
1739 to the year 17" the right digits are 4 to 9, exactly. Decade D is contrasted with 8 - D.
"""

from collections.abc import Sequence
from typing import Literal

from .._typing import checked
from ._contrasts import choose, draw
from ._english import CENTURIES, EVENTS, YEARS
from ._fitting import Fitting
from ._pairs import PromptPair, PromptPairs
from ._text_tokens import ModelOrTokenizer

_LOWER_YEARS = range(2, 49)
_MIRROR = 98
_LOWER_DECADES = range(4)
_DECADES_MIRROR = 8


@checked
def greater_than(
    n: int = 32,
    seed: int = 0,
    *,
    model: ModelOrTokenizer | None = None,
    prepend_bos: bool | None = None,
    digits: Literal[1, 2] | None = None,
    words: Sequence[str] | None = None,
) -> PromptPairs:
    """`n` pairs, both directions of n/2 contrasts; a start year in the first half of a century against its mirror.

    Args:
        n: number of pairs, even.
        seed: which contrasts are drawn.
        model: a model, or its tokenizer, for which the pairs are drawn: prompts of one token length, answers of one
            token.
        prepend_bos: with `model`; None means the model's default.
        digits: 2 asks for the year, as published; 1 for the decade, for tokenizers that take digit by digit. None is 2,
            or what the tokenizer of `model` needs.
        words: events to use ("war", "siege", ...); two calls with different events share none.

    Labels are the events.

    Raises:
        PairsError: `n` is odd or more than there are, or `words` has unknown events.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.tasks.greater_than(2, words=["war"])
        PromptPairs(n=2, first='The war lasted from the year 1236 to the year 12' → '37' | 'The war lasted from the year
        1262 to the year 12' → '36')
        >>> tnc.tasks.greater_than(2, words=["war"], digits=1)
        PromptPairs(n=2, first='The war lasted from the year 1209 to the year 12' → '1' | 'The war lasted from the year
        1289 to the year 12' → '0')
    """
    events = choose(words, EVENTS, "events")
    fitting = None if model is None else Fitting(model, prepend_bos)
    if digits is None:
        starts = [greater_than_prompt(century, "32", events[0]) for century in CENTURIES]
        whole = fitting is None or any(fitting.single_tokens(start, year) for start in starts for year in ("33", "67"))
        digits = 2 if whole else 1
    lower, mirror = (_LOWER_YEARS, _MIRROR) if digits == 2 else (_LOWER_DECADES, _DECADES_MIRROR)

    def contrast(event: int, century: int, place: int) -> tuple[PromptPair, PromptPair]:
        first = lower[place]
        prompts = {
            start: greater_than_prompt(CENTURIES[century], YEARS[start] if digits == 2 else f"{start}9", events[event])
            for start in (first, mirror - first)
        }
        sides = [
            PromptPair(prompt, f"{start + 1:0{digits}d}", prompts[mirror - start], f"{start:0{digits}d}", events[event])
            for start, prompt in prompts.items()
        ]
        return sides[0], sides[1]

    return draw(n, seed, (len(events), len(CENTURIES), len(lower)), contrast, fitting)


def greater_than_prompt(century: str, year: str, event: str = EVENTS[0]) -> str:
    """A start year and the century of the end; any later two digits answer it (without a space between)."""
    return f"The {event} lasted from the year {century}{year} to the year {century}"
