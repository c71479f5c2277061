"""Marks in prompts name stretches of text, and of tokens."""

from typing import Any

import pytest

from tests.loops import for_each
from tl_neuron_circuits import load_demo_model
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.tasks import apply_chat_template
from tl_neuron_circuits.tasks._spans import read_marks, span_tokens


@for_each(
    ("text", "plain", "spans"),
    [
        ("of {city:Dallas} is", "of Dallas is", [("city", 3, 9)]),
        ("{a:One} and {b: two three}", "One and  two three", [("a", 0, 3), ("b", 8, 18)]),
        ("keep {{a:1}} and {b:2}", "keep {a:1} and 2", [("b", 15, 16)]),
        ('{"a": 1} {} {x} {:d} {x:.2f} {x:>10}', '{"a": 1} {} {x} {:d} {x:.2f} {x:>10}', []),
        ("", "", []),
    ],
)
def test_marks_are_taken_out_and_remembered(text: str, plain: str, spans: list) -> None:
    read = read_marks(text)
    assert read == plain and [tuple(span) for span in read.spans] == spans
    assert all(plain[start:end] in text for _, start, end in spans)


def test_spans_are_found_in_the_tokens(tmp_path: Any) -> None:
    model = load_demo_model()
    text = read_marks("The {first:dogs near} the {second:cat}")
    tokens = model.to_tokens(text)[0]
    found = {name: tokens[start:end].tolist() for name, start, end in span_tokens(model, text, tokens)}
    words = {name: [model.tokenizer.decode([token]).strip() for token in own] for name, own in found.items()}
    assert words == {"first": ["dogs", "near"], "second": ["cat"]}
    assert span_tokens(model, "The dogs", model.to_tokens("The dogs")[0]) == []
    for wrong, message in (("The {a:do}gs", "cuts the token 'dogs'"), ("The {a:dogs} {a:cat}", "name once")):
        with pytest.raises(SettingsError, match=message):
            read = read_marks(wrong)
            span_tokens(model, read, model.to_tokens(read)[0])


def test_the_turns_of_a_chat_are_spans_and_marks_stay_inside_them() -> None:
    tokenizer = load_demo_model().tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} {% endfor %}"
        "{% if add_generation_prompt %}<bot> {% endif %}"
    )
    chat: Any = apply_chat_template(tokenizer, "The {x:dogs} user", system="Be short.", answer_start="The cats")
    read = read_marks(chat)
    assert read == "<system> Be short. <user> The dogs user <bot> The cats"
    assert {name: read[start:end] for name, start, end in read.spans} == {
        "system": "Be short.", "user": "The dogs user", "x": "dogs", "assistant": "The cats",
    }  # fmt: skip
    assert type(read) is type(chat) and (chat + " near").spans == chat.spans
    bare: Any = apply_chat_template(tokenizer, "The dogs")
    assert [name for name, *_ in bare.spans] == ["user"]
