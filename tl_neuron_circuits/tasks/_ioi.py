"""Indirect object identification (Wang et al. 2023, arXiv 2211.00593).

    When John and Mary went to the store, John | Mary gave a drink to       Mary | John

Clean and corrupt differ in who gives; the names keep their places, and both orders of names are drawn. Each name is
contrasted with one other, its partner under `seed`: parts made by `split(..., by="label")` share no name.
"""

from collections.abc import Sequence

from .._typing import checked
from . import _english as english
from ._contrasts import both, choose, choose_phrasing, couple, draw
from ._pairs import PromptPair, PromptPairs


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
    phrasings = range(len(english.IOI_PHRASINGS))
    if phrasing is not None:
        choose_phrasing(english.IOI_PHRASINGS, phrasing)
        phrasings = range(phrasing, phrasing + 1)
    couples = couple(choose(words, english.NAMES, "names", at_least=2), seed, "names")

    def contrast(which: int, swap: int, place: int, thing: int, wording: int) -> tuple[PromptPair, PromptPair]:
        a, b = couples[which][:: -1 if swap else 1]
        sides = [
            (english.ioi_prompt(a, b, giver, english.PLACES[place], english.OBJECTS[thing], phrasings[wording]), answer)
            for giver, answer in ((a, f" {b}"), (b, f" {a}"))
        ]
        label = " and ".join(couples[which])
        return both(sides[0], sides[1], (label, label))

    sizes = (len(couples), 2, len(english.PLACES), len(english.OBJECTS), len(phrasings))
    return draw(n, seed, sizes, contrast)
