"""The seed paper's numbers, in the conventions of its text and of its released code.

The stored numbers come from `python -m tests.nodes.seed_paper ../shared/models/stories260K`: the paper's formulas in
plain torch, which know nothing of this package. Each test names a convention, and fails where the other one is taken.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nodes.seed_paper import PROMPT, TOP, measured
from tl_neuron_circuits import RelP, attribute, check_model, trace
from tl_neuron_circuits.nodes import NodeScores
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.tasks._tokenized import Batch

STORED: dict[str, Any] = {
    "goal": 74.23266,
    "neurons": [
        (0, 13, 140),
        (4, 13, 163),
        (4, 13, 138),
        (0, 13, 66),
        (1, 13, 56),
        (3, 13, 84),
        (4, 13, 135),
        (4, 13, 80),
        (3, 13, 124),
        (2, 13, 52),
    ],
    "conserved": [1.0, 1.199886],
    "paper": [23.95111, 7.742068, 7.165621, 5.752951, 5.297731, 4.417267, 3.541551, 2.822624, -2.624932, 2.481768],
    "released": [23.76864, 7.742068, 7.165621, 6.749171, 6.505861, 5.061542, 3.541551, 2.822624, -2.892406, 2.312343],
    "centered": [31.01005, 5.225484, 3.412534, 6.347038, 5.859662, 5.084292, 2.843832, 5.540686, -3.509337, 1.302966],
    "unpaired": [
        -23.95111,
        -7.742068,
        -7.165621,
        -5.752951,
        -5.297731,
        -4.417267,
        -3.541551,
        -2.822624,
        2.624932,
        -2.481768,
    ],
    "sum": [96.34817, 96.03633],
    "gradient": [
        6.235393,
        4.542579,
        1.669765,
        2.518706,
        7.420924,
        3.302738,
        1.600365,
        -2.124144,
        -0.9737393,
        0.3906993,
    ],
    "ig_inputs": [28.37216, 8.387883, 5.306833, 9.105122, 9.73755, 4.06548, 4.187828, -1.461091, -1.319165, 1.094683],
    "conductance": [
        26.86508,
        7.021823,
        4.998367,
        10.27613,
        9.806449,
        4.604428,
        3.669503,
        1.249528,
        -3.219488,
        -0.199565,
    ],
    "edges": [
        (7.742068, (4, 13, 163), None),
        (7.165621, (4, 13, 138), None),
        (7.110481, (0, 13, 140), None),
        (-0.8866623, (0, 13, 140), (4, 13, 138)),
        (-0.8541675, (0, 13, 140), (4, 13, 163)),
        (0.6880117, (0, 13, 140), (4, 13, 135)),
        (0.1024422, (2, 12, 15), (3, 13, 84)),
        (-0.0992365, (2, 12, 15), (4, 13, 138)),
        (-0.04707819, (1, 12, 145), (4, 13, 163)),
    ],
}


def pairs() -> TokenizedPairs:
    return TokenizedPairs.from_tokens([torch.tensor(PROMPT)], torch.zeros(1, dtype=torch.long))


def raw_goal(logits: Tensor, batch: Batch) -> Tensor:
    """The sum of the largest raw logits."""
    return logits[:, -1].topk(TOP).values.sum(-1)


def goal_of_tokens(model: Any) -> Callable[[Tensor, Batch], Tensor]:
    """The sum of the logits that are largest on the whole prompt: a path of embeddings keeps to these tokens."""
    with torch.no_grad():
        chosen = model(torch.tensor(PROMPT)[None])[0, -1].topk(TOP).indices
    return lambda logits, batch: logits[:, -1, chosen].sum(-1)


def read(scores: NodeScores) -> list[float]:
    return [float(scores.values[f"blocks.{layer}.mlp.hook_post"][pos, unit]) for layer, pos, unit in STORED["neurons"]]


def close(found: list[float], name: str) -> bool:
    most = max(abs(value) for value in STORED[name])
    return found == pytest.approx(STORED[name], abs=2e-5 * most)


def test_the_formulas_still_give_what_is_stored(shared_models: Path) -> None:
    for name, value in measured(shared_models / "stories260K").items():
        if name == "edges":
            assert [ends for _, *ends in value] == [ends for _, *ends in STORED[name]]
            value, expected = ([weight for weight, *_ in rows] for rows in (value, STORED[name]))
        else:
            expected = STORED[name]
        assert torch.allclose(torch.tensor(value).double(), torch.tensor(expected).double(), rtol=1e-5), name


def test_four_rules_are_the_papers_and_three_the_released_codes(stories260K: Any) -> None:
    given = {"metric": raw_goal, "baseline": "zero"}
    four = read(attribute(stories260K, pairs(), method="relp", **given))
    three = read(attribute(stories260K, pairs(), method=RelP(rules=("ln", "identity", "half")), **given))
    assert close(four, "paper") and close(three, "released")
    assert not close(four, "released") and not close(three, "paper")


def test_unpaired_scores_have_the_opposite_sign(stories260K: Any) -> None:
    found = read(attribute(stories260K, pairs(), metric=raw_goal, baseline="zero"))
    assert close([-score for score in found], "unpaired") and not close(found, "unpaired")


def test_integrated_gradients_of_the_released_code_are_one_gradient(stories260K: Any) -> None:
    given = {"metric": goal_of_tokens(stories260K), "baseline": "zero"}
    plain = read(attribute(stories260K, pairs(), method="gradient", **given))
    assert close(plain, "gradient")
    assert not close(read(attribute(stories260K, pairs(), method="integrated_gradients(steps=5)", **given)), "gradient")
    inputs = read(attribute(stories260K, pairs(), method="integrated_gradients_inputs(steps=5)", **given))
    conductance = read(attribute(stories260K, pairs(), method="conductance(steps=5)", **given))
    assert close(inputs, "ig_inputs") and close(conductance, "conductance")
    assert not close(inputs, "conductance") and not close(conductance, "ig_inputs")


def traced(model: Any, **settings: Any) -> Any:
    return trace(model, torch.tensor(PROMPT)[None], nodes=200, top_k=TOP, keep_bos=True, **settings)


def attributions(circuit: Any) -> list[float]:
    table = circuit.nodes.set_index(["layer", "position", "unit"])["score"]
    return [float(table.loc[place]) for place in STORED["neurons"]]


def test_goals_are_raw_there_and_centered_here(stories260K: Any) -> None:
    raw, centered = traced(stories260K, center=False), traced(stories260K)
    assert raw.settings["target_value"] == pytest.approx(STORED["goal"], rel=1e-5)
    assert centered.settings["target_value"] != pytest.approx(STORED["goal"], rel=1e-2)
    assert close(attributions(raw), "paper") and close(attributions(centered), "centered")
    assert not close(attributions(raw), "centered") and not close(attributions(centered), "paper")


def test_edges_are_activation_times_direct_gradient(stories260K: Any) -> None:
    circuit = traced(stories260K, center=False)
    name = circuit.nodes.set_index(["layer", "position", "unit"])["node"]
    weights = circuit.edges.set_index(["source", "target"])["weight"]
    for expected, source, target in STORED["edges"]:
        if target is not None:
            found = float(weights.loc[(name.loc[source], name.loc[target])])
        else:
            logits = circuit.nodes.loc[circuit.nodes["kind"] == "logit", "node"]
            found = sum(float(weights.get((name.loc[source], logit), 0.0)) for logit in logits)
        assert found == pytest.approx(expected, rel=2e-4), (source, target)


def test_the_first_token_is_dropped_after_the_choice_there_and_before_it_here(stories260K: Any) -> None:
    scores = attribute(stories260K, pairs(), metric=raw_goal, baseline="zero")
    whole = sum(float(values.sum()) for values in scores.values.values())
    without = sum(float(values[1:].sum()) for values in scores.values.values())
    assert [whole, without] == pytest.approx(STORED["sum"], rel=1e-5)
    there = scores.top(400).query("position > 0")
    here = trace(stories260K, torch.tensor(PROMPT)[None], nodes=400, top_k=TOP, center=False)
    own = here.nodes[here.nodes["kind"] == "neuron"]
    assert len(own) == 400 > len(there) and (own["position"] > 0).all()
    places = ["layer", "position", "unit"]
    assert set(there[places].itertuples(index=False, name=None)) < set(own[places].itertuples(index=False, name=None))


def test_relevance_is_conserved_by_four_rules_and_not_by_three(stories260K: Any) -> None:
    four, three = STORED["conserved"]
    assert four == pytest.approx(1.0, abs=1e-12) and three > 1.1
    assert check_model(stories260K).ok
