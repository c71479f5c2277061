"""A circuit's page can tell examples and logit effects of every neuron, from one call."""

from pathlib import Path

import pytest

import tl_neuron_circuits as tnc
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.demo import capitals

PROMPT = "The capital of the state containing Dallas is"


def test_details_are_the_examples_and_effects_of_each_neuron_and_fit_the_page(tmp_path: Path) -> None:
    model = tnc.load_demo_model()
    circuit = tnc.trace(model, PROMPT, " Austin", nodes=12)
    prompts = capitals(n=16).clean
    details = tnc.node_details(model, circuit, prompts, k=3, tokens=4, describe=lambda label, rows: f"about {label}")
    neurons = {name.partition("@")[0] for name in circuit.members}
    assert set(details) == neurons
    name = sorted(neurons)[0]
    effects = tnc.direct_logit_effects(model, [name], k=4).to_dataframe()
    tokens, numbers = zip(*details[name]["direct_logit_effects"], strict=True)
    assert list(tokens) == effects["token"].tolist()
    assert list(numbers) == pytest.approx(effects["effect"].tolist(), rel=1e-5)
    examples = tnc.max_activating_examples(model, prompts, [name], k=3, by="absolute").examples[name]
    assert [e.tokens for e in details[name]["examples"]] == [e.tokens for e in examples]
    assert details[name]["description"] == f"about {name}"
    circuit.to_html(tmp_path / "page.html", details=details)
    assert f"about {name}" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert set(tnc.node_details(model, circuit)[name]) == {"direct_logit_effects"}


def test_what_cannot_be_told_is_refused() -> None:
    model = tnc.load_demo_model()
    circuit = tnc.trace(model, PROMPT, " Austin", nodes=4)
    with pytest.raises(SettingsError, match="give prompts"):
        tnc.node_details(model, circuit, describe=lambda label, rows: "")
    with pytest.raises(SettingsError, match="before collapse"):
        tnc.node_details(model, circuit.group({"all": sorted(circuit.members)}).collapse())
