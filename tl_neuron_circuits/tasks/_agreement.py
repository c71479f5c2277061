"""Subject-verb agreement in the four structures of Marks et al. 2025 (arXiv 2403.19647; METHODS.md 1.4).

    simple      The boy | boys                                       is | are
    nounpp      The boy | boys near the girls                        is | are
    rc          The boy | boys that the girls admire                 is | are
    within_rc   The boys that the girl | girls                       admires | admire

Clean and corrupt differ in the number of the noun that the verb agrees with (the second in within_rc); attractors come
in both numbers. Words are our own: single tokens of the demo models, and nearly all single tokens of GPT-2.
"""

from collections.abc import Sequence
from typing import Literal

from .._errors import SettingsError
from .._typing import checked
from ._contrasts import both, choose, draw
from ._english import FINITE_VERBS, NOUNS, PREPOSITIONS, TRANSITIVE_VERBS, Inflected
from ._pairs import PromptPair, PromptPairs

Structure = Literal["simple", "nounpp", "rc", "within_rc"]
STRUCTURES: tuple[Structure, ...] = ("simple", "nounpp", "rc", "within_rc")


@checked
def subject_verb_agreement(
    structure: Structure = "simple", n: int = 32, seed: int = 0, *, words: Sequence[str] | None = None
) -> PromptPairs:
    """`n` agreement pairs, both directions of n/2 contrasts, for the demo models and for models of real English.

    Args:
        structure: "simple", "nounpp", "rc" or "within_rc".
        n: number of pairs, even.
        seed: which contrasts are drawn.
        words: nouns to use (singular), as subjects and as attractors; two calls with different words share no noun.

    Labels name the noun that the verb agrees with, so `split(..., by="label")` makes parts that share none of these.

    Raises:
        PairsError: `n` is odd or more than there are, or `words` has unknown nouns.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.tasks.subject_verb_agreement("simple", n=2)
        PromptPairs(n=2, first='The horse' → ' was' | 'The horses' → ' were')
    """
    by_singular = {noun.singular: noun for noun in NOUNS}
    at_least = 1 if structure == "simple" else 2
    nouns = [by_singular[word] for word in choose(words, list(by_singular), "singular nouns", at_least)]

    sizes = {  # choices of subject, attractor, its number, finite verb, transitive verb, preposition
        "simple": (len(nouns), 1, 1, len(FINITE_VERBS), 1, 1),
        "nounpp": (len(nouns), len(nouns) - 1, 2, len(FINITE_VERBS), 1, len(PREPOSITIONS)),
        "rc": (len(nouns), len(nouns) - 1, 2, len(FINITE_VERBS), len(TRANSITIVE_VERBS), 1),
        "within_rc": (len(nouns), len(nouns) - 1, 2, 1, len(TRANSITIVE_VERBS), 1),
    }

    def contrast(
        head: int, attractor: int, plural: int, answer: int, transitive: int, preposition: int
    ) -> tuple[PromptPair, PromptPair]:
        subject, other = nouns[head], nouns[attractor + (attractor >= head)] if len(nouns) > 1 else None
        inside = structure == "within_rc"
        verb = TRANSITIVE_VERBS[transitive]
        asked = verb if inside else FINITE_VERBS[answer]

        def side(number: bool) -> tuple[str, str]:
            numbers = (bool(plural), number) if inside else (number, bool(plural))
            prompt = agreement_prompt(
                structure, subject, numbers[0], other, numbers[1], verb=verb, preposition=PREPOSITIONS[preposition]
            )
            return prompt, " " + asked.form(number)

        label = (other or subject).singular if inside else subject.singular
        return both(side(False), side(True), (label, label))

    return draw(n, seed, sizes[structure], contrast)


def agreement_prompt(
    structure: Structure,
    subject: Inflected,
    plural: bool,
    attractor: Inflected | None = None,
    attractor_plural: bool = False,
    *,
    verb: Inflected = TRANSITIVE_VERBS[0],
    preposition: str = PREPOSITIONS[0],
) -> str:
    """A sentence up to the verb whose number is asked for.

    In "simple", "nounpp" and "rc" the answer is a finite verb in the subject's number; in "within_rc" it is a
    transitive verb in the attractor's number ("The boy that the girls" is followed by "admire").

    Raises:
        SettingsError: the structure is unknown, or it needs an attractor and there is none.
    """
    if structure not in STRUCTURES:
        raise SettingsError(f"expected one of {STRUCTURES}, got {structure!r}")
    noun = subject.form(plural)
    if structure == "simple":
        return f"The {noun}"
    if attractor is None:
        raise SettingsError(f"the structure {structure!r} needs an attractor noun: pass attractor=NOUNS[...]")
    other = attractor.form(attractor_plural)
    if structure == "nounpp":
        return f"The {noun} {preposition} the {other}"
    if structure == "within_rc":
        return f"The {noun} that the {other}"
    return f"The {noun} that the {other} {verb.form(attractor_plural)}"
