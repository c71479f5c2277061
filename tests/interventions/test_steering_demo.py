"""Steering and explaining the demo models: chosen neurons matter, random ones do not."""

from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.families import HookedTransformer
from tests.real_models import TransformerBridge
from tl_neuron_circuits import tasks

BACKENDS = [
    name
    for name, model_class in (("HookedTransformer", HookedTransformer), ("TransformerBridge", TransformerBridge))
    if model_class is not None
]


@pytest.fixture(scope="module", params=["demo-gelu", "demo-swiglu"])
def demo(request: pytest.FixtureRequest) -> Any:
    return tnc.load_demo_model(request.param)


def test_ablating_the_best_neurons_takes_the_answer_away_and_random_ones_do_not(demo: Any) -> None:
    train, test = tasks.subject_verb_agreement("nounpp", n=64, seed=0).split(0.5)
    scores = tnc.attribute(demo, train)
    best = scores.top(60, by="signed")
    every = scores.to_dataframe()
    picked = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:60]
    tokens = tasks.tokenize(demo, test)
    rows = torch.arange(len(test))
    differences = {}
    for name, nodes in (("best", best), ("random", every.iloc[picked.numpy()])):
        result = tnc.steer(demo, test.clean, nodes, scale=0)
        answers = (tokens.answer.cpu(), tokens.wrong_answer.cpu())
        before, after = (
            float((logits[rows, answers[0]] - logits[rows, answers[1]]).mean())
            for logits in (result.before, result.after)
        )
        differences[name] = 1 - after / before
    assert differences["best"] > 0.5 and abs(differences["random"]) < 0.1


def test_the_subjects_number_can_be_transplanted(demo: Any) -> None:
    """All neurons at the noun, from the plural prompt: verbs follow in the plural."""
    pairs = tasks.subject_verb_agreement("simple", n=16, seed=1)
    nodes = [f"L{layer}/N{unit}" for layer in range(demo.cfg.n_layers) for unit in range(demo.cfg.d_mlp)]
    last = demo.to_tokens(pairs.clean[0]).shape[1] - 1
    moved = tnc.interchange(demo, list(pairs.clean), list(pairs.corrupt), nodes, positions=last)
    tokens = tasks.tokenize(demo, pairs)
    rows = torch.arange(len(pairs))
    answer, wrong = tokens.answer.cpu(), tokens.wrong_answer.cpu()
    before = moved.before[rows, answer] - moved.before[rows, wrong]
    after = moved.after[rows, answer] - moved.after[rows, wrong]
    assert (before > 0).float().mean() > 0.9 and float((after / before).mean()) < 0.5


def test_hypotheses_about_number_hold_on_other_prompts(demo: Any) -> None:
    pairs = tasks.subject_verb_agreement("simple", n=48, seed=2)
    plural = [answer.strip() in ("are", "have", "do", "go", "were") for answer in pairs.answer]
    scores = tnc.prompt_scores(demo, pairs, share=0.005)
    found = tnc.score_features(scores, plural, high=0.95, low=0.05)
    chosen = found.selected
    assert len(chosen) and ((chosen["auroc_heldout"] - 0.5).abs() + 0.5).mean() > 0.85


def test_a_circuit_is_steered_by_its_neurons(demo: Any) -> None:
    prompt = "The boy near the girls"
    circuit = tnc.trace(demo, prompt, nodes=30)
    nodes = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    labels = list(nodes["node"])
    by_circuit, by_labels = (tnc.steer(demo, prompt, chosen, scale=0) for chosen in (circuit, labels))
    assert len(by_circuit.nodes) == 30 and torch.equal(by_circuit.after, by_labels.after)
    assert not torch.equal(by_circuit.after, by_circuit.before)
    prompts = [f"The {noun} near the girls" for noun in ("boy", "boys", "man", "men", "dog", "dogs", "cat", "cats")]
    tables = [tnc.trace(demo, text, nodes=30).nodes for text in prompts]
    found = tnc.score_features(tables, [index % 2 for index in range(8)])
    assert found.table["label"].nunique() > 30 and found.table["auroc_heldout"].notna().all()


def test_circuits_their_tables_rows_and_supernodes_all_steer_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model, prompt = tnc.load_demo_model(), "The capital of the state containing Dallas is"
    circuit = tnc.trace(model, prompt, " Austin", nodes=30)
    neurons = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    collapsed = circuit.group({"half": sorted(circuit.members)[:15], "rest": sorted(circuit.members)[15:]}).collapse()
    results = [
        tnc.steer(model, prompt, nodes, scale=0).after
        for nodes in (circuit, circuit.nodes, neurons, list(neurons["node"]), collapsed)
    ]
    assert all(torch.equal(result, results[0]) for result in results)
    assert "embed@0 (embedding)" in caplog.text  # rows of the whole table that have no unit
    with pytest.raises(tnc.SettingsError, match=r"embed@0 \(embedding\).* alone"):
        tnc.steering_hooks(model, circuit.nodes[circuit.nodes["kind"] == "embedding"], scale=0)
    with pytest.raises(tnc.SettingsError, match="supernodes"):
        tnc.steering_hooks(model, collapsed.nodes, scale=0)
    pairs, zero = (
        tnc.PromptPairs(clean=[prompt], answer=[" Austin"]),
        {"baseline": "zero", "metric": tnc.tasks.answer_logit},
    )
    measured = [tnc.attribute(model, pairs, method=tnc.Patching(nodes), **zero) for nodes in (neurons, circuit.nodes)]
    assert len(measured[0].top(50)) == 30 and measured[0].top(50).equals(measured[1].top(50))
