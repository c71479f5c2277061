"""Graph scores and pruning are circuit-tracer's: numbers of its own code on the same models.

Made by circuit-tracer 0.5.0 (`attribute`, `compute_graph_scores`, `prune_graph`) with TransformerLens 3.9.0 in float64,
on the tiny GPT-2 of `tests.families` (seed 0) with the transcoders of `site_dictionaries` at `ln2.hook_normalized`,
five random tokens, five logits, every active feature. BOS zeroed is its default; the other rows have no zeros.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.bases.site_dictionaries import dictionaries
from tests.circuits.checks import assert_sums_hold, small_circuit
from tests.circuits.test_neuronpedia import shown_nodes
from tests.families import MAJOR, all_models, random_tokens
from tl_neuron_circuits import Circuit, trace
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.circuits._flow import Links, influence
from tl_neuron_circuits.circuits._neuronpedia import cumulative_influence
from tl_neuron_circuits.circuits._table import node_table

CASES = [case for case in all_models("gpt2") if case.values[0].backend == "HookedTransformer"]
pytestmark = [
    pytest.mark.skipif(not CASES, reason="the numbers are of a HookedTransformer"),
    pytest.mark.skipif(MAJOR < 3, reason="TransformerLens 2 has another value at ln2.hook_normalized, which they read"),
]

SCORES = {True: (0.5024107085141742, 0.787714947181818), False: (0.5116010230447592, 0.7933898513529537)}
PRUNED: list[tuple[bool, float, float, int, float, str]] = [
    (True, 0.8, 0.98, 38, 26.361828, "F0/4@4 F0/6@4 F1/11@4 E0@1 E0@3 E0@4 E1@4"),
    (True, 0.5, 0.9, 6, 12.224898, "E0@4 E1@4"),
    (True, 0.95, 0.8, 28, 27.684821,
     "F0/5@2 F0/2@3 F0/1@4 F0/4@4 F0/6@4 F1/5@4 F1/6@4 F1/11@4 E0@1 E0@2 E0@3 E0@4 E1@4"),
    (False, 0.8, 0.98, 44, 28.73116, "F0/2@3 F0/4@4 F0/6@4 F1/11@4 E0@1 E0@3 E0@4 E1@4"),
    (False, 0.95, 0.8, 30, 28.981393,
     "F0/1@0 F0/5@2 F0/2@3 F0/1@4 F0/4@4 F0/6@4 F1/5@4 F1/6@4 E0@0 E0@1 E0@2 E0@3 E0@4 E1@4"),
]  # fmt: skip
"""BOS zeroed, both thresholds; kept edges, the sum of their sizes, and kept features (F) and errors (E)."""
OF_REMAINDERS = {(0.8, 0.98): (6, 82), (0.5, 0.9): (2, 28), (0.95, 0.8): (13, 74), (0.99, 0.95): (19, 165)}
"""Kept neurons and edges of `prune_graph` on a circuit of 20 neurons whose remainders it takes for error nodes."""
_ALL_ACTIVE, _ACTIVE = 38, 52
"""Features with an effect, and all that are active, away from BOS."""


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    model = CASES[0].values[0].build()
    return trace(model, random_tokens(model, 1, 5), basis=dictionaries("transcoder"), nodes=_ALL_ACTIVE)


@pytest.mark.parametrize("zeroed", [True, False])
def test_scores_are_circuit_tracers(circuit: Circuit, zeroed: bool) -> None:
    assert circuit.graph_scores(zero_positions=[0] if zeroed else []) == pytest.approx(SCORES[zeroed], abs=2e-9)
    if not zeroed:
        assert (circuit.graph_replacement, circuit.graph_completeness) == circuit.graph_scores()


@pytest.mark.parametrize("case", PRUNED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_pruning_keeps_circuit_tracers_nodes_and_edges(circuit: Circuit, case: Any) -> None:
    zeroed, node, edge, count, size, names = case
    pruned = circuit.prune(node_influence=node, edge_influence=edge, zero_positions=[0] if zeroed else [])
    kinds = pruned.nodes.set_index("node")["kind"]
    rows: Any = pruned.nodes[pruned.nodes["kind"].isin(("feature", "error"))].itertuples()
    kept = {f"F{r.layer}/{r.unit}@{r.position}" if r.kind == "feature" else f"E{r.layer}@{r.position}" for r in rows}
    assert kept == set(names.split())
    edges = pruned.edges[kinds[pruned.edges["source"]].isin(("feature", "error", "embedding")).to_numpy()]
    assert (len(edges), float(edges["weight"].abs().sum())) == (count, pytest.approx(size, rel=1e-6))
    assert_sums_hold(pruned)


@pytest.mark.parametrize("thresholds", OF_REMAINDERS)
def test_remainders_count_as_errors_do(thresholds: tuple[float, float]) -> None:
    circuit = small_circuit(CASES[0].values[0], 20)
    pruned = circuit.prune(node_influence=thresholds[0], edge_influence=thresholds[1])
    kinds = pruned.nodes.set_index("node")["kind"]
    edges = int(kinds[pruned.edges["source"]].isin(("neuron", "embedding")).sum())
    assert (len(pruned), edges) == OF_REMAINDERS[thresholds]


def test_a_node_of_score_zero_still_hands_its_influence_down() -> None:
    """Its incoming attributions are zero, its weights are not: circuit-tracer goes by weights."""
    nodes = node_table(
        [
            {"node": "embed@0", "kind": "embedding", "position": 0},
            {"node": "f", "kind": "feature", "layer": 0, "score": 0.0},
            {"node": "logit", "kind": "logit", "layer": 1, "score": 1.0, "probability": 1.0},
        ]
    )
    edges = pd.DataFrame(
        [("embed@0", "f", 2.0, 0.0), ("f", "logit", 1.0, 1.0)], columns=["source", "target", "weight", "attribution"]
    )
    assert influence(nodes, Links.read(nodes, edges)).tolist() == [1.0, 1.0, 0.0]


def test_every_active_feature_may_be_chosen(circuit: Circuit) -> None:
    """circuit-tracer's graphs hold those of no effect too: 14 before the last position that no later layer reads."""
    model = CASES[0].values[0].build()
    tokens, basis = random_tokens(model, 1, 5), dictionaries("transcoder")
    active = [trace(model, tokens, basis=basis, nodes=n) for n in (_ALL_ACTIVE + 4, _ACTIVE)]
    for whole in active:
        silent = whole.nodes[whole.nodes["node"].isin(whole.members - circuit.members)]
        assert len(silent) == len(whole) - _ALL_ACTIVE and circuit.members < whole.members
        assert (silent["score"].abs() < 1e-12).all() and (silent["change"].abs() > 0).all()
        assert whole.graph_scores(zero_positions=[0]) == pytest.approx(SCORES[True], abs=2e-9)
        assert_sums_hold(whole)
        assert (
            whole.prune(node_influence=0.8, edge_influence=0.98).members
            == circuit.prune(node_influence=0.8, edge_influence=0.98).members
        )
    strongest, silent = active[0].nodes, active[1].nodes[~active[1].nodes["node"].isin(active[0].members)]
    first = strongest[strongest["node"].isin(active[0].members - circuit.members)]
    assert first["change"].abs().min() >= silent.loc[silent["kind"] == "feature", "change"].abs().max()
    with pytest.raises(SettingsError, match=f"between 1 and {_ACTIVE}"):
        trace(model, tokens, basis=basis, nodes=_ACTIVE + 1)


