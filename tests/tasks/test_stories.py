"""Pronoun pairs on the real `stories260K`: its tokenizer's ways, and that it knows the task."""

from typing import Any

import pytest
import torch

from tests.loops import for_each
from tests.stories_tasks import BOYS, GIRLS, PRONOUN_TEMPLATES, pronoun_pairs
from tl_neuron_circuits._errors import PairsError
from tl_neuron_circuits.tasks import PromptPairs, logit_difference, tokenize
from tl_neuron_circuits.tasks._metrics import measure


def test_at_least_eight_templates_with_disjoint_names() -> None:
    assert len(set(PRONOUN_TEMPLATES)) >= 8
    parts = [{*GIRLS[part], *BOYS[part]} for part in ("attribution", "evaluation")]
    assert [len(part) for part in parts] == [8, 8] and not parts[0] & parts[1]
    pairs = pronoun_pairs(PRONOUN_TEMPLATES[0], "attribution", 12)
    assert len(pairs) == 24 and pairs == pairs.both_directions()


@for_each("part", ["attribution", "evaluation"])
@for_each("template", PRONOUN_TEMPLATES)
def test_the_real_model_solves_every_template(stories260K: Any, template: str, part: str) -> None:
    tokens = tokenize(stories260K, pronoun_pairs(template, part, 4))
    assert len(set(tokens.lengths)) == 1
    (batch,) = tokens.batches(100)
    with torch.no_grad():
        values = measure(logit_difference, stories260K(batch.clean), batch)
    assert (values > 0).all()


def test_an_answer_is_one_token_in_context_though_two_alone(stories260K: Any) -> None:
    tokens = tokenize(stories260K, PromptPairs(clean=["Mia was sad."], answer=[" She"]))
    assert stories260K.to_tokens(" She", prepend_bos=False).shape[1] == 2
    assert stories260K.tokenizer.convert_ids_to_tokens(int(tokens.answer[0])) == "▁She"


def test_was_and_were_are_told_apart_by_their_first_different_token(stories260K: Any) -> None:
    pairs = PromptPairs(clean=["The dog"], answer=[" was"], wrong_answer=[" were"])
    with pytest.raises(PairsError, match=r"pair 0 \('The dog'\): the answer ' were' is 2 tokens \['▁we', 're'\]"):
        tokenize(stories260K, pairs)
    tokens = tokenize(stories260K, pairs, multi_token="first_difference")
    assert tokens.wrong_answer is not None
    names = stories260K.tokenizer.convert_ids_to_tokens([int(tokens.answer[0]), int(tokens.wrong_answer[0])])
    assert names == ["▁was", "▁we"]


def test_names_of_unequal_length_are_refused(stories260K: Any) -> None:
    pairs = PromptPairs(clean=["Lily ran."], answer=[" She"], corrupt=["Ben ran."], wrong_answer=[" He"])
    with pytest.raises(PairsError, match=r"pair 0: clean and corrupt .*'▁Lily'.*'▁B', 'en'"):
        tokenize(stories260K, pairs)
