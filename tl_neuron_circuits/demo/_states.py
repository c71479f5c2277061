"""The 50 US states, eight attributes each, and the towns of the demo models' world.

Everything is written in natural English with capitals. The demo tokenizer keeps names of several words ("Salt Lake
City") as one token and splits town names into two pieces ("Dal", "##las"), neither of which gives the state alone.
The towns are invented, except for Dallas; `tasks.capitals` has real ones.
Attributes are single tokens of the demo models; regions are the nine divisions of the US Census.
"""

from dataclasses import dataclass

import torch

from .._errors import SettingsError

ATTRIBUTES: tuple[str, ...] = (
    "capital",
    "abbreviation",
    "region",
    "nickname",
    "demonym",
    "bird",
    "flower",
    "tree",
)


@dataclass(frozen=True)
class State:
    """One US state; fields of several words ("New York") are one token of the demo models."""

    name: str
    capital: str
    abbreviation: str
    region: str
    nickname: str
    demonym: str
    bird: str
    flower: str
    tree: str

    def attribute(self, attribute: str) -> str:
        """The state's value of one of `ATTRIBUTES`."""
        if attribute not in ATTRIBUTES:
            raise SettingsError(f"expected one of {ATTRIBUTES}, got {attribute!r}")
        return getattr(self, attribute)


@dataclass(frozen=True)
class City:
    """A town of the demo world: its name is `first + second`, two tokens of the demo models."""

    first: str
    second: str
    state: State

    @property
    def name(self) -> str:
        """The name as it is written, for example "Dallas"."""
        return self.first + self.second


