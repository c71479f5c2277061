"""The tasks: both directions, no repeats, determinism, disjoint words, and that they say what they mean."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.loops import for_each
from tl_neuron_circuits import tasks
from tl_neuron_circuits._errors import PairsError, SettingsError
from tl_neuron_circuits.demo import _states as states
from tl_neuron_circuits.demo import capitals
from tl_neuron_circuits.tasks import PromptPairs, greater_than, ioi, subject_verb_agreement
from tl_neuron_circuits.tasks import _english as english
from tl_neuron_circuits.tasks._agreement import STRUCTURES
from tl_neuron_circuits.tasks._capitals import MOST_SHOTS, PHRASINGS, STATES

TASKS: dict[str, tuple[Callable[..., PromptPairs], dict[str, Any], int, list[str]]] = {
    # name: (task, options, distinct pairs with all words, words enough for a few pairs)
    "simple": (subject_verb_agreement, {"structure": "simple"}, 330, ["boy", "dog"]),
    "nounpp": (subject_verb_agreement, {"structure": "nounpp"}, 126_720, ["boy", "dog"]),
    "rc": (subject_verb_agreement, {"structure": "rc"}, 253_440, ["boy", "dog"]),
    "within_rc": (subject_verb_agreement, {"structure": "within_rc"}, 50_688, ["boy", "dog"]),
    "capitals": (capitals, {}, 1800, ["Texas", "Utah"]),
    "capitals-all-phrasings": (capitals, {"phrasing": None}, 5400, ["Texas", "Utah"]),
    "real capitals": (tasks.capitals, {}, 450, ["Texas", "Utah"]),
    "real capitals, examples": (tasks.capitals, {"phrasing": None, "shots": 4}, 1350, ["Texas", "Utah"]),
    "real one_hop": (tasks.capitals, {"question": "one_hop", "phrasing": None}, 150, ["Texas", "Utah"]),
    "real state": (tasks.capitals, {"question": "state", "phrasing": 2}, 450, ["Texas", "Utah"]),
    "one_hop": (capitals, {"question": "one_hop", "phrasing": None}, 150, ["Texas", "Utah"]),
    "state": (capitals, {"question": "state"}, 1800, ["Texas", "Utah"]),
    "region": (capitals, {"attribute": "region"}, 1800, ["Texas", "Utah"]),
    "ioi": (ioi, {}, 6000, ["John", "Mary"]),
    "ioi-all-phrasings": (ioi, {"phrasing": None}, 18_000, ["John", "Mary"]),
    "greater_than": (greater_than, {}, 6580, ["war"]),
}
each_task = for_each("name", TASKS)


def make(name: str, n: int = 32, seed: int = 0, **more: Any) -> PromptPairs:
    task, options, _, _ = TASKS[name]
    return task(n=n, seed=seed, **options, **more)


@each_task
def test_every_contrast_comes_in_both_directions_and_once(name: str) -> None:
    pairs = list(make(name))
    assert len(pairs) == 32
    assert len({pair[:4] for pair in pairs}) == 32
    prompts = {(pair.clean, pair.corrupt) for pair in pairs}
    assert {(corrupt, clean) for clean, corrupt in prompts} == prompts
    if name != "greater_than":  # where any later year is right, so the answers belong to a prompt, not to a contrast
        swapped = {(pair.corrupt, pair.wrong_answer, pair.clean, pair.answer) for pair in pairs}
        assert swapped == {pair[:4] for pair in pairs}


@each_task
def test_tasks_depend_on_the_seed_alone_and_grow_at_the_end(name: str) -> None:
    assert make(name) == make(name)
    assert make(name) != make(name, seed=1)
    assert make(name, n=8) == make(name)[:8]


@each_task
def test_asking_for_more_pairs_than_there_are_says_how_many(name: str) -> None:
    total = TASKS[name][2]
    with pytest.raises(PairsError, match=f"n={total + 2} pairs were asked for, but .* only {total} distinct ones"):
        make(name, n=total + 2)
    for n in (0, -2, 3):
        with pytest.raises(PairsError, match=f"must be even, got {n}"):
            make(name, n=n)


@for_each("name", [name for name, task in TASKS.items() if task[2] <= 6580])
def test_all_pairs_that_are_counted_exist(name: str) -> None:
    total = TASKS[name][2]
    assert len({pair[:4] for pair in make(name, n=total)}) == total


@each_task
def test_parts_split_by_label_share_no_label_and_keep_directions_together(name: str) -> None:
    train, test = make(name, n=64).split(0.5, by="label")
    assert len(train) + len(test) == 64 and min(len(train), len(test)) >= 16
    assert not set(train.labels or ()) & set(test.labels or ())
    assert {(p.clean, p.corrupt) for p in train} == {(p.corrupt, p.clean) for p in train}


@each_task
def test_only_the_words_asked_for_are_used(name: str) -> None:
    words = TASKS[name][3]
    pairs = make(name, n=2, words=words)
    known = {noun.singular for noun in english.NOUNS} | {
        *english.NAMES,
        *english.EVENTS,
        *(s.name for s in states.STATES),
    }
    for pair in pairs:
        questions = [prompt.split("\n")[-1] for prompt in (pair.clean, pair.corrupt)]  # solved examples are of others
        text = f" {questions[0]}{pair.answer} {questions[1]}{pair.wrong_answer} ".replace(",", " ")
        assert not [word for word in known - set(words) if f" {word} " in text]


@each_task
def test_words_are_checked(name: str) -> None:
    with pytest.raises(PairsError, match=r"\['Atlantis'\] are not known. Choose among"):
        make(name, words=["Atlantis"])
    with pytest.raises(PairsError, match=r"needs at least . different"):
        make(name, words=[])
    with pytest.raises(PairsError, match="each once"):
        make(name, words=TASKS[name][3] * 2)


def test_agreement_changes_one_noun_and_asks_for_its_verb() -> None:
    numbers = {noun.singular: 0 for noun in english.NOUNS} | {noun.plural: 1 for noun in english.NOUNS}
    verbs = (*english.FINITE_VERBS, *english.TRANSITIVE_VERBS)
    numbers |= {f" {verb.singular}": 0 for verb in verbs} | {f" {verb.plural}": 1 for verb in verbs}
    for structure, place in (("simple", 0), ("nounpp", 0), ("rc", 0), ("within_rc", 1)):
        pairs = subject_verb_agreement(structure, 64)
        attractors = set()
        for pair in pairs:
            nouns = [word for word in pair.clean.split() if word in numbers]
            changed = [a for a, b in zip(pair.clean.split(), pair.corrupt.split(), strict=True) if a != b]
            assert changed == [nouns[place]]
            assert numbers[pair.answer] == numbers[changed[0]] == 1 - numbers[pair.wrong_answer]
            attractors |= {numbers[noun] for i, noun in enumerate(nouns) if i != place}
            assert len(nouns) == 1 or nouns[0] not in nouns[1:]
        assert attractors == (set() if structure == "simple" else {0, 1})
    pair = subject_verb_agreement("rc", 8)[1]
    assert pair.clean.split()[0::1][2:4] == ["that", "the"]


def test_agreement_labels_name_the_noun_that_is_asked_about() -> None:
    for structure in STRUCTURES:
        for pair in subject_verb_agreement(structure, 32):
            (changed,) = (a for a, b in zip(pair.clean.split(), pair.corrupt.split(), strict=True) if a != b)
            noun = next(noun for noun in english.NOUNS if changed in (noun.singular, noun.plural))
            assert pair.label == noun.singular


def test_capitals_answer_with_the_state_of_the_town() -> None:
    invented = {city.name: city.state for city in states.CITIES}
    real = {city: state for state in STATES for city in state.cities}
    for pairs, home in ((capitals(50), invented), (tasks.capitals(50), real)):
        for pair in pairs:
            town = pair.clean.removeprefix("The capital of the state containing ").removesuffix(" is")
            other = pair.corrupt.removeprefix("The capital of the state containing ").removesuffix(" is")
            assert pair.answer == f" {home[town].capital}" and pair.wrong_answer == f" {home[other].capital}"
            assert pair.label == home[town].name
    dallas = [pair for pair in capitals(72, words=["Texas", "Ohio"]) if "Dallas" in pair.clean]
    assert len(dallas) == 6 and {pair.answer for pair in dallas} == {" Austin"}


def test_clean_and_corrupt_of_capitals_have_the_same_phrasing() -> None:
    names = [city.name for city in states.CITIES] + [state.name for state in states.STATES]
    blank = re.compile("|".join(sorted(names, key=len, reverse=True)))
    for question, phrasings in (("two_hop", 3), ("one_hop", 3), ("state", 4)):
        pairs = capitals(64, question=question, phrasing=None)
        frames = {(blank.sub("_", pair.clean), blank.sub("_", pair.corrupt)) for pair in pairs}
        assert len(frames) == phrasings and all(clean == corrupt for clean, corrupt in frames)


def test_capitals_refuse_what_they_do_not_have() -> None:
    with pytest.raises(SettingsError, match="expected one of"):
        capitals(attribute="mayor")
    for task in (capitals, tasks.capitals):
        with pytest.raises(PairsError, match="phrasing must be 0 to 2, or None for all, got 3"):
            task(phrasing=3)
    for shots in (-1, MOST_SHOTS + 1):
        with pytest.raises(PairsError, match=f"shots must be 0 to 4, got {shots}"):
            tasks.capitals(shots=shots)
    with pytest.raises(PairsError, match="number must be even, got 3 states"):
        capitals(2, words=["Texas", "Ohio", "Utah"])
    with pytest.raises(PairsError, match="no way to couple these states so that the answers differ: Texas, Oklahoma"):
        capitals(2, words=["Texas", "Oklahoma"], attribute="region")


def test_real_cities_tell_their_state_and_do_not_say_it() -> None:
    cities = [city for state in STATES for city in state.cities]
    capital_names = {state.capital for state in STATES}
    assert len(STATES) == 50 and len(set(cities)) == len(cities) == 150 and not set(cities) & capital_names
    assert {state.name: state.capital for state in STATES} == {state.name: state.capital for state in states.STATES}
    for state in STATES:
        assert not [city for city in state.cities if set(state.name.split()) & set(city.split())]


def test_solved_examples_are_right_and_about_other_states() -> None:
    facts = {state.name: state for state in STATES}
    for question in PHRASINGS:
        for shots in (1, MOST_SHOTS):
            for pair in tasks.capitals(100, question=question, phrasing=None, shots=shots):
                (*shown, asked), (*same, _) = pair.clean.split("\n"), pair.corrupt.split("\n")
                assert shown == same and len(shown) == shots
                frame = next(text for text in PHRASINGS[question] if re.fullmatch(_pattern(text), asked))
                for example in shown:
                    name = re.fullmatch(_pattern(frame) + r" (.+)\.", example)
                    state = next(s for s in STATES if name and name[1] in (s.name, *s.cities))
                    assert name and name[2] == (state.name if question == "state" else state.capital)
                    assert state.name != pair.label and state.capital not in (pair.answer[1:], pair.wrong_answer[1:])
                    assert facts[state.name] is state


def _pattern(phrasing: str) -> str:
    return re.escape(phrasing).replace(r"\{city\}", "(.+)").replace(r"\{state\}", "(.+)")


def test_ioi_answers_with_the_name_that_does_not_give() -> None:
    for pair in ioi(64, phrasing=None):
        names = [word.strip(",.") for word in pair.clean.split() if word.strip(",.") in english.NAMES]
        first, second, giver = names
        assert pair.answer == f" {second if giver == first else first}" and pair.wrong_answer == f" {giver}"
    with pytest.raises(PairsError, match="phrasing must be 0 to 8"):
        ioi(phrasing=-1)


def test_greater_than_is_balanced_and_answers_with_the_boundary() -> None:
    pairs = greater_than(64)
    chance = 0
    for pair in pairs:
        start = int(pair.clean.split(" to ")[0][-2:])
        century = pair.clean[-2:]
        assert f"{century}{start:02d} to the year {century}" in pair.clean
        assert (int(pair.answer), int(pair.wrong_answer)) == (start + 1, start)
        chance += (99 - start) - (start + 1)
    assert chance == 0, "a model without preference scores zero"
