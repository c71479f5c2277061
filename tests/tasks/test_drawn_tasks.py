"""Tasks drawn for a tokenizer: the pairs that were asked for or an error with their number; what pairs remember."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tests.real_models import BACKENDS
from tests.tasks.tiny_tokenizers import model_with, word_level
from tl_neuron_circuits._errors import PairsError
from tl_neuron_circuits.tasks import PromptPairs, keep_fitting, subject_verb_agreement, tokenize
from tl_neuron_circuits.tasks import _english as english
from tl_neuron_circuits.tasks._agreement import STRUCTURES
from tl_neuron_circuits.tasks._pairs import directions
from tl_neuron_circuits.tasks._tokenize import encoder

TASKS: dict[str, Callable[..., PromptPairs]] = {
    **{structure: partial(subject_verb_agreement, structure) for structure in STRUCTURES},
    **{question: partial(tnc.tasks.capitals, question=question) for question in ("two_hop", "one_hop", "state")},
    "four shots": partial(tnc.tasks.capitals, shots=4),
    "ioi": tnc.tasks.ioi,
    "ioi, all phrasings": partial(tnc.tasks.ioi, phrasing=None),
    "ioi, abc": partial(tnc.tasks.ioi, against="abc"),
    "greater_than": tnc.tasks.greater_than,
}
THERE_ARE = {
    "demo": {"two_hop": 0, "state": 0, "four shots": 0, "one_hop": 146},
    "SmolLM2": {"one_hop": 60},
    "stories260K": {**dict.fromkeys(TASKS, 0), "greater_than": 224},
}
"""Pairs there are, where fewer than 200."""


@pytest.fixture(scope="module", params=["demo", "SmolLM2", "stories260K"])
def tokenizer(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Name and tokenizer; of the demo models, and of real ones where they are on this machine."""
    if request.param == "demo":
        return request.param, tnc.load_demo_model().tokenizer
    if request.param == "SmolLM2":
        folder: Path = request.getfixturevalue("smollm2_folder")
    else:
        folder = request.getfixturevalue("shared_models") / "stories260K"
    return request.param, AutoTokenizer.from_pretrained(str(folder))


def assert_fits(pairs: PromptPairs, tokenizer: Any) -> None:
    """One length, answers of one token, every pair once, both directions."""
    encode = encoder(tokenizer, None)
    lengths = {len(encode(prompt)) for pair in pairs for prompt in (pair.clean, pair.corrupt)}
    assert len(lengths) == 1
    for pair in pairs:
        for prompt in (pair.clean, pair.corrupt):
            for answer in (pair.answer, pair.wrong_answer):
                assert encode(prompt + answer)[:-1] == encode(prompt)
    assert len({pair[:4] for pair in pairs}) == len(pairs)
    assert len(set(directions(pairs))) == len(pairs) // 2


