"""Which words a circuit is learned on and which it is judged on, for SmolLM2: `agreement` and `cities`.

    split = agreement(model, "nounpp")
    split.learning       pairs to attribute on
    split.development    pairs to choose settings on (sizes, ranking, ...)
    split.evaluation     pairs to report
    split.right          {"learning": .., "development": .., "evaluation": ..}: of as many drawn for this, those
                         contrasts that the model gets right in both directions
    split.share          share of the drawn contrasts that are right, for the same three names
    split.clusters       {part: one label per pair}: the couple of nouns, the unit for a paired bootstrap

Agreement. Nouns lie in one part only, as subjects and as attractors, and the parts are the same in all four structures,
so that one structure's circuit can be judged on another's evaluation pairs. Within a part each noun meets one other
(in "simple" it is alone), and the label of a pair is that couple. Half of the evaluation pairs ask for verbs that the
other two parts do not have (`NEW_VERBS`); `new_verbs` says which. Both directions of every contrast are in.

Cities. The pairs ask for the capital of the state that a city is in, after two solved examples whose city is not the
capital. Cities (never a capital, of any state) lie in one part; states are those whose capital is one token.
`evaluation` has other cities of the states of `learning`; `new_states` has states that are in no other part. Only
cities after which the model ranks the state's own capital first among all those capitals are used: `known` lists
them, `asked` all that were tried. Labels are the clean prompt's state, so states are the clusters of a bootstrap.

Pairs are made for the model's tokenizer with `prepend_bos=False` unless asked otherwise: SmolLM2's own tokenizer adds
no BOS, and the model is better without it. Every function is deterministic in its arguments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import tl_neuron_circuits as tnc

Structure = Literal["simple", "nounpp", "rc", "within_rc"]
STRUCTURES: tuple[Structure, ...] = ("simple", "nounpp", "rc", "within_rc")
Part = Literal["learning", "development", "evaluation"]

NOUNS: Mapping[Part, tuple[str, ...]] = {
    "learning": tuple(
        "boy woman doctor teacher actor farmer parent brother king author athlete writer customer player cat father "
        "guy poet architect chef executive neighbor nurse engineer".split()
    ),
    "development": tuple("dog minister kid singer guard visitor".split()),
    "evaluation": tuple(
        "girl man child lawyer student driver officer friend sister queen pilot manager senator leader horse mother "
        "victim assistant dancer artist soldier scientist".split()
    ),
}
"""Singular nouns whose two forms are one token each; both nouns of a pair come from the same part."""

VERBS: Mapping[str, tuple[str, ...]] = {
    "finite": ("is", "has", "was"),
    "transitive": ("likes", "knows", "loves", "sees", "helps", "follows"),
}
NEW_VERBS: Mapping[str, tuple[str, ...]] = {
    "finite": ("does", "goes"),
    "transitive": ("fears", "meets", "trusts", "thanks"),
}
"""Verbs that are asked for in half of the evaluation pairs only. ("transitive" is for within_rc.)"""

SIZES: Mapping[Part, int] = {"learning": 200, "development": 24, "evaluation": 60}
MOST_SIMPLE: Mapping[Part, int] = {"learning": 144, "development": 24, "evaluation": 60}
"""24 nouns and three verbs make 144 pairs of "The {noun}", not 200."""


@dataclass(frozen=True)
class AgreementSplit:
    """Three parts that share no noun. See the module."""

    structure: Structure
    learning: tnc.PromptPairs
    development: tnc.PromptPairs
    evaluation: tnc.PromptPairs
    right: Mapping[Part, tnc.PromptPairs]
    share: Mapping[Part, float]

    @property
    def clusters(self) -> dict[Part, tuple[str, ...]]:
        """One label per pair of each part."""
        return {part: tuple(getattr(self, part).labels) for part in SIZES}

    @property
    def new_verbs(self) -> torch.Tensor:
        """For each evaluation pair whether its verbs are in no other part."""
        return torch.tensor([asks_new_verb(pair.answer, pair.wrong_answer) for pair in self.evaluation])


def asks_new_verb(*answers: str | None) -> bool:
    """Whether one of the two forms is a verb of `NEW_VERBS`."""
    new = {f" {verb}" for verbs in NEW_VERBS.values() for verb in verbs}
    return any(answer in new for answer in answers)


def agreement(
    model: Any,
    structure: Structure,
    *,
    prepend_bos: bool = False,
    seed: int = 0,
    sizes: Mapping[Part, int] | None = None,
) -> AgreementSplit:
    """The three parts of one structure; `sizes` are numbers of pairs per part, even (evaluation: a multiple of 4)."""
    asked = {**SIZES, **(sizes or {})}
    if structure == "simple":
        asked = {part: min(n, MOST_SIMPLE[part]) for part, n in asked.items()}
    parts, right, share = {}, {}, {}
    for part, n in asked.items():
        verbs = [VERBS, NEW_VERBS] if part == "evaluation" else [VERBS]
        each = n // len(verbs)
        kind = "transitive" if structure == "within_rc" else "finite"

        def draw(n: int, verbs: Sequence[str], part: Part = part) -> tnc.PromptPairs:
            return tnc.tasks.subject_verb_agreement(
                structure, n, seed, model=model, prepend_bos=prepend_bos, words=NOUNS[part], verbs=verbs
            )

        drawn = [draw(each, lists[kind]) for lists in verbs]
        parts[part] = _joined(drawn)
        more = [_as_many(draw, 2 * each, each, lists[kind]) for lists in verbs]
        judged = [pairs.where_model_is_right(model) for pairs in more]
        right[part] = _joined([pairs[: min(each, len(pairs))] for pairs in judged])
        share[part] = sum(map(len, judged)) / sum(map(len, more))
    return AgreementSplit(structure, **parts, right=right, share=share)


def _joined(sets: Sequence[tnc.PromptPairs]) -> tnc.PromptPairs:
    joined = sets[0]
    for pairs in sets[1:]:
        joined = joined + pairs
    return joined


def _as_many(draw: Any, wanted: int, least: int, verbs: Sequence[str]) -> tnc.PromptPairs:
    """`wanted` pairs, or as many as there are."""
    for n in range(wanted, least, -max(2, wanted // 8 // 2 * 2)):
        try:
            return draw(n, verbs)
        except tnc.PairsError:
            continue
    return draw(least, verbs)


EXAMPLES = (("Seattle", "Olympia"), ("Philadelphia", "Harrisburg"))
QUESTION = "The capital of the state containing {city} is"
SHOTS = "".join(f"{QUESTION.format(city=city)} {capital}.\n" for city, capital in EXAMPLES)

_CITIES = """
Alabama|Montgomery|Birmingham, Mobile, Tuscaloosa, Huntsville, Auburn, Selma
Arizona|Phoenix|Tucson, Flagstaff, Scottsdale, Tempe, Yuma
California|Sacramento|Los Angeles, San Francisco, San Diego, Oakland, Fresno, San Jose
Colorado|Denver|Boulder, Fort Collins, Pueblo, Aspen
Connecticut|Hartford|Bridgeport, New Haven, Stamford
Georgia|Atlanta|Savannah, Macon, Valdosta
Hawaii|Honolulu|Hilo, Lahaina, Kahului
Illinois|Springfield|Chicago, Rockford, Naperville, Peoria
Indiana|Indianapolis|Fort Wayne, Evansville, South Bend, Gary
Massachusetts|Boston|Worcester, Lowell, New Bedford, Cambridge
Mississippi|Jackson|Biloxi, Hattiesburg, Tupelo, Natchez
Montana|Helena|Billings, Bozeman, Missoula, Butte
Nebraska|Lincoln|Omaha, Grand Island, North Platte
New Hampshire|Concord|Nashua, Keene, Laconia
New York|Albany|Buffalo, Syracuse, Ithaca, Brooklyn
North Carolina|Raleigh|Charlotte, Asheville, Greensboro, Durham
North Dakota|Bismarck|Fargo, Grand Forks, Minot
Ohio|Columbus|Cleveland, Cincinnati, Akron, Toledo, Dayton
Oregon|Salem|Eugene, Corvallis, Klamath Falls, Medford
Rhode Island|Providence|Cranston, Newport, Pawtucket
South Carolina|Columbia|Myrtle Beach, Rock Hill, Spartanburg, Greenville
South Dakota|Pierre|Sioux Falls, Rapid City, Deadwood
Tennessee|Nashville|Memphis, Knoxville, Chattanooga
Texas|Austin|Dallas, Houston, San Antonio, Fort Worth, El Paso, Lubbock, Waco, Galveston
Virginia|Richmond|Norfolk, Roanoke, Charlottesville, Alexandria
West Virginia|Charleston|Wheeling, Morgantown, Parkersburg
Wisconsin|Madison|Milwaukee, Green Bay, Eau Claire, Kenosha, Racine
"""
STATES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    name: (capital, tuple(cities.split(", ")))
    for name, capital, cities in (row.split("|") for row in _CITIES.strip().splitlines())
}
"""State: (capital, cities). The capital is one token of SmolLM2; no city is a capital or contains its state's name."""


