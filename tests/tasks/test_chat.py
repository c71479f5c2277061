"""Chat templates and text that brings its own BOS: one BOS wherever text goes in."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.real_models import BACKENDS
from tests.tasks.tiny_tokenizers import byte_level, model_with, word_level
from tl_neuron_circuits._errors import PairsError, SettingsError
from tl_neuron_circuits.interventions._steering_prompts import read_prompts
from tl_neuron_circuits.lasso._observations import tokenize_inputs
from tl_neuron_circuits.tasks import PromptPairs, apply_chat_template, tokenize
from tl_neuron_circuits.tasks._chat import special_positions
from tl_neuron_circuits.tasks._text_tokens import text_tokens
from tl_neuron_circuits.transcoders._residual_run import one_prompt

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% endif %}"
    "{% if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PAIRS = PromptPairs(
    clean=["The keys", "The boys"],
    answer=[" are", " were"],
    corrupt=["The key", "The boy"],
    wrong_answer=[" is", " was"],
    labels=["key", "boy"],
)


@pytest.fixture(params=[(kind, backend) for kind in (word_level, byte_level) for backend in BACKENDS])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Nobody was told yet that its text begins with BOS: a tokenizer of its own."""
    kind, backend = request.param
    model = model_with(kind(tmp_path), backend)
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_text_that_begins_with_bos_gets_no_other_and_says_so_once(model: Any, prepend_bos: bool | None) -> None:
    text = f"{model.tokenizer.bos_token}The keys"
    expected = model.to_tokens("The keys", prepend_bos=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(text_tokens(model, text, prepend_bos), expected)
        pairs = PromptPairs(clean=[text], answer=[" are"])
        assert torch.equal(tokenize(model, pairs, prepend_bos=prepend_bos).clean[0], expected[0])
        assert torch.equal(read_prompts(model, [text], prepend_bos).tokens[0], expected[0])
        assert torch.equal(tokenize_inputs(model, [text], prepend_bos).clean[0], expected[0])
        assert torch.equal(one_prompt(model, text, prepend_bos), expected)
        circuit = tnc.trace(model, text, nodes=3, prepend_bos=prepend_bos)
        assert circuit.settings["token_ids"] == expected[0].tolist()
    messages = [str(warning.message) for warning in told if "no second one" in str(warning.message)]
    assert len(messages) == (0 if prepend_bos is False else 1)
    twice = text_tokens(model, model.tokenizer.bos_token + text, prepend_bos)
    assert twice.shape[1] == expected.shape[1] + 1, "two that were asked for stay"


def test_a_chat_begins_with_one_bos_and_ends_with_the_answers_beginning(model: Any) -> None:
    bos, eos = model.tokenizer.bos_token, model.tokenizer.eos_token
    text = apply_chat_template(model, "The keys", system="The table", answer_start="The boy")
    assert text == f"{bos}The table The keys{eos}The boy"
    assert apply_chat_template(model, ["The keys"], message="The {prompt}") == [f"{bos}The The keys{eos}"]
    pairs = apply_chat_template(model, PAIRS, message="The table", answer_start="{prompt}")
    assert pairs.clean[0] == f"{bos}The table{eos}The keys" and pairs.answer == PAIRS.answer
    assert pairs.labels == PAIRS.labels and pairs.made_for is not None
    tokens = tokenize(model, pairs)
    assert all(row.tolist()[0] == model.tokenizer.bos_token_id != row.tolist()[1] for row in tokens.clean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a chat's BOS is no surprise
        read_prompts(model, text)


def test_answers_lose_the_space_that_the_template_has(model: Any) -> None:
    model.tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}The \n{% endif %}"
    pairs = apply_chat_template(model, PAIRS)
    assert pairs.clean[0].endswith("The \n") and pairs.answer == ("are", "were")
    assert apply_chat_template(model, PAIRS, answer_start="The").answer == (" are", " were")


def test_chats_that_cannot_be_say_why(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'\{prompt\}' in message or answer_start"):
        apply_chat_template(model, "The keys", message="The table")
    model.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SettingsError, match="refused the messages .*no system role"):
        apply_chat_template(model, "The keys", system="The table")
    model.tokenizer.chat_template = None
    with pytest.raises(SettingsError, match="this one has none"):
        apply_chat_template(model, "The keys")


def test_no_node_is_at_a_special_token_on_request(model: Any) -> None:
    pairs = apply_chat_template(model, PAIRS[:1], answer_start="The")
    tokens = tokenize(model, pairs)
    special = {model.tokenizer.bos_token_id, model.tokenizer.eos_token_id}
    places = [place for place, token in enumerate(tokens.clean[0].tolist()) if token in special]
    assert len(places) == 2 and special_positions(model, tokens) == places
    plain, scores = tnc.attribute(model, pairs), tnc.attribute(model, pairs, skip_special=True)
    for hook, values in scores.values.items():
        assert values[places].isnan().all()
        rest = [place for place in range(len(values)) if place not in places]
        assert torch.equal(values[rest], plain.values[hook][rest])
    assert not set(scores.top(50)["position"]) & set(places)
    nodes = tnc.trace(model, pairs, nodes=40, skip_special=True, baseline="zero").nodes
    chosen = set(nodes.loc[nodes["kind"] == "neuron", "position"])
    assert chosen and not chosen & set(places)
    with pytest.raises(SettingsError, match="Keep the positions"):
        tnc.attribute(model, pairs, skip_special=True, positions="sum")


def test_a_chat_is_for_its_tokenizer_alone(model: Any) -> None:
    with pytest.raises(PairsError, match="made for the tokenizer"):
        tokenize(tnc.load_demo_model(), apply_chat_template(model, PAIRS, answer_start="The"))
