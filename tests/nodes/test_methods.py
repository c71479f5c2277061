"""Methods as small objects: names, labels, JSON, the form of a command line."""

import json
import traceback
from pathlib import Path

import pytest

import tl_neuron_circuits as tnc
from tests.families import all_models
from tests.loops import for_each
from tests.nodes.plain import random_pairs
from tests.propagation.readings import model_of
from tl_neuron_circuits import (
    ActivationDifference,
    Gradient,
    IntegratedGradients,
    IntegratedGradientsInputs,
    LearnedMask,
    MaskGradient,
    Patching,
    Random,
    RelP,
    SettingsError,
    _typing,
)
from tl_neuron_circuits.models import _threads
from tl_neuron_circuits.nodes import Conductance, _attribute, attribute
from tl_neuron_circuits.nodes._methods import METHODS, as_method, parse_method
from tl_neuron_circuits.propagation._relp import Relp

CASE = all_models("gpt2")[0].values[0]

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
    "conductance(steps=4)": Conductance(4),
    "patching": Patching(),
    "learned_mask": LearnedMask(),
    "learned_mask(steps=50, schedule=uniform, loss=kl, lr=0.1)": LearnedMask(50, "uniform", "kl", lr=0.1),
    "mask_gradient(steps=4, direction=flip)": MaskGradient(4, direction="flip"),
    "activation_difference": ActivationDifference(),
    "random(seed=3)": Random(3),
}


@for_each("label", CASES)
def test_a_label_reads_back_as_the_method(label: str) -> None:
    method = CASES[label]
    assert method.label == label
    back = parse_method(label)
    assert type(back) is type(method) and back.to_json() == method.to_json() and as_method(method) is method
    assert json.loads(json.dumps(method.to_json())) == method.to_json()


def test_every_method_has_a_case_and_a_name_of_its_own() -> None:
    assert {type(method) for method in CASES.values()} == set(METHODS.values())


@for_each(
    ("text", "message"),
    [
        ("relevance", "expected a method out of"),
        ("relp(", "expected a method out of"),
        ("relp(steps=3)", "expected options of relp out of"),
        ("relp(rules=)", "as name=value"),
        ("integrated_gradients(2, steps=2)", "each once"),
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


def test_relp_is_entered_three_functions_below_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring of `nodes/_attribute.py` says, also where batches may be halved; nothing in between."""
    documented = [line.split()[0] for line in (_attribute.__doc__ or "").splitlines() if line.startswith("    ")]
    package, stacks, enter = str(Path(_attribute.__file__).parents[1]), [], Relp.__enter__

    def recorded(self: Relp) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(package)]
        stacks.append([f.name for f in frames if f.filename not in (_typing.__file__, _threads.__file__)])
        enter(self)

    monkeypatch.setattr(Relp, "__enter__", recorded)
    for batch_size in (2, "auto"):
        attribute(model_of(CASE), random_pairs(4, 4, 4), batch_size=batch_size)
        assert stacks[-1] == ["attribute", "score", "gradients_at"]
    assert documented[:3] == ["attribute", "RelP.score", "gradients_at"]
