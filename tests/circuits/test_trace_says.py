"""`trace` says what it found, and `ByExplained` keeps its promise when the circuit is run."""

import re
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.families import ModelCase, all_models, model_cases, random_tokens, typical_models
from tl_neuron_circuits import Circuit, trace
from tl_neuron_circuits._errors import NumericalError, SettingsError
from tl_neuron_circuits.circuits import ByExplained
from tl_neuron_circuits.interventions import ablation_hooks
from tl_neuron_circuits.tasks import TokenizedPairs, answer_logit, logit_difference

PROMPT = "The capital of the state containing Dallas is"
TEXTS = ["The dogs near the girl are old.", "The dog is here.", "She lives in Dallas Texas.", "The cats have time."]


@pytest.fixture(scope="module")
def demo() -> Any:
    return tnc.load_demo_model()


def pairs_of(model: Any, n: int = 2, *, wrong: bool = True) -> TokenizedPairs:
    answers = torch.arange(n) + 3
    tokens, others = random_tokens(model, n, 6), random_tokens(model, n, 6, seed=1)
    return TokenizedPairs.from_tokens(tokens, answers, others, answers + 20 if wrong else None)


def test_prediction_and_rank_are_the_models(demo: Any) -> None:
    circuit = trace(demo, PROMPT, [" Austin", " Boston"], nodes=10)
    probabilities = demo(PROMPT)[0, -1].softmax(-1)
    best = probabilities.topk(5)
    assert [p for _, p in circuit.settings["predicted"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    token = demo.to_single_token("Boston") if "Boston" in demo.tokenizer.get_vocab() else None
    ranks = list(circuit.settings["target_ranks"].values())
    assert ranks[0] == 1 and ranks[1] > 1
    assert token is None or ranks[1] == 1 + int((probabilities > probabilities[token]).sum())


def test_a_target_that_is_not_predicted_or_mostly_left_out_has_notes(
    demo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    circuit = trace(demo, PROMPT, " Boston", nodes=3)
    assert any("does not predict" in note and "rank" in note for note in circuit.notes)
    assert any("left out" in note and "circuit.layers()" in note for note in circuit.notes)
    assert all(note in caplog.text for note in circuit.notes)
    assert "rank" in repr(circuit) and "explained" in repr(circuit)
    assert not any("does not predict" in note for note in trace(demo, PROMPT, " Austin", nodes=200).notes)


def test_what_is_not_linear_in_a_pair_is_not_said_to_be_left_out(demo: Any) -> None:
    pairs = tnc.tasks.subject_verb_agreement("nounpp", n=16, model=demo)
    for nodes in (20, 1000):
        circuit = trace(demo, pairs, nodes=nodes)
        flow = circuit.nodes.groupby("kind")["flow"].sum() / circuit.target_value
        found = re.search(
            r"(\d+)% of the target is not explained: (-?\d+)% flows.*, (\d+)% is not linear", circuit.notes[-1]
        )
        assert found is not None, circuit.notes
        whole, left, curved = map(int, found.groups())
        assert whole == pytest.approx(100 * circuit.unexplained, abs=0.51)
        assert left == pytest.approx(100 * flow.get("unselected", 0.0), abs=0.51)
        assert curved == pytest.approx(100 * flow["linearization_error"], abs=0.51)
    assert "is not linear" not in "".join(trace(demo, PROMPT, " Boston", nodes=3).notes)


def test_layers_say_where_the_scores_are(demo: Any) -> None:
    circuit = trace(demo, PROMPT, " Austin", nodes=40)
    layers = circuit.layers()
    assert layers["chosen"].sum() == 40 and len(layers) == demo.cfg.n_layers
    assert (layers["chosen_size"] <= layers["size"] + 1e-6).all()
    assert circuit.prune(count=10).layers()["chosen"].sum() == 10


@pytest.mark.parametrize("case", typical_models("gpt2", "gemma2"))
@pytest.mark.parametrize("baseline", ["corrupt", "zero"])
def test_attribute_gives_the_same_scores_on_the_same_pairs_unless_a_soft_cap_stands_between(
    case: ModelCase, baseline: Any
) -> None:
    model = case.build()
    for wrong, metric, options in ((True, logit_difference, {}), (False, answer_logit, {"center": False})):
        pairs = pairs_of(model, wrong=wrong)
        circuit = trace(model, pairs, nodes=30, baseline=baseline, keep_bos=True, **options)
        scores = tnc.attribute(model, pairs, metric=metric, baseline=baseline)
        own = circuit.nodes[circuit.nodes["kind"] == "neuron"]
        theirs = [float(scores.values[f"blocks.{r.layer}.mlp.hook_post"][r.position, r.unit]) for r in own.itertuples()]
        same = torch.allclose(torch.tensor(own["score"].to_numpy()).float(), torch.tensor(theirs), rtol=1e-3, atol=1e-5)
        assert same == (case.family != "gemma2")


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_raw_logits_are_centered_ones_plus_what_all_logits_share(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    logits = model(tokens)[0, -1].detach()
    for center in (True, False):
        circuit = trace(model, tokens[0], 5, nodes=10, center=center, keep_bos=True)
        expected = logits[5] - logits.mean() if center else logits[5]
        assert circuit.target_value == pytest.approx(float(expected))
    assert len(circuit.heads(5))  # knows that it is not centered


def faithfulness(model: Any, circuit: Circuit, tokens: torch.Tensor, corrupt: torch.Tensor, target: Any) -> float:
    """By hand, with the package's ablation hooks."""
    sites = tnc.bases.Neurons().sites(model)
    own = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    base = model.run_with_cache(corrupt)[1]
    baselines = {site.hook: site.take_apart({site.hook: base[site.hook]}) for site in sites}

    def run(rows: Any) -> float:
        masks = {
            (s.hook, "node"): torch.zeros(tokens.shape[1], base[s.hook].shape[-1], dtype=torch.bool) for s in sites
        }
        for row in rows.itertuples():
            masks[f"blocks.{row.layer}.mlp.hook_post", "node"][row.position, row.unit] = True
        with torch.no_grad(), model.hooks(fwd_hooks=ablation_hooks(sites, masks, baselines)):
            return float(target(model(tokens)[0, -1]))

    empty = run(own.iloc[:0])
    with torch.no_grad():
        whole = float(target(model(tokens)[0, -1]))
    return (run(own) - empty) / (whole - empty)


def test_the_kept_circuit_gives_the_share_that_was_asked_for() -> None:
    model = model_cases("gpt2")[0].build()
    pairs = pairs_of(model, 1)
    circuit = trace(model, pairs, nodes=ByExplained(0.5), keep_bos=True)
    share = circuit.settings["explained"]["share"]
    answer, wrong = int(pairs.answer[0]), int(pairs.wrong_answer[0])
    by_hand = faithfulness(model, circuit, pairs.clean[0][None], pairs.corrupt[0][None], lambda z: z[answer] - z[wrong])
    assert share == pytest.approx(by_hand, abs=1e-5) and 0.5 <= share <= 1.5
    sizes = dict(map(tuple, circuit.settings["explained"]["sizes"]))
    assert all(0.5 <= f <= 1.5 for size, f in sizes.items() if size >= len(circuit))
    smaller = [size for size in sizes if size < len(circuit)]
    assert not smaller or not 0.5 <= sizes[max(smaller)] <= 1.5  # the last one before was outside


def test_a_single_prompt_needs_reference_texts_and_takes_means_over_them(demo: Any) -> None:
    with pytest.raises(SettingsError, match="reference="):
        trace(demo, PROMPT, " Austin", nodes=ByExplained(0.5))
    circuit = trace(demo, PROMPT, " Austin", nodes=ByExplained(0.5), reference=TEXTS)
    assert 0.5 <= circuit.settings["explained"]["share"] <= 1.5
    assert circuit.settings["nodes"] == "explained(0.5)"
    again = trace(demo, PROMPT, " Austin", nodes=len(circuit))
    assert again.members == circuit.members


def test_nodes_that_make_no_difference_are_refused() -> None:
    model = model_cases("gpt2")[0].build()
    tokens = random_tokens(model, 2, 6)
    same = TokenizedPairs.from_tokens(tokens, torch.tensor([3, 4]), tokens, torch.tensor([5, 6]))
    with pytest.raises(NumericalError, match="make no difference"):
        trace(model, same, nodes=ByExplained(0.5), baseline="corrupt")
