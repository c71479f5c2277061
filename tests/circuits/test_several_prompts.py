"""Several prompts in one call give what each gives alone, wherever their tokens stand."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_neuron_circuits as tnc
from tests.circuits.checks import assert_sums_hold
from tests.families import ModelCase, all_models, random_tokens
from tests.loops import for_each
from tl_neuron_circuits import Circuit, trace
from tl_neuron_circuits._errors import PairsError, SettingsError
from tl_neuron_circuits.circuits import ByExplained
from tl_neuron_circuits.circuits._direct_effects import direct_effects
from tl_neuron_circuits.circuits._slots import find_slots
from tl_neuron_circuits.circuits._targets import answer_target
from tl_neuron_circuits.circuits._total_effects import can_share
from tl_neuron_circuits.tasks import TokenizedPairs

MARKED = ["The {subject:dogs near the cat} are", "The {subject:dogs} are", "The {subject:cats near the girl} are"]
TEXTS = ["The dogs near the girl are old.", "The dog is here.", "She lives in Dallas Texas.", "The cats have time."]
PLAIN = ["The dogs near the cat are", "The dogs are", "The cats near the girl are"]
TARGETS = [" old", " here", " old"]
NUMBERS = ["weight", "attribution"]
WITHOUT_BIASES = [p for p in all_models("llama") if p.values[0].backend == "TransformerBridge"]


@pytest.fixture(scope="module")
def demo() -> Any:
    return tnc.load_demo_model()


@pytest.fixture(scope="module")
def marked(demo: Any) -> Circuit:
    return trace(demo, MARKED, TARGETS, nodes=30, profiles=True)


def every_node(model: Any, prompt: Any, target: Any) -> Circuit:
    """A trace that chooses all active nodes."""
    with pytest.raises(SettingsError) as error:  # the error says how many they are
        trace(model, prompt, target, nodes=10**9)
    return trace(model, prompt, target, nodes=int(str(error.value).split("1 and ")[1].split()[0].replace(",", "")))


def table_of(circuit: Circuit) -> Any:
    """The table of single prompts."""
    assert circuit.by_prompt is not None
    return circuit.by_prompt


def edges_of(circuit: Circuit) -> pd.DataFrame:
    return circuit.edges.set_index(["source", "target"])[NUMBERS].sort_index()


def assert_prompts_average_to(circuit: Circuit) -> None:
    """The table of prompts, and the circuit: the same numbers."""
    mean = table_of(circuit).groupby(["kind", "source", "target"])[NUMBERS].sum() / circuit.settings["n_prompts"]
    edges, nodes = mean.loc["edge"], circuit.nodes.set_index("node")
    scale = nodes["score"].abs().max()
    off = edges.sub(edges_of(circuit), fill_value=0.0).abs()
    assert off.to_numpy().max() < 1e-6 * scale
    own = nodes[nodes["kind"].isin(("neuron", "embedding", "group", "logit"))]
    of_nodes = mean.loc["node"].droplevel("target").reindex(own.index)
    np.testing.assert_allclose(of_nodes["attribution"], own["score"], atol=1e-6 * scale)
    has_change = own["kind"] != "embedding"
    np.testing.assert_allclose(of_nodes["weight"][has_change], own["change"][has_change], atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("case", "paired"), [*((p.values[0], False) for p in WITHOUT_BIASES), (all_models("gpt2")[0].values[0], True)]
)
def test_prompts_in_one_batch_give_what_they_give_one_by_one_and_alone(case: ModelCase, paired: bool) -> None:
    model = case.build()
    assert can_share(model, find_slots(model, tnc.bases.Neurons()), paired=paired)
    tokens, others = random_tokens(model, 3, 6), random_tokens(model, 3, 6, seed=1)
    answers, wrong = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])
    pairs = TokenizedPairs.from_tokens(tokens, answers, others if paired else None, wrong)
    together, one_by_one = (trace(model, pairs, nodes=25, by_prompt=True, batch_size=size) for size in (3, 1))
    assert together.members == one_by_one.members
    pd.testing.assert_frame_equal(edges_of(together), edges_of(one_by_one), rtol=1e-9, atol=1e-12)
    assert_prompts_average_to(together)
    assert_sums_hold(together, max(case.tolerance, 1e-9))
    for row in range(3):
        own = TokenizedPairs.from_tokens(
            tokens[row : row + 1],
            answers[row : row + 1],
            None if not paired else others[row : row + 1],
            wrong[row : row + 1],
        )
        alone = every_node(model, own, None).nodes.set_index("node")["score"]
        found = table_of(together).query(f"prompt == {row} and kind == 'node'").set_index("source")["attribution"]
        chosen = [name for name in found.index if "/N" in name]
        np.testing.assert_allclose(found[chosen], alone.reindex(chosen).fillna(0.0), atol=1e-9)


@pytest.mark.parametrize("positions", ["keep", "sum"])
def test_a_place_of_several_tokens_has_the_sums_of_what_single_prompts_have_at_them(demo: Any, positions: Any) -> None:
    """A marked span, and all of a prompt: scores are those of `attribute`, edges those between the members."""
    together = trace(demo, MARKED, TARGETS, nodes=25, positions=positions, center=False)
    if positions == "keep":
        assert together.settings["tokens"][1:] == ["The", "{subject}", "are"]
        assert together.spans()[["span", "first", "last"]].to_numpy().tolist() == [["subject", 2, 2]]
    targets, slots = [answer_target(against_wrong=False, center=False)], find_slots(demo, tnc.bases.Neurons())
    for prompt, (text, target) in enumerate(zip(PLAIN, TARGETS, strict=True)):
        pairs = tnc.tasks.tokenize(demo, tnc.PromptPairs(clean=[text], answer=[target]))
        table = table_of(together)[table_of(together)["prompt"] == prompt]
        own = together.on_prompt(prompt)
        values = tnc.attribute(demo, pairs, baseline="zero", metric=tnc.tasks.answer_logit).values
        rows: Any = own.itertuples()
        alone = [float(values[f"blocks.{n.layer}.mlp.hook_post"][n.position, n.unit]) for n in rows]
        own = own.assign(alone=alone)
        expected = own.groupby("node")["alone"].sum()
        found = table[table["kind"] == "node"].set_index("source")["attribution"]
        np.testing.assert_allclose(found[expected.index], expected, atol=1e-5)
        members = torch.tensor(own[["layer", "position", "unit"]].to_numpy())
        effects = direct_effects(demo, list(pairs.batches(1)), members, targets, paired=False, slots=slots)
        names, n = [*own["node"], "answer_logit"], len(own)
        by_hand = pd.DataFrame(
            effects.edges.to_dense()[: n + 1, :n].permute(1, 0, 2).reshape(-1, 2).numpy(), columns=NUMBERS
        )
        ends = [np.repeat(names[:n], n + 1), np.tile(names, n)]
        by_hand = by_hand.groupby(ends).sum()
        edges = table[(table["kind"] == "edge") & table["source"].isin(names)].set_index(["source", "target"])[NUMBERS]
        by_hand = by_hand[(by_hand != 0).any(axis=1)]
        assert len(by_hand) > 50
        np.testing.assert_allclose(edges.reindex(by_hand.index).fillna(0.0), by_hand, atol=1e-5)
    assert_prompts_average_to(together)
    assert_sums_hold(together, 1e-5)


def test_prompts_add_up_whatever_is_done_to_the_circuit(marked: Circuit, tmp_path: Path) -> None:
    assert_prompts_average_to(marked)
    assert_sums_hold(marked, 1e-5)
    names = marked.to_dataframe().query("kind == 'neuron'")["node"].tolist()
    grouped = marked.group({"first": names[:8], "second": names[8:12]})
    for changed in (
        marked.prune(count=15),
        marked.prune(edges=60),
        grouped.collapse(),
        marked - marked.prune(count=5),
        marked & marked.prune(count=30),
        marked | marked.prune(count=9),
    ):
        assert_prompts_average_to(changed)
    summed = marked.sum_positions()
    assert_prompts_average_to(summed)
    with pytest.raises(SettingsError, match="have no places"):
        summed.on_prompt(0)
    marked.save(tmp_path / "saved")
    again = Circuit.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(table_of(again), table_of(marked))
    assert dict(again.settings) == dict(marked.settings)
    marked.to_neuronpedia(tmp_path / "graph.json")
    assert Circuit.from_neuronpedia(tmp_path / "graph.json").nodes.equals(marked.nodes)
    marked.to_html(tmp_path / "page.html")
    figure: Any = marked.plot()
    assert len(figure.data) > 0
    assert "{subject}" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_profiles_are_those_of_the_model(demo: Any, marked: Circuit) -> None:
    table = table_of(marked)
    nodes = marked.nodes.query("kind == 'neuron'")
    for prompt in (0, 1):
        own = marked.on_prompt(prompt)
        labels = [f"L{row.layer}/N{row.unit}@{row.position}" for row in own.itertuples()]
        found = tnc.profiles(demo, PLAIN[prompt], labels)
        n = demo.to_tokens(PLAIN[prompt]).shape[1]
        place = [min(at, 2) if at < n - 1 else 3 for at in range(n)]
        by_place = torch.zeros(len(labels), 4).index_add_(1, torch.tensor(place), found.attribution)
        expected = pd.DataFrame(by_place.numpy(), index=own["node"]).groupby(level=0).sum()
        rows = table[(table["prompt"] == prompt) & (table["kind"] == "token") & table["target"].isin(nodes["node"])]
        mine = rows.pivot(index="target", columns="source", values="weight").fillna(0.0)
        np.testing.assert_allclose(mine, expected.loc[mine.index], atol=1e-4)
    into = table[(table["kind"] == "target")].groupby(["prompt", "source"])["attribution"].sum()
    score = table[(table["kind"] == "node")].set_index(["prompt", "source"])["attribution"]
    np.testing.assert_allclose(into, score.loc[into.index], atol=1e-6)
    tokens = (
        table[(table["kind"] == "token") & (table["target"] == "answer_logit")].groupby("source")["weight"].sum() / 3
    )
    embedding = marked.nodes.query("kind == 'embedding'").set_index("node")["score"]
    np.testing.assert_allclose(tokens.reindex(embedding.index).fillna(0.0), embedding, atol=1e-5)


@pytest.mark.parametrize("case", WITHOUT_BIASES)
def test_profiles_of_a_model_without_biases_sum_to_everything(case: ModelCase) -> None:
    model = case.build()
    circuit = trace(model, random_tokens(model, 2, 5), [3, 4], nodes=20, profiles=True)
    table = table_of(circuit)
    sums = table[table["kind"] == "token"].groupby(["prompt", "target"])[NUMBERS].sum()
    nodes = table[table["kind"] == "node"].set_index(["prompt", "source"])[NUMBERS]
    np.testing.assert_allclose(sums, nodes.loc[sums.index], rtol=1e-6, atol=1e-9)
    several = table_of(trace(model, random_tokens(model, 1, 5), [3, 4], nodes=5, profiles=True))
    parts = several[several["kind"] == "target"]
    assert set(parts["target"]) == {"logit/3", "logit/4"}  # one prompt: two tokens of its own
    into, score = parts.groupby("source")["weight"].sum(), several[several["kind"] == "node"].set_index("source")
    np.testing.assert_allclose(into, score["attribution"][into.index], rtol=1e-6)


def test_the_union_has_every_node_that_a_prompt_chooses_alone(demo: Any) -> None:
    prompts = ["The dogs near the cat", "The cat near the dogs"]
    union = trace(demo, prompts, [" are", " is"], nodes=10, selection="union")
    alone = [trace(demo, text, answer, nodes=10).members for text, answer in zip(prompts, (" are", " is"), strict=True)]
    assert union.members == alone[0] | alone[1]
    assert len(trace(demo, prompts, [" are", " is"], nodes=10)) == 10
    assert union.settings["prompts"][0]["target"].strip() == "are" and table_of(union)["prompt"].nunique() == 2


def test_targets_of_several_prompts(demo: Any) -> None:
    prompts = ["The dogs near the cat", "The cat near the dogs"]
    logit = lambda *options: trace(demo, prompts, *options, nodes=3).nodes.query("kind == 'logit'")["node"].tolist()  # noqa: E731
    are = trace(demo, prompts[0], " are", nodes=3).nodes.query("kind == 'logit'")["node"].iloc[0]
    assert logit(" are") == logit([" are", " are"]) == [are]
    assert logit([" are", " is"]) == logit() == ["answer_logit"]
    assert logit([(" are", " is"), (" is", " are")]) == ["logit_difference"] and "-" in logit((" are", " is"))[0]
    likeliest = trace(demo, prompts, nodes=3)
    assert [one["rank"] for one in likeliest.settings["prompts"]] == [1, 1]
    wrong = trace(demo, prompts, " Boston", nodes=3)
    assert any("on 2 of 2 prompts the model does not predict" in note for note in wrong.notes)


def test_the_kept_circuit_of_aligned_prompts_gives_the_share_that_was_asked_for(demo: Any) -> None:
    circuit = trace(demo, MARKED, TARGETS, nodes=ByExplained(0.5), reference=TEXTS)
    sums, count = {}, 0
    for text in TEXTS:
        cache = demo.run_with_cache(text)[1]
        count += cache["blocks.0.mlp.hook_post"].shape[1] - 1
        for layer in range(demo.cfg.n_layers):
            sums[layer] = sums.get(layer, 0.0) + cache[f"blocks.{layer}.mlp.hook_post"][0, 1:].double().sum(0)

    def target(live: Any, prompt: int) -> float:
        def ablate(value: torch.Tensor, hook: Any, layer: int) -> torch.Tensor:
            new = (sums[layer] / count).float().expand_as(value).clone()
            new[:, 0] = value[:, 0]  # BOS
            for row in live[live["layer"] == layer].itertuples():
                new[:, row.position, row.unit] = value[:, row.position, row.unit]
            return new

        hooks = [
            (f"blocks.{layer}.mlp.hook_post", lambda v, hook, layer=layer: ablate(v, hook, layer))
            for layer in range(demo.cfg.n_layers)
        ]
        with torch.no_grad():
            logits = demo.run_with_hooks(PLAIN[prompt], fwd_hooks=[] if live is None else hooks)[0, -1]
        answer = demo.tokenizer.convert_tokens_to_ids("here" if prompt == 1 else "old")
        return float(logits[answer] - logits.mean())

    nodes = [circuit.on_prompt(prompt) for prompt in range(3)]
    whole, empty, kept = (
        sum(target(live, prompt) for prompt, live in enumerate(lives))
        for lives in ([None] * 3, [own.iloc[:0] for own in nodes], nodes)
    )
    share = (kept - empty) / (whole - empty)
    assert share == pytest.approx(circuit.settings["explained"]["share"], abs=1e-4) and 0.5 <= share <= 1.5


def test_an_aligned_circuit_is_steered_prompt_by_prompt_and_refused_elsewhere(demo: Any, marked: Circuit) -> None:
    own = marked.on_prompt(0)
    at_subject = own[own["node"].str.endswith("@2")]
    assert set(at_subject["position"]) == {2, 3, 4, 5} and set(own["position"]) <= set(range(7))
    assert tnc.steer(demo, PLAIN[0], own, scale=0.0).kl[0] > 0
    for refused in (
        marked.to_scores,
        marked.heads,
        lambda: marked.on_prompt(3),
        lambda: tnc.steer(demo, PLAIN[0], marked, scale=0.0),
        lambda: tnc.steer(demo, PLAIN[0], marked.nodes.query("kind == 'neuron' and layer > 1").head(3), scale=0.0),
        lambda: marked | trace(demo, MARKED[:2], [" old", " here"], nodes=5, positions="sum"),
    ):
        with pytest.raises(SettingsError):
            refused()


@for_each(
    ("prompts", "options", "message"),
    [
        (["The dogs", "The dogs near the cat"], {}, "marks that say what differs"),
        (["The {a:dogs} are", "The {b:dogs near} are"], {}, "same marked spans"),
        (["The {a:dogs} near the cat are", "The {a:dogs} are"], {}, "between marks"),
        (["The {a:dogs} near the {a:cat}"], {}, "each span's name once"),
        (["The dogs", "The cats"], {"target": [" are"]}, "one per prompt; got 1 for 2"),
        (["The dogs", "The cats"], {"target": [" are", (" are", " is")]}, "tuple of two for every prompt"),
        (["The dogs", "The cats"], {"rollout": [" are", " are not"]}, "as many tokens after every prompt"),
        (["The dogs", "The cats"], {"rollout": [" are"]}, "for each of the 2 prompts"),
        (["The {a:dogs} are", "The {a:dogs near} are"], {"rollout": 2, "positions": "sum"}, "positions that are kept"),
        (["The {a:dogs} are", "The {a:dogs near} are"], {"target": {1: 3}}, "positions that are kept"),
        (["The dogs", "The cats"], {"nodes": ByExplained(0.5), "selection": "union"}, "leave selection='union' out"),
        (["The dogs", "The cats"], {"nodes": ByExplained(0.5)}, "reference="),
    ],
)
def test_prompts_that_do_not_fit_together_are_refused(
    demo: Any, prompts: list[str], options: dict[str, Any], message: str
) -> None:
    options = {"nodes": 3, **options}
    with pytest.raises((SettingsError, PairsError), match=message):
        trace(demo, prompts, **options)