_TABLE = """
Alabama|Montgomery|AL|East South Central|Yellowhammer|Alabamian|Yellowhammer|Camellia|Longleaf Pine
Alaska|Juneau|AK|Pacific|Last Frontier|Alaskan|Ptarmigan|Forget-me-not|Sitka Spruce
Arizona|Phoenix|AZ|Mountain|Grand Canyon|Arizonan|Cactus Wren|Saguaro|Palo Verde
Arkansas|Little Rock|AR|West South Central|Natural|Arkansan|Mockingbird|Apple Blossom|Loblolly Pine
California|Sacramento|CA|Pacific|Golden|Californian|Quail|Poppy|Redwood
Colorado|Denver|CO|Mountain|Centennial|Coloradan|Lark Bunting|Columbine|Blue Spruce
Connecticut|Hartford|CT|New England|Constitution|Nutmegger|Robin|Mountain Laurel|White Oak
Delaware|Dover|DE|South Atlantic|First|Delawarean|Blue Hen|Peach Blossom|Holly
Florida|Tallahassee|FL|South Atlantic|Sunshine|Floridian|Mockingbird|Orange Blossom|Sabal Palm
Georgia|Atlanta|GA|South Atlantic|Peach|Georgian|Brown Thrasher|Cherokee Rose|Live Oak
Hawaii|Honolulu|HI|Pacific|Aloha|Hawaiian|Nene|Hibiscus|Kukui
Idaho|Boise|ID|Mountain|Gem|Idahoan|Mountain Bluebird|Syringa|White Pine
Illinois|Springfield|IL|East North Central|Prairie|Illinoisan|Cardinal|Violet|White Oak
Indiana|Indianapolis|IN|East North Central|Hoosier|Hoosier|Cardinal|Peony|Tulip Tree
Iowa|Des Moines|IA|West North Central|Hawkeye|Iowan|Goldfinch|Wild Rose|Bur Oak
Kansas|Topeka|KS|West North Central|Sunflower|Kansan|Meadowlark|Sunflower|Cottonwood
Kentucky|Frankfort|KY|East South Central|Bluegrass|Kentuckian|Cardinal|Goldenrod|Tulip Tree
Louisiana|Baton Rouge|LA|West South Central|Pelican|Louisianan|Pelican|Magnolia|Bald Cypress
Maine|Augusta|ME|New England|Pine Tree|Mainer|Chickadee|Pine Cone|White Pine
Maryland|Annapolis|MD|South Atlantic|Old Line|Marylander|Oriole|Black-eyed Susan|White Oak
Massachusetts|Boston|MA|New England|Bay|Bay Stater|Chickadee|Mayflower|Elm
Michigan|Lansing|MI|East North Central|Great Lakes|Michigander|Robin|Apple Blossom|White Pine
Minnesota|Saint Paul|MN|West North Central|North Star|Minnesotan|Loon|Lady Slipper|Red Pine
Mississippi|Jackson|MS|East South Central|Magnolia|Mississippian|Mockingbird|Magnolia|Magnolia
Missouri|Jefferson City|MO|West North Central|Show-Me|Missourian|Bluebird|Hawthorn|Dogwood
Montana|Helena|MT|Mountain|Treasure|Montanan|Meadowlark|Bitterroot|Ponderosa Pine
Nebraska|Lincoln|NE|West North Central|Cornhusker|Nebraskan|Meadowlark|Goldenrod|Cottonwood
Nevada|Carson City|NV|Mountain|Silver|Nevadan|Mountain Bluebird|Sagebrush|Bristlecone Pine
New Hampshire|Concord|NH|New England|Granite|New Hampshirite|Purple Finch|Lilac|White Birch
New Jersey|Trenton|NJ|Middle Atlantic|Garden|New Jerseyan|Goldfinch|Violet|Red Oak
New Mexico|Santa Fe|NM|Mountain|Enchantment|New Mexican|Roadrunner|Yucca|Pinyon
New York|Albany|NY|Middle Atlantic|Empire|New Yorker|Bluebird|Rose|Sugar Maple
North Carolina|Raleigh|NC|South Atlantic|Tar Heel|North Carolinian|Cardinal|Dogwood|Longleaf Pine
North Dakota|Bismarck|ND|West North Central|Peace Garden|North Dakotan|Meadowlark|Prairie Rose|Elm
Ohio|Columbus|OH|East North Central|Buckeye|Ohioan|Cardinal|Carnation|Buckeye
Oklahoma|Oklahoma City|OK|West South Central|Sooner|Oklahoman|Flycatcher|Mistletoe|Redbud
Oregon|Salem|OR|Pacific|Beaver|Oregonian|Meadowlark|Oregon Grape|Douglas Fir
Pennsylvania|Harrisburg|PA|Middle Atlantic|Keystone|Pennsylvanian|Grouse|Mountain Laurel|Hemlock
Rhode Island|Providence|RI|New England|Ocean|Rhode Islander|Red Hen|Violet|Red Maple
South Carolina|Columbia|SC|South Atlantic|Palmetto|South Carolinian|Carolina Wren|Jessamine|Sabal Palm
South Dakota|Pierre|SD|West North Central|Mount Rushmore|South Dakotan|Pheasant|Pasque|Black Hills Spruce
Tennessee|Nashville|TN|East South Central|Volunteer|Tennessean|Mockingbird|Iris|Tulip Tree
Texas|Austin|TX|West South Central|Lone Star|Texan|Mockingbird|Bluebonnet|Pecan
Utah|Salt Lake City|UT|Mountain|Beehive|Utahn|Gull|Sego Lily|Aspen
Vermont|Montpelier|VT|New England|Green Mountain|Vermonter|Hermit Thrush|Red Clover|Sugar Maple
Virginia|Richmond|VA|South Atlantic|Old Dominion|Virginian|Cardinal|Dogwood|Dogwood
Washington|Olympia|WA|Pacific|Evergreen|Washingtonian|Goldfinch|Rhododendron|Hemlock
West Virginia|Charleston|WV|South Atlantic|Mountain|West Virginian|Cardinal|Rhododendron|Sugar Maple
Wisconsin|Madison|WI|East North Central|Badger|Wisconsinite|Robin|Violet|Sugar Maple
Wyoming|Cheyenne|WY|Mountain|Equality|Wyomingite|Meadowlark|Paintbrush|Cottonwood
"""