@for_each("task", TASKS)
def test_a_task_gives_what_is_asked_or_says_how_many_there_are(task: str, tokenizer: tuple[str, Any]) -> None:
    name, its = tokenizer
    there = THERE_ARE[name].get(task, 200)
    if there >= 2:
        pairs = TASKS[task](n=min(64, there), model=its)
        assert len(pairs) == min(64, there)
        assert_fits(pairs, its)
        assert pairs.made_for is not None and pairs.made_for.begins_with_bos
        shorter = TASKS[task](n=min(64, there) // 4 * 2, model=its)
        assert shorter == pairs[: len(shorter)]
        assert TASKS[task](n=8, seed=1, model=its) != pairs[:8]
    if there < 200:
        with pytest.raises(
            PairsError, match=f"only {there} fit this tokenizer with prompts of one token length"
        ) as error:
            TASKS[task](n=200 if there < 150 else there + 2, model=its)
        assert re.search("left out|qualified", str(error.value)) and "keep_fitting" in str(error.value)


def test_a_draw_says_what_was_left_out(smollm2_folder: Path) -> None:
    pairs = subject_verb_agreement("rc", 64, model=AutoTokenizer.from_pretrained(str(smollm2_folder)))
    chosen = pairs.selection
    assert chosen is not None and chosen.words["nouns"] == ("uncle", "aunt", "carpenter")
    assert list(chosen.left_out) == ["of another length than 7 tokens"]  # "admires" and "hates" are two tokens
    assert chosen.qualified + sum(chosen.left_out.values()) == chosen.candidates
    assert f"{chosen.qualified} of {chosen.candidates} qualified" in repr(pairs) and "left out nouns: uncle" in repr(
        pairs
    )
    assert pairs[:4].selection is None and pairs[:4].made_for == pairs.made_for


@pytest.mark.parametrize("structure", ["nounpp", "rc", "within_rc"])
def test_parts_of_a_draw_share_neither_noun(structure: Any) -> None:
    pairs = subject_verb_agreement(structure, 128, model=tnc.load_demo_model())
    train, test = pairs.split(0.5, by="label")
    forms = {noun.singular: {noun.singular, noun.plural} for noun in english.NOUNS}
    nouns = [{noun for label in part.labels or () for noun in label.split(" and ")} for part in (train, test)]
    for part, own in zip((train, test), nouns, strict=True):
        for pair in part:
            words = {*pair.clean.split(), *pair.corrupt.split()}
            assert all(words & forms[noun] for noun in pair.label.split(" and "))
        assert len(own) >= 8
    assert not nouns[0] & nouns[1]


def test_verbs_can_be_chosen_and_held_out() -> None:
    model = tnc.load_demo_model()
    asked = subject_verb_agreement("within_rc", 16, model=model, verbs=["is", "has"])
    assert {pair.answer for pair in asked} <= {" is", " are", " has", " have"}
    assert {pair.answer for pair in subject_verb_agreement("rc", 16, verbs=["was"])} == {" was", " were"}
    with pytest.raises(PairsError, match=r"verbs= must be a list of singular verbs; \['are'\] are not known"):
        subject_verb_agreement(verbs=["are"])


def test_a_tokenizer_of_digits_is_asked_for_decades(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2_folder))
    chance = 0
    for pair in tnc.tasks.greater_than(64, model=tokenizer):
        start = int(pair.clean.split(" to ")[0][-2:])
        assert start % 10 == 9 and (int(pair.answer), int(pair.wrong_answer)) == (start // 10 + 1, start // 10)
        chance += (10 - int(pair.answer)) - int(pair.answer)
    assert chance == 0, "a model without preference scores zero"
    assert tnc.tasks.greater_than(8, model=tnc.load_demo_model())[0].answer.isdecimal()
    assert len(tnc.tasks.greater_than(8, model=tnc.load_demo_model())[0].answer) == 2


def test_abc_names_three_others_who_meet_no_other_couple() -> None:
    pairs = tnc.tasks.ioi(64, against="abc")
    names = set(english.NAMES)
    others: dict[str, set[str]] = {}
    for pair in pairs:
        clean, corrupt = ({word.strip(",.") for word in text.split()} & names for text in (pair.clean, pair.corrupt))
        assert clean == {pair.answer.strip(), pair.wrong_answer.strip()} and len(corrupt) == 3 and not clean & corrupt
        others.setdefault(pair.label, set()).update(clean | corrupt)
    assert all(not a & b for a in others.values() for b in others.values() if a is not b)
    assert [p.corrupt for p in pairs[::2]] == [p.corrupt for p in pairs[1::2]]


# What pairs remember


@pytest.fixture(scope="module")
def demo() -> Any:
    return tnc.load_demo_model()


@pytest.fixture(scope="module")
def drawn(demo: Any) -> PromptPairs:
    return subject_verb_agreement("simple", 16, model=demo)


def test_pairs_refuse_another_tokenizer(drawn: PromptPairs, tmp_path: Path) -> None:
    other = model_with(word_level(tmp_path), BACKENDS[-1])
    for some in (drawn, drawn[:4], drawn.split(0.5)[0], drawn.both_directions(), drawn[:2] + drawn[2:4]):
        with pytest.raises(PairsError, match="made for the tokenizer .* and this model has"):
            tokenize(other, some)
    text = PromptPairs.from_pairs([*drawn])
    assert text == drawn and text.hash == drawn.hash and text.made_for is None
    with pytest.raises(PairsError, match="does not know"):
        tokenize(other, text)


def test_the_same_tokenizer_is_known_in_every_class_and_by_itself(demo: Any, drawn: PromptPairs) -> None:
    alone = subject_verb_agreement("simple", 16, model=demo.tokenizer)
    assert alone == drawn and alone.made_for is not None and drawn.made_for is not None
    assert alone.made_for.fingerprint == drawn.made_for.fingerprint
    swiglu = tnc.load_demo_model("demo-swiglu")  # its own copy of the same tokenizer
    assert len(tokenize(swiglu, alone)) == 16


def test_pairs_keep_their_bos_setting(demo: Any) -> None:
    without = subject_verb_agreement("simple", 16, model=demo, prepend_bos=False)
    bos = demo.tokenizer.bos_token_id
    assert all(int(row[0]) != bos for row in tokenize(demo, without).clean)
    scores = tnc.attribute(demo, without[:4])
    assert next(iter(scores.values.values())).shape[0] == 2
    with pytest.raises(PairsError, match="made without BOS, and would be tokenized with it"):
        tokenize(demo, without, prepend_bos=True)
    with pytest.raises(PairsError, match="made for different tokenizers or BOS settings"):
        without + subject_verb_agreement("simple", 16, model=demo)
    again = keep_fitting(demo, without, prepend_bos=True)
    assert again.made_for is None and keep_fitting(demo, without).made_for == without.made_for


def test_json_lines_keep_the_tokenizer_and_the_bos_setting(demo: Any, tmp_path: Path) -> None:
    without = subject_verb_agreement("simple", 16, model=demo, prepend_bos=False)
    file = tmp_path / "pairs.jsonl"
    without.to_jsonl(file)
    again = PromptPairs.from_jsonl(file)
    assert again == without and again.made_for == without.made_for is not None
    assert tokenize(demo, again).hash == tokenize(demo, without).hash  # BOS as they were drawn, not as by default
    with pytest.raises(PairsError, match="made without BOS, and would be tokenized with it"):
        tokenize(demo, again, prepend_bos=True)
    with pytest.raises(PairsError, match="made for the tokenizer .* and this model has"):
        tokenize(model_with(word_level(tmp_path), BACKENDS[-1]), again)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:4]))
    assert PromptPairs.from_jsonl(file).made_for == without.made_for
    PromptPairs.from_pairs([*without]).to_jsonl(tmp_path / "text.jsonl")
    assert PromptPairs.from_jsonl(tmp_path / "text.jsonl").made_for is None
    file.write_text("\n".join([*lines, *(tmp_path / "text.jsonl").read_text().splitlines()]))
    with pytest.raises(PairsError, match="only some say for which"):
        PromptPairs.from_jsonl(file)


