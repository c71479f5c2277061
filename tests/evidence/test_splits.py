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


def test_pairs_drawn_for_smollm2_share_no_noun_across_parts_or_structures(smollm2: Any) -> None:
    words: dict[str, set[str]] = {part: set() for part in PARTS}
    for structure in splits.STRUCTURES:
        drawn = splits.agreement(smollm2, structure, sizes={"learning": 16, "development": 8, "evaluation": 8})
        for part in PARTS:
            pairs = getattr(drawn, part)
            assert not any(splits.asks_new_verb(p.answer, p.wrong_answer) for p in pairs) or part == "evaluation"
            words[part] |= {word for pair in pairs for word in pair.label.split(" and ")}
        assert drawn.new_verbs.sum() == 4
        assert len(drawn.right["evaluation"].where_model_is_right(smollm2)) == len(drawn.right["evaluation"])
    for one, other in combinations(PARTS, 2):
        assert not words[one] & words[other]


def test_cities_of_the_evaluation_are_in_no_learning_pair(smollm2: Any) -> None:
    drawn = splits.cities(smollm2)
    last = {
        part: {prompt.splitlines()[-1] for pair in getattr(drawn, part) for prompt in (pair.clean, pair.corrupt)}
        for part in ("learning", "evaluation", "new_states")
    }
    for one, other in combinations(last, 2):
        assert not last[one] & last[other]
    assert set(drawn.learning.labels) == set(drawn.evaluation.labels)
    assert not set(drawn.new_states.labels) & set(drawn.learning.labels)
