"""The evidence's splits share no word, whatever the structure."""

from itertools import combinations
from typing import Any

from tests.evidence import splits

PARTS = ("learning", "development", "evaluation")


def test_no_noun_verb_or_city_is_in_two_parts():
    for one, other in combinations(PARTS, 2):
        assert not set(splits.NOUNS[one]) & set(splits.NOUNS[other])
    for kind, verbs in splits.VERBS.items():
        assert not set(verbs) & set(splits.NEW_VERBS[kind])
    capitals = {capital for capital, _ in splits.STATES.values()}
    cities = [city for _, names in splits.STATES.values() for city in names]
    shown = {name for example in splits.EXAMPLES for name in example}
    assert len(set(cities)) == len(cities) and not set(cities) & (capitals | shown)


def test_pairs_drawn_for_smollm2_share_no_noun_across_parts(smollm2: Any) -> None:
    drawn = splits.agreement(smollm2, "rc", sizes={"learning": 16, "development": 8, "evaluation": 8})
    words = {part: {word for label in drawn.clusters[part] for word in label.split(" and ")} for part in PARTS}
    for one, other in combinations(PARTS, 2):
        assert not words[one] & words[other]
    for part in PARTS:
        asked = [splits.asks_new_verb(pair.answer, pair.wrong_answer) for pair in getattr(drawn, part)]
        assert sum(asked) == (4 if part == "evaluation" else 0)


def test_cities_are_in_one_part_and_new_states_in_no_other() -> None:
    known = {"Texas": ["Houston", "Waco", "El Paso"], "Ohio": ["Dayton", "Akron"], "Maine": ["Bangor"]}
    parts = splits.divide_cities(known, {city: 1 for names in known.values() for city in names}, n_new_states=2)
    for one, other in combinations(parts.values(), 2):
        assert not {city for names in one.values() for city in names} & {
            city for names in other.values() for city in names
        }
    assert list(parts["learning"]) == list(parts["evaluation"]) == ["Texas", "Ohio"]
    assert parts["new_states"] == {"Maine": ("Bangor",)}