# Users' own pairs


def test_keep_fitting_keeps_one_length_and_reports_losses(demo: Any) -> None:
    rows = [("The dogs", " are", "The dog", " is"), ("The dogs near the cat", " are", "The dog near the cat", " is")]
    rows += [("The cats", " are", "The cat", " is"), ("The boys", " are near", "The boy", " is near")]
    pairs = PromptPairs.from_pairs([tnc.tasks.PromptPair(*row) for row in rows]).both_directions()
    kept = keep_fitting(demo, pairs, same_length=True)
    assert {pair.clean for pair in kept} == {"The dogs", "The dog", "The cats", "The cat"}
    assert kept.selection is not None and kept.selection.share == 0.5
    expected = {"of another length than 3 tokens": 2, "with an answer of several tokens": 2}
    assert dict(kept.selection.left_out) == expected
    assert "4 of 8 qualified (50%)" in repr(kept)
    with pytest.raises(PairsError, match="needs prompts of one token length.*keep_fitting.*same_length=True"):
        tnc.attribute(demo, keep_fitting(demo, pairs))


def test_verbs_of_one_noun_do_not_fall_together(demo: Any) -> None:
    rows = [("The dogs", " are", "The dog", " is"), ("The dogs", " are near", "The dog", " is near")]
    pairs = PromptPairs.from_pairs([tnc.tasks.PromptPair(*row) for row in rows]).both_directions()
    assert [pair.answer for pair in keep_fitting(demo, pairs)] == [" are", " is"]


def test_every_error_over_several_pairs_names_the_filter(demo: Any) -> None:
    for bad in (("The dogs", " are near"), ("The wombat", " is"), ("The dogs are", "n't")):
        pairs = PromptPairs(clean=["The cats", bad[0]], answer=[" are", bad[1]])
        with pytest.raises(PairsError, match=r"tasks\.keep_fitting\(model, pairs\)"):
            tokenize(demo, pairs)


def test_only_contrasts_that_the_model_gets_right_both_ways_are_kept(demo: Any) -> None:
    pairs = subject_verb_agreement("rc", 32, model=demo)

    def wrong_for_some(logits: torch.Tensor, batch: Any) -> torch.Tensor:  # one direction of one contrast in four
        right = tnc.tasks.logit_difference(logits, batch)
        return torch.where(batch.index.to(right.device) % 8 == 0, -right.abs(), right.abs())

    kept = pairs.where_model_is_right(demo, metric=wrong_for_some, batch_size=5)
    assert list(kept) == [pair for index, pair in enumerate(pairs) if index % 8 > 1]
    assert kept.selection is not None and kept.selection.share == 0.75 and kept.made_for == pairs.made_for
    assert "24 of 32 qualified (75%), left out 8 of contrasts in which the model is wrong" in repr(kept)
    with pytest.raises(PairsError, match=r"right in every direction of none of the 16 contrasts \(0 of 32 pairs"):
        pairs.where_model_is_right(demo, metric=lambda logits, batch: -tnc.tasks.logit_difference(logits, batch).abs())


def test_the_two_directions_of_every_task_are_one_contrast() -> None:
    for task in (*TASKS.values(), partial(tnc.tasks.greater_than, digits=1)):
        pairs = task(n=16)
        assert directions(pairs) == [index // 2 for index in range(16)]
