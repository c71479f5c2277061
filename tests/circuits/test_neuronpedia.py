"""The exported graph is what Neuronpedia reads, and comes back whole."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.circuits.checks import assert_sums_hold, small_circuit
from tests.families import all_models
from tl_neuron_circuits import Circuit, trace
from tl_neuron_circuits._errors import FileFormatError, SettingsError

CASE = all_models("gpt2")[0].values[0]
TEXT, NUMBER = str, (int, float)
METADATA = {"slug": TEXT, "scan": TEXT, "prompt_tokens": list, "prompt": TEXT, "transcoder_list": list}
QUERY = {"pinnedIds": list, "supernodes": list, "linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT}
NODE = {
    "node_id": TEXT, "feature": int, "layer": TEXT, "ctx_idx": int, "feature_type": TEXT, "jsNodeId": TEXT,
    "clerp": TEXT, "influence": NUMBER, "token_prob": NUMBER, "is_target_logit": bool,
}  # fmt: skip
TYPES = {"cross layer transcoder", "embedding", "logit", "mlp reconstruction error", "bias"}


def assert_fields(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, kind in expected.items():
        assert isinstance(found[name], kind), f"{name} is {found.get(name)!r}, expected {kind}"


def shown_nodes(graph: dict[str, Any]) -> set[str]:
    """What circuit-tracer's frontend shows at first: its rules of influence, and of features that are everywhere."""
    threshold = graph["metadata"]["node_threshold"]
    kept = [
        n for n in graph["nodes"]
        if not threshold or n["feature_type"] in ("embedding", "logit") or n["influence"] <= threshold
    ]  # fmt: skip
    of_feature: dict[str, list[str]] = {}
    for node in kept:
        end = f"__err_{node['ctx_idx']}" if "error" in node["feature_type"] else ""
        of_feature.setdefault(f"{node['layer']}_{node['feature']}_{node['ctx_idx']}{end}", []).append(node["node_id"])
    limit = len(graph["metadata"]["prompt_tokens"]) * 2 / 3
    return {name for same in of_feature.values() if len(same) <= limit for name in same}


def assert_is_a_graph(graph: dict[str, Any]) -> None:
    """The schema of ECOSYSTEM.md."""
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    assert_fields(graph["metadata"], METADATA)
    assert graph["metadata"]["schema_version"] == 1
    assert_fields(graph["metadata"]["info"]["generator"], {"name": TEXT, "version": TEXT, "url": TEXT})
    assert_fields(graph["qParams"], QUERY)
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids) == len({node["jsNodeId"] for node in graph["nodes"]})
    assert len(shown_nodes(graph)) == len(ids)
    for node in graph["nodes"]:
        assert_fields(node, NODE)
        assert node["feature_type"] in TYPES
        assert 0 <= node["influence"] <= 1 and 0 <= node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"])
        first, unit, position = node["node_id"].split("_")
        assert int(position) == node["ctx_idx"]
        if node["feature_type"] == "cross layer transcoder":
            x, y = int(first), int(unit)
            assert (node["layer"], node["jsNodeId"]) == (first, f"{x}_{y}-{position}")
            assert node["feature"] == (x + y) * (x + y + 1) // 2 + y
        if node["feature_type"] == "logit":
            assert node["clerp"].startswith('Output "') and "(p=" in node["clerp"]
        assert (first == "E") == (node["feature_type"] == "embedding")
        assert (first == "err") == (node["feature_type"] == "mlp reconstruction error")
        assert (first == "bias") == (node["feature_type"] == "bias")
        assert not (first == "err" and node["node_id"] in graph["qParams"]["pinnedIds"])
    for link in graph["links"]:
        assert set(link) == {"source", "target", "weight"}
        assert link["source"] in ids and link["target"] in ids and isinstance(link["weight"], float)
    for label, *members in graph["qParams"]["supernodes"]:
        assert isinstance(label, str) and members and set(members) <= set(ids)


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    circuit = small_circuit(CASE, 30)
    neurons = circuit.nodes.query("kind == 'neuron'")["node"].tolist()
    return circuit.group({"one": neurons[:3], "two": neurons[3:5]}).label({neurons[0]: "the first"})


@pytest.fixture
def path(circuit: Circuit, tmp_path: Path) -> Path:
    circuit.to_neuronpedia(tmp_path / "graph.json", slug="a-slug", scan="a-model")
    return tmp_path / "graph.json"


