"""Cross-layer transcoders: random ones, whose features write into their own and all later layers.

A slow replica holds the replacement model in the open (`replacement_by_hand`), and circuit-tracer 0.5.0 gave the graph
scores of one of them.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.circuits.checks import assert_sums_hold
from tests.circuits.replacement_by_hand import FrozenReplacement
from tests.families import MAJOR, all_models, random_tokens
from tl_neuron_circuits import attribute, bases, evaluate, load_demo_model, steer, trace
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.bases import Dictionaries, Dictionary
from tl_neuron_circuits.interventions import ablation_hooks
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.transcoders import fidelity

D_DICT = 8
CASES = all_models("gpt2")
RANDOM = pytest.mark.filterwarnings("ignore:dictionaries leave more than 0.9 of the variance")


def cross_layer(n_layers: int, d_model: int, hook_in: str, dtype: torch.dtype = torch.float64) -> list[Dictionary]:
    """A random cross-layer transcoder; about half of its features fire. The last layer has a threshold of its own."""
    generator = torch.Generator().manual_seed(5)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    layers = []
    for layer in range(n_layers):
        tensors = {
            "W_enc": make(d_model, D_DICT) / 3, "W_dec": make(D_DICT, d_model) / 3, "b_dec": make(d_model),
            "b_enc": 0.3 * make(D_DICT), "W_dec_later": make(n_layers - 1 - layer, D_DICT, d_model) / 3,
        }  # fmt: skip
        hooks = {"hook_in": f"blocks.{layer}.{hook_in}", "hook_out": f"blocks.{layer}.hook_mlp_out"}
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        layers.append(Dictionary("cross_layer_transcoder", **tensors, **hooks))
    return layers


@cache
def four_layers() -> Any:
    """The demo model in float64: four layers, so that features skip some."""
    return load_demo_model().to(torch.float64)


def demo_basis(model: Any) -> Dictionaries:
    hook_in = "ln2.hook_normalized" if "blocks.0.ln2.hook_normalized" in model.hook_dict else "mlp.hook_in"
    return Dictionaries(cross_layer(4, model.cfg.d_model, hook_in))


def pairs_of(model: Any, n: int = 3) -> TokenizedPairs:
    clean, corrupt = random_tokens(model, n, 5), random_tokens(model, n, 5, seed=9)
    return TokenizedPairs.from_tokens(clean, corrupt[:, 0], corrupt, corrupt[:, 1])


@pytest.mark.parametrize("case", CASES)
def test_every_edge_and_score_is_there_and_nothing_is_lost(case: Any) -> None:
    model = case.build()
    basis = Dictionaries(cross_layer(2, model.cfg.d_model, "ln2.hook_normalized"))
    circuit = trace(model, random_tokens(model, 1, 5), basis=basis, nodes=10)
    assert_sums_hold(circuit, max(case.tolerance, 1e-9))
    ends = circuit.nodes[circuit.nodes["kind"].isin(("embedding", "bias", "error"))]
    assert ends["score"].sum() == pytest.approx(circuit.target_value, rel=max(case.tolerance, 1e-6))
    assert_sums_hold(trace(model, pairs_of(model), basis=basis, nodes=10), max(case.tolerance, 1e-9))


def test_weights_left_in_their_files_give_the_same_circuit(tmp_path: Path) -> None:
    model = four_layers()
    basis, tokens = demo_basis(model), random_tokens(model, 1, 5)
    for layer, d in enumerate(basis.dictionaries):
        assert d.W_dec_later is not None and d.b_enc is not None
        encoder = {"W_enc": d.W_enc.T.contiguous(), "b_enc": d.b_enc, "b_dec": d.b_dec}
        save_file({f"{name}_{layer}": t for name, t in encoder.items()}, tmp_path / f"W_enc_{layer}.safetensors")
        decoder = torch.cat([d.W_dec[:, None], d.W_dec_later.transpose(0, 1)], 1).contiguous()
        save_file({f"W_dec_{layer}": decoder}, tmp_path / f"W_dec_{layer}.safetensors")
    hook_in = str(basis.dictionaries[0].hook_in).removeprefix("blocks.0.")
    (tmp_path / "config.yaml").write_text(f"feature_input_hook: {hook_in}\nfeature_output_hook: hook_mlp_out\n")
    lazy = Dictionaries(bases.load_dictionaries(tmp_path, lazy=True))
    found, expected = (trace(model, tokens, basis=one, nodes=16) for one in (lazy, basis))
    assert found.nodes["node"].tolist() == expected.nodes["node"].tolist()
    for table in ("nodes", "edges"):
        keys = ["node"] if table == "nodes" else ["source", "target"]
        one, other = (getattr(c, table).sort_values(keys) for c in (found, expected))
        for column in ("attribution", "weight") if table == "edges" else ("score", "activation", "influence"):
            np.testing.assert_allclose(one[column], other[column], rtol=1e-9, atol=1e-12)


def test_edges_equal_finite_differences_over_layers_that_are_skipped() -> None:
    model = four_layers()
    basis, tokens = demo_basis(model), random_tokens(model, 1, 4)
    circuit = trace(model, tokens, (3, 4), basis=basis, nodes=16)
    assert_sums_hold(circuit, 1e-7)
    slow = FrozenReplacement(model, tokens, basis)
    explained = lambda logits, _: logits[0, -1, 3] - logits[0, -1, 4]  # noqa: E731
    clean = slow(explained)
    nodes, reached = circuit.nodes.set_index("node"), set()
    rows: Any = circuit.nodes[circuit.nodes["kind"] == "feature"].itertuples()
    for row in rows:
        change: Any = {"feature": ((row.layer, row.position, row.unit), row.activation)}
        assert slow(explained, **change) - clean == pytest.approx(row.score, rel=1e-5, abs=1e-5), row.node
        for edge in circuit.edges[circuit.edges["source"] == row.node].itertuples():
            target: Any = nodes.loc[edge.target]
            at = (target["layer"], target["position"], target["unit"])
            read = explained if target["kind"] == "logit" else lambda _, seen, at=at: seen[at[0]][0, at[1], at[2]]
            direct = slow(read, **change, direct=True) - slow(read, direct=True)
            assert direct == pytest.approx(edge.weight, rel=1e-5, abs=1e-5), (edge.source, edge.target)
            reached.add((row.layer, target["layer"]))
    assert {b - a for a, b in reached} >= {1, 2, 3}


@RANDOM
def test_scores_are_gradients_over_all_places_that_a_feature_writes_to() -> None:
    model = four_layers()
    basis, pairs = demo_basis(model), pairs_of(model)
    scores = attribute(model, pairs, method="gradient", basis=basis)
    outputs = [f"blocks.{layer}.hook_mlp_out" for layer in range(4)]
    expected = {hook: torch.zeros(5, D_DICT) for hook in outputs}
    errors = {hook: torch.zeros(5) for hook in outputs}
    layers = basis.dictionaries
    for row in range(len(pairs)):
        values: list[Any] = []
        for tokens in (pairs.clean[row], pairs.corrupt[row]):
            _, cache = model.run_with_cache(tokens[None])
            values.append({name: cache[name].detach() for d in layers for name in (d.hook_in, d.hook_out)})
        kept: dict[str, Any] = {}
        hooks = [(name, lambda v, hook, n=name, k=kept: k.update({n: v.requires_grad_(True)}) or v) for name in outputs]
        with torch.enable_grad():
            logits = model.run_with_hooks(pairs.clean[row][None], fwd_hooks=hooks)
            metric = logits[0, -1, int(pairs.answer[row])] - logits[0, -1, int(pairs.wrong_answer[row])]
            gradients = dict(zip(outputs, torch.autograd.grad(metric, [kept[name] for name in outputs]), strict=True))
        features = [[d.encode(run[d.hook_in])[0] for d in layers] for run in values]
        for layer, d in enumerate(layers):
            slope = gradients[outputs[layer]][0] @ d.W_dec.T
            for later in range(d.n_later):
                slope = slope + gradients[outputs[layer + 1 + later]][0] @ d.W_dec_later[later].T
            expected[outputs[layer]] += ((features[0][layer] - features[1][layer]) * slope).float() / len(pairs)
            error = [
                run[outputs[layer]][0] - d.b_dec - own[layer] @ d.W_dec
                for run, own in zip(values, features, strict=True)
            ]
            for k, own in enumerate(features):
                for before in range(layer):
                    error[k] = error[k] - own[before] @ layers[before].W_dec_later[layer - before - 1]
            errors[outputs[layer]] += ((error[0] - error[1]) * gradients[outputs[layer]][0]).sum(-1).float() / len(
                pairs
            )
    for name in outputs:
        torch.testing.assert_close(scores.values[name], expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.errors[name], errors[name], rtol=1e-4, atol=1e-5)


def test_an_ablated_feature_is_gone_from_all_layers_that_it_writes_to() -> None:
    model = four_layers()
    basis, tokens = demo_basis(model), random_tokens(model, 1, 4)
    sites = basis.sites(model)
    first = sites[0].dictionary
    keep = torch.ones(D_DICT, dtype=torch.bool)
    keep[3] = False
    hooks = ablation_hooks(sites, {(sites[0].hook, "node"): keep}, {site.hook: None for site in sites})
    with torch.no_grad():
        found = model.run_with_hooks(tokens, fwd_hooks=hooks)
    seen: dict[str, Any] = {}

    def take_out(value: Any, hook: Any, layer: int) -> Any:
        decoder = first.W_dec if layer == 0 else first.W_dec_later[layer - 1]
        return value - seen["f"][..., 3:4] * decoder[3]

    slow = [(sites[0].hook_in, lambda value, hook: seen.update(f=first.encode(value)))]
    slow += [(site.hook, lambda v, hook, layer=layer: take_out(v, hook, layer)) for layer, site in enumerate(sites)]
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=slow)
        plain = model(tokens)
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().max() > 1e-3


@RANDOM
def test_circuits_are_evaluated_and_graph_scores_are_between_zero_and_one() -> None:
    model = four_layers()
    basis, pairs = demo_basis(model), pairs_of(model, 4)
    circuit = trace(model, pairs, basis=basis, nodes=20)
    curve = evaluate(model, pairs, circuit, ablation="zero")
    assert np.isfinite(curve.to_dataframe()["faithfulness"]).all()
    whole = evaluate(model, pairs, attribute(model, pairs, basis=basis), sizes=[4 * 5 * D_DICT], error_nodes="keep")
    assert float(whole.to_dataframe()["faithfulness"].iloc[0]) == pytest.approx(1.0, abs=1e-6)
    single = trace(model, random_tokens(model, 1, 4), basis=basis, nodes=20)
    assert all(0 < score < 1 for score in single.graph_scores())


def test_edges_from_features_of_several_layers_are_not_split_by_head() -> None:
    """Those from embeddings, errors and the last layer are, and their parts sum to them."""
    model = four_layers()
    circuit = trace(model, random_tokens(model, 1, 4), (3, 4), basis=demo_basis(model), nodes=16)
    nodes = circuit.nodes.set_index("node")
    kind, layer = nodes.loc[circuit.edges["source"], "kind"], nodes.loc[circuit.edges["source"], "layer"]
    several = ((kind == "feature") & (layer < 3)).to_numpy()
    ends = nodes.loc[circuit.edges["target"], "kind"].isin(("feature", "logit")).to_numpy()
    single = circuit.edges[~several & ends & kind.isin(("embedding", "error", "feature")).to_numpy()]
    parts = circuit.heads(single.head(30))
    sums = parts.groupby(["source", "target"])["part"].sum()
    for edge in single.head(30).itertuples():
        assert float(sums[edge.source, edge.target]) == pytest.approx(edge.weight, rel=1e-6, abs=1e-9)
    assert {"embedding", "error"} <= set(nodes.loc[single.head(30)["source"], "kind"])
    with pytest.raises(SettingsError, match="write into 3 later layers"):
        circuit.heads(circuit.edges[several & (layer == 0).to_numpy()].head(1))


def test_fidelity_replaces_each_layer_by_what_all_earlier_ones_write() -> None:
    model = four_layers()
    basis, tokens = demo_basis(model), random_tokens(model, 4, 8)
    measured = fidelity(model, list(basis.dictionaries), tokens, baselines=False)
    layers, seen = basis.dictionaries, {}

    def replace(value: Any, hook: Any, layer: int) -> Any:
        features = [d.encode(seen[d.hook_in]) for d in layers[: layer + 1]]
        out = features[layer] @ layers[layer].W_dec + layers[layer].b_dec
        for before in range(layer):
            out = out + features[before] @ layers[before].W_dec_later[layer - before - 1]
        return out

    hooks = [(d.hook_in, lambda v, hook, name=d.hook_in: seen.update({name: v})) for d in layers]
    hooks += [(d.hook_out, lambda v, hook, layer=d.layer: replace(v, hook, layer)) for d in layers]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, :-1].log_softmax(-1)
    loss = -logits.gather(-1, tokens[:, 1:, None]).mean()
    assert measured.of("transcoder").loc["all", "loss"] == pytest.approx(float(loss), rel=1e-4)


def test_what_takes_one_place_at_a_time_refuses_them() -> None:
    model = four_layers()
    basis, pairs = demo_basis(model), pairs_of(model)
    for method in ("patching", "integrated_gradients"):
        with pytest.raises(SettingsError, match="cross-layer"):
            attribute(model, pairs, method=method, basis=basis)
    with pytest.raises(SettingsError, match="cross-layer"):
        steer(model, pairs.clean[0][None], ["L0/F1"], scale=0.0, basis=basis)
    with pytest.raises(SettingsError, match="layers 0 to 3"):
        trace(model, pairs, basis=Dictionaries(list(basis.dictionaries)[1:]), nodes=5)
    site = basis.sites(model)[1]
    parts = bases._site.Parts(torch.zeros(1, 2, D_DICT), {"error": torch.zeros(1, 2, model.cfg.d_model)})
    with pytest.raises(SettingsError, match="cross-layer"):
        site.put_together(parts, torch.zeros(1, 2, model.cfg.d_model))


@pytest.mark.skipif(CASES[0].values[0].backend != "HookedTransformer", reason="the numbers are of a HookedTransformer")
@pytest.mark.skipif(MAJOR < 3, reason="TransformerLens 2 has another value at ln2.hook_normalized, which they read")
def test_graph_scores_are_circuit_tracers() -> None:
    """Of circuit-tracer 0.5.0's `CrossLayerTranscoder` on the same model; all 26 features that reach logits."""
    model = CASES[0].values[0].build()
    basis = Dictionaries(cross_layer(2, model.cfg.d_model, "ln2.hook_normalized"))
    circuit = trace(model, random_tokens(model, 1, 5), basis=basis, nodes=26)
    assert circuit.graph_scores(zero_positions=[0]) == pytest.approx((0.519176667942213, 0.80172722870417), abs=2e-9)
    assert circuit.graph_scores() == pytest.approx((0.5137911864717882, 0.7997612494523478), abs=2e-9)
    for zeros, nodes, edges in (([0], 17, 32), ([], 19, 41)):
        pruned = circuit.prune(node_influence=0.9, edge_influence=0.95, zero_positions=zeros)
        kinds = pruned.nodes.set_index("node")["kind"]
        assert int(kinds.isin(("feature", "error", "embedding", "logit")).sum()) == nodes
        assert int(kinds[pruned.edges["source"]].isin(("feature", "error", "embedding")).sum()) == edges
