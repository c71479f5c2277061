"""Curves over edges end where curves over nodes end."""

import itertools
from typing import Any

import pytest
import torch

from tests.stories_tasks import pronoun_pairs
from tl_neuron_circuits import Circuit, evaluate, trace
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.evaluation import evaluate_edges
from tl_neuron_circuits.evaluation._edge_curve import ranked_edges, surviving

TEMPLATE = "{name} was sad."


@pytest.fixture(scope="module")
def circuit(stories260K: Any) -> Circuit:
    return trace(stories260K, pronoun_pairs(TEMPLATE, "attribution", 2), nodes=40)


def test_both_protocols_end_at_the_whole_circuit(stories260K: Any, circuit: Circuit) -> None:
    pairs = pronoun_pairs(TEMPLATE, "evaluation", 2)
    count = len(ranked_edges(circuit))
    nodes = evaluate(stories260K, pairs, circuit)
    by_nodes = evaluate_edges(stories260K, pairs, circuit, sizes=[0, count])
    by_edges = evaluate_edges(stories260K, pairs, circuit, sizes=[0, count], protocol="edges")
    assert surviving(circuit, ranked_edges(circuit)) == circuit.members
    torch.testing.assert_close(by_nodes.kept[1], nodes.kept[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_edges.kept[1], nodes.kept[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_nodes.removed[1], nodes.removed[0], atol=1e-4, rtol=1e-4)
    for curve in (by_nodes, by_edges):
        assert curve.n_edges == count
        torch.testing.assert_close(curve.kept[0], curve.empty, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(curve.removed[0], curve.full, atol=1e-4, rtol=1e-4)


def test_more_edges_leave_more_nodes(circuit: Circuit) -> None:
    edges = ranked_edges(circuit)
    sets = [surviving(circuit, edges.head(size)) for size in (0, 50, 200, len(edges))]
    assert all(few <= many for few, many in itertools.pairwise(sets))
    assert not sets[0] and 0 < len(sets[1]) < len(sets[2])
    assert (edges["attribution"].abs().diff().dropna() <= 0).all()


def test_circuits_without_positions_are_refused(stories260K: Any, circuit: Circuit) -> None:
    pairs = pronoun_pairs(TEMPLATE, "evaluation", 2)
    with pytest.raises(SettingsError, match="positions"):
        evaluate_edges(stories260K, pairs, circuit.sum_positions())
    with pytest.raises(SettingsError, match="sizes between"):
        evaluate_edges(stories260K, pairs, circuit, sizes=[10**6])
