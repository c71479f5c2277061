"""The demo models' world: capitals and other attributes of the 50 US states, asked through invented towns.

    The capital of the state containing Dallas | Cormouth is      Austin | Tallahassee

Each state is contrasted with one other, its partner under `seed`, so couples share no state, and neither do the parts
made by `split(..., by="label")`. `tasks.capitals` is the same task about real cities.
"""

from collections.abc import Sequence

from .._typing import checked
from ..tasks._capitals import Question
from ..tasks._contrasts import both, choose, choose_phrasing, couple, draw
from ..tasks._pairs import PromptPair, PromptPairs
from . import _states as states


@checked
def capitals(
    n: int = 32,
    seed: int = 0,
    *,
    question: Question = "two_hop",
    attribute: str = "capital",
    phrasing: int | None = 0,
    words: Sequence[str] | None = None,
) -> PromptPairs:
    """`n` pairs about US states, both directions of n/2 contrasts, with the same phrasing in clean and corrupt.

    Args:
        n: number of pairs, even.
        seed: which state is contrasted with which, and which contrasts are drawn.
        question: "two_hop" asks the attribute of the state containing a town, "one_hop" of a named state, "state" asks
            which state a town is in.
        attribute: "capital", or another one of the demo models' world (abbreviation, region, nickname, ...).
        phrasing: which wording, from 0; None draws from all.
        words: names of the states to use, an even number; two calls with different states share none.

    Labels are the clean prompt's state.

    Raises:
        PairsError: `n` is odd or more than there are, `words` has unknown states, an odd number of them, or no two
            whose answers differ, or there is no such phrasing.
        SettingsError: the attribute is unknown.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.demo.capitals(2, words=["Texas", "California"])
        PromptPairs(n=2, first='The capital of the state containing Cordale is' → ' Austin' | 'The capital of the state
        containing Millas is' → ' Sacramento')
    """
    by_name = {state.name: state for state in states.STATES}
    names = choose(words, list(by_name), "states", at_least=2)
    phrasings = {
        "two_hop": states.TWO_HOP_PHRASINGS,
        "one_hop": states.ONE_HOP_PHRASINGS,
        "state": states.CITY_PHRASINGS,
    }[question]
    if phrasing is not None:
        phrasings = (choose_phrasing(phrasings, phrasing),)

    def answer(name: str) -> str:
        return " " + (name if question == "state" else by_name[name].attribute(attribute))

    couples = couple(names, seed, "states", lambda a, b: answer(a) != answer(b))
    towns = {name: [city.name for city in states.CITIES if city.state.name == name] for name in names}
    n_towns = 1 if question == "one_hop" else states.CITIES_PER_STATE

    def contrast(which: int, town: int, other_town: int, wording: int) -> tuple[PromptPair, PromptPair]:
        clean, corrupt = couples[which]
        text = phrasings[wording]
        sides = [
            (text.format(city=towns[name][place], state=name, attribute=attribute), answer(name))
            for name, place in ((clean, town), (corrupt, other_town))
        ]
        return both(sides[0], sides[1], (clean, corrupt))

    return draw(n, seed, (len(couples), n_towns, n_towns, len(phrasings)), contrast)
