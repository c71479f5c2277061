"""Word lists of the demo models' English, and the prompts made from them.

Every word is one token of the demo models (years are two: "17", "##32"), and nearly all are one token of GPT-2 after a
space. Prompts are natural text without a final space; the answer follows after a space, but for years, which continue
the number.
"""

from dataclasses import dataclass
from typing import Literal

from .._errors import SettingsError

Structure = Literal["simple", "nounpp", "rc", "within_rc"]
STRUCTURES: tuple[Structure, ...] = ("simple", "nounpp", "rc", "within_rc")


@dataclass(frozen=True)
class Inflected:
    """A noun or a verb in both numbers."""

    singular: str
    plural: str

    def form(self, plural: bool) -> str:
        """The plural form, or the singular."""
        return self.plural if plural else self.singular


def _inflected(text: str) -> tuple[Inflected, ...]:
    return tuple(Inflected(*pair.split("/")) for pair in text.split())


NOUNS: tuple[Inflected, ...] = _inflected(
    "boy/boys girl/girls man/men woman/women child/children doctor/doctors lawyer/lawyers teacher/teachers "
    "student/students actor/actors singer/singers farmer/farmers driver/drivers officer/officers parent/parents "
    "friend/friends brother/brothers sister/sisters king/kings queen/queens pilot/pilots author/authors "
    "manager/managers athlete/athletes senator/senators writer/writers guard/guards customer/customers "
    "leader/leaders player/players dog/dogs cat/cats horse/horses"
)
"""Subjects and attractors."""

FINITE_VERBS: tuple[Inflected, ...] = _inflected("is/are has/have does/do goes/go was/were")
"""Verbs that follow a whole subject: "The boy near the girls is"."""

TRANSITIVE_VERBS: tuple[Inflected, ...] = _inflected(
    "admires/admire likes/like hates/hate knows/know loves/love fears/fear sees/see helps/help meets/meet trusts/trust "
    "follows/follow thanks/thank"
)
"""Verbs inside a relative clause: "The boy that the girls admire"."""

PREPOSITIONS: tuple[str, ...] = ("near", "behind", "beside", "with", "by", "under")

COMPLEMENTS: dict[str, tuple[str, ...]] = {
    "is": ("happy", "here", "old", "tall", "late"),
    "has": ("money", "time", "food"),
    "does": ("work", "nothing", "sports"),
    "goes": ("home", "away", "out"),
    "was": ("sad", "there", "young", "quiet", "early"),
}
"""Words that end a sentence after a finite verb, by its singular."""

NAMES: tuple[str, ...] = tuple(
    "John Mary Tom Anna James Kate Paul Jane Mark Sarah Peter Laura David Emma Michael Alice Robert Lucy Daniel Helen "
    "George Rachel Simon Julia Kevin Maria Adam Claire Brian Susan".split()
)
PLACES: tuple[str, ...] = (
    "store",
    "park",
    "school",
    "office",
    "station",
    "garden",
    "beach",
    "market",
    "hospital",
    "house",
)
OBJECTS: tuple[str, ...] = ("drink", "book", "ball", "ring", "kiss", "basket", "letter", "gift", "flower", "computer")

IOI_PHRASINGS: tuple[str, ...] = (
    "When {a} and {b} went to the {place}, {giver} gave a {object} to",
    "Then, {a} and {b} went to the {place}. {giver} gave a {object} to",
    "After {a} and {b} went to the {place}, {giver} handed a {object} to",
)

EVENTS: tuple[str, ...] = (
    "war",
    "reign",
    "siege",
    "voyage",
    "project",
    "trial",
    "conflict",
    "study",
    "campaign",
    "career",
)
CENTURIES: tuple[str, ...] = tuple(str(century) for century in range(11, 18))
YEARS: tuple[str, ...] = tuple(f"{year:02d}" for year in range(100))
"""The last two digits of a year: what a greater-than prompt asks for."""
START_YEARS: tuple[str, ...] = YEARS[2:99]
"""Years a war may start in, so that some year is earlier and some later."""


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


def ioi_prompt(a: str, b: str, giver: str, place: str = PLACES[0], thing: str = OBJECTS[0], phrasing: int = 0) -> str:
    """Two names and a giver, who is one of them; the other one is the answer."""
    return IOI_PHRASINGS[phrasing].format(a=a, b=b, giver=giver, place=place, object=thing)


def greater_than_prompt(century: str, year: str, event: str = EVENTS[0]) -> str:
    """A start year and the century of the end; any later two digits answer it (without a space between)."""
    return f"The {event} lasted from the year {century}{year} to the year {century}"
