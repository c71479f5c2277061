"""Targets at several positions, and rollouts: one graph gives what traces of each prompt give."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.circuits.checks import assert_sums_hold
from tests.families import ModelCase, random_tokens, typical_models
from tests.loops import for_each
from tl_neuron_circuits import Circuit, load_demo_model, trace
from tl_neuron_circuits._errors import SettingsError

PROMPT = "The capital of the state containing Dallas is"


def scores(circuit: Circuit) -> dict[str, torch.Tensor]:
    return {hook: value.nan_to_num() for hook, value in circuit.to_scores().values.items()}


@pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
def test_a_rollout_equals_single_traces(case: ModelCase) -> None:
    model = case.build()
    tokens, every = random_tokens(model, 1, 5), 10**6
    with pytest.raises(SettingsError) as error:  # the error says how many nodes are active
        trace(model, tokens, nodes=every, rollout=3)
    every = int(str(error.value).split("between 1 and ")[1].split(" ")[0].replace(",", ""))
    together = trace(model, tokens, nodes=every, rollout=3)
    assert_sums_hold(together, max(case.tolerance, 1e-9))
    goals = together.nodes.query("kind == 'logit'").sort_values("position")
    assert goals["position"].tolist() == [4, 5, 6]
    total = {hook: torch.zeros_like(value) for hook, value in scores(together).items()}
    prompt = tokens
    for goal in goals.itertuples():
        logits = model(prompt)[0, -1].detach()
        assert int(logits.argmax()) == goal.unit
        assert goal.probability == pytest.approx(float(logits.softmax(-1)[goal.unit]), rel=1e-4)
        alone = trace(model, prompt, goal.unit, nodes=20)
        assert goal.activation == pytest.approx(alone.target_value, rel=1e-4)
        into = together.edges[together.edges["target"] == goal.node].set_index("source")["weight"]
        expected = alone.edges[alone.edges["target"] == f"logit/{goal.unit}"].set_index("source")["weight"]
        expected = expected[[name for name in expected.index if "/N" in name]]
        np.testing.assert_allclose(into[expected.index], expected, rtol=1e-3, atol=1e-6)
        for hook, value in full_scores(model, prompt, goal.unit).items():
            total[hook][: value.shape[0]] += value
        prompt = torch.cat([prompt, torch.tensor([[goal.unit]])], 1)
    for hook, value in scores(together).items():
        torch.testing.assert_close(value, total[hook].to(value), rtol=1e-3, atol=1e-5)


def full_scores(model: Any, prompt: torch.Tensor, token: int) -> dict[str, torch.Tensor]:
    """Scores of all nodes, from a trace of the prompt that targets its last position by number."""
    with pytest.raises(SettingsError) as error:
        trace(model, prompt, token, nodes=10**6)
    every = int(str(error.value).split("between 1 and ")[1].split(" ")[0].replace(",", ""))
    return scores(trace(model, prompt, token, nodes=every))


def test_a_given_continuation_and_targets_by_position(tmp_path: Any) -> None:
    model = load_demo_model()
    greedy = trace(model, PROMPT, rollout=2, nodes=20)
    generated = [token for _, token in greedy.settings["rollout"]]
    given = trace(model, PROMPT, rollout=generated, nodes=20)
    assert given.nodes.equals(greedy.nodes)
    longer = torch.cat([model.to_tokens(PROMPT), torch.tensor([generated[:1]])], 1)
    placed = trace(model, longer, {9: generated[0], 10: generated[1]}, nodes=20)
    assert placed.nodes.equals(greedy.nodes)
    assert len(greedy.settings["predicted_at"]) == 2 and set(greedy.settings["target_ranks"].values()) == {1}
    assert len(greedy.with_heads(edges=20).heads()["source"]) >= 20
    greedy.plot(), greedy.to_html(tmp_path / "page.html"), greedy.save(tmp_path / "saved")
    assert Circuit.load(tmp_path / "saved").nodes.equals(greedy.nodes)
    named = trace(model, PROMPT, {9: " Austin"}, nodes=5)
    assert named.nodes.query("kind == 'logit'")["node"].tolist() == [f"logit/{generated[0]}@9"]
    by_text = trace(model, PROMPT, rollout=" Austin", nodes=20)
    alone = trace(model, PROMPT, " Austin", nodes=20)
    assert by_text.target_value == pytest.approx(alone.target_value)
    assert by_text.members == alone.members


def test_rollouts_of_several_prompts_are_the_mean_of_single_ones() -> None:
    model = load_demo_model()
    cities = ("Dallas", "Belgate")
    for span in ("{}", "{{city:{}}}"):  # marked spans of several lengths, and one length
        names = cities if span == "{}" else ("Dallas", "North Belgate")
        prompts = [f"The capital of the state containing {span.format(name)} is" for name in names]
        together = trace(model, prompts, rollout=2, nodes=40)
        assert_sums_hold(together, 1e-4)
        alone = [trace(model, prompt, rollout=2, nodes=40) for prompt in prompts]
        tokens = [[token for _, token in one.settings["rollout"]] for one in alone]
        assert [token for _, token in together.settings["rollout"]] == [
            list(pair) for pair in zip(*tokens, strict=True)
        ]
        goals = together.nodes.query("kind == 'logit'")
        single = [one.nodes.query("kind == 'logit'") for one in alone]
        np.testing.assert_allclose(goals["activation"], np.mean([one["activation"] for one in single], 0), rtol=1e-5)
        assert together.by_prompt is not None
        rows = together.by_prompt.query("kind == 'node'")
        for number, one in enumerate(single):
            own = rows[(rows["prompt"] == number) & rows["source"].isin(goals["node"])]
            np.testing.assert_allclose(own["attribution"], one["activation"], rtol=1e-5)
            chances = together.settings["prompts"][number]["probability"]
            assert chances == pytest.approx(float(one["probability"].prod()), rel=1e-3)
    given = trace(model, prompts, rollout=tokens, nodes=40)
    assert given.nodes.equals(together.nodes)


@for_each(
    ("options", "message"),
    [
        ({"target": {42: 3}}, "by the position that predicts them, 0 to 9"),
        ({"target": 3, "rollout": 2}, "leave target= out"),
        ({"rollout": 0}, "at least one token"),
        ({"rollout": [10**6]}, "at least one token"),
    ],
)
def test_wrong_goals_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        trace(load_demo_model(), PROMPT, nodes=5, **options)
