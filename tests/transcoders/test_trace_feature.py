"""Circuits from weights: whatever comes into a node sums to it, and nothing of the target is lost."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import ModelCase, model_cases
from tests.loops import for_each
from tests.transcoders.weights_cases import prompt, transcoders
from tl_neuron_circuits import Circuit, PromptPairs, evaluate, load_demo_dictionaries, steer, trace
from tl_neuron_circuits._errors import DictionaryError, SettingsError
from tl_neuron_circuits.bases import Dictionaries
from tl_neuron_circuits.transcoders import contributions, trace_feature
from tl_neuron_circuits.transcoders._contributions import Read, find_target, one_step
from tl_neuron_circuits.transcoders._residual_run import residual_run
from tl_neuron_circuits.transcoders._trace_feature import head_read, skip_read

TEXT = "The capital of the state containing Dallas is"
ENDS = ["embedding", "bias", "error", "unselected"]


@pytest.fixture(scope="module")
def austin(demo: tuple[Any, Any]) -> Circuit:
    return trace_feature(*demo, TEXT, " Austin")


def assert_everything_adds_up(circuit: Circuit, tolerance: float) -> None:
    nodes, into = circuit.nodes.set_index("node"), circuit.edges.groupby("target")[["weight", "attribution"]].sum()
    read = nodes[~nodes["kind"].isin(ENDS)]
    assert set(into.index) == set(read.index)
    assert (into["weight"] - read["change"]).abs().max() < tolerance
    assert (into["attribution"] - read["score"]).abs().max() < tolerance
    out = circuit.edges.groupby("source")["attribution"].sum()
    inner = read[read["kind"] != "logit"]
    assert (out[inner.index] - inner["score"]).abs().max() < tolerance
    ends = nodes.loc[nodes["kind"].isin(ENDS), "flow"].sum()
    assert ends == pytest.approx(circuit.target_value, abs=tolerance)


@for_each("case", model_cases("llama", "pythia", "gemma2", "phi"), ids=lambda case: case.id)
def test_incoming_edges_sum_to_every_node(case: ModelCase) -> None:
    model = case.build(torch.float32)
    circuit = trace_feature(
        model, transcoders(model), prompt(model), "L1/F3@4", num_iters=3, num_branches=12, rank="absolute"
    )  # fmt: skip
    assert {"feature", "head", "skip", "error", "embedding", "unselected"} <= set(circuit.nodes["kind"])
    assert_everything_adds_up(circuit, 1e-4)


def test_a_circuit_of_the_demo_model_adds_up_before_and_after_pruning(austin: Circuit) -> None:
    assert_everything_adds_up(austin, 1e-4)
    pruned = austin.prune(share=0.05)
    assert 0 < len(pruned.members) < len(austin.members)
    ends = pruned.nodes.loc[pruned.nodes["kind"].isin(ENDS), "flow"].sum()
    assert ends == pytest.approx(austin.target_value, abs=1e-4)
    assert pruned.unexplained > austin.unexplained


def test_edges_into_the_target_are_its_contributions(demo: tuple[Any, Any], austin: Circuit) -> None:
    into = austin.edges[austin.edges["target"] == austin.nodes.loc[austin.nodes["kind"] == "logit", "node"].iloc[0]]
    direct = contributions(*demo, TEXT, " Austin").table.set_index("node")["contribution"]
    chosen = into[into["source"].isin(austin.members)].set_index("source")["weight"]
    assert len(chosen) > 5
    assert (chosen - direct[chosen.index]).abs().max() < 1e-5


def test_edges_into_a_feature_are_its_own_contributions(demo: tuple[Any, Any], austin: Circuit) -> None:
    features = austin.nodes[(austin.nodes["kind"] == "feature") & (austin.nodes["layer"] > 0)]
    feature = features.loc[features["score"].abs().idxmax()]
    into = austin.edges[(austin.edges["target"] == feature["node"]) & austin.edges["source"].isin(austin.members)]
    found = contributions(*demo, TEXT, feature["node"])
    assert found.value == pytest.approx(feature["activation"], abs=1e-4)
    direct = found.table.set_index("node")["contribution"]
    assert (into.set_index("source")["weight"] - direct[into["source"]]).abs().max() < 1e-5


def test_paths_are_products_of_one_step_shares(demo: tuple[Any, Any]) -> None:
    """Through features alone a path's contribution is the target's, times each feature's share of the one before."""
    wide = trace_feature(*demo, TEXT, " Austin", num_branches=40, num_iters=2)
    paths = [path for path in wide.settings["paths"] if len(path["nodes"]) > 2]
    chains = [path for path in paths if all("/F" in node for node in path["nodes"][1:])]
    assert chains
    names, expected = chains[0]["nodes"], 1.0
    for reader, source in zip([" Austin", *names[1:]], names[1:], strict=False):
        found = contributions(*demo, TEXT, reader)
        before = 1.0 if reader == " Austin" else found.value
        expected *= float(found.table.set_index("node")["contribution"][source]) / before
    assert chains[0]["contribution"] == pytest.approx(expected, rel=1e-4)