def test_the_file_is_an_attribution_graph(circuit: Circuit, path: Path) -> None:
    graph = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert_is_a_graph(graph)
    assert (graph["metadata"]["slug"], graph["metadata"]["scan"]) == ("a-slug", "a-model")
    assert len(graph["nodes"]) == len(circuit.nodes) and len(graph["links"]) == len(circuit.edges)
    assert [len(group) for group in graph["qParams"]["supernodes"]] == [4, 3]
    assert "the first" in [node["clerp"] for node in graph["nodes"]]


def test_links_into_a_unit_sum_to_its_activation(path: Path) -> None:
    graph = json.loads(path.read_text())
    for node in graph["nodes"]:
        if node["feature_type"] in ("cross layer transcoder", "logit"):
            total = sum(link["weight"] for link in graph["links"] if link["target"] == node["node_id"])
            assert total == pytest.approx(node["activation"], abs=1e-9)


def test_our_own_graphs_come_back_whole(circuit: Circuit, path: Path) -> None:
    back = Circuit.from_neuronpedia(path)
    pd.testing.assert_frame_equal(back.nodes, circuit.nodes)
    pd.testing.assert_frame_equal(back.edges, circuit.edges)
    assert dict(back.settings) == dict(circuit.settings)
    assert_sums_hold(back.prune(edges=40))


def test_graphs_of_other_programs_are_read_as_far_as_they_say(circuit: Circuit, path: Path) -> None:
    graph = json.loads(path.read_text())
    graph["metadata"]["info"] = {"generator": {"name": "another"}}
    path.write_text(json.dumps(graph))
    back = Circuit.from_neuronpedia(path)
    assert len(back) == len(circuit)
    assert back.settings["model"] == "a-model"
    assert sorted(back.edges["weight"]) == sorted(circuit.edges["weight"])
    assert set(back.nodes["kind"]) == {"feature", "embedding", "logit", "error", "bias"}
    assert (
        back.nodes.query("kind == 'feature'")["unit"].tolist()
        == circuit.nodes.query("kind == 'neuron'")["unit"].tolist()
    )
    key = lambda c: sorted(c.nodes.loc[c.nodes["kind"].isin(("neuron", "feature")), "influence"])  # noqa: E731
    assert key(back) == pytest.approx(key(circuit))
    assert len(back.prune(node_influence=0.5)) < len(back)
    with pytest.raises(SettingsError, match="were imported"):
        back.to_scores()


def test_a_graph_survives_without_groups_and_with_pairs_of_tokens(stories260K: Any, tmp_path: Path) -> None:
    prompt = "Once upon a time, there was a little girl named Lily."
    circuit = trace(stories260K, prompt, target=(" She", " He"), nodes=20)
    circuit.to_neuronpedia(tmp_path / "graph.json")
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert_is_a_graph(graph)
    assert graph["metadata"]["slug"] == "once-upon-a-time-there-was-a-little-girl-named-lily"
    assert [node["clerp"] for node in graph["nodes"] if node["feature_type"] == "embedding"][1] == " Once"


def test_supernodes_and_summed_positions_cannot_be_exported(circuit: Circuit, tmp_path: Path) -> None:
    for without in (circuit.collapse(), circuit.sum_positions()):
        with pytest.raises(SettingsError, match="before collapse"):
            without.to_neuronpedia(tmp_path / "graph.json")


@pytest.mark.parametrize("damage", ["missing", "no json", "no graph", "twice", "lost link", "fewer nodes", "older"])
def test_damaged_graphs_are_errors(path: Path, damage: str) -> None:
    graph = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    elif damage == "no json":
        path.write_text(path.read_text()[:-50])
    elif damage == "no graph":
        path.write_text('{"a": 1}')
    else:
        if damage == "fewer nodes":
            graph["nodes"].pop()
        elif damage == "older":
            graph["metadata"]["info"]["tl_neuron_circuits"]["schema"] = 1
        else:
            graph["metadata"]["info"] = {}
            if damage == "twice":
                graph["nodes"].append(graph["nodes"][0])
            else:
                graph["links"][0]["source"] = "elsewhere"
        path.write_text(json.dumps(graph))
    with pytest.raises(FileFormatError):
        Circuit.from_neuronpedia(path)