STATES: tuple[State, ...] = tuple(State(*row.split("|")) for row in _TABLE.strip().splitlines())

FIRST_PIECES: tuple[str, ...] = tuple(
    "Dal Mor Bel Gran Har Win Ash Kel Sto Wes Nor Lin Cor Fen Bur Mil Tre Hol Ros Bram".split()
)
SECOND_PIECES: tuple[str, ...] = tuple(
    "las ton ville field ford burg dale port wood mont view brook land gate ridge stead wick mouth worth haven".split()
)
CITIES_PER_STATE = 6


def _deal_cities(seed: int = 0) -> tuple[City, ...]:
    """Deal 300 of the 20 x 20 possible names to the states, so that no state owns a piece; Dallas goes to Texas."""
    generator = torch.Generator().manual_seed(seed)
    order = [int(i) for i in torch.randperm(len(FIRST_PIECES) * len(SECOND_PIECES), generator=generator)]
    slots = [state for _ in range(CITIES_PER_STATE) for state in STATES]
    texas = next(i for i, state in enumerate(slots) if state.name == "Texas")
    order.remove(0)  # "Dal" + "las"
    order.insert(texas, 0)
    names = [(FIRST_PIECES[i // len(SECOND_PIECES)], SECOND_PIECES[i % len(SECOND_PIECES)]) for i in order]
    return tuple(City(first, second, state) for (first, second), state in zip(names, slots, strict=False))


CITIES: tuple[City, ...] = _deal_cities()

# Prompts end where the answer follows: " " + the state, or " " + the value of the attribute.
CITY_PHRASINGS: tuple[str, ...] = (
    "{city},",
    "{city} is in",
    "{city} is a city in the state of",
    "The state containing {city} is",
)
ONE_HOP_PHRASINGS: tuple[str, ...] = (
    "The {attribute} of {state} is",
    "The {attribute} of the state of {state} is",
    "In {state}, the {attribute} is",
)
TWO_HOP_PHRASINGS: tuple[str, ...] = (
    "The {attribute} of the state containing {city} is",
    "The {attribute} of the state with {city} in it is",
    "In the state containing {city}, the {attribute} is",
)


def city_prompt(city: City, phrasing: int = 0) -> str:
    """A prompt that the city's state answers, for example "Dallas is in"."""
    return CITY_PHRASINGS[phrasing].format(city=city.name)


def one_hop_prompt(state: State, attribute: str, phrasing: int = 0) -> str:
    """A prompt such as "The capital of Texas is"; the answer is `state.attribute(attribute)`."""
    return ONE_HOP_PHRASINGS[phrasing].format(state=state.name, attribute=attribute)


def two_hop_prompt(city: City | str, attribute: str, phrasing: int = 0) -> str:
    """A prompt such as "The capital of the state containing Dallas is"; takes a `City` or its name."""
    name = city.name if isinstance(city, City) else city
    return TWO_HOP_PHRASINGS[phrasing].format(city=name, attribute=attribute)


def held_out_combinations(seed: int = 0) -> frozenset[tuple[str, str]]:
    """(City name, attribute) combinations that no two-hop training text contains, in any phrasing.

    For every state and attribute one of the state's six towns is held out: 400 of 2,400 combinations, every state and
    every attribute among them, every town still seen with most attributes.
    """
    generator = torch.Generator().manual_seed(seed)
    towns: dict[str, list[City]] = {}
    for city in CITIES:
        towns.setdefault(city.state.name, []).append(city)
    held_out = set()
    for state in STATES:
        for turn, attribute in enumerate(ATTRIBUTES):
            if turn % CITIES_PER_STATE == 0:  # every town is held out for one or two attributes
                order = torch.randperm(CITIES_PER_STATE, generator=generator)
            held_out.add((towns[state.name][int(order[turn % CITIES_PER_STATE])].name, attribute))
    return frozenset(held_out)
