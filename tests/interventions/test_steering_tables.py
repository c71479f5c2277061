"""Tables and figures of a steered circuit say what became of its target."""

from typing import Any

import pytest

from tl_neuron_circuits import Circuit, load_demo_model, steer, trace
from tl_neuron_circuits.interventions import sweep

PROMPT = "The capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_demo_model()


@pytest.fixture(scope="module")
def circuit(model: Any) -> Circuit:
    return trace(model, PROMPT, " Austin", nodes=12)


def test_tables_show_the_target_and_changes_that_mean_something(model: Any, circuit: Circuit) -> None:
    """Ablating a circuit can raise the target's logit while its probability falls."""
    target = int(circuit.nodes.query("kind == 'logit'")["unit"].item())
    result = steer(model, PROMPT, circuit, scale=0, top_k=1)
    row = result.to_dataframe().set_index("token_id").loc[target]
    before, after = (logits[0].double() for logits in (result.before, result.after))
    expected = after.log_softmax(-1)[target] - before.log_softmax(-1)[target]
    assert row["log_probability_change"] == pytest.approx(float(expected), rel=1e-5) and expected < 0
    centered = (after - after.mean() - before + before.mean())[target]
    assert row["logit_change"] == pytest.approx(float(centered), abs=1e-4)
    figure = sweep(model, PROMPT, circuit, scales=(-1, 0, 1), top_k=4).plot()
    assert len(figure.data) == 6 and "(target)" in figure.data[0].name
    assert len({(line.line.dash, line.marker.symbol) for line in figure.data}) == 6
    other = sweep(model, PROMPT, sorted(circuit.members), scales=(0, 1), top_k=4).plot()
    assert "target" not in other.data[0].name and "Austin" in other.data[0].name
