"""Greater-than (Hanna et al. 2023, arXiv 2305.00586; METHODS.md 4.4).

    The war lasted from the year 1732 | 1766 to the year 17      33 to 99 | 67 to 99

Any later year is right, so the metric is `ProbabilityDifference.for_years(model, pairs)`, and a pair's answer is the
boundary: the first right year, its wrong answer the last wrong one (the start year). YY is contrasted with 98 - YY:
then a model that finds all end years alike scores zero on the two directions together.
"""

from collections.abc import Sequence

from .._typing import checked
from ._contrasts import choose, draw
from ._english import CENTURIES, EVENTS, YEARS
from ._pairs import PromptPair, PromptPairs

_LOWER_YEARS = range(2, 49)
_MIRROR = 98


@checked
def greater_than(n: int = 32, seed: int = 0, *, words: Sequence[str] | None = None) -> PromptPairs:
    """`n` pairs, both directions of n/2 contrasts; a start year in the first half of a century against its mirror.

    Args:
        n: number of pairs, even.
        seed: which contrasts are drawn.
        words: events to use ("war", "siege", ...); two calls with different events share none.

    Labels are the events. On tokenizers that split some years elsewhere than in the middle, filter with `keep_fitting`.

    Raises:
        PairsError: `n` is odd or more than there are, or `words` has unknown events.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.tasks.greater_than(2, words=["war"])
        PromptPairs(n=2, first='The war lasted from the year 1236 to the year 12' → '37' | 'The war lasted from the year
        1262 to the year 12' → '36')
    """
    events = choose(words, EVENTS, "events")

    def contrast(event: int, century: int, lower: int) -> tuple[PromptPair, PromptPair]:
        year = _LOWER_YEARS[lower]
        prompts = {
            start: greater_than_prompt(CENTURIES[century], YEARS[start], events[event])
            for start in (year, _MIRROR - year)
        }
        sides = [
            PromptPair(prompt, YEARS[start + 1], prompts[_MIRROR - start], YEARS[start], events[event])
            for start, prompt in prompts.items()
        ]
        return sides[0], sides[1]

    return draw(n, seed, (len(events), len(CENTURIES), len(_LOWER_YEARS)), contrast)


def greater_than_prompt(century: str, year: str, event: str = EVENTS[0]) -> str:
    """A start year and the century of the end; any later two digits answer it (without a space between)."""
    return f"The {event} lasted from the year {century}{year} to the year {century}"
