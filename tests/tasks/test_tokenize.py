"""`tokenize` and `keep_fitting`: what the model would see, answers in context, every refusal by pair."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.families import ModelCase, model_cases
from tests.loops import for_each
from tl_neuron_circuits._errors import PairsError, SettingsError
from tl_neuron_circuits.tasks import PromptPairs, TokenizedPairs, keep_fitting, tokenize


def one(clean: str, answer: str, corrupt: str | None = None, wrong_answer: str | None = None) -> PromptPairs:
    return PromptPairs(
        clean=["The boy", clean],  # a good pair first, so that messages must find the second
        answer=[" was", answer],
        corrupt=None if corrupt is None else ["The boys", corrupt],
        wrong_answer=None if wrong_answer is None else [" were", wrong_answer],
    )


def test_prompts_are_what_the_model_sees(tiny_model: Any) -> None:
    pairs = PromptPairs(clean=["The keys", "The key on the table"], answer=[" are", " is"])
    tokens = tokenize(tiny_model, pairs)
    for prompt, row in zip(pairs.clean, tokens.clean, strict=True):
        assert torch.equal(row, tiny_model.to_tokens(prompt)[0])
        assert torch.equal(tiny_model(row[None]), tiny_model(prompt))
    assert all(row[0] == tiny_model.tokenizer.bos_token_id for row in tokens.clean)


@for_each("prepend_bos", [True, False])
def test_bos_is_prepended_when_asked(tiny_model: Any, prepend_bos: bool) -> None:
    pairs = PromptPairs(clean=["The keys"], answer=[" are"])
    (row,) = tokenize(tiny_model, pairs, prepend_bos=prepend_bos).clean
    assert (row == tiny_model.tokenizer.bos_token_id).tolist() == [prepend_bos, *[False] * (len(row) - 1)]


def test_answers_are_read_in_context(tiny_model: Any) -> None:
    tokens = tokenize(tiny_model, one("The keys", " are", "The key", " is"))
    for text, answers in ((" are", tokens.answer), (" is", tokens.wrong_answer)):
        assert answers is not None
        assert tiny_model.tokenizer.decode([int(answers[1])]).strip() == text.strip()


def test_labels_and_pairs_without_options_pass_through(word_model: Any) -> None:
    pairs = PromptPairs(clean=["The keys"], answer=[" are"], labels=["key"])
    tokens = tokenize(word_model, pairs)
    assert tokens.labels == ("key",) and tokens.corrupt is None and tokens.wrong_answer is None
    assert tokenize(word_model, tokens) is tokens
    with pytest.raises(SettingsError, match="prepend_bos cannot be applied to tokenized pairs"):
        tokenize(word_model, tokens, prepend_bos=True)


@for_each(
    ("pairs", "message"),
    [
        (
            one("The keys", "are"),
            r"pair 1: after 'The keys' .* the answer 'are' merges .*End the prompt without a space",
        ),
        (one("The wombat", " is"), r"pair 1: the tokenizer does not know every word of 'The wombat': .*'<unk>'"),
        (one("The keys", " hop"), r"pair 1 \('The keys'\): the tokenizer does not know the answer ' hop': .*'<unk>'"),
        (one("The keys", "  "), r"pair 1: .* the answer '  ' merges"),
        (one("The keys", " are here"), r"pair 1 \('The keys'\): the answer ' are here' is 2 tokens \['are', 'here'\]"),
        (
            one("The key", " is", "The key on", " are"),
            r"pair 1: clean and corrupt must .* got 3 tokens .*'key'\] .* 4 tok",
        ),
        (one("The key", " is", " The key", " are"), r"pair 1: 'The key' and ' The key' are the same tokens 3 tokens"),
        (one("The key", " is", "The keys", "  is"), r"pair 1 .*: no token tells the answer ' is' .* from the wrong"),
        (one("The key" + " on" * 40, " is"), r"pair 1: the clean prompt .* has 43 tokens, but .* context holds 32"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name(word_model: Any, pairs: PromptPairs, message: str) -> None:
    with pytest.raises(PairsError, match=message):
        tokenize(word_model, pairs)


@pytest.mark.parametrize("answer", ["key", "key is here"])  # fewer tokens than expected, or enough but others
def test_an_answer_that_merges_into_the_prompt_is_refused(byte_model: Any, answer: str) -> None:
    with pytest.raises(PairsError, match=rf"pair 1: after 'The ' .* the answer '{answer}' merges with the prompt"):
        tokenize(byte_model, one("The ", answer), multi_token="first_difference")


def test_the_first_differing_token_is_contrasted_on_request(word_model: Any) -> None:
    tokens = tokenize(
        word_model, one("The boys", " were late", "The boy", " were here"), multi_token="first_difference"
    )
    vocabulary = word_model.tokenizer.get_vocab()
    assert tokens.lengths == (3, 4)  # " were", which both answers share, went to the prompt
    assert tokens.clean[1][-1] == tokens.corrupt[1][-1] == vocabulary["were"]
    assert (tokens.answer[1], tokens.wrong_answer[1]) == (vocabulary["late"], vocabulary["here"])


def test_without_a_wrong_answer_the_first_token_is_taken_on_request(byte_model: Any) -> None:
    tokens = tokenize(byte_model, one("The key", " wombat"), multi_token="first_difference")
    whole = byte_model.to_tokens("The key wombat")[0]
    assert len(whole) > 1 + len(tokens.clean[1])
    assert tokens.answer[1] == whole[len(tokens.clean[1])]


def test_an_answer_that_begins_the_other_has_no_difference(word_model: Any) -> None:
    with pytest.raises(PairsError, match="Choose answers neither of which begins the other"):
        tokenize(word_model, one("The key", " is", "The keys", " is here"), multi_token="first_difference")


def test_an_answer_must_be_the_same_token_after_both_prompts(piece_model: Any) -> None:
    pairs = PromptPairs(clean=["The year 17"], answer=["32"], corrupt=["The year ,"])
    with pytest.raises(
        PairsError, match=r"pair 0: the answer '32' is 1 token \['##32'\] after .* \['32'\] after 'The year ,'"
    ):
        tokenize(piece_model, pairs)
    assert tokenize(
        piece_model, PromptPairs(clean=["The year 17"], answer=["32"], corrupt=["The year 18"])
    ).lengths == (4,)


def test_unequal_lengths_are_allowed_on_request(word_model: Any) -> None:
    tokens = tokenize(word_model, one("The key", " is", "The keys on the table", " are"), aligned=False)
    assert [len(row) for row in tokens.corrupt or ()] == [3, 6]
    assert tokens.corrupt_position.tolist() == [2, 5] and tokens.position.tolist() == [2, 2]


def test_end_of_text_as_unknown_token_is_no_unknown_word(byte_model: Any) -> None:
    assert byte_model.tokenizer.unk_token_id == byte_model.tokenizer.bos_token_id
    assert tokenize(byte_model, one("The keys", " are")).lengths[1] == 3


def test_a_foreign_tokenizer_is_refused(word_model: Any) -> None:
    d_vocab = word_model.cfg.d_vocab
    try:
        word_model.cfg.d_vocab = 5
        with pytest.raises(PairsError, match=r"pair 0 .* beyond the model's vocabulary of 5"):
            tokenize(word_model, one("The keys", " are"))
    finally:
        word_model.cfg.d_vocab = d_vocab


@pytest.mark.parametrize("case", model_cases("gpt2"), ids=lambda case: case.id)
def test_a_model_without_tokenizer_asks_for_tokens(case: ModelCase) -> None:
    with pytest.raises(PairsError, match=r"no tokenizer.*TokenizedPairs\.from_tokens"):
        tokenize(case.build(), one("The keys", " are"))


@pytest.mark.parametrize(
    ("clean", "answer", "warns"),
    [
        ("The keys", "are", True),
        ("The keys", " are", False),
        ("The keys.\n", "are", False),
        ("The keys", ".", False),
        ("from 1732 to 17", "35", False),
        ("钥匙", "在", False),
    ],
)
def test_an_answer_without_its_space_is_reported(
    byte_model: Any, caplog: pytest.LogCaptureFixture, clean: str, answer: str, warns: bool
) -> None:
    with caplog.at_level(logging.WARNING, logger="tl_neuron_circuits"):
        tokenize(byte_model, one(clean, answer), multi_token="first_difference")
    assert ("1 of 2 answers continue the last word of their prompt" in caplog.text) == warns


def test_keep_fitting_drops_both_directions_and_says_why(word_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    good = PromptPairs(clean=["The keys"], answer=[" are"], corrupt=["The key"], wrong_answer=[" is"])
    bad = PromptPairs(clean=["The boys"], answer=[" were"], corrupt=["The wombat"], wrong_answer=[" was"])
    half = PromptPairs(clean=["The girl"], answer=[" is"], corrupt=["The boy"], wrong_answer=[" was"])
    half += PromptPairs(clean=["The boy"], answer=[" is here"], corrupt=["The girl"], wrong_answer=[" was"])
    with caplog.at_level(logging.INFO, logger="tl_neuron_circuits"):
        kept = keep_fitting(word_model, good.both_directions() + bad.both_directions() + half)
    assert kept == good.both_directions()
    assert "first problem: pair 2" in caplog.text
    assert "2 of 6 qualified (33%), left out 2 with unknown words" in caplog.text and "wombat" in caplog.text
    with pytest.raises(PairsError, match=r"none of the 2 pairs fits this model's tokenizer.*wombat"):
        keep_fitting(word_model, bad.both_directions())


def test_tokenizing_leaves_the_model_as_it_was(tiny_model: Any, untouched: Callable) -> None:
    side = tiny_model.tokenizer.padding_side
    with untouched(tiny_model):
        tokenize(tiny_model, one("The keys", " are", "The key", " is"), prepend_bos=False)
        with pytest.raises(PairsError):
            tokenize(tiny_model, one("The keys on", " are", "The key", " is"))
    assert tiny_model.tokenizer.padding_side == side


def test_tokens_from_text_and_from_tensors_are_the_same(word_model: Any) -> None:
    pairs = one("The keys", " are", "The key", " is")
    tokens = tokenize(word_model, pairs)
    given = TokenizedPairs.from_tokens(
        word_model.to_tokens(list(pairs.clean)),
        tokens.answer,
        word_model.to_tokens(list(pairs.corrupt or ())),
        tokens.wrong_answer,
    )
    assert given.hash == tokens.hash
