"""Indirect object identification (Wang et al. 2023, arXiv 2211.00593).

    When John and Mary went to the store, John | Mary gave a drink to       Mary | John

Clean and corrupt differ in who gives; the names keep their places, and both orders of names are drawn. Each name is
contrasted with one other, its partner under `seed`: parts made by `split(..., by="label")` share no name.
"""

from collections.abc import Sequence

from .._typing import checked
from ._contrasts import both, choose, choose_phrasing, couple, draw
from ._english import NAMES, OBJECTS, PLACES
from ._pairs import PromptPair, PromptPairs

IOI_PHRASINGS = (
    "When {a} and {b} went to the {place}, {giver} gave a {object} to",
    "Then, {a} and {b} went to the {place}. {giver} gave a {object} to",
    "After {a} and {b} went to the {place}, {giver} handed a {object} to",
)


@checked
def ioi(n: int = 32, seed: int = 0, *, phrasing: int | None = 0, words: Sequence[str] | None = None) -> PromptPairs:
    """`n` pairs, both directions of n/2 contrasts.

    Args:
        n: number of pairs, even.
        seed: which name is coupled with which, and which contrasts are drawn.
        phrasing: which wording, from 0; None draws from all (their token lengths may differ).
        words: names to use, an even number; two calls with different names share none.

    Labels are the couple of names, the same for both directions.

    Raises:
        PairsError: `n` is odd or more than there are, `words` has unknown names or an odd number of them, or there is
            no such phrasing.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.tasks.ioi(2, words=["John", "Mary"])
        PromptPairs(n=2, first='When John and Mary went to the station, John gave a kiss to' → ' Mary' | 'When John and
        Mary went to the station, Mary gave a kiss to' → ' John')
    """
    phrasings = range(len(IOI_PHRASINGS))
    if phrasing is not None:
        choose_phrasing(IOI_PHRASINGS, phrasing)
        phrasings = range(phrasing, phrasing + 1)
    couples = couple(choose(words, NAMES, "names", at_least=2), seed, "names")

    def contrast(which: int, swap: int, place: int, thing: int, wording: int) -> tuple[PromptPair, PromptPair]:
        a, b = couples[which][:: -1 if swap else 1]
        sides = [
            (ioi_prompt(a, b, giver, PLACES[place], OBJECTS[thing], phrasings[wording]), answer)
            for giver, answer in ((a, f" {b}"), (b, f" {a}"))
        ]
        label = " and ".join(couples[which])
        return both(sides[0], sides[1], (label, label))

    sizes = (len(couples), 2, len(PLACES), len(OBJECTS), len(phrasings))
    return draw(n, seed, sizes, contrast)


def ioi_prompt(a: str, b: str, giver: str, place: str = PLACES[0], thing: str = OBJECTS[0], phrasing: int = 0) -> str:
    """Two names and a giver, who is one of them; the other one is the answer."""
    return IOI_PHRASINGS[phrasing].format(a=a, b=b, giver=giver, place=place, object=thing)
