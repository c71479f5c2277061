"""Graph scores and pruning are circuit-tracer's: numbers of its own code on the same models.

Made by circuit-tracer 0.5.0 (`attribute`, `compute_graph_scores`, `prune_graph`) with TransformerLens 3.9.0 in float64,
on the tiny GPT-2 of `tests.families` (seed 0) with the transcoders of `site_dictionaries` at `ln2.hook_normalized`, five
random tokens, five logits, every active feature. BOS zeroed is its default; the other rows have `zero_positions` empty.
"""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.bases.site_dictionaries import dictionaries
from tests.circuits.checks import assert_sums_hold, small_circuit
from tests.families import all_models, random_tokens
from tl_neuron_circuits import Circuit, trace
from tl_neuron_circuits.circuits._table import influence, node_table

CASES = [case for case in all_models("gpt2") if case.values[0].backend == "HookedTransformer"]
pytestmark = pytest.mark.skipif(not CASES, reason="the numbers are of a HookedTransformer")

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
_ALL_ACTIVE = 38


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
    assert influence(nodes, edges).tolist() == [1.0, 1.0, 0.0]


def test_scores_of_a_circuit_without_influence_are_nan() -> None:
    circuit = small_circuit(CASES[0].values[0], 5)
    dead = Circuit(circuit.nodes.assign(probability=0.0), circuit.edges, circuit.settings)
    assert np.isnan(dead.graph_scores()).all()
