"""Capitals of the 50 US states, asked through a city: the two-hop prompt of Lindsey et al. 2025 (METHODS.md 1.8).

    The capital of the state containing Dallas | Miami is      Austin | Tallahassee

Each state is contrasted with one other, its partner under `seed`, so couples share no state, and neither do the parts
made by `split(..., by="label")`. The cities are real: three well-known ones per state that are not its capital, do not
contain its name, and are not also well-known in another state. Drawn for a model, states whose answer is several
tokens are left out, cities (or names) have one token length, and states meet in groups of four, which a split by label
keeps together. `tnc.demo.capitals` asks the same of invented towns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .._errors import PairsError
from .._typing import checked
from ._contrasts import both, choose, choose_phrasing, couple, draw
from ._fitting import Fitting
from ._pairs import PromptPair, PromptPairs
from ._text_tokens import ModelOrTokenizer

Question = Literal["two_hop", "one_hop", "state"]


@dataclass(frozen=True)
class State:
    """A state, its capital, and cities that tell which state is meant."""

    name: str
    capital: str
    cities: tuple[str, ...]


_TABLE = """
Alabama|Montgomery|Birmingham, Mobile, Tuscaloosa
Alaska|Juneau|Anchorage, Fairbanks, Ketchikan
Arizona|Phoenix|Tucson, Flagstaff, Scottsdale
Arkansas|Little Rock|Fort Smith, Bentonville, Pine Bluff
California|Sacramento|Los Angeles, San Francisco, San Diego
Colorado|Denver|Boulder, Fort Collins, Pueblo
Connecticut|Hartford|Bridgeport, New Haven, Stamford
Delaware|Dover|Rehoboth Beach, Bethany Beach, Lewes
Florida|Tallahassee|Miami, Orlando, Tampa
Georgia|Atlanta|Savannah, Macon, Valdosta
Hawaii|Honolulu|Hilo, Lahaina, Kahului
Idaho|Boise|Pocatello, Coeur d'Alene, Twin Falls
Illinois|Springfield|Chicago, Rockford, Naperville
Indiana|Indianapolis|Fort Wayne, Evansville, South Bend
Iowa|Des Moines|Cedar Rapids, Dubuque, Sioux City
Kansas|Topeka|Wichita, Dodge City, Overland Park
Kentucky|Frankfort|Louisville, Owensboro, Paducah
Louisiana|Baton Rouge|New Orleans, Shreveport, Lake Charles
Maine|Augusta|Bangor, Bar Harbor, Kennebunkport
Maryland|Annapolis|Baltimore, Bethesda, Hagerstown
Massachusetts|Boston|Worcester, Lowell, New Bedford
Michigan|Lansing|Detroit, Ann Arbor, Kalamazoo
Minnesota|Saint Paul|Minneapolis, Duluth, Bemidji
Mississippi|Jackson|Biloxi, Hattiesburg, Tupelo
Missouri|Jefferson City|St. Louis, Branson, Joplin
Montana|Helena|Billings, Bozeman, Missoula
Nebraska|Lincoln|Omaha, Grand Island, North Platte
Nevada|Carson City|Las Vegas, Reno, Elko
New Hampshire|Concord|Nashua, Keene, Laconia
New Jersey|Trenton|Atlantic City, Hoboken, Princeton
New Mexico|Santa Fe|Albuquerque, Las Cruces, Taos
New York|Albany|Buffalo, Syracuse, Ithaca
North Carolina|Raleigh|Charlotte, Asheville, Greensboro
North Dakota|Bismarck|Fargo, Grand Forks, Minot
Ohio|Columbus|Cleveland, Cincinnati, Akron
Oklahoma|Oklahoma City|Tulsa, Norman, Broken Arrow
Oregon|Salem|Eugene, Corvallis, Klamath Falls
Pennsylvania|Harrisburg|Philadelphia, Pittsburgh, Allentown
Rhode Island|Providence|Cranston, Newport, Pawtucket
South Carolina|Columbia|Myrtle Beach, Rock Hill, Spartanburg
South Dakota|Pierre|Sioux Falls, Rapid City, Deadwood
Tennessee|Nashville|Memphis, Knoxville, Chattanooga
Texas|Austin|Dallas, Houston, San Antonio
Utah|Salt Lake City|Provo, Ogden, Moab
Vermont|Montpelier|Brattleboro, Rutland, Stowe
Virginia|Richmond|Norfolk, Roanoke, Charlottesville
Washington|Olympia|Seattle, Spokane, Tacoma
West Virginia|Charleston|Wheeling, Morgantown, Parkersburg
Wisconsin|Madison|Milwaukee, Green Bay, Eau Claire
Wyoming|Cheyenne|Casper, Laramie, Rock Springs
"""

STATES: tuple[State, ...] = tuple(
    State(name, capital, tuple(cities.split(", ")))
    for name, capital, cities in (row.split("|") for row in _TABLE.strip().splitlines())
)
_BY_NAME = {state.name: state for state in STATES}

PHRASINGS: dict[Question, tuple[str, ...]] = {
    "two_hop": (
        "The capital of the state containing {city} is",
        "Fact: the capital of the state containing {city} is",
        "The capital of the US state in which {city} lies is",
    ),
    "one_hop": (
        "The capital of the state of {state} is",
        "Fact: the capital of the state of {state} is",
        "The capital of the US state of {state} is",
    ),
    "state": (
        "The state containing {city} is",
        "Fact: the state containing {city} is",
        "{city} is a city in the US state of",
    ),
}

MOST_SHOTS = 4
_GROUP = 4  # states that are contrasted with each other, where pairs are drawn for a model
_EXAMPLES = ("Washington", "Illinois", "Tennessee", "Florida", "Pennsylvania", "Louisiana")
"""States for solved examples: two more than are shown at most, since the two that a pair asks about are passed over."""


@checked
def capitals(
    n: int = 32,
    seed: int = 0,
    *,
    model: ModelOrTokenizer | None = None,
    prepend_bos: bool | None = None,
    question: Question = "two_hop",
    phrasing: int | None = 0,
    shots: int = 0,
    words: Sequence[str] | None = None,
) -> PromptPairs:
    """`n` pairs about US states for models of real English, both directions of n/2 contrasts.

    Clean and corrupt differ in the city (or state) alone. Names differ in token length, and capitals often have several
    tokens: draw for a `model`, or filter with `keep_fitting(model, pairs, multi_token="first_difference")`.

    Args:
        n: number of pairs, even.
        seed: which state is contrasted with which, and which contrasts are drawn.
        model: a model, or its tokenizer, for which the pairs are drawn: prompts of one token length, answers of one
            token.
        prepend_bos: with `model`; None means the model's default.
        question: "two_hop" asks for the capital of the state containing a city, "one_hop" for the capital of a named
            state, "state" which state a city is in.
        phrasing: which wording, from 0; None draws from all.
        shots: solved examples before the question, one per line, at most four; never about a state of the pair.
        words: names of the states to ask about, an even number; two calls with different states share none.

    Labels are the clean prompt's state.

    Raises:
        PairsError: `n` is odd or larger than the number of pairs, `words` has unknown states or an odd number of them,
            there is no such phrasing, or `shots` is not from 0 to 4.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.tasks.capitals(2, words=["Texas", "California"])
        PromptPairs(n=2, first='The capital of the state containing San Antonio is' → ' Austin' | ...)
    """
    names = choose(words, list(_BY_NAME), "states", at_least=2)
    phrasings = PHRASINGS[question]
    if phrasing is not None:
        phrasings = (choose_phrasing(phrasings, phrasing),)
    if not 0 <= shots <= MOST_SHOTS:
        raise PairsError(f"shots must be 0 to {MOST_SHOTS}, got {shots}.")

    def ask(name: str, city: int, text: str) -> tuple[str, str]:
        state = _BY_NAME[name]
        prompt = text.format(city=state.cities[city], state=name)
        return prompt, f" {name if question == 'state' else state.capital}"

    def contrast(name: str, city: int, other: str, other_city: int, text: str) -> tuple[PromptPair, PromptPair]:
        examples = [ask(example, 0, text) for example in _EXAMPLES if example not in (name, other)][:shots]
        before = "".join(f"{prompt}{answer}.\n" for prompt, answer in examples)
        (clean, answer), (corrupt, other_answer) = ask(name, city, text), ask(other, other_city, text)
        return both((before + clean, answer), (before + corrupt, other_answer), (name, other))

    n_cities = 1 if question == "one_hop" else len(STATES[0].cities)
    if model is None:
        couples = couple(names, seed, "states")

        def of_couple(which: int, city: int, other_city: int, wording: int) -> tuple[PromptPair, PromptPair]:
            name, other = couples[which]
            return contrast(name, city, other, other_city, phrasings[wording])

        return draw(n, seed, (len(couples), n_cities, n_cities, len(phrasings)), of_couple)

    fitting = Fitting(model, prepend_bos)
    names = fitting.keep("states", names, lambda name: fitting.single_tokens(*ask(name, 0, phrasings[0])))
    lengths = {
        (name, city): fitting.length(ask(name, city, phrasings[0])[0]) for name in names for city in range(n_cities)
    }
    unknown = [key for key, length in lengths.items() if not length]
    if question == "one_hop":
        fitting.leave_out("states with unknown words", [name for name, _ in unknown])
    else:
        fitting.leave_out("cities with unknown words", [_BY_NAME[name].cities[city] for name, city in unknown])
    best: list[tuple[str, int, str, int]] = []
    for length in sorted(set(lengths.values()) - {0}):
        cities = {name: [c for c in range(n_cities) if lengths[name, c] == length] for name in names}
        having = [name for name in names if cities[name]]
        order = torch.randperm(len(having), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [having[place] for place in order]
        groups = [shuffled[start : start + _GROUP] for start in range(0, len(shuffled), _GROUP)]
        couples = [two for group in groups for two in itertools.combinations(group, 2)]
        best = max(best, [(a, c, b, d) for a, b in couples for c in cities[a] for d in cities[b]], key=len)

    def of_two(which: int, wording: int) -> tuple[PromptPair, PromptPair]:
        name, city, other, other_city = best[which]
        return contrast(name, city, other, other_city, phrasings[wording])

    return draw(n, seed, (len(best), len(phrasings)), of_two, fitting)
