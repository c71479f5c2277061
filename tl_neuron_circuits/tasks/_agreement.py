"""Subject-verb agreement in the four structures of Marks et al. 2025 (arXiv 2403.19647; METHODS.md 1.4).

    simple      The boy | boys                                       is | are
    nounpp      The boy | boys near the girls                        is | are
    rc          The boy | boys that the girls admire                 is | are
    within_rc   The boys that the girl | girls                       admires | admire

Clean and corrupt differ in the number of the noun that the verb agrees with (the second in within_rc); attractors come
in both numbers. Words are our own: single tokens of the demo models, and nearly all single tokens of GPT-2. Drawn for
a model, they take in the nouns of Marks et al., and each noun meets one other, its partner under `seed`: parts made by
`split(..., by="label")` then share neither noun.
"""

from collections.abc import Sequence
from typing import Literal

from .._errors import SettingsError
from .._typing import checked
from ._contrasts import both, choose, draw, groups_by_length
from ._english import FINITE_VERBS, MORE_NOUNS, NOUNS, PREPOSITIONS, THINGS, TRANSITIVE_VERBS, Inflected
from ._fitting import Fitting
from ._pairs import PromptPair, PromptPairs
from ._text_tokens import ModelOrTokenizer

Structure = Literal["simple", "nounpp", "rc", "within_rc"]
STRUCTURES: tuple[Structure, ...] = ("simple", "nounpp", "rc", "within_rc")


@checked
def subject_verb_agreement(
    structure: Structure = "simple",
    n: int = 32,
    seed: int = 0,
    *,
    model: ModelOrTokenizer | None = None,
    prepend_bos: bool | None = None,
    words: Sequence[str] | None = None,
    verbs: Sequence[str] | None = None,
) -> PromptPairs:
    """`n` agreement pairs, both directions of n/2 contrasts.

    Args:
        structure: "simple", "nounpp", "rc" or "within_rc".
        n: number of pairs, even.
        seed: which contrasts are drawn; with `model` also which nouns meet.
        model: a model, or its tokenizer, for which the pairs are drawn: prompts of one token length, answers of one
            token. Without it, text made of words that the demo models know.
        prepend_bos: with `model`; None means the model's default.
        words: nouns to use (singular), as subjects and as attractors; two calls with different words share no noun.
        verbs: verbs to ask for (singular, such as "is"): by default finite verbs, and transitive ones in "within_rc".

    Labels name the noun that the verb agrees with, so `split(..., by="label")` makes parts that share none of these;
    with `model` they name both nouns, which meet each other only, so that the parts share neither.

    Raises:
        PairsError: `n` is odd or more than there are, or `words` or `verbs` has unknown ones.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.tasks.subject_verb_agreement("simple", n=2)
        PromptPairs(n=2, first='The horse' → ' was' | 'The horses' → ' were')
        >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=64, model=tnc.load_demo_model())
        >>> pairs.made_for.begins_with_bos, pairs.labels[0]
        (True, 'player and queen')
    """
    inside = structure == "within_rc"
    known = NOUNS
    if words is not None or model is not None:
        known += MORE_NOUNS + (THINGS if words is not None or structure in ("simple", "nounpp") else ())
    by_singular = {noun.singular: noun for noun in known}
    at_least = 1 if structure == "simple" else 2
    nouns = [by_singular[word] for word in choose(words, list(by_singular), "singular nouns", at_least)]
    asked = TRANSITIVE_VERBS if inside else FINITE_VERBS
    if verbs is not None:
        verb_of = {verb.singular: verb for verb in FINITE_VERBS + TRANSITIVE_VERBS}
        asked = tuple(verb_of[verb] for verb in choose(verbs, list(verb_of), "singular verbs", argument="verbs"))
    n_transitive = len(TRANSITIVE_VERBS) if structure == "rc" else 1
    n_prepositions = len(PREPOSITIONS) if structure == "nounpp" else 1

    def contrast(
        subject: Inflected,
        other: Inflected | None,
        label: str,
        plural: int,
        verb: int,
        transitive: int,
        preposition: int,
    ) -> tuple[PromptPair, PromptPair]:
        words, sides = {"verb": TRANSITIVE_VERBS[transitive], "preposition": PREPOSITIONS[preposition]}, []
        for number in (False, True):
            numbers = (bool(plural), number) if inside else (number, bool(plural))
            prompt = agreement_prompt(structure, subject, numbers[0], other, numbers[1], **words)
            sides.append((prompt, " " + asked[verb].form(number)))
        return both(sides[0], sides[1], (label, label))

    if model is None:

        def any_two(head: int, attractor: int, *choices: int) -> tuple[PromptPair, PromptPair]:
            other = nouns[attractor + (attractor >= head)] if len(nouns) > 1 else None
            label = (other or nouns[head] if inside else nouns[head]).singular
            return contrast(nouns[head], other, label, *choices)

        attractors, numbers = (1, 1) if structure == "simple" else (len(nouns) - 1, 2)
        return draw(n, seed, (len(nouns), attractors, numbers, len(asked), n_transitive, n_prepositions), any_two)

    fitting = Fitting(model, prepend_bos)

    def noun_length(noun: Inflected) -> int:
        """Of both numbers, 0 where they differ: then clean and corrupt could not be compared."""
        singular, plural = (fitting.length(f"The {form}") for form in (noun.singular, noun.plural))
        return singular if singular == plural else 0

    nouns = fitting.keep("nouns", nouns, lambda noun: noun_length(noun) > 0, lambda noun: noun.singular)
    before = f"The {nouns[0].singular}" if nouns else "The"
    asked = fitting.keep(
        "verbs", asked, lambda verb: fitting.single_tokens(before, f" {verb.singular}", f" {verb.plural}"),
        lambda verb: verb.singular,
    )  # fmt: skip
    if structure == "simple":

        def alone(head: int, verb: int) -> tuple[PromptPair, PromptPair]:
            return contrast(nouns[head], None, nouns[head].singular, 0, verb, 0, 0)

        return draw(n, seed, (len(nouns), len(asked)), alone, fitting)
    singulars = [noun.singular for noun in nouns]
    names = groups_by_length(singulars, 2, seed, "nouns", lambda word: noun_length(by_singular[word]), fitting)

    def partners(couple: int, swap: int, *choices: int) -> tuple[PromptPair, PromptPair]:
        subject, other = (by_singular[name] for name in names[couple][:: -1 if swap else 1])
        return contrast(subject, other, " and ".join(sorted(names[couple])), *choices)

    return draw(n, seed, (len(names), 2, 2, len(asked), n_transitive, n_prepositions), partners, fitting)


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
