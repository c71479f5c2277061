"""Edges into q, k and v are EAP-IG's, and files are MIB's graphs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.components.test_component_edges import some_pairs
from tests.families import ModelCase, all_models, typical_models
from tests.loops import for_each
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.components import EdgeScores, component_edges
from tl_neuron_circuits.components._mib import _connected
from tl_neuron_circuits.evaluation import SparsityCurve

GPT2 = [case for case in all_models("gpt2") if case.values[0].backend == "HookedTransformer"]


@for_each("case", typical_models("gpt2", "llama"))
@for_each("method", ["eap", "eap_ig_inputs(steps=2)", "relp"])
def test_q_k_and_v_add_up_to_the_head(case: ModelCase, method: str) -> None:
    model = case.build()
    edges = component_edges(model, some_pairs(model), method=method, split_qkv=True)
    plain = component_edges(model, some_pairs(model), method=method)
    assert torch.allclose(edges.scores, plain.scores, equal_nan=True)
    assert edges.qkv is not None
    heads = ["/H" in name for name in edges.names]
    whole = edges.scores.nan_to_num()[:, heads]
    assert torch.allclose(edges.qkv.sum(0)[:, heads], whole, atol=1e-9 if case.backend == "HookedTransformer" else 1e-5)
    assert not edges.qkv[:, :, [not head for head in heads]].any()
    q, k, v = (edges.qkv[part].abs().sum() for part in range(3))
    assert v > 0 and (q == k == 0 if method == "relp" else min(q, k) > 0)  # relp's rules hold patterns fixed


@pytest.mark.parametrize("case", GPT2)
@pytest.mark.parametrize("steps", [1, 3])
def test_scores_are_those_of_eap_ig_over_split_inputs(case: ModelCase, steps: int) -> None:
    """The original's way: every head has three inputs of its own, and k / m runs from the corrupt embeddings."""
    model = case.build()
    pairs = some_pairs(model)
    found = component_edges(model, pairs, method=f"eap_ig_inputs(steps={steps})", split_qkv=True)
    assert found.qkv is not None
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.set_use_attn_result(True)
    (batch,) = pairs.batches(4)
    with torch.no_grad():
        runs = [model.run_with_cache(tokens)[1] for tokens in (batch.clean, batch.corrupt)]
    names = [f"blocks.{layer}.hook_{letter}_input" for layer in range(2) for letter in "qkv"]
    sums = {name: 0.0 for name in names}
    for step in range(steps):
        point = runs[1]["hook_embed"] + step / steps * (runs[0]["hook_embed"] - runs[1]["hook_embed"])
        kept: dict[str, Any] = {}
        hooks = [("hook_embed", lambda v, hook, p=point: p.clone().requires_grad_(True))]
        hooks += [(name, lambda v, hook, n=name, k=kept: k.update({n: v}) or v) for name in names]
        rows = torch.arange(4)
        logits = model.run_with_hooks(batch.clean, fwd_hooks=hooks)[:, -1]
        metric = (logits[rows, batch.answer] - logits[rows, batch.wrong_answer]).sum()
        for name, gradient in zip(names, torch.autograd.grad(metric, [kept[name] for name in names]), strict=True):
            sums[name] = sums[name] + gradient / steps
    change = {name: runs[0][name] - runs[1][name] for name in ("hook_embed", "blocks.0.attn.hook_result")}
    for part, letter in enumerate("qkv"):
        for head in range(4):
            for source, written in (
                ("embedding", change["hook_embed"]), ("L0/H2", change["blocks.0.attn.hook_result"][:, :, 2]),
            ):  # fmt: skip
                expected = (written * sums[f"blocks.1.hook_{letter}_input"][:, :, head]).sum() / 4
                place = part, found.names.index(source), found.names.index(f"L1/H{head}")
                assert float(found.qkv[place]) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("case", typical_models("gpt2", "pythia"))
def test_the_file_is_a_graph_of_mibs(case: ModelCase, tmp_path: Path) -> None:
    model = case.build()
    edges = component_edges(model, some_pairs(model), method="eap", split_qkv=True)
    edges.save(tmp_path / "edges")
    EdgeScores.load(tmp_path / "edges").to_mib(tmp_path / "circuit.json", n_edges=40)
    graph = json.loads((tmp_path / "circuit.json").read_text())
    parallel = case.family == "pythia"
    assert graph["cfg"] == {"n_layers": 2, "n_heads": 4, "d_model": 16, "parallel_attn_mlp": parallel}
    stream, names = ["input"], []
    for layer in range(2):  # as the original builds its graph
        heads, mlp = [f"a{layer}.h{head}" for head in range(4)], f"m{layer}"
        names += [f"{one}->{head}<{letter}>" for one in stream for head in heads for letter in "qkv"]
        names += [f"{one}->{mlp}" for one in (stream if parallel else [*stream, *heads])]
        stream += [*heads, mlp]
    names += [f"{one}->logits" for one in stream]
    assert set(graph["edges"]) == set(names)
    assert set(graph["nodes"]) == {*stream, "logits"}
    kept = [name for name, edge in graph["edges"].items() if edge["in_graph"]]
    assert graph["counts"] == {"edges": len(names), "requested": 40, "kept": len(kept)} and 0 < len(kept) <= 40
    largest = sorted((abs(edge["score"]) for edge in graph["edges"].values()), reverse=True)[39]
    assert all(abs(graph["edges"][name]["score"]) >= largest for name in kept)
    first = edges.top(1).iloc[0]
    assert first["score"] == pytest.approx(first["q"] + first["k"] + first["v"]) or "/H" not in first["target"]


