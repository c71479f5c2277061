"""Methods as small objects: names, labels, JSON, the form of a command line."""

import json

import pytest

import tl_neuron_circuits as tnc
from tl_neuron_circuits import (
    ActivationDifference,
    Gradient,
    IntegratedGradients,
    IntegratedGradientsInputs,
    Patching,
    Random,
    RelP,
    SettingsError,
    parse_method,
)
from tl_neuron_circuits.nodes._methods import METHODS, as_method

CASES = {
    "relp": RelP(),
    "relp(rules=gim)": RelP(rules="gim"),
    "relp(rules=ln+half, stabilizer=1e-06)": RelP(rules=("ln", "half"), stabilizer=1e-6),
    "relp(rules=ln+)": RelP(rules=("ln",)),
    "gradient": Gradient(),
    "integrated_gradients": IntegratedGradients(),
    "integrated_gradients(steps=20)": IntegratedGradients(steps=20),
    "integrated_gradients(steps=3, rules=relp)": IntegratedGradients(3, "relp"),
    "integrated_gradients_inputs(steps=5)": IntegratedGradientsInputs(5),
    "patching": Patching(),
    "activation_difference": ActivationDifference(),
    "random(seed=3)": Random(3),
}


@pytest.mark.parametrize("label", CASES)
def test_a_label_reads_back_as_the_method(label: str) -> None:
    method = CASES[label]
    assert method.label == label
    back = parse_method(label)
    assert type(back) is type(method) and back.to_json() == method.to_json() and as_method(method) is method
    assert json.loads(json.dumps(method.to_json())) == method.to_json()


def test_every_method_has_a_case_and_a_name_of_its_own() -> None:
    assert {type(method) for method in CASES.values()} == set(METHODS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relevance", "expected a method out of"),
        ("relp(", "expected a method out of"),
        ("relp(steps=3)", "expected options of relp out of"),
        ("relp(rules)", "as name=value"),
        ("integrated_gradients(steps=few)", "a number for steps"),
        ("patching(nodes=5)", "expected options of patching"),
    ],
)
def test_what_is_no_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_method(text)


def test_a_saved_result_says_its_method(tmp_path: object) -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
    scores = tnc.attribute(model, pairs, method=IntegratedGradients(steps=2), basis=tnc.bases.Neurons([0]))
    assert scores.settings["method"] == "integrated_gradients(steps=2)"
    assert scores.settings["method_options"] == {"name": "integrated_gradients", "steps": 2, "rules": []}
