"""Models, circuits and the identities that every circuit keeps."""

from typing import Any

import numpy as np
import pytest

from tests.families import ModelCase, random_tokens
from tl_neuron_circuits import Circuit, trace

ENDS = ("embedding", "bias", "unselected", "linearization_error", "error")


def small_circuit(case: ModelCase, n: int = 12, seed: int = 0, **options: Any) -> Circuit:
    """A circuit of a tiny random model on six tokens."""
    model = case.build()
    return trace(model, random_tokens(model, 1, 6, seed=seed), **({"nodes": n} | options))


def assert_sums_hold(circuit: Circuit, tolerance: float = 1e-9) -> None:
    """Edges into a node sum to its change, score and 1; what flows out of the logits ends somewhere."""
    into = circuit.edges.groupby("target")[["weight", "attribution", "relative"]].sum()
    nodes = circuit.nodes.set_index("node").loc[into.index]
    scale = float(circuit.nodes["score"].abs().max())
    np.testing.assert_allclose(into["weight"], nodes["change"], atol=tolerance * scale, rtol=tolerance)
    np.testing.assert_allclose(into["attribution"], nodes["score"], atol=tolerance * scale, rtol=tolerance)
    np.testing.assert_allclose(into["relative"], 1, rtol=1e-4 if tolerance > 1e-6 else 1e-6)
    assert set(into.index) == set(circuit.nodes.loc[~circuit.nodes["kind"].isin(ENDS), "node"])
    ends = circuit.nodes.loc[circuit.nodes["kind"].isin(ENDS), "flow"].sum()
    logits = circuit.nodes.loc[circuit.nodes["kind"] == "logit", "score"].sum()
    assert logits == pytest.approx(circuit.target_value, rel=1e-9)
    assert ends == pytest.approx(logits, rel=max(tolerance, 1e-6))
    assert set(circuit.edges["source"]) <= set(circuit.nodes["node"])
    assert circuit.nodes["node"].is_unique
    assert not circuit.edges.duplicated(["source", "target"]).any()