def test_a_cap_lets_no_path_count_for_more_than_what_it_extends(demo: tuple[Any, Any]) -> None:
    settings = {"num_branches": 10, "num_iters": 3}
    capped, raw = (trace_feature(*demo, TEXT, "L3/F7@-1", cap=c, **settings).settings["paths"] for c in (True, False))
    known = {tuple(path["nodes"]): path["contribution"] for path in capped}
    longer = [(key, value) for key, value in known.items() if key[:-1] in known]
    assert longer
    assert all(value <= known[key[:-1]] * (1 + 1e-6) for key, value in longer)
    free = {tuple(path["nodes"]): path["contribution"] for path in raw}
    assert any(value > free[key[:-1]] * 1.01 for key, value in free.items() if key[:-1] in free)


def test_the_first_position_is_left_out_unless_asked_for(demo: tuple[Any, Any]) -> None:
    without = trace_feature(*demo, TEXT, "L3/F7@-1", rank="absolute", num_iters=1)
    with_bos = trace_feature(*demo, TEXT, "L3/F7@-1", rank="absolute", num_iters=1, keep_bos=True)
    at = lambda c: c.nodes.loc[c.nodes["kind"].isin(["feature", "head"]), "position"]  # noqa: E731
    assert 0 not in set(at(without))
    assert 0 in set(at(with_bos))


@pytest.mark.parametrize("case", model_cases("gpt2", "llama"), ids=lambda case: case.id)
def test_summed_over_all_heads_edges_are_those_that_gradients_give(case: ModelCase) -> None:
    """`trace` of features takes gradients through frozen attention: every route through heads and skips at once."""
    model = case.build(torch.float32)
    dictionaries, tokens = transcoders(model), prompt(model)
    circuit = trace(model, tokens, 7, basis=Dictionaries(dictionaries), nodes=10)
    run = residual_run(model, dictionaries, tokens[None])
    found: dict[str, float] = defaultdict(float)

    def follow(read: Read) -> None:
        step = one_step(run, read)
        for features in step.features:
            for unit, value in zip(features.units.tolist(), features.contributions.tolist(), strict=True):
                found[f"L{features.layer}/F{unit}@{read.position}"] += value
        for layer in step.skips:
            follow(skip_read(run, layer, read.position, read.vector))
        for layer, head, source in ((n, h, s) for n in step.heads for h in range(4) for s in range(read.position + 1)):
            if layer > 0:  # no features before the first layer's heads
                follow(head_read(run, layer, head, source, read.position, read.vector))

    follow(find_target(run, 7, None).read)
    edges = circuit.edges[(circuit.edges["target"] == "logit/7") & circuit.edges["source"].str.contains("/F")]
    assert len(edges) > 5
    for edge in edges.itertuples():
        assert found[edge.source] == pytest.approx(edge.weight, abs=1e-4)


