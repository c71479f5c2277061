"""Strongest examples against a plain search, and their HTML."""

import html
import re
from typing import Any

import pytest
import torch

from tests.families import ModelCase, all_models, random_tokens
from tests.loops import for_each
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.explain import max_activating_examples
from tl_neuron_circuits.explain._highlight import highlight
from tl_neuron_circuits.explain._max_activating_examples import Example, MaxActivatingExamples

few_models = pytest.mark.parametrize("case", all_models("gpt2"))


@few_models
@for_each("by", ["largest", "smallest", "absolute"])
def test_they_are_what_a_plain_search_finds(case: ModelCase, by: Any, untouched: Any) -> None:
    model = case.build()
    tokens = random_tokens(model, 11)
    model(tokens[:1])
    with untouched(model):
        found = max_activating_examples(model, tokens, ["L1/N3@2", "L0/N5"], k=4, by=by, batch_size=3)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for label, layer, unit in (("L1/N3", 1, 3), ("L0/N5", 0, 5)):
        values = cache[f"blocks.{layer}.mlp.hook_post"][:, :, unit].float()
        key = {"largest": values, "smallest": -values, "absolute": values.abs()}[by]
        expected = key.amax(1).topk(4).indices.tolist()
        assert [example.prompt for example in found.examples[label]] == expected
        for example in found.examples[label]:
            assert example.position == int(key[example.prompt].argmax())
            torch.testing.assert_close(torch.tensor(example.activations), values[example.prompt], rtol=1e-5, atol=1e-6)
    assert len(found.to_dataframe()) == 8 and "11 prompts" in repr(found)


def test_text_of_several_lengths_descriptions_and_bos(stories260K: Any) -> None:
    prompts = ["Lily saw a <b>big</b> ball & ran.", "Tom was sad.", "Once upon a time there was a dog", "She"] * 2
    seen = []

    def describe(label: str, examples: Any) -> str:
        seen.append((label, len(examples)))
        return f"<i>{label}</i> likes {examples['token'].iloc[0]!r}"

    nodes = [f"L2/N{unit}" for unit in (0, 1, 14, 21)]
    found = max_activating_examples(stories260K, prompts, nodes, k=3, describe=describe, batch_size=2)
    assert seen == [(node, 3) for node in nodes] and found.n_prompts == 8
    page = found._repr_html_()
    assert "<b>big" not in page and "<i>L2" not in page and "&lt;i&gt;L2/N0" in page
    visible = html.unescape(re.sub(r"<[^>]*>", "", found.html("L2/N0")))
    for row in found.to_dataframe().query("label == 'L2/N0'").itertuples():
        assert prompts[row.prompt] in row.text and row.text in visible
    table = found.to_dataframe()
    assert (table["position"] > 0).all() and table["description"].str.startswith("<i>").all()
    with_bos = max_activating_examples(stories260K, prompts, "L2/N14", k=8, by="absolute", skip_bos=False)
    assert (with_bos.to_dataframe()["position"] == 0).any()
    with pytest.raises(SettingsError, match="expected describe to return a string"):
        max_activating_examples(stories260K, prompts, nodes, describe=lambda label, examples: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(SettingsError, match="one of the neurons"):
        found.html("L9/N9")
    with pytest.raises(SettingsError, match="units below 172"):
        max_activating_examples(stories260K, prompts, "L2/N172")


def test_highlight_escapes_and_scales() -> None:
    page = highlight(["<x>", " y\n", '"'], [1.0, -0.5, 0.0], 1.0)
    assert "<x>" not in page and "&lt;x&gt;" in page and "&quot;" in page
    assert "rgba(42,157,143,1.00)" in page and "rgba(231,111,81,0.50)" in page
    assert highlight(["a"], [0.0], 0.0).count("0.00") == 1


def test_the_first_token_of_a_prompt_is_out_of_the_scale_of_colors() -> None:
    for first in ("<bos>", "The"):
        examples = (Example(0, (first, " dog"), (90.0, 2.0), 0), Example(1, (first, " cat"), (91.0, -1.0), 1))
        page = MaxActivatingExamples({"L0/N1": examples}, 2).html("L0/N1")
        assert page.count(",0.00)") == 2 and "157,143,1.00)" in page and "111,81,0.50)" in page