@pytest.mark.parametrize("case", all_models("gpt2", "pythia"))
def test_files_read_and_written_back_are_equal(case: ModelCase, tmp_path: Path) -> None:
    model = case.build()
    edges = component_edges(model, some_pairs(model), method="eap", split_qkv=True)
    assert edges.qkv is not None
    edges.to_mib(tmp_path / "circuit.json", n_edges=40)
    found = EdgeScores.from_mib(tmp_path / "circuit.json")
    assert found.names == edges.names and found.qkv is not None and found.kept is not None
    assert torch.equal(found.qkv, edges.qkv.float())
    assert torch.allclose(found.scores, edges.scores.float(), equal_nan=True, atol=1e-6)
    found.to_mib(tmp_path / "again.json", n_edges=40)
    first, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("circuit", "again"))
    assert [key for key in first if key != "edges"] == [key for key in again if key != "edges"]
    for name, edge in first["edges"].items():
        assert again["edges"][name]["in_graph"] == edge["in_graph"]
        assert again["edges"][name]["score"] == pytest.approx(edge["score"], rel=1e-6, abs=1e-12)
    kept = {name.split("<")[0] for name, edge in first["edges"].items() if edge["in_graph"]}
    assert int(found.kept.sum()) == len(kept)
    del first["edges"]["input->m0"]
    (tmp_path / "again.json").write_text(json.dumps(first))
    with pytest.raises(FileFormatError, match="input->m0"):
        EdgeScores.from_mib(tmp_path / "again.json")


def test_nine_circuits_are_a_submission_and_come_back(tmp_path: Path) -> None:
    model = all_models("gpt2")[0].values[0].build()
    edges = component_edges(model, some_pairs(model), method="eap", split_qkv=True)
    for _ in range(2):  # one folder of circuits may replace another
        edges.to_mib(tmp_path / "ioi_gpt2", n_edges="mib")
    shares = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    files = sorted((tmp_path / "ioi_gpt2").iterdir(), key=lambda file: float(file.stem))
    assert [float(file.stem) for file in files] == shares
    before = torch.zeros_like(edges.scores, dtype=torch.bool)
    for share, file in zip(shares, files, strict=True):
        graph, found = json.loads(file.read_text()), EdgeScores.from_mib(file)
        n, kept = len(graph["edges"]), sum(edge["in_graph"] for edge in graph["edges"].values())
        assert graph["counts"] == {"edges": n, "requested": int(share * n), "kept": kept} and kept <= share * n
        assert found.kept is not None and bool((before <= found.kept).all())
        found.to_mib(tmp_path / "again.json", n_edges=int(share * n))
        again = EdgeScores.from_mib(tmp_path / "again.json")
        assert again.kept is not None and torch.equal(found.kept, again.kept)
        assert found.qkv is not None and again.qkv is not None and torch.equal(found.qkv, again.qkv)
        before = found.kept
    assert before.any()
    (tmp_path / "ioi_gpt2" / "notes.txt").write_text("mine")
    for path in (tmp_path / "ioi_gpt2", tmp_path / "again.json"):
        with pytest.raises(FileFormatError, match="notes.txt|a file"):
            edges.to_mib(path, n_edges="mib")


def test_circuits_lose_what_lies_on_no_path() -> None:
    kept, nodes = _connected({("input", "m0"), ("m0", "logits"), ("a0.h0", "m1"), ("m1", "logits"), ("m0", "a1.h0<q>")})
    assert kept == {("input", "m0"), ("m0", "logits")} and nodes == {"input", "m0", "logits"}


def test_what_mib_has_no_form_for_is_refused(tmp_path: Path) -> None:
    model = all_models("gpt2")[0].values[0].build()
    plain = component_edges(model, some_pairs(model), method="eap")
    with pytest.raises(SettingsError, match="split_qkv=True"):
        plain.to_mib(tmp_path / "graph.json")
    with pytest.raises(SettingsError, match="gradients into single heads"):
        component_edges(model, some_pairs(model), method="patching", split_qkv=True)
    split = component_edges(model, some_pairs(model), method="eap", split_qkv=True)
    with pytest.raises(SettingsError, match="between 0 and"):
        split.to_mib(tmp_path / "graph.json", n_edges=10**6)


def test_mibs_areas_truncate_sizes() -> None:
    """Of 150 nodes: int(p * 150) = 0, 0, 0, 1, 3, 7, 15, 30, 75, 150."""
    ramp = torch.linspace(0, 1, 151)[:, None].double()
    curve = SparsityCurve(
        tuple(range(151)),
        ramp,
        1 - ramp,
        torch.ones(1).double(),
        torch.zeros(1).double(),
        torch.zeros(151),
        150,
        {},
        None,
    )
    sizes = [0, 0, 0, 1, 3, 7, 15, 30, 75, 150]
    fractions = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    faithfulness = [size / 150 for size in sizes]
    expected = sum((b - a) * (f + g) / 2 for a, b, f, g in
                   zip(fractions, fractions[1:], faithfulness, faithfulness[1:], strict=False))  # fmt: skip
    assert curve.mib_areas(truncate=True)[0] == pytest.approx(expected)
    assert curve.mib_areas() == (curve.cpr, curve.cmd) and curve.cpr != pytest.approx(expected, abs=1e-5)
