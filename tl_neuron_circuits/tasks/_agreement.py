"""Subject-verb agreement in the four structures of Marks et al. 2025 (arXiv 2403.19647; METHODS.md 1.4).

    simple      The boy | boys                                       is | are
    nounpp      The boy | boys near the girls                        is | are
    rc          The boy | boys that the girls admire                 is | are
    within_rc   The boys that the girl | girls                       admires | admire

Clean and corrupt differ in the number of the noun that the verb agrees with (the second in within_rc); attractors come
in both numbers. Words are our own: single tokens of the demo models, and nearly all single tokens of GPT-2.
"""

from collections.abc import Sequence

from .._typing import checked
from . import _english as english
from ._contrasts import both, choose, draw
from ._english import Structure
from ._pairs import PromptPair, PromptPairs


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
    by_singular = {noun.singular: noun for noun in english.NOUNS}
    at_least = 1 if structure == "simple" else 2
    nouns = [by_singular[word] for word in choose(words, list(by_singular), "singular nouns", at_least)]

    def contrast(
        head: int, attractor: int, plural: int, answer: int, transitive: int, preposition: int
    ) -> tuple[PromptPair, PromptPair]:
        subject, other = nouns[head], nouns[attractor + (attractor >= head)] if len(nouns) > 1 else None
        inside = structure == "within_rc"
        verb = english.TRANSITIVE_VERBS[transitive]
        asked = verb if inside else english.FINITE_VERBS[answer]

        def side(number: bool) -> tuple[str, str]:
            numbers = (bool(plural), number) if inside else (number, bool(plural))
            prompt = english.agreement_prompt(
                structure,
                subject,
                numbers[0],
                other,
                numbers[1],
                verb=verb,
                preposition=english.PREPOSITIONS[preposition],
            )
            return prompt, " " + asked.form(number)

        label = (other or subject).singular if inside else subject.singular
        return both(side(False), side(True), (label, label))

    return draw(n, seed, _sizes(structure, len(nouns)), contrast)


def _sizes(structure: Structure, n_nouns: int) -> tuple[int, int, int, int, int, int]:
    """Choices of (subject, attractor, its number, finite verb, transitive verb, preposition)."""
    finite, transitive = len(english.FINITE_VERBS), len(english.TRANSITIVE_VERBS)
    if structure == "simple":
        return n_nouns, 1, 1, finite, 1, 1
    if structure == "nounpp":
        return n_nouns, n_nouns - 1, 2, finite, 1, len(english.PREPOSITIONS)
    if structure == "rc":
        return n_nouns, n_nouns - 1, 2, finite, transitive, 1
    return n_nouns, n_nouns - 1, 2, 1, transitive, 1
