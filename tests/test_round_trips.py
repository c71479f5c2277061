"""Everyone's files, read and written back: the same. One row per format.

Dictionaries of other programs are written back as SAELens' folders, which hold every kind.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import tl_neuron_circuits as tnc
from tests.bases.test_dictionary_formats import pick, random_tensors, write_circuit_tracer, write_cross_layer
from tests.circuits.test_circuit_tracer import written_by_circuit_tracer
from tl_neuron_circuits.bases import Dictionary, load_dictionaries
from tl_neuron_circuits.circuits import compare_with_neuron_list
from tl_neuron_circuits.components import EdgeScores, component_edges
from tl_neuron_circuits.explain._descriptions import Descriptions

PROMPT = "The capital of the state containing Dallas is"
Format = Callable[[Path], tuple[Any, Any]]


def tables(circuit: tnc.Circuit) -> Any:
    parts = () if circuit.head_parts is None else (circuit.head_parts,)
    return (circuit.nodes, circuit.edges, *parts), dict(circuit.settings)


def our_graph(folder: Path) -> tuple[Any, Any]:
    model = tnc.load_demo_model()
    circuit = tnc.trace(model, PROMPT, " Austin", nodes=30).with_heads(edges=5).prune(edges=200)
    neurons = sorted(circuit.members)
    circuit = circuit.group({"two": neurons[:2]}).label({neurons[0]: "the first"})
    circuit.to_neuronpedia(folder / "graph.json")
    return tables(tnc.Circuit.from_neuronpedia(folder / "graph.json")), tables(circuit)


def saved_circuit(folder: Path) -> tuple[Any, Any]:
    model = tnc.load_demo_model()
    circuit = tnc.trace(model, [PROMPT, PROMPT.replace("Dallas", "Belgate")], [" Austin", " Augusta"], nodes=20)
    circuit.save(folder / "circuit")
    back = tnc.Circuit.load(folder / "circuit")
    return (*tables(back), back.by_prompt), (*tables(circuit), circuit.by_prompt)


def circuit_tracers_graph(folder: Path) -> tuple[Any, Any]:
    stored = Path(__file__).parent / "circuits" / "circuit_tracer_graph.json"
    (folder / "theirs.json").write_text(json.dumps(json.loads(stored.read_text(encoding="utf-8"))["graph"]))
    with pytest.warns(UserWarning, match="1 of 104 links"):
        circuit = tnc.Circuit.from_neuronpedia(folder / "theirs.json")
    circuit.to_neuronpedia(folder / "ours.json")
    files = [json.loads((folder / name).read_text()) for name in ("theirs.json", "ours.json")]
    for kind in ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit"):
        own = [[n for n in file["nodes"] if n["feature_type"] == kind] for file in files]
        for key in ("ctx_idx", "clerp", "activation", "token_prob", "is_target_logit", "influence"):
            theirs, ours = ([n.get(key) or None for n in nodes] for nodes in own)  # no text, number or influence
            assert theirs == ours or (kind, key) == ("logit", "influence")  # theirs has none
    return tables(tnc.Circuit.from_neuronpedia(folder / "ours.json")), tables(circuit)


def pinned_graph(folder: Path) -> tuple[Any, Any]:
    graph, _ = written_by_circuit_tracer(2)
    features = [n["node_id"] for n in graph["nodes"] if n["feature_type"].startswith("cross")]
    graph["qParams"] = {"pinnedIds": features[4:9], "supernodes": [["two", *features[4:6]]], "linkType": "both"}
    (folder / "theirs.json").write_text(json.dumps(graph))
    circuit = tnc.Circuit.from_neuronpedia(folder / "theirs.json")
    circuit.to_neuronpedia(folder / "ours.json")
    ours = json.loads((folder / "ours.json").read_text())["qParams"]
    return {name: ours[name] for name in graph["qParams"]}, graph["qParams"]


def weights(dictionaries: list[Dictionary]) -> list[Any]:
    return [(d.kind, d.hook_in, d.hook_out, d.k, d.apply_b_dec_to_input, d.tensors()) for d in dictionaries]


def written_back(folder: Path, source: Path) -> tuple[Any, Any]:
    read = load_dictionaries(source)
    for place, dictionary in enumerate(read):
        tnc.save_dictionary(dictionary, folder / "back" / f"layer-{place}")
    return weights(load_dictionaries(folder / "back")), weights(read)


def saelens(folder: Path) -> tuple[Any, Any]:
    for sae in tnc.load_demo_dictionaries("sae"):
        tnc.save_dictionary(sae, folder / "saes" / f"layer-{sae.layer}")
    return written_back(folder, folder / "saes")


def tracer(folder: Path) -> tuple[Any, Any]:
    write_circuit_tracer(folder / "set", threshold=True, skip=True)
    return written_back(folder, folder / "set")


def cross_layer(folder: Path) -> tuple[Any, Any]:
    write_cross_layer(folder / "clt", threshold=True)
    return written_back(folder, folder / "clt")


def gemma_scope(folder: Path) -> tuple[Any, Any]:
    path = folder / "gemma-scope-2b-pt-transcoders" / "layer_7" / "width_16k" / "params.npz"
    path.parent.mkdir(parents=True)
    t = random_tensors()
    np.savez(path, **{name: t[name].numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")})
    return written_back(folder, path)


def gemma_scope_2(folder: Path) -> tuple[Any, Any]:
    path = folder / "gemma-scope-2-1b-pt-transcoders" / "layer_3" / "params.safetensors"
    path.parent.mkdir(parents=True)
    t = pick(random_tensors(), "W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip")
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
    save_file({names.get(name, name): tensor for name, tensor in t.items()}, path)
    return written_back(folder, path.parent)


def sparsify(folder: Path) -> tuple[Any, Any]:
    t, place = random_tensors(), folder / "run" / "layers.2.mlp"
    place.mkdir(parents=True)
    tensors = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"]}
    save_file(tensors | pick(t, "W_dec", "b_dec", "W_skip"), place / "sae.safetensors")
    (place / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 3, "transcode": True}))
    return written_back(folder, folder / "run")


def neuron_list(folder: Path) -> tuple[Any, Any]:
    circuit = tnc.trace(tnc.load_demo_model(), PROMPT, " Austin", nodes=30)
    rows = [(2, 5, -1, 'a "quoted", label'), (3, 1, 1, ""), (1, 7, 1, "=x\u2028y")]
    published = pd.DataFrame(rows, columns=["layer", "unit", "sign", "label"])
    published.to_csv(folder / "theirs.csv", index=False)
    read = compare_with_neuron_list(circuit, folder / "theirs.csv").to_dataframe()
    read.to_csv(folder / "ours.csv", index=False)
    assert read[list(published)].equals(published)
    return compare_with_neuron_list(circuit, folder / "ours.csv").to_dataframe(), read


def mib(n_edges: int | None) -> Format:
    def check(folder: Path) -> tuple[Any, Any]:
        model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
        edges = component_edges(model, pairs, method="eap", split_qkv=True)
        edges.to_mib(folder / "first.json", n_edges=n_edges)
        read = EdgeScores.from_mib(folder / "first.json")
        read.to_mib(folder / "again.json", n_edges=n_edges)
        again = EdgeScores.from_mib(folder / "again.json")
        parts = [(e.names, e.scores.nan_to_num(-7.0), e.qkv, () if e.kept is None else e.kept) for e in (again, read)]
        assert edges.qkv is not None and read.qkv is not None and torch.equal(edges.qkv, read.qkv)
        return parts[0], parts[1]

    return check


def labels(write: str) -> Format:
    def check(folder: Path) -> tuple[Any, Any]:
        rows = '2,5,-1,"a ""quoted"", label"\n2,5,1,=x\u2028y\n3,1,1,cities\n'
        (folder / "theirs.csv").write_text(f"layer,unit,sign,label\n{rows}", encoding="utf-8")
        theirs = Descriptions.from_file(folder / "theirs.csv")
        getattr(theirs, write)(folder / "first")
        read = Descriptions.from_file(folder / "first")
        getattr(read, write)(folder / "again")
        again = Descriptions.from_file(folder / "again")
        texts = [[one.text(name) for name in ("L2/N5-", "L2/N5+", "L3/N1+")] for one in (theirs, read, again)]
        assert texts[0] == texts[1] == ['a "quoted", label', "=x\u2028y", "cities"]
        return (again.table, texts[2]), (read.table, texts[1])

    return check


FORMATS: dict[str, Format] = {
    "our circuits": saved_circuit,
    "our attribution graphs": our_graph,
    "circuit-tracer's attribution graphs": circuit_tracers_graph,
    "graphs with pinned nodes": pinned_graph,
    "SAELens folders": saelens,
    "circuit-tracer's transcoders": tracer,
    "circuit-tracer's cross-layer transcoders": cross_layer,
    "Gemma Scope": gemma_scope,
    "Gemma Scope 2": gemma_scope_2,
    "sparsify folders": sparsify,
    "neuron lists": neuron_list,
    "MIB's scores": mib(None),
    "MIB's circuits": mib(300),
    "MIB's circuit of no edges": mib(0),
    "labels as CSV": labels("to_csv"),
    "labels as JSON": labels("to_json"),
    "Neuronpedia's explanations": labels("to_neuronpedia"),
}


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the bit, whatever is inside what."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_written_back_equal(name: str, tmp_path: Path) -> None:
    assert_same(*FORMATS[name](tmp_path))


def test_twelve_graphs_with_collisions_load(tmp_path: Path) -> None:
    """Errors share ids with features of layer 0 in each; every link is there, whole or halved between the two."""
    halved = 0
    for seed in range(12):
        graph, truth = written_by_circuit_tracer(seed)
        ids = [node["node_id"] for node in graph["nodes"]]
        assert len(ids) > len(set(ids))
        (tmp_path / "graph.json").write_text(json.dumps(graph))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            circuit = tnc.Circuit.from_neuronpedia(tmp_path / "graph.json")
        assert len(circuit.nodes) == len(ids) and circuit.nodes["node"].is_unique
        found = {(s, t): w for s, t, w in circuit.edges[["source", "target", "weight"]].itertuples(index=False)}
        assert sum(found.values()) == pytest.approx(sum(truth.values()))
        wrong = [edge for edge in found.keys() | truth.keys() if found.get(edge, 0.0) != truth.get(edge, 0.0)]
        assert len(wrong) <= 0.1 * len(truth)
        halved += len(wrong)
        assert_same(tables(back_again(circuit, tmp_path)), tables(circuit))
    assert halved > 0  # some graphs do not say


def back_again(circuit: tnc.Circuit, folder: Path) -> tnc.Circuit:
    circuit.to_neuronpedia(folder / "ours.json")
    return tnc.Circuit.from_neuronpedia(folder / "ours.json")