def test_scores_of_a_circuit_without_influence_are_nan() -> None:
    circuit = small_circuit(CASES[0].values[0], 5)
    dead = Circuit(circuit.nodes.assign(probability=0.0), circuit.edges, circuit.settings)
    assert np.isnan(dead.graph_scores()).all()


def test_its_files_are_read_though_errors_and_features_share_ids(tmp_path: Path) -> None:
    """A file that circuit-tracer 0.5.0 wrote: two shared ids, one link of which nothing says whose it is."""
    stored = json.loads((Path(__file__).parent / "circuit_tracer_graph.json").read_text(encoding="utf-8"))
    graph, path = stored["graph"], tmp_path / "graph.json"
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(ids) - len(set(ids)) == 2
    path.write_text(json.dumps(graph), encoding="utf-8")
    with pytest.warns(UserWarning, match="1 of 104 links"):
        circuit = Circuit.from_neuronpedia(path)
    assert len(circuit.nodes) == len(ids) and circuit.nodes["node"].is_unique
    kinds = circuit.nodes.set_index("node")["kind"]
    of_errors = circuit.edges[(kinds[circuit.edges["source"]] == "error").to_numpy()]
    found = set(zip(of_errors["source"], of_errors["target"], strict=True))
    expected = {(source, target) for source, target in stored["links_of_errors"]}
    assert len(found ^ expected) <= 1  # the link that is halved
    assert circuit.edges["weight"].sum() == pytest.approx(sum(link["weight"] for link in graph["links"]))
    shown = shown_nodes({**graph, "nodes": [n for n in graph["nodes"] if ids.count(n["node_id"]) == 1]})
    single = {name for name in ids if ids.count(name) == 1}
    assert len(single - shown) == 1  # its writer hides the node that crosses the threshold


