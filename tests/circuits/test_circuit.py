"""Whatever is done to a circuit, its totals stay."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.circuits.checks import assert_sums_hold, small_circuit
from tests.families import all_models, random_tokens
from tests.loops import for_each
from tests.real_models import BACKENDS
from tests.saved_files import edit
from tests.stories_tasks import pronoun_pairs
from tl_neuron_circuits import Circuit, attribute, evaluate, trace
from tl_neuron_circuits._errors import FileFormatError, SettingsError

CASE = all_models("gpt2")[0].values[0]


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return small_circuit(CASE, 30)


@pytest.fixture(scope="module")
def other() -> Circuit:
    return small_circuit(CASE, 30, seed=1)


def assert_same(one: Circuit, two: Circuit) -> None:
    pd.testing.assert_frame_equal(one.nodes, two.nodes)
    pd.testing.assert_frame_equal(one.edges, two.edges)
    assert dict(one.settings) == dict(two.settings)


@for_each(
    "rule",
    [
        {"count": 10},
        {"share": 0.02},
        {"edges": 60},
        {"relative": 0.05},
        {"node_influence": 0.5},
        {"edge_influence": 0.7},
        {"node_influence": 0.8, "edge_influence": 0.9, "count": 20},
        {"edges": 0},
    ],
)
def test_pruning_keeps_totals(circuit: Circuit, rule: dict[str, Any]) -> None:
    pruned = circuit.prune(**rule)
    assert_sums_hold(pruned)
    assert len(pruned) < len(circuit)
    assert pruned.target_value == circuit.target_value
    free = pruned.nodes.set_index("node")["kind"][pruned.edges["source"]].isin(("neuron", "embedding"))
    of_neurons = pruned.edges[free.to_numpy()]
    neurons = set(pruned.nodes.query("kind == 'neuron'")["node"])
    assert neurons <= set(of_neurons["source"]) and neurons <= set(of_neurons["target"])
    if "edges" in rule:
        assert len(of_neurons) <= rule["edges"]
    if "relative" in rule:
        assert of_neurons["relative"].abs().min() >= rule["relative"]


def test_pruning_nothing_changes_nothing(circuit: Circuit) -> None:
    pruned = circuit.prune(share=0.0)
    key = lambda c: c.edges.set_index(["source", "target"]).sort_index()  # noqa: E731
    kept = set(pruned.nodes["node"])
    orphans = set(circuit.nodes["node"]) - kept
    assert all(not (circuit.edges["source"] == node).any() for node in orphans)
    pd.testing.assert_frame_equal(key(pruned), key(circuit)[~key(circuit).index.get_level_values(1).isin(orphans)])


def test_a_cut_edge_goes_to_the_remainder_at_its_position(circuit: Circuit) -> None:
    pruned = circuit.prune(edges=40)
    before = circuit.edges.set_index(["target", "source"])["weight"]
    place = circuit.nodes.set_index("node")["position"]
    for target, edges in pruned.edges.groupby("target"):
        kept = set(edges["source"])
        for position in range(6):
            cut = [s for s in before[target].index if s not in kept and place[s] == position]
            name = f"unselected@{position}"
            old = before[target].get(name, 0.0)
            now = edges.set_index("source")["weight"].get(name, 0.0)
            assert now == pytest.approx(old + before[target][cut].sum(), abs=1e-12)


def test_influence_is_the_series_of_circuit_tracer(circuit: Circuit) -> None:
    names = circuit.nodes["node"].tolist()
    n = np.zeros((len(names), len(names)))  # target, source
    biases = set(circuit.nodes.query("kind == 'bias'")["node"])
    for edge in circuit.edges[~circuit.edges["source"].isin(biases)].itertuples():
        n[names.index(edge.target), names.index(edge.source)] = abs(edge.weight)
    n /= np.maximum(n.sum(1, keepdims=True), 1e-300)
    weights = np.where(circuit.nodes["kind"] == "logit", circuit.nodes["probability"], 0.0)
    series, power = np.zeros(len(names)), weights @ n
    for _ in range(10):
        series, power = series + power, power @ n
    np.testing.assert_allclose(circuit.nodes["influence"], series, rtol=1e-7, atol=1e-12)
    embeddings, left = (series[circuit.nodes["kind"] == kind].sum() for kind in ("embedding", "unselected"))
    assert circuit.graph_replacement == pytest.approx(embeddings / (embeddings + left))
    reach = series + weights
    of_left = n[:, circuit.nodes["kind"] == "unselected"].sum(1)
    expected = ((1 - of_left) * reach).sum() / reach.sum()
    assert circuit.graph_completeness == pytest.approx(expected)


@pytest.fixture(scope="module")
def groups(circuit: Circuit) -> dict[str, list[str]]:
    neurons = circuit.to_dataframe().query("kind == 'neuron'")["node"].tolist()
    return {"first": neurons[:5], "second": neurons[5:11]}


def test_supernodes_keep_totals(circuit: Circuit, groups: dict[str, list[str]]) -> None:
    collapsed = circuit.group(groups).collapse()
    assert_sums_hold(collapsed)
    assert len(collapsed) == len(circuit)
    assert len(collapsed.nodes) == len(circuit.nodes) - 9
    score = circuit.nodes.set_index("node")["score"]
    for name, members in groups.items():
        inside = circuit.edges[circuit.edges["source"].isin(members) & circuit.edges["target"].isin(members)]
        expected = score[members].sum() - inside["attribution"].sum()
        assert collapsed.nodes.set_index("node").loc[name, "score"] == pytest.approx(expected)
    between = circuit.edges["source"].isin(groups["first"]) & circuit.edges["target"].isin(groups["second"])
    found = collapsed.edges.query("source == 'first' and target == 'second'")
    assert found["attribution"].sum() == pytest.approx(circuit.edges[between]["attribution"].sum(), abs=1e-12)
    assert_sums_hold(collapsed.prune(edges=30))


def test_a_supernode_of_everything_has_what_comes_from_outside(circuit: Circuit) -> None:
    neurons = circuit.nodes.query("kind == 'neuron'")["node"].tolist()
    collapsed = circuit.group({"all": neurons}).collapse()
    assert_sums_hold(collapsed)
    outside = ~circuit.edges["source"].isin(neurons) & circuit.edges["target"].isin(neurons)
    score = collapsed.nodes.set_index("node").loc["all", "score"]
    assert score == pytest.approx(circuit.edges[outside]["attribution"].sum())


def test_labels_and_groups_by_neuron_reach_all_positions(circuit: Circuit) -> None:
    name = circuit.nodes.query("kind == 'neuron'")["node"].iloc[0].partition("@")[0]
    of_neuron = circuit.nodes["node"].str.startswith(f"{name}@")
    labeled = circuit.label({name: "mine"}).group({"group": [name]})
    assert (labeled.nodes.loc[of_neuron, "label"] == "mine").all()
    assert ((labeled.nodes["group"] == "group") == of_neuron).all()
    assert (circuit.nodes["group"] == "").all()


def test_wrong_names_are_refused(circuit: Circuit, groups: dict[str, list[str]]) -> None:
    node = groups["first"][0]
    for call in (
        lambda: circuit.label({"L9/N9": "x"}),
        lambda: circuit.group({"a": ["L9/N9"]}),
        lambda: circuit.group({"a": [node], "b": [node]}),
        lambda: circuit.group({node: [node]}),
        lambda: circuit.group({"a": ["embed@0"]}),
        lambda: circuit.collapse(),
        lambda: circuit.prune(),
        lambda: circuit.prune(edge_influence=1.5),
        lambda: circuit.prune(count=-1),
        lambda: Circuit.merge([]),
        lambda: circuit | small_circuit(all_models("llama")[0].values[0]).sum_positions(),
    ):
        with pytest.raises(SettingsError):
            call()
    with pytest.raises(SettingsError, match="before collapse"):
        circuit.group(groups).collapse().to_scores()


def test_summing_positions_keeps_totals(circuit: Circuit) -> None:
    summed = circuit.sum_positions()
    assert_sums_hold(summed)
    assert (summed.nodes.query("kind != 'logit'")["position"] == -1).all()
    node = summed.nodes.query("kind == 'neuron'").iloc[0]
    same = circuit.nodes[(circuit.nodes["layer"] == node["layer"]) & (circuit.nodes["unit"] == node["unit"])]
    assert node["score"] == pytest.approx(same["score"].sum())
    assert_sums_hold(summed.prune(count=5))


def test_circuits_of_different_lengths_merge_without_positions() -> None:
    model = CASE.build()
    circuits = [trace(model, random_tokens(model, 1, n), 3, nodes=10).sum_positions() for n in (5, 7)]
    merged = Circuit.merge(circuits)
    assert_sums_hold(merged)
    assert merged.settings["n_prompts"] == 2
    assert merged.target_value == pytest.approx(np.mean([c.target_value for c in circuits]))


def test_unions_are_means_over_prompts(circuit: Circuit, other: Circuit) -> None:
    third = small_circuit(CASE, 30, seed=2)
    union = circuit | other | third
    assert_sums_hold(union)
    assert union.members == circuit.members | other.members | third.members
    at_once = Circuit.merge([circuit, other, third])
    key = lambda c: c.nodes.set_index("node")["score"].sort_index()  # noqa: E731
    pd.testing.assert_series_equal(key(union), key(at_once))
    expected = (
        sum(c.nodes.set_index("node")["score"].reindex(union.members).fillna(0) for c in (circuit, other, third)) / 3
    )
    np.testing.assert_allclose(key(union)[expected.index], expected)


def test_the_union_with_itself_is_itself(circuit: Circuit) -> None:
    union = circuit | circuit
    key = lambda c: c.nodes.set_index("node").sort_index()  # noqa: E731
    pd.testing.assert_frame_equal(key(union), key(circuit))


def test_intersections_and_differences_keep_totals(circuit: Circuit, other: Circuit) -> None:
    common, mine = circuit & other, circuit - other
    assert_sums_hold(common)
    assert_sums_hold(mine)
    assert common.members == circuit.members & other.members
    assert mine.members == circuit.members - other.members
    expected = len(circuit.members & other.members) / len(circuit.members | other.members)
    assert circuit.jaccard(other) == expected > 0
    assert circuit.jaccard(circuit) == 1


def test_a_graph_has_the_tables(circuit: Circuit) -> None:
    graph = circuit.graph()
    assert graph.number_of_nodes() == len(circuit.nodes) and graph.number_of_edges() == len(circuit.edges)
    first = circuit.edges.iloc[0]
    assert graph[first["source"]][first["target"]]["weight"] == first["weight"]
    assert graph.nodes[first["target"]]["kind"] in ("neuron", "logit")


def test_what_is_saved_is_loaded(circuit: Circuit, groups: dict[str, list[str]], tmp_path: Path) -> None:
    named = circuit.group(groups).label({groups["first"][0]: "a label"})
    named.save(tmp_path / "one")
    assert_same(named, Circuit.load(tmp_path / "one"))
    named.collapse().save(tmp_path / "two")
    assert_same(named.collapse(), Circuit.load(tmp_path / "two"))


def test_a_fresh_process_evaluates_a_saved_circuit_alike(tmp_path: Path, stories260K: Any) -> None:
    if type(stories260K).__name__ != BACKENDS[0]:
        pytest.skip("one model class shows it, and starting a process takes seconds")
    pairs = pronoun_pairs("{name} was sad.", "attribution", 2)
    circuit = trace(stories260K, pairs, nodes=40)
    circuit.save(tmp_path / "circuit")
    here = evaluate(stories260K, pairs, circuit)
    backend = type(stories260K).__name__
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tests.real_models import load_stories260K\nfrom tests.stories_tasks import pronoun_pairs\n"
        "from tl_neuron_circuits import Circuit, evaluate\n"
        f"model = load_stories260K(Path({str(_shared())!r}), {backend!r})\n"
        "pairs = pronoun_pairs('{name} was sad.', 'attribution', 2)\n"
        f"curve = evaluate(model, pairs, Circuit.load({str(tmp_path / 'circuit')!r}))\n"
        "print(repr(curve.faithfulness.tolist()), repr(curve.completeness.tolist()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"{here.faithfulness.tolist()!r} {here.completeness.tolist()!r}"


def _shared() -> Path:
    return Path(os.environ.get("TNC_SHARED_MODELS", Path(__file__).resolve().parents[3] / "shared" / "models"))


@for_each("damage", ["missing", "truncated", "foreign", "short", "older", "an edge to nowhere"])
def test_damaged_directories_are_errors(circuit: Circuit, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "circuit"
    circuit.save(path)
    if damage == "missing":
        (path / "circuit.safetensors").unlink()
    elif damage == "truncated":
        file = path / "circuit.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        (path / "circuit.safetensors").write_bytes(b"another")
    elif damage == "older":
        edit(path / "circuit.safetensors", lambda head, _: head.update(schema=2))
    elif damage == "an edge to nowhere":
        edit(path / "circuit.safetensors", lambda _, tensors: tensors["edges/source"].fill_(-1))
    else:
        edit(path / "circuit.safetensors", lambda head, _: head["notes"]["texts"]["node"].pop())
    with pytest.raises(FileFormatError):
        Circuit.load(path)


def test_evaluate_takes_circuits(stories260K: Any) -> None:
    """The same nodes by the same scores are the same set, however they are given."""
    train, test = (pronoun_pairs("{name} was sad.", part, 2) for part in ("attribution", "evaluation"))
    circuit = trace(stories260K, train, nodes=50)
    by_circuit = evaluate(stories260K, test, circuit)
    by_scores = evaluate(stories260K, test, attribute(stories260K, train), sizes=[50])
    assert by_circuit.sizes == (50,)
    skipped = circuit.settings["skipped_positions"]
    top = attribute(stories260K, train).top(50)
    if set(top["label"]) == circuit.members and not (set(skipped) & set(top["position"])):
        torch.testing.assert_close(by_circuit.kept, by_scores.kept)
    assert 0.05 < float(by_circuit.faithfulness[0]) < 1.5
    wide = evaluate(stories260K, test, circuit.sum_positions())
    assert wide.settings["positions"] == "sum"


def test_reprs_are_one_line(circuit: Circuit) -> None:
    assert "\n" not in repr(circuit)
    assert repr(circuit).startswith("Circuit(30 nodes")
    assert "<table" in circuit._repr_html_()
