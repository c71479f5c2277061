"""Indirect object identification (Wang et al. 2023, arXiv 2211.00593).

    When John and Mary went to the store, John | Mary gave a drink to       Mary | John

Clean and corrupt differ in who gives; the names keep their places, and both orders of names are drawn. Each name is
contrasted with one other, its partner under `seed`: parts made by `split(..., by="label")` share no name. Against
"abc" the corrupt prompt names three others, who belong to that couple alone.
"""

from collections.abc import Sequence
from typing import Literal

from .._typing import checked
from ._contrasts import both, choose, choose_phrasing, couple, draw, groups_by_length
from ._english import NAMES, OBJECTS, PLACES
from ._fitting import Fitting
from ._pairs import PromptPair, PromptPairs
from ._text_tokens import ModelOrTokenizer

IOI_PHRASINGS = (
    "When {a} and {b} went to the {place}, {giver} gave a {object} to",
    "Then, {a} and {b} went to the {place}. {giver} gave a {object} to",
    "After {a} and {b} went to the {place}, {giver} handed a {object} to",
)

MORE_IOI_PHRASINGS = (
    "While {a} and {b} were working at the {place}, {giver} gave a {object} to",
    "Then, {a} and {b} had a good time at the {place}. {giver} gave a {object} to",
    "After lunch, {a} and {b} walked to the {place}. {giver} decided to give a {object} to",
    "Then, {a} and {b} had a long talk at the {place}, and afterwards {giver} gave a {object} to",
    "Two friends, {a} and {b}, found a {object} at the {place}. {giver} gave it to",
    "The {place} that {a} and {b} went to had a {object}. {giver} gave it to",
)
"""Of the same kind; the demo models do not know all of their words."""


@checked
def ioi(
    n: int = 32,
    seed: int = 0,
    *,
    model: ModelOrTokenizer | None = None,
    prepend_bos: bool | None = None,
    phrasing: int | None = 0,
    against: Literal["swap", "abc"] = "swap",
    words: Sequence[str] | None = None,
) -> PromptPairs:
    """`n` pairs, both directions of n/2 contrasts.

    Args:
        n: number of pairs, even.
        seed: which name is coupled with which, and which contrasts are drawn.
        model: a model, or its tokenizer, for which the pairs are drawn: prompts of one token length, answers of one
            token.
        prepend_bos: with `model`; None means the model's default.
        phrasing: which wording, from 0 to 8; None draws from the first three (their token lengths may differ), with
            `model` from all that have the length most of them have.
        against: the corrupt prompt: "swap" lets the other one give; "abc" has three other names, so that neither answer
            is favored. In both, a couple's two pairs ask for one name and for the other.
        words: names to use, an even number (five at least for "abc"); two calls with different names share none.

    Labels are the couple of names, the same for both directions.

    Raises:
        PairsError: `n` is odd or more than there are, `words` has unknown names or an odd number of them, or there is
            no such phrasing.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.tasks.ioi(2, words=["John", "Mary"])
        PromptPairs(n=2, first='When John and Mary went to the station, John gave a kiss to' → ' Mary' | 'When John and
        Mary went to the station, Mary gave a kiss to' → ' John')
        >>> pair = tnc.tasks.ioi(2, against="abc", words=["John", "Mary", "Tom", "Anna", "James"])[0]
        >>> pair.clean, pair.corrupt
        ('When James and John went to the station, James gave a kiss to', 'When Mary and Anna went to the station, Tom
        gave a kiss to')
    """
    every = IOI_PHRASINGS + MORE_IOI_PHRASINGS
    phrasings = range(len(IOI_PHRASINGS if model is None else every))
    if phrasing is not None:
        choose_phrasing(every, phrasing)
        phrasings = range(phrasing, phrasing + 1)
    size = 2 if against == "swap" else 5
    names = choose(words, NAMES, "names", at_least=size)
    fitting: Fitting | None = None
    groups: Sequence[tuple[str, ...]]
    if model is not None:
        fit = fitting = Fitting(model, prepend_bos)
        names = fit.keep("names", names, lambda name: fit.single_tokens("When", f" {name}"))
        groups = groups_by_length(names, size, seed, "names", lambda name: fit.length(f"When {name}"), fit)
    elif against == "swap":
        groups = couple(names, seed, "names")
    else:
        groups = groups_by_length(names, size, seed, "names", lambda name: 0, None)

    def contrast(which: int, swap: int, place: int, thing: int, wording: int) -> tuple[PromptPair, PromptPair]:
        a, b = groups[which][:2][:: -1 if swap else 1]
        rest = (PLACES[place], OBJECTS[thing], phrasings[wording])
        sides = [(ioi_prompt(a, b, giver, *rest), answer) for giver, answer in ((a, f" {b}"), (b, f" {a}"))]
        label = " and ".join(groups[which][:2])
        if against == "swap":
            return both(sides[0], sides[1], (label, label))
        c, d, giver = list(groups[which])[2:]
        corrupt = ioi_prompt(*((d, c) if swap else (c, d)), giver, *rest)
        (prompt, answer), (other, other_answer) = sides
        return (
            PromptPair(prompt, answer, corrupt, other_answer, label),
            PromptPair(other, other_answer, corrupt, answer, label),
        )

    return draw(n, seed, (len(groups), 2, len(PLACES), len(OBJECTS), len(phrasings)), contrast, fitting)


def ioi_prompt(a: str, b: str, giver: str, place: str = PLACES[0], thing: str = OBJECTS[0], phrasing: int = 0) -> str:
    """Two names and a giver, who is one of them; the other one is the answer."""
    text = (IOI_PHRASINGS + MORE_IOI_PHRASINGS)[phrasing]
    return text.format(a=a, b=b, giver=giver, place=place, object=thing)
