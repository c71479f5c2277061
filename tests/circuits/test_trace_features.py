"""Circuits of features explain the whole target through the local replacement model, and everything works on them."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.bases.site_dictionaries import dictionaries, dictionary, identity, pairs
from tests.circuits.checks import assert_sums_hold
from tests.circuits.replacement_by_hand import FrozenReplacement
from tests.circuits.test_neuronpedia import assert_is_a_graph
from tests.families import D_MODEL, ModelCase, all_models, random_tokens, typical_models
from tests.loops import for_each
from tl_neuron_circuits import (
    Circuit,
    NeuronCircuitsError,
    bases,
    evaluate,
    load_demo_dictionaries,
    load_demo_model,
    relp,
    trace,
)
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.bases._runs import run_values, take_apart
from tl_neuron_circuits.circuits._prompt_graph import run_prompt
from tl_neuron_circuits.circuits._slots import find_slots
from tl_neuron_circuits.evaluation import evaluate_edges
from tl_neuron_circuits.tasks import TokenizedPairs

FAMILIES = ("gpt2", "pythia", "llama", "gemma2")
both = typical_models("gpt2", "llama")
hooked = [case for case in both if case.values[0].backend == "HookedTransformer"]
one = all_models("gpt2")[:1]
PROMPT = "The capital of the state containing Dallas is"


def assert_explains_everything(circuit: Circuit, tolerance: float = 1e-9) -> None:
    """Edges into every node add up, and the ends of all paths share the whole target."""
    assert_sums_hold(circuit, tolerance)
    ends = circuit.nodes[circuit.nodes["kind"].isin(("embedding", "bias", "error"))]
    assert ends["score"].sum() == pytest.approx(circuit.target_value, rel=max(tolerance, 1e-6))


@for_each("case", typical_models(*FAMILIES))
@for_each("place", ["skip_transcoder", "sae_mlp_out"])
def test_nothing_is_lost(case: ModelCase, place: str) -> None:
    model = case.build()
    circuit = trace(model, random_tokens(model, 1, 5), basis=dictionaries(place), nodes=10)
    assert_explains_everything(circuit, max(case.tolerance, 1e-9))
    assert len(circuit) == 10
    assert {"feature", "error", "unselected"} <= set(circuit.nodes["kind"])


@for_each("case", all_models("gpt2"))
@for_each("place", ["sae_residual", "sae_attention", "sae_hidden"])
def test_dictionaries_at_other_hook_points_lose_nothing(case: ModelCase, place: str) -> None:
    """Kinds topk, gated and jumprelu; MLPs between them are paths under the rules."""
    model = case.build()
    assert_explains_everything(trace(model, random_tokens(model, 1, 5), basis=dictionaries(place), nodes=8), 1e-9)


@pytest.mark.parametrize("case", one)
@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_normalized_dictionaries_lose_nothing(case: ModelCase, how: str) -> None:
    model = case.build()
    basis = dictionaries("sae_mlp_out", normalize_activations=how, apply_b_dec_to_input=True)
    assert_explains_everything(trace(model, random_tokens(model, 1, 5), basis=basis, nodes=8))


@pytest.mark.parametrize("case", one)
def test_float32_sums_hold_to_four_digits(case: ModelCase) -> None:
    model = case.build(torch.float32)
    basis = dictionaries("skip_transcoder", dtype=torch.float32)
    circuit = trace(model, random_tokens(model, 1, 5), basis=basis, nodes=8)
    assert_explains_everything(circuit, 1e-4)
    assert circuit.settings["largest_residual"] < 1e-4


@pytest.mark.parametrize("case", both)
def test_the_forward_pass_is_the_models_own(case: ModelCase) -> None:
    model = case.build()
    tokens = pairs(model, 1)
    plain = model(tokens.clean[0][None])
    (batch,) = tokens.batches(1)
    with relp(model):
        run = run_prompt(model, batch, find_slots(model, dictionaries("skip_transcoder")))
    assert torch.equal(run.logits, plain)


@pytest.mark.parametrize("case", hooked)
@pytest.mark.parametrize("place", ["skip_transcoder"])
def test_scores_and_edges_equal_finite_differences_of_the_replacement_model(case: ModelCase, place: str) -> None:
    model = case.build()
    tokens, basis = random_tokens(model, 1, 5), dictionaries(place)
    circuit = trace(model, tokens, (3, 4), basis=basis, nodes=10)
    slow = FrozenReplacement(model, tokens, basis)
    explained = lambda logits, _: logits[0, -1, 3] - logits[0, -1, 4]  # noqa: E731
    clean = slow(explained)
    assert clean == pytest.approx(circuit.target_value)
    nodes = circuit.nodes.set_index("node")
    rows: Any = nodes.reset_index().itertuples()
    for row in rows:
        change: dict[str, Any] = {}
        if row.kind == "feature":
            change["feature"] = ((row.layer, row.position, row.unit), row.activation)
        elif row.kind == "error":
            change["error"] = torch.zeros(2, 5, D_MODEL).double()
            change["error"][row.layer, row.position] = slow.errors[row.layer][0, row.position]
        elif row.kind == "embedding":
            change["embedding"] = torch.zeros(5, D_MODEL).double()
            change["embedding"][row.position] = slow._clean["hook_embed"][0, row.position]
        else:
            continue
        assert slow(explained, **change) - clean == pytest.approx(row.score, abs=1e-9), row.node
        for edge in circuit.edges[circuit.edges["source"] == row.node].itertuples():
            target: Any = nodes.loc[edge.target]
            at = (target["layer"], target["position"], target["unit"])
            read = explained if target["kind"] == "logit" else lambda _, seen, at=at: seen[at[0]][0, at[1], at[2]]
            direct = slow(read, **change, direct=True) - slow(read, direct=True)
            assert direct == pytest.approx(edge.weight, abs=1e-9), (edge.source, edge.target)


@pytest.fixture(scope="module")
def whole() -> tuple[Any, bases.Dictionaries, Circuit]:
    """A circuit of every feature that matters."""
    model, basis = one[0].values[0].build(), dictionaries("transcoder")
    tokens = random_tokens(model, 1, 5)
    (batch,) = TokenizedPairs.from_tokens(tokens, torch.tensor([0])).batches(1)
    sites = basis.sites(model)
    fires = [take_apart([s], run_values(model, batch, s.reads))[s.hook].nodes[0] != 0 for s in sites]
    reaching = int(fires[0].sum()) + int(fires[1][-1].sum())  # of the last layer only those at the last position
    return model, basis, trace(model, tokens, basis=basis, nodes=reaching)


def test_with_every_feature_nothing_is_left_but_errors(whole: tuple) -> None:
    circuit = whole[2]
    assert_explains_everything(circuit)
    left = circuit.nodes.query("kind == 'unselected'")["flow"].abs().sum()
    assert left < 1e-9
    np.testing.assert_allclose(circuit.nodes["flow"].to_numpy(), circuit.nodes["score"].to_numpy(), atol=1e-8)


def test_the_two_scores_are_circuit_tracers(whole: tuple) -> None:
    """From a dense matrix without biases, as circuit-tracer has it: features, errors, tokens, logits."""
    circuit = whole[2]
    nodes = circuit.nodes[circuit.nodes["kind"].isin(("feature", "error", "embedding", "logit"))].reset_index(drop=True)
    place = {name: index for index, name in enumerate(nodes["node"])}
    matrix = np.zeros((len(nodes), len(nodes)))
    for edge in circuit.edges.itertuples():
        if edge.source in place:
            matrix[place[edge.target], place[edge.source]] = abs(edge.weight)
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1e-300)
    weights = np.where(nodes["kind"] == "logit", nodes["probability"], 0.0)
    influence, power = np.zeros(len(nodes)), weights @ matrix
    for _ in range(8):
        influence, power = influence + power, power @ matrix
    errors, tokens = ((nodes["kind"] == kind).to_numpy() for kind in ("error", "embedding"))
    expected = influence[tokens].sum() / (influence[tokens].sum() + influence[errors].sum())
    assert 0 < circuit.graph_replacement == pytest.approx(expected, abs=1e-9)
    reach = influence + weights
    expected = ((1 - matrix[:, errors].sum(1)) * reach).sum() / reach.sum()
    assert 0 < circuit.graph_completeness == pytest.approx(expected, abs=1e-9)
    pruned = circuit.prune(count=5)
    assert pruned.graph_replacement < circuit.graph_replacement


@pytest.mark.parametrize("case", both)
def test_pairs_add_up_and_show_what_thresholds_do(case: ModelCase) -> None:
    model = case.build()
    circuit = trace(model, pairs(model, 3), basis=dictionaries("transcoder"), nodes=10)
    assert_sums_hold(circuit, max(case.tolerance, 1e-9))
    assert circuit.settings["baseline"] == "corrupt" and "linearization_error" in set(circuit.nodes["kind"])


@pytest.mark.parametrize("case", both)
def test_neurons_and_features_share_the_layers(case: ModelCase) -> None:
    model = case.build()
    tokens, late = random_tokens(model, 1, 5), dictionaries("transcoder", [1])
    mixed = trace(model, tokens, basis=[bases.Neurons(layers=[0]), late], nodes=20)
    assert_explains_everything(mixed, max(case.tolerance, 1e-9))
    kinds = mixed.nodes.groupby("kind")["layer"].unique()
    assert kinds["neuron"].tolist() == [0] and kinds["feature"].tolist() == [1] == kinds["error"].tolist()
    assert_explains_everything(trace(model, tokens, basis=late, nodes=4), max(case.tolerance, 1e-9))


@pytest.fixture(scope="module")
def circuit(whole: tuple) -> Circuit:
    return trace(whole[0], random_tokens(whole[0], 1, 5), basis=whole[1], nodes=12)


@pytest.mark.parametrize(
    "rule", [{"count": 5}, {"share": 0.05}, {"edges": 20}, {"node_influence": 0.9, "edge_influence": 0.9}]
)
def test_pruning_keeps_totals_and_drops_errors_without_edges(circuit: Circuit, rule: dict) -> None:
    pruned = circuit.prune(**rule)
    assert_sums_hold(pruned)
    assert 0 < len(pruned) < len(circuit)
    errors = set(pruned.nodes.query("kind == 'error'")["node"])
    assert errors <= set(pruned.edges["source"])
    if "share" in rule:
        assert pruned.nodes.query("kind == 'error'")["share"].abs().min() >= 0.05


def test_groups_sums_and_sets_keep_totals(circuit: Circuit, whole: tuple) -> None:
    features = circuit.nodes.query("kind == 'feature'")["node"].tolist()
    other = trace(whole[0], random_tokens(whole[0], 1, 5, seed=1), basis=whole[1], nodes=12)
    for changed in (
        circuit.group({"some": features[:4]}).collapse(), circuit.sum_positions(), circuit | other, circuit & other,
        circuit - other, Circuit.merge([circuit, other]),
    ):  # fmt: skip
        assert_sums_hold(changed)
        assert "error" in set(changed.nodes["kind"])
    with pytest.raises(SettingsError, match="one basis"):
        Circuit.merge([circuit, trace(whole[0], random_tokens(whole[0], 1, 5), nodes=5)])


def test_what_is_saved_is_loaded_and_needs_its_dictionaries(whole: tuple, tmp_path: Path) -> None:
    model, basis, _ = whole
    given = pairs(model, 4)
    circuit = trace(model, given, basis=basis, nodes=15)
    here = evaluate(model, given, circuit)
    circuit.save(tmp_path / "circuit")
    back = Circuit.load(tmp_path / "circuit", basis=basis)
    pd.testing.assert_frame_equal(back.nodes, circuit.nodes)
    assert torch.equal(evaluate(model, given, back).kept, here.kept)
    assert here.sizes == (15,)
    with pytest.raises(SettingsError, match="basis="):
        evaluate(model, given, Circuit.load(tmp_path / "circuit"))
    kept = evaluate(model, given, circuit, error_nodes="keep")
    assert not torch.equal(kept.kept, here.kept)
    by_edges = evaluate_edges(model, given, circuit, sizes=[0, 5, 30])
    assert by_edges.faithfulness[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(SettingsError, match="between neurons"):
        evaluate_edges(model, given, circuit, protocol="edges")


def test_evaluate_keeps_exactly_the_circuits_features(whole: tuple) -> None:
    """Kept features stay live and all else takes its baseline, errors too unless they are kept; the skip stays."""
    model = whole[0]
    basis, given = dictionaries("skip_transcoder"), pairs(model, 3)
    circuit = trace(model, given, basis=basis, nodes=6)
    scores = circuit.to_scores()
    chosen = {hook: ~values.isnan() for hook, values in scores.values.items()}
    assert sum(int(mask.sum()) for mask in chosen.values()) == 6
    seen: dict[str, torch.Tensor] = {}

    def replace(d: Any, errors: bool) -> Callable[..., torch.Tensor]:
        def hook(value: torch.Tensor, hook: Any) -> torch.Tensor:
            x = seen[d.hook_in]
            kept = torch.where(chosen[d.hook_out], d.encode(x), 0.0)
            out = kept @ d.W_dec + d.b_dec + d.skip(x)
            return out + value - d(x) if errors else out

        return hook

    for error in ("rank", "keep"):
        found = evaluate(model, given, circuit, ablation="zero", error_nodes=error)
        reads = [(d.hook_in, lambda v, hook: seen.update({hook.name: v})) for d in basis.dictionaries]
        writes = [(d.hook_out, replace(d, error == "keep")) for d in basis.dictionaries]
        with torch.no_grad():
            logits = model.run_with_hooks(torch.stack(list(given.clean)), fwd_hooks=[*reads, *writes])[:, -1]
        rows = torch.arange(3)
        expected = logits[rows, given.answer] - logits[rows, given.wrong_answer]
        torch.testing.assert_close(found.kept[0], expected.float())


def test_the_exported_graph_has_features_and_errors_by_layer(circuit: Circuit, tmp_path: Path) -> None:
    circuit.to_neuronpedia(tmp_path / "graph.json")
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert_is_a_graph(graph)
    ids = {node["node_id"]: node for node in graph["nodes"]}
    for row in circuit.nodes.query("kind in ('feature', 'error')").itertuples():
        name = f"{row.layer}_{row.unit}_{row.position}" if row.kind == "feature" else f"err_{row.layer}_{row.position}"
        assert ids[name]["layer"] == str(row.layer)
    assert len(graph["metadata"]["transcoder_list"]) == 2
    back = Circuit.from_neuronpedia(tmp_path / "graph.json", basis=circuit.basis)
    pd.testing.assert_frame_equal(back.nodes, circuit.nodes)
    pd.testing.assert_frame_equal(back.edges, circuit.edges)
    assert back.to_scores().values.keys() == circuit.to_scores().values.keys()


def test_it_can_be_looked_at(circuit: Circuit, tmp_path: Path) -> None:
    circuit.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert circuit.nodes.query("kind == 'feature'")["node"].iloc[0] in page and "error of layer 1" in page
    assert circuit.plot().data


@pytest.mark.parametrize("case", both)
def test_the_model_is_left_as_found(case: ModelCase, untouched: Callable[[Any], AbstractContextManager[None]]) -> None:
    model = case.build()
    tokens, basis = random_tokens(model, 1, 5), dictionaries("skip_transcoder")
    model(tokens)
    with untouched(model):
        trace(model, tokens, basis=basis, nodes=5)
    with untouched(model), pytest.raises(NeuronCircuitsError):
        trace(model, tokens, basis=basis, nodes=10**6)


def test_bases_that_cannot_be_nodes_are_refused(whole: tuple) -> None:
    model, basis, _ = whole
    own = bases.Dictionaries([identity(D_MODEL, "blocks.0.hook_mlp_out")])
    for wrong, message in (
        ([bases.Neurons(), basis], "one kind of node per layer"),
        (bases.MLPOutputs(), "neurons or features"),
        (own, "encoder of its own"),
    ):
        with pytest.raises(SettingsError, match=message):
            trace(model, random_tokens(model, 1, 5), basis=wrong, nodes=3)


def test_the_bridges_input_of_a_norm_is_no_place_to_write() -> None:
    cases = [case.values[0] for case in all_models("gpt2") if case.values[0].backend == "TransformerBridge"]
    if not cases:
        pytest.skip("no TransformerBridge here")
    model = cases[0].build()
    kept = dictionary("sae_residual", hook_in="blocks.0.hook_resid_mid", hook_out="blocks.0.hook_resid_mid")
    with pytest.raises(SettingsError, match="goes past it"):
        trace(model, random_tokens(model, 1, 5), basis=bases.Dictionaries([kept]), nodes=3)


@pytest.mark.parametrize("kind", ["transcoder", "sae"])
def test_the_demo_dictionaries_explain_the_demo_model(kind: str) -> None:
    if kind == "transcoder" and version("transformer-lens").startswith("2."):
        pytest.skip("the demo transcoders need TransformerLens 3 or later")
    basis = bases.Dictionaries(load_demo_dictionaries(kind))
    circuit = trace(load_demo_model(), PROMPT, " Austin", basis=basis)
    assert_explains_everything(circuit, 1e-4)
    assert circuit.graph_replacement > 0.7 and circuit.graph_completeness > 0.8
    tokens = circuit.nodes.query("kind == 'embedding'").nlargest(3, "score")["token"]
    assert "##las" in set(tokens) and "capital" in set(tokens)