@dataclass(frozen=True)
class CitiesSplit:
    """Pairs about cities; the parts share no city. See the module."""

    learning: tnc.PromptPairs
    evaluation: tnc.PromptPairs
    new_states: tnc.PromptPairs | None
    cities: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Part, then state: its cities in that part."""
    known: tuple[str, ...]
    asked: tuple[str, ...]


def cities_pairs(
    cities: Mapping[str, Sequence[str]], *, shots: str = SHOTS, question: str = QUESTION
) -> tnc.PromptPairs:
    """Every city against every city of another state, clean and corrupt; labels are the clean prompt's state."""
    rows = [(state, city) for state, names in cities.items() for city in names]
    both = [(one, other) for one in rows for other in rows if one[0] != other[0]]
    return tnc.PromptPairs(
        clean=[shots + question.format(city=city) for (_, city), _ in both],
        answer=[f" {STATES[state][0]}" for (state, _), _ in both],
        corrupt=[shots + question.format(city=city) for _, (_, city) in both],
        wrong_answer=[f" {STATES[state][0]}" for _, (state, _) in both],
        labels=[state for (state, _), _ in both],
    )


def known_cities(model: Any, *, prepend_bos: bool = False) -> tuple[dict[str, list[str]], dict[str, int]]:
    """State: cities after which its capital is first among all capitals; and every city's number of tokens."""
    tokens = {city: _tokens(model, SHOTS + QUESTION.format(city=city), prepend_bos) for city in _all_cities()}
    capitals = torch.tensor([_tokens(model, f" {capital}", False)[-1] for capital, _ in STATES.values()])
    known: dict[str, list[str]] = {state: [] for state in STATES}
    shortest = min(map(len, tokens.values()))
    for length in sorted({len(row) for row in tokens.values()}):
        names = [city for city, row in tokens.items() if len(row) == length]
        for start in range(0, len(names), 16):
            some = names[start : start + 16]
            with torch.no_grad():
                logits = model(torch.tensor([tokens[city] for city in some]))[:, -1]
            first = logits[:, capitals].argmax(-1).tolist()
            for city, place in zip(some, first, strict=True):
                state = list(STATES)[place]
                if city in STATES[state][1]:
                    known[state].append(city)
    return known, {city: len(row) - shortest + 1 for city, row in tokens.items()}