def test_it_is_evaluated_and_steered(demo: tuple[Any, Any], austin: Circuit) -> None:
    model = demo[0]
    pairs = PromptPairs(
        clean=[TEXT, TEXT.replace("Dallas", "Kelford")], corrupt=[TEXT.replace("Dallas", "Kelford"), TEXT],
        answer=[" Austin", " Providence"], wrong_answer=[" Providence", " Austin"],
    )  # fmt: skip
    curve = evaluate(model, pairs, austin, sizes=[len(austin)])
    assert np.isfinite(curve.to_dataframe()["faithfulness"]).all()
    steered = steer(model, TEXT, austin, scale=0.0)
    assert float(steered.kl[0]) > 0.01


def test_it_is_saved_exported_and_drawn_like_any_circuit(austin: Circuit, tmp_path: Path) -> None:
    austin.save(tmp_path / "circuit")
    assert Circuit.load(tmp_path / "circuit").edges.equals(austin.edges)
    austin.to_neuronpedia(tmp_path / "graph.json")
    assert Circuit.from_neuronpedia(tmp_path / "graph.json").nodes.equals(austin.nodes)
    austin.to_html(tmp_path / "page.html")
    assert "L1/H3@8\\u21929" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert austin.plot().data
    summed = austin.sum_positions()
    assert summed.nodes["flow"].sum() == pytest.approx(austin.nodes["flow"].sum(), rel=1e-6)
    assert not summed.nodes.loc[summed.nodes["kind"] == "head", "node"].str.contains("@").any()


def test_a_circuit_of_one_prompt_says_so(austin: Circuit) -> None:
    assert "target 'Austin'" in repr(austin)
    assert len(austin) == (austin.nodes["kind"] == "feature").sum()
    assert np.isfinite(austin.graph_replacement)


def test_it_knows_its_model_and_prompt_and_has_heads_as_nodes(demo: tuple[Any, Any], austin: Circuit) -> None:
    assert austin.traced is not None and austin.traced.model() is demo[0]
    assert austin.traced.pairs.clean[0].tolist() == austin.settings["token_ids"]
    assert austin.traced.pairs.hash == austin.settings["pairs_hash"]
    features = austin.nodes.loc[austin.nodes["kind"] == "feature", "node"]
    described = austin.describe([TEXT, TEXT.replace("Dallas", "Kelford")] * 2)
    assert described.details and set(described.details) <= set(features)
    for ask in (austin.heads, austin.with_heads, lambda: austin.cut_heads(austin.edges)):
        with pytest.raises(SettingsError, match="heads are nodes"):
            ask()


def test_it_says_where_a_feature_is_silent_or_nothing_was_chosen(demo: tuple[Any, Any]) -> None:
    model, transcoders = demo
    prompt = "The capital of the state containing Dallas is"
    silent = trace_feature(model, transcoders, prompt, "L3/F7@-1")
    assert silent.target_value < 0 and "a feature does not fire there" in silent.notes[0]
    bare = trace_feature(model, transcoders, prompt, "L0/F386@8", num_branches=1)
    assert len(bare) == 0 and any("no feature or head was chosen" in note for note in bare.notes)
    opposed = trace_feature(model, transcoders, prompt, "L0/F386@1", num_branches=1)
    assert opposed.unexplained < -0.5 and "large parts of both signs cancel" in opposed.notes[-1]
    fires = trace_feature(model, transcoders, prompt, "L3/F77@-1")
    assert fires.target_value > 0 and not any("chosen:" in note or "fire" in note for note in fires.notes)


def test_saes_and_numbers_out_of_range_are_refused(demo: tuple[Any, Any]) -> None:
    with pytest.raises(DictionaryError, match="weights do not connect"):
        trace_feature(demo[0], load_demo_dictionaries("sae"), TEXT, " Austin")
    with pytest.raises(SettingsError, match="at least 1"):
        trace_feature(*demo, TEXT, " Austin", num_branches=0)
