"""Pronoun pairs for the real `stories260K`: " She" or " He" after a sentence about a named child.

All names are three tokens long there, so that all prompts of a template align. The names of the attribution part and
of the evaluation part are disjoint.
"""

from typing import Literal

from tl_neuron_circuits.tasks import PromptPair, PromptPairs

PRONOUN_TEMPLATES: tuple[str, ...] = (
    "{name} saw a big ball.",
    "{name} was very happy.",
    "{name} went to the park.",
    "{name} had a red ball.",
    "{name} liked to play outside.",
    "{name} wanted to play.",
    "{name} was sad.",
    "{name} went home.",
    "Once upon a time, there was a kid named {name}.",
    "{name} found a toy.",
    "One day, {name} went to the park.",
    "{name} ran to the tree.",
)
GIRLS = {"attribution": ("Mia", "Sue", "Amy", "Mary"), "evaluation": ("Sara", "Sally", "Lisa", "Mimi")}
BOYS = {"attribution": ("Max", "Bob", "Mark", "Mike"), "evaluation": ("Tommy", "Spot", "Leo", "Jim")}


def pronoun_pairs(
    template: str, part: Literal["attribution", "evaluation"], n_contrasts: int = 16, context: str = ""
) -> PromptPairs:
    """Both directions of up to 16 contrasts of a girl and a boy; multiples of 4 use every name equally often."""
    girls, boys = GIRLS[part], BOYS[part]
    couples = [(girl, boys[(i + turn) % 4]) for turn in range(4) for i, girl in enumerate(girls)]
    pairs = []
    for girl, boy in couples[:n_contrasts]:
        she, he = (context + template.format(name=name) for name in (girl, boy))
        pairs += [PromptPair(she, " She", he, " He", "girl"), PromptPair(he, " He", she, " She", "boy")]
    return PromptPairs.from_pairs(pairs)