def cities(model: Any, *, prepend_bos: bool = False, n_new_states: int = 2) -> CitiesSplit:
    """Learning and evaluation cities of the same states, and states held out altogether, all of one token length.

    The length is the one with the most states that have two known cities. Of each state the first known city goes to
    learning and the second to evaluation; states with one known city, at most `n_new_states`, are the new ones.
    """
    known, lengths = known_cities(model, prepend_bos=prepend_bos)
    by_length = {
        length: {
            state: fitting
            for state, names in known.items()
            if (fitting := [city for city in names if lengths[city] == length])
        }
        for length in sorted(set(lengths.values()))
    }
    best = max(by_length.values(), key=lambda states: sum(len(names) > 1 for names in states.values()))
    two = {state: names for state, names in best.items() if len(names) > 1}
    one = {state: tuple(names) for state, names in best.items() if len(names) == 1}
    parts: dict[str, dict[str, tuple[str, ...]]] = {
        "learning": {state: (names[0],) for state, names in two.items()},
        "evaluation": {state: (names[1],) for state, names in two.items()},
        "new_states": dict(list(one.items())[:n_new_states]),
    }
    pairs = {
        part: tnc.tasks.keep_fitting(model, cities_pairs(found), prepend_bos=prepend_bos) if len(found) > 1 else None
        for part, found in parts.items()
    }
    if pairs["learning"] is None or pairs["evaluation"] is None:
        raise ValueError(f"too few states with two cities that the model knows: {best}")
    everywhere = tuple(city for names in known.values() for city in names)
    return CitiesSplit(
        pairs["learning"], pairs["evaluation"], pairs["new_states"], parts, everywhere, tuple(_all_cities())
    )


def _all_cities() -> list[str]:
    return [city for _, cities in STATES.values() for city in cities]


def _tokens(model: Any, text: str, prepend_bos: bool) -> list[int]:
    return model.to_tokens(text, prepend_bos=prepend_bos)[0].tolist()
