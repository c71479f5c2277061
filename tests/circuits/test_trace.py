"""`trace` chooses the nodes it says, explains the target it was given, and loses nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.circuits.checks import assert_sums_hold, small_circuit
from tests.families import ModelCase, all_models, random_tokens, typical_models
from tests.loops import for_each
from tests.stories_tasks import pronoun_pairs
from tl_neuron_circuits import ByMass, ByShare, Circuit, NeuronCircuitsError, attribute, load_demo_model, trace
from tl_neuron_circuits._errors import PairsError, SettingsError
from tl_neuron_circuits.circuits._choose import parse_choice
from tl_neuron_circuits.demo import capitals
from tl_neuron_circuits.tasks import TokenizedPairs, logit_difference

FAMILIES = ("gpt2", "llama", "gemma2")
both = typical_models("gpt2", "llama")
one = all_models("gpt2")[:1]


@pytest.mark.parametrize("case", typical_models(*FAMILIES))
def test_everything_adds_up(case: ModelCase) -> None:
    circuit = small_circuit(case)
    assert_sums_hold(circuit, max(case.tolerance, 1e-9))
    assert len(circuit) == 12
    sources = circuit.nodes[circuit.nodes["kind"].isin(("embedding", "bias"))]
    assert sources["score"].sum() == pytest.approx(circuit.target_value, rel=1e-5)


@pytest.mark.parametrize("case", both)
@pytest.mark.parametrize("corrupt", [False, True])
def test_pairs_add_up(case: ModelCase, corrupt: bool) -> None:
    model = case.build()
    tokens, others = random_tokens(model, 3, 6), random_tokens(model, 3, 6, seed=1)
    pairs = TokenizedPairs.from_tokens(
        tokens, torch.tensor([3, 4, 5]), others if corrupt else None, torch.tensor([6, 7, 8])
    )
    circuit = trace(model, pairs, nodes=10)
    assert_sums_hold(circuit, max(case.tolerance, 1e-9))
    assert ("linearization_error" in set(circuit.nodes["kind"])) is corrupt
    assert circuit.settings["baseline"] == ("corrupt" if corrupt else "zero")
    expected = attribute(model, pairs, baseline=circuit.settings["baseline"]).top(10)
    chosen = circuit.nodes[circuit.nodes["kind"] == "neuron"].set_index("node")["score"]
    np.testing.assert_allclose(chosen[expected["label"]], expected["score"], rtol=1e-4)


@pytest.mark.parametrize("case", both)
def test_the_default_target_is_the_likeliest_tokens_minus_the_mean(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    logits = trace(model, tokens, nodes=3, top_k=4).nodes.query("kind == 'logit'")
    final = model(tokens)[0, -1].detach()
    values, top = (final - final.mean()).topk(4)
    assert logits["unit"].tolist() == top.tolist()
    np.testing.assert_allclose(logits["activation"], values, rtol=1e-5)
    np.testing.assert_allclose(logits["probability"], final.softmax(-1)[top], rtol=1e-5)


@pytest.mark.parametrize("case", all_models("pythia"))  # its unembedding is not tied to the embedding
def test_centering_the_unembedding_changes_nothing(case: ModelCase) -> None:
    model, tokens = case.build(), random_tokens(case.build(), 1, 6)
    before, raw = trace(model, tokens, nodes=10), model(tokens).detach()
    with torch.no_grad():
        shift = torch.linspace(-3, 3, model.cfg.d_model).double()
        model.unembed.W_U.add_(shift[:, None])
    assert not torch.allclose(model(tokens), raw)
    after = trace(model, tokens, nodes=10)
    key = lambda circuit: circuit.nodes.set_index("node")["score"]  # noqa: E731
    pd.testing.assert_series_equal(key(before), key(after), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", [c for c in both if c.values[0].backend == "HookedTransformer"])
def test_targets_that_mean_the_same_give_the_same(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    over_logits = torch.zeros(model.cfg.d_vocab).double()
    over_logits[3], over_logits[8] = 1, -1
    read = (model.unembed.W_U[:, 3] - model.unembed.W_U[:, 8]).detach()

    def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits[:, -1, 3] - logits[:, -1, 8]

    pair, logits, residual, metric_ = (trace(model, tokens, t, nodes=10) for t in ((3, 8), over_logits, read, metric))
    chosen = [c.nodes.query("kind == 'neuron'")[["node", "score"]] for c in (pair, logits, residual, metric_)]
    for other in chosen[1:]:
        pd.testing.assert_frame_equal(chosen[0], other)
    bias = model.unembed.b_U[3] - model.unembed.b_U[8]
    assert pair.target_value == pytest.approx(logits.target_value) == pytest.approx(metric_.target_value)
    assert pair.target_value == pytest.approx(residual.target_value + bias.item())


@pytest.mark.parametrize("case", one)
def test_several_tokens_are_several_logits(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    together = trace(model, tokens[0], [3, 8], nodes=10)
    alone = [trace(model, tokens, token, nodes=10).target_value for token in (3, 8)]
    assert together.nodes.query("kind == 'logit'")["score"].tolist() == pytest.approx(alone)
    assert together.target_value == pytest.approx(sum(alone))


@pytest.mark.parametrize("case", one)
def test_nodes_are_chosen_by_share_count_or_mass(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    score = torch.cat([v.flatten() for v in trace(model, tokens, (3, 8), nodes=1).to_scores().values.values()])
    assert int(score.isfinite().sum()) == 1
    everything = trace(model, tokens, (3, 8), nodes=7 * 24)  # layer 0, and the last position of layer 1
    size = everything.nodes.query("kind == 'neuron'")["score"].abs()
    shared = trace(model, tokens, (3, 8), nodes=ByShare(0.02))
    assert len(shared) == int((size >= 0.02 * abs(everything.target_value)).sum())
    massive = trace(model, tokens, (3, 8), nodes=ByMass(0.5))
    taken = massive.nodes.query("kind == 'neuron'")["score"].abs()
    assert taken.sum() >= 0.5 * size.sum() > taken.sum() - taken.min()
    assert everything.nodes.query("kind == 'unselected'")["flow"].abs().sum() < 1e-9


def test_choices_have_labels_that_parse_back() -> None:
    for choice, label in ((ByShare(), "share(0.005)"), (ByShare(1e-6), "share(1e-06)"), (ByMass(0.9), "mass(0.9)")):
        assert choice.label == label and parse_choice(label) == choice
    assert repr(ByMass()) == "ByMass(mass=0.8)" and parse_choice("mass") == ByMass() and parse_choice("50") == 50
    for wrong in ("best", "share(0.1", "5.5"):
        with pytest.raises(SettingsError, match="expected a number of nodes"):
            parse_choice(wrong)
    with pytest.raises(SettingsError, match="expected a number for mass; got 'a'"):
        parse_choice("mass(a)")
    assert parse_choice("share(share=0.01)") == parse_choice("share(0.01)") == ByShare(0.01)
    for wrong in (lambda: ByShare(0), lambda: ByMass(2.0), lambda: parse_choice("mass(0)")):
        with pytest.raises(SettingsError, match=r"positive share|mass above 0"):
            wrong()


@pytest.mark.parametrize("case", one)
def test_settings_keep_the_choice_as_its_label(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    labels = [trace(model, tokens, nodes=n).settings["nodes"] for n in (3, ByShare(0.1), ByMass(0.1))]
    assert labels == [3, "share(0.1)", "mass(0.1)"]


@pytest.mark.parametrize("case", one)
def test_running_out_of_memory_is_raised_as_what_it_is(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every backward pass of a trace: no other way is tried, and the model is left as found."""
    model = case.build()
    tokens, real, calls = random_tokens(model, 1, 6), torch.autograd.grad, []
    trace(model, tokens, nodes=5)  # the first use of a model checks that relevance is conserved

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(options.get("is_grads_batched", False))
        return real(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    trace(model, tokens, nodes=5)
    assert any(calls) and not all(calls)
    for fails_at in range(len(calls)):
        made = []

        def failing(*arguments: Any, made: list = made, fails_at: int = fails_at, **options: Any) -> Any:
            made.append(1)
            if len(made) == fails_at + 1:
                raise torch.OutOfMemoryError("no memory")
            return real(*arguments, **options)

        monkeypatch.setattr(torch.autograd, "grad", failing)
        with pytest.raises(torch.OutOfMemoryError):
            trace(model, tokens, nodes=5)
        assert len(made) == fails_at + 1
        assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("case", one)
def test_excluded_neurons_join_the_remainder(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    best = trace(model, tokens, nodes=1).nodes.query("kind == 'neuron'").iloc[0]
    circuit = trace(model, tokens, nodes=20, exclude=[(int(best["layer"]), int(best["unit"]))])
    assert not ((circuit.nodes["layer"] == best["layer"]) & (circuit.nodes["unit"] == best["unit"])).any()
    assert_sums_hold(circuit)


def test_gated_neurons_have_the_signs_of_their_branches(stories260K: Any) -> None:
    prompt = "Once upon a time, there was a little girl named Lily."
    circuit = trace(stories260K, prompt, nodes=20)
    _, cache = stories260K.run_with_cache(prompt)
    for row in circuit.nodes.query("kind == 'neuron'").itertuples():
        at = (0, row.position, row.unit)
        assert row.gate_sign == int(cache[f"blocks.{row.layer}.mlp.hook_pre"][at].sign())
        assert row.up_sign == int(cache[f"blocks.{row.layer}.mlp.hook_pre_linear"][at].sign())
        assert row.sign == row.gate_sign * row.up_sign == np.sign(row.activation)


def test_text_prompts_on_a_real_model(stories260K: Any) -> None:
    prompt = "Once upon a time, there was a little girl named Lily."
    circuit = trace(stories260K, prompt, " She", nodes=60)
    assert_sums_hold(circuit, 1e-4)
    assert circuit.settings["prompt"] == prompt
    assert circuit.nodes.query("kind == 'logit'")["label"].tolist() == [" She"]
    assert circuit.nodes.query("kind == 'logit'")["probability"].item() > 0.5
    assert (circuit.nodes.query("kind == 'neuron'")["position"] > 0).all()  # BOS is left out
    with_bos = trace(stories260K, prompt, " She", nodes=60, keep_bos=True)
    assert with_bos.settings["skipped_positions"] == [] != circuit.settings["skipped_positions"]
    assert abs(circuit.unexplained) < 0.3


@pytest.mark.parametrize("case", both)
def test_raw_logits_are_explained_without_the_mean(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    raw, centered = (trace(model, tokens, [3, 7], nodes=10, center=center) for center in (False, True))
    logits = model(tokens)[0, -1].detach().double()
    assert raw.target_value == pytest.approx(float(logits[[3, 7]].sum()), rel=1e-5)
    assert centered.target_value == pytest.approx(float(logits[[3, 7]].sum() - 2 * logits.mean()), rel=1e-5)
    assert_sums_hold(raw, max(case.tolerance, 1e-9))
    pair = [trace(model, tokens, (3, 7), nodes=10, center=center).target_value for center in (False, True)]
    assert pair[0] == pair[1]


def test_pairs_on_a_real_model(stories260K: Any) -> None:
    circuit = trace(stories260K, pronoun_pairs("{name} was sad.", "attribution", 2), nodes=40)
    assert_sums_hold(circuit, 1e-4)
    assert circuit.settings["n_prompts"] == 4
    assert "…" in circuit.settings["tokens"]


@pytest.mark.parametrize("case", both)
def test_the_model_is_left_as_found(case: ModelCase, untouched: Callable[[Any], AbstractContextManager[None]]) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    model(tokens)
    with untouched(model):
        trace(model, tokens, nodes=5)
    with untouched(model), pytest.raises(NeuronCircuitsError):
        trace(model, tokens, nodes=10**6)


@for_each(
    ("target", "options", "message"),
    [
        (99, {}, "between 0 and 49"),
        (" text", {}, "tokenized in the context"),
        ((3, 3), {}, "two different tokens"),
        ([], {}, "at least one token"),
        (torch.ones(7).double(), {}, "direction of 50"),
        (3, {"nodes": 0}, "between 1 and"),
        (3, {"nodes": ByShare(1e6)}, "no node has"),
        (3, {"exclude": [(9, 9)]}, "no nodes here"),
        (3, {"prepend_bos": True}, "put BOS into"),
        (None, {"top_k": 0}, "top_k"),
    ],
)
def test_wrong_arguments_say_what_to_do(target: Any, options: dict, message: str) -> None:
    model = one[0].values[0].build()
    with pytest.raises(SettingsError, match=message):
        trace(model, random_tokens(model, 1, 6), target, **options)


def test_pairs_that_do_not_fit_are_refused() -> None:
    model = one[0].values[0].build()
    short, long = random_tokens(model, 1, 5)[0], random_tokens(model, 1, 6)[0]
    with pytest.raises(PairsError, match="one token length"):
        trace(model, TokenizedPairs.from_tokens([short, long], torch.tensor([1, 2])))
    with pytest.raises(PairsError, match="corrupt prompts"):
        trace(model, TokenizedPairs.from_tokens([short], torch.tensor([1])), baseline="corrupt")
    with pytest.raises(PairsError, match="equal token length"):
        trace(model, TokenizedPairs.from_tokens([short], torch.tensor([1]), [long], torch.tensor([2])))


@pytest.mark.parametrize("case", one)
def test_a_metric_can_be_the_target_of_pairs(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 2, 6)
    pairs = TokenizedPairs.from_tokens(tokens, torch.tensor([3, 4]), None, torch.tensor([6, 7]))
    by_name, by_default = trace(model, pairs, logit_difference, nodes=5), trace(model, pairs, nodes=5)
    pd.testing.assert_frame_equal(by_name.nodes, by_default.nodes)
    assert isinstance(by_name, Circuit)


@pytest.mark.parametrize("name", ["demo-gelu", "demo-swiglu"])
def test_the_demo_models_circuit_reads_the_city(name: str) -> None:
    """The two-hop answer comes from the city's tokens and the attribute asked for, and all numbers add up."""
    circuit = trace(load_demo_model(name), "The capital of the state containing Dallas is", " Austin")
    assert_sums_hold(circuit, 1e-4)
    assert circuit.settings["skipped_positions"] == [0]
    logit = circuit.nodes.query("kind == 'logit'")
    assert logit["label"].tolist() == ["Austin"] and logit["probability"].item() > 0.5
    embeddings = circuit.nodes.query("kind == 'embedding'").nlargest(3, "score")["token"]
    assert set(embeddings) == {"Dal", "##las", "capital"}
    assert circuit.nodes.query("kind == 'neuron'")["share"].abs().min() >= ByShare().share


def test_pairs_name_the_text_they_share_with_its_spaces() -> None:
    pairs = capitals(n=2)
    circuit = trace(load_demo_model(), pairs, nodes=2)
    assert circuit.settings["prompt"] == "<bos> The capital of the state containing …… is"