def written_by_circuit_tracer(seed: int, n_layers: int = 3, n_positions: int = 4) -> tuple[dict[str, Any], Any]:
    """A random graph in its writer's form and order, features of layer 0 sharing ids with errors; the true links.

    Features first, by layer, position and number, then errors, tokens and logits; links by target, then source.
    """
    draw = np.random.default_rng(seed)
    rows: list[tuple[str, str, int, int, str]] = []  # id, type, layer, position, name here
    for layer in range(n_layers):
        for position in range(n_positions):
            numbers = [*draw.choice(n_layers, 2, replace=False), int(draw.integers(5, 90))]
            rows += [
                (f"{layer}_{n}_{position}", "cross layer transcoder", layer, position, "") for n in sorted(numbers)
            ]
    rows += [
        (f"0_{layer}_{position}", "mlp reconstruction error", layer, position, f"err_{layer}_{position}")
        for layer in range(n_layers) for position in range(n_positions)
    ]  # fmt: skip
    rows += [(f"E_{9 + p}_{p}", "embedding", -1, p, "") for p in range(n_positions)]
    rows.append((f"{n_layers + 1}_7_{n_positions - 1}", "logit", n_layers, n_positions - 1, ""))
    nodes = [
        {"node_id": name, "feature": 0, "layer": "E" if layer < 0 else str(layer), "ctx_idx": position, "jsNodeId": "",
         "feature_type": kind, "clerp": "", "influence": 0.5, "token_prob": 0.5 if kind == "logit" else 0.0}
        for name, kind, layer, position, _ in rows
    ]  # fmt: skip
    links, truth = [], {}
    for name, kind, layer, position, _ in rows:
        for source, what, below, before, own in rows:
            reads = kind == "logit" or (kind.startswith("cross") and below < layer)
            if reads and what != "logit" and before <= position and draw.random() < 0.5:
                weight = float(draw.normal())
                links.append({"source": source, "target": name, "weight": weight})
                truth[own or source, name] = weight
    metadata = {"slug": "s", "scan": "m", "prompt_tokens": list("abcdefgh"[:n_positions]), "prompt": "abcd"}
    return {"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}, truth


def _write(order: str, path: Path) -> dict[tuple[str, str], float]:
    """A graph with an error and a feature of one id at each of two positions; what its links really are."""
    rows = [
        ("0_1_0", "F"),
        ("0_1_1", "F"),
        ("0_4_1", "F"),
        ("1_7_1", "F"),
        ("0_0_0", "E"),
        ("0_1_0", "E"),
        ("0_1_1", "E"),
    ]
    nodes = [
        {"node_id": name, "feature": 0, "layer": name.split("_")[1 if kind == "E" else 0],
         "ctx_idx": int(name.split("_")[2]), "feature_type": "cross layer transcoder" if kind == "F" else
         "mlp reconstruction error", "jsNodeId": "", "clerp": "", "influence": 0.5, "activation": 1.0}
        for name, kind in rows
    ]  # fmt: skip
    nodes.append({"node_id": "3_9_1", "feature": 9, "layer": "3", "ctx_idx": 1, "feature_type": "logit", "jsNodeId": "",
                  "clerp": 'Output "x" (p=0.5)', "token_prob": 0.5})  # fmt: skip
    true = [(0, 3), (1, 3), (4, 3), (0, 7), (5, 7), (1, 7), (2, 7), (4, 7), (6, 7)]
    true = sorted(true, key=lambda link: (link[1], link[0])) if order == "writer" else true[::-1]
    name = [*(r[0] for r in rows), "3_9_1"]
    links = [{"source": name[s], "target": name[t], "weight": 1.0 + s} for s, t in true]
    metadata = {"slug": "s", "scan": "m", "prompt_tokens": ["a", "b"], "prompt": "ab"}
    path.write_text(json.dumps({"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}))
    unique = [f"err_{n.split('_')[1]}_{n.split('_')[2]}" if kind == "E" else n for n, kind in [*rows, ("3_9_1", "L")]]
    return {(unique[s], unique[t]): 1.0 + s for s, t in true}


def test_the_writers_order_tells_links_apart_and_another_order_halves_them(tmp_path: Path) -> None:
    truth = _write("writer", tmp_path / "graph.json")
    circuit = Circuit.from_neuronpedia(tmp_path / "graph.json")  # warnings are errors
    found = {(s, t): w for s, t, w in circuit.edges[["source", "target", "weight"]].itertuples(index=False)}
    assert found == truth
    _write("another", tmp_path / "graph.json")
    with pytest.warns(UserWarning, match="4 of 9 links"):
        halved = Circuit.from_neuronpedia(tmp_path / "graph.json")
    assert len(halved.edges) == 9  # both links of an id have both nodes, and are added up
    assert halved.edges["weight"].sum() == sum(truth.values())


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "1e999"])
def test_weights_that_are_no_numbers_are_refused(weight: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    _write("writer", path)
    path.write_text(path.read_text().replace('"weight": 3.0', f'"weight": {weight}', 1))
    with pytest.raises(FileFormatError, match="has no NaN|has no Infinity|damaged"):
        Circuit.from_neuronpedia(path)


def test_a_pruned_graph_shows_whole_with_the_influence_of_before(circuit: Circuit, tmp_path: Path) -> None:
    pruned = circuit.prune(node_influence=0.8, edge_influence=0.98).prune(edges=30)
    pruned.to_neuronpedia(tmp_path / "graph.json")
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert len(shown_nodes(graph)) == len(pruned.nodes) == len({node["jsNodeId"] for node in graph["nodes"]})
    whole = dict(zip(circuit.nodes["node"], cumulative_influence(circuit.nodes["influence"]), strict=True))
    for node, name in zip(graph["nodes"], pruned.nodes["node"], strict=True):
        if name in whole:
            assert node["influence"] == whole[name]
    assert graph["metadata"]["node_threshold"] == pytest.approx(max(n["influence"] for n in graph["nodes"]), abs=0.01)
    rows = {node["feature_type"]: {n["layer"] for n in graph["nodes"] if n["feature_type"] == node["feature_type"]}
            for node in graph["nodes"]}  # fmt: skip
    assert rows["bias"] == rows["embedding"] == {"E"} and rows["mlp reconstruction error"] <= {"0", "1", "E"}
