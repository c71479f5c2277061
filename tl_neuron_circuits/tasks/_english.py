"""Word lists: nouns and verbs in both numbers, names, places, things and events.

Every word is one token of the demo models, and nearly all are one token of GPT-2 after a space; `MORE_NOUNS` and
`THINGS` are for tasks that are drawn for a model.
"""

from dataclasses import dataclass


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


NOUNS = _inflected(
    "boy/boys girl/girls man/men woman/women child/children doctor/doctors lawyer/lawyers teacher/teachers "
    "student/students actor/actors singer/singers farmer/farmers driver/drivers officer/officers parent/parents "
    "friend/friends brother/brothers sister/sisters king/kings queen/queens pilot/pilots author/authors "
    "manager/managers athlete/athletes senator/senators writer/writers guard/guards customer/customers "
    "leader/leaders player/players dog/dogs cat/cats horse/horses"
)
MORE_NOUNS = _inflected(
    "father/fathers mother/mothers uncle/uncles aunt/aunts guy/guys kid/kids poet/poets victim/victims "
    "carpenter/carpenters architect/architects assistant/assistants chef/chefs dancer/dancers executive/executives "
    "minister/ministers skater/skaters neighbor/neighbors artist/artists nurse/nurses soldier/soldiers "
    "engineer/engineers scientist/scientists visitor/visitors worker/workers"
)
"""With `NOUNS`, those of Marks et al.'s agreement prompts, as subjects or as attractors, and a few others."""

THINGS = _inflected("car/cars truck/trucks bike/bikes table/tables chair/chairs desk/desks tree/trees window/windows")
"""Nouns that admire nobody."""

FINITE_VERBS = _inflected("is/are has/have does/do goes/go was/were")
"""Verbs that follow a whole subject: "The boy near the girls is"."""

TRANSITIVE_VERBS = _inflected(
    "admires/admire likes/like hates/hate knows/know loves/love fears/fear sees/see helps/help meets/meet trusts/trust "
    "follows/follow thanks/thank"
)
"""Verbs inside a relative clause: "The boy that the girls admire"."""

PREPOSITIONS = ("near", "behind", "beside", "with", "by", "under")

NAMES = tuple(
    "John Mary Tom Anna James Kate Paul Jane Mark Sarah Peter Laura David Emma Michael Alice Robert Lucy Daniel Helen "
    "George Rachel Simon Julia Kevin Maria Adam Claire Brian Susan".split()
)
PLACES = tuple("store park school office station garden beach market hospital house".split())
OBJECTS = tuple("drink book ball ring kiss basket letter gift flower computer".split())
EVENTS = tuple("war reign siege voyage project trial conflict study campaign career".split())
CENTURIES = tuple(str(century) for century in range(11, 18))
YEARS = tuple(f"{year:02d}" for year in range(100))
"""The last two digits of a year."""
