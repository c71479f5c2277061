"""CircuitLasso on small models: its weights are those of a plain regression on cached activations."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, model_cases, random_tokens
from tests.lasso.problems import standardized_columns
from tests.loops import for_each
from tests.planted.load import load_planted
from tl_neuron_circuits._errors import FileFormatError, NumericalError, SettingsError
from tl_neuron_circuits.bases import Neurons
from tl_neuron_circuits.circuits import Circuit
from tl_neuron_circuits.lasso import CircuitLasso, Components, HeldOut, LassoCircuit, MostEdges, Share
from tl_neuron_circuits.lasso._observations import Noise, build_observer
from tl_neuron_circuits.tasks import TokenizedPairs, logit_difference

CASES = [pytest.param(case, id=case.id) for case in model_cases("gpt2", "pythia")]
SMALL = {"readout": "none", "blocks": 2, "skip_positions": 0}
PATHS = ("blocks.{}.attn.hook_z", "blocks.{}.hook_mlp_out")


@pytest.fixture(scope="module")
def gpt2():
    return model_cases("gpt2")[0].build()


def cached(model, tokens: Tensor) -> dict[str, Tensor]:
    """Values by node name, straight from the cache."""
    _, cache = model.run_with_cache(tokens)
    found = {"embedding": cache["blocks.0.hook_resid_pre"]}
    for layer in range(model.cfg.n_layers):
        z = cache[f"blocks.{layer}.attn.hook_z"].reshape(*tokens.shape, model.cfg.n_heads, -1)
        found |= {f"L{layer}/H{head}": z[:, :, head] for head in range(model.cfg.n_heads)}
        found[f"L{layer}/MLP"] = cache[f"blocks.{layer}.hook_mlp_out"]
    return {name: value.double() for name, value in found.items()}


def slow_norms(x: Tensor, y: Tensor, owners: list[str], alpha: float) -> dict[str, float]:
    """Frobenius norm of every source's block in scikit-learn's lasso of y on x, both standardized."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y = standardized_columns(x).numpy(), standardized_columns(y).numpy()
    model = sklearn.Lasso(alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=100_000)
    weights = np.stack([model.fit(x, column).coef_ for column in y.T], 1)
    names = np.array(owners)
    return {name: float(np.linalg.norm(weights[names == name])) for name in dict.fromkeys(owners)}


def norms_into(circuit: LassoCircuit, target: str) -> dict[str, float]:
    edges = circuit.edges[circuit.edges["target"] == target]
    return dict(zip(edges["source"], edges["norm"], strict=True))


def assert_same_norms(found: dict[str, float], expected: dict[str, float]) -> None:
    assert any(norm > 0.05 for norm in expected.values())
    for name, norm in expected.items():
        assert found.get(name, 0.0) == pytest.approx(norm, abs=2e-4), name


def columns(values: dict[str, Tensor], names: list[str]) -> list[str]:
    return [name for name in names for _ in range(values[name].shape[-1])]


@for_each("case", CASES)
@for_each("target", ["L1/H0", "L0/MLP"])
def test_weights_are_those_of_a_regression_on_cached_activations(case: ModelCase, target: str) -> None:
    model = case.build()
    tokens = random_tokens(model, batch=30, pos=5)
    circuit = CircuitLasso(regressors="same", penalty=Share(0.2), tolerance=1e-9, **SMALL).fit(model, tokens)
    values = cached(model, tokens)
    before = [n for n in values if n == "embedding" or (n[1] < target[1])]
    if target == "L0/MLP" and case.family == "gpt2":  # in parallel blocks the MLP does not see its layer's heads
        before += [f"L0/H{head}" for head in range(4)]
    x = torch.cat([values[name] for name in before], -1).flatten(0, 1)
    expected = slow_norms(x, values[target].flatten(0, 1), columns(values, before), circuit.settings["penalty"] / 300)
    assert_same_norms(norms_into(circuit, target), expected)
    assert set(norms_into(circuit, target)) <= set(before)


def test_pooled_lets_attention_alone_see_the_mean_of_what_it_can_see(gpt2) -> None:
    tokens = random_tokens(gpt2, batch=30, pos=5)
    circuit = CircuitLasso(regressors="pooled", penalty=Share(0.2), tolerance=1e-9, **SMALL).fit(gpt2, tokens)
    values = cached(gpt2, tokens)
    now = values["embedding"]
    mean = torch.stack([now[:, : t + 1].mean(1) for t in range(5)], 1)
    both, alpha = torch.cat([now, mean], -1).flatten(0, 1), circuit.settings["penalty"] / 300
    expected = slow_norms(both, values["L0/H1"].flatten(0, 1), ["embedding"] * 32, alpha)
    assert_same_norms(norms_into(circuit, "L0/H1"), expected)
    before = ["embedding", *(f"L0/H{head}" for head in range(4))]
    x = torch.cat([values[name] for name in before], -1).flatten(0, 1)
    expected = slow_norms(x, values["L0/MLP"].flatten(0, 1), columns(values, before), alpha)
    assert_same_norms(norms_into(circuit, "L0/MLP"), expected)


def test_earlier_positions_are_columns_of_their_own(gpt2) -> None:
    tokens = random_tokens(gpt2, batch=60, pos=3)
    circuit = CircuitLasso(regressors="earlier", penalty=Share(0.3), tolerance=1e-9, **SMALL).fit(gpt2, tokens)
    values = cached(gpt2, tokens)
    alpha = circuit.settings["penalty"] / 120
    total = 0.0
    for t in range(3):
        x = values["embedding"][:, : t + 1].flatten(1)
        owners = ["embedding"] * x.shape[1]
        total += slow_norms(x, values["L0/H2"][:, t], owners, alpha)["embedding"] ** 2
    assert norms_into(circuit, "L0/H2")["embedding"] == pytest.approx(total**0.5, abs=2e-4)


@pytest.mark.parametrize("regressors", ["same", "pooled", "earlier"])
def test_batches_do_not_matter_and_neither_does_a_second_run(gpt2, regressors: str) -> None:
    tokens = random_tokens(gpt2, batch=20, pos=4)
    lasso = CircuitLasso(regressors=regressors, penalty=Share(0.3), **SMALL)
    one, other, again = (lasso.fit(gpt2, tokens, batch_size=size) for size in (3, 20, 3))
    pd.testing.assert_frame_equal(one.edges, again.edges)
    pd.testing.assert_frame_equal(
        one.edges.sort_values(["source", "target"], ignore_index=True),
        other.edges.sort_values(["source", "target"], ignore_index=True),
        atol=1e-6,
    )


def test_the_model_is_left_as_it_was(gpt2, untouched) -> None:
    with untouched(gpt2):
        CircuitLasso(penalty=Share(0.5), **SMALL).fit(gpt2, random_tokens(gpt2, batch=8, pos=4))


def pairs(model, n: int = 40) -> TokenizedPairs:
    tokens = random_tokens(model, batch=n, pos=4)
    answer = torch.arange(n) % 3 + 5
    return TokenizedPairs.from_tokens(tokens, answer, wrong_answer=(answer - 4) % 3 + 5)


def test_the_readout_of_pairs_is_the_logits_of_their_answers(gpt2) -> None:
    data = pairs(gpt2)
    circuit = CircuitLasso(penalty=Share(0.2), regressors="same", blocks=2, tolerance=1e-9).fit(gpt2, data)
    tokens = torch.stack(list(data.clean))
    values = {name: value[:, -1] for name, value in cached(gpt2, tokens).items()}
    x = torch.cat(list(values.values()), -1)
    y = gpt2(tokens)[:, -1, [5, 6, 7]].detach()
    alpha = circuit.settings["penalty"] / (2 * 40 * 4)
    assert_same_norms(norms_into(circuit, "logits"), slow_norms(x, y, columns(values, list(values)), alpha))
    assert circuit.settings["answers"] == [5, 6, 7]


def test_everything_earlier_explains_the_logits_of_every_position(gpt2) -> None:
    lasso = CircuitLasso(
        readout="logits",
        penalty=Share(0.01),
        shares=(0.2,),
        blocks=2,
        regressors="same",
        nodes=Components(attention="layers"),
    )
    circuit = lasso.fit(gpt2, random_tokens(gpt2, batch=60, pos=5))
    nodes = circuit.nodes.set_index("node")
    assert list(nodes.index) == ["embedding", "L0/attention", "L0/MLP", "L1/attention", "L1/MLP", "logits"]
    assert nodes.loc["logits", "r2"] > 0.8  # all but the last norm's scale is linear
    assert np.isnan(nodes.loc["embedding", "r2"])


def test_as_many_edges_as_asked_for_and_no_more(gpt2) -> None:
    circuit = CircuitLasso(penalty=MostEdges(12), **SMALL).fit(gpt2, random_tokens(gpt2, batch=30, pos=5))
    assert 8 <= len(circuit.edges) <= 12
    assert circuit.settings["chosen_by"] == {"name": "most_edges", "count": 12}
    assert circuit.edges["weight"].abs().is_monotonic_decreasing
    assert circuit.path["n_edges"].is_monotonic_increasing and circuit.path["n_edges"][0] == 0
    assert circuit.path["share"].is_monotonic_decreasing
    chosen = circuit.path[circuit.path["penalty"] == circuit.settings["penalty"]]  # found between two of the shares
    assert chosen["n_edges"].tolist() == [len(circuit.edges)] and circuit.path["n_edges"].iloc[-1] > 12
    none = CircuitLasso(penalty=Share(1.0), **SMALL).fit(gpt2, random_tokens(gpt2, batch=30, pos=5))
    assert len(none.edges) == 0 and none.notes[0].startswith("no edge is left") and circuit.notes == []


def test_held_out_error_takes_the_sparsest_within_one_standard_error(gpt2) -> None:
    shares = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)
    lasso = CircuitLasso(
        shares=shares, readout="none", nodes=Components(attention="layers"), bootstrap=4, regressors="same"
    )
    circuit = lasso.fit(gpt2, random_tokens(gpt2, batch=48, pos=5))
    path = circuit.path
    best = path["held_out_error"].idxmin()
    chosen = int((path["share"] - circuit.settings["share"]).abs().idxmin())
    limit = path["held_out_error"][best] + path["held_out_se"][best]
    assert chosen <= best and path["held_out_error"][chosen] <= limit
    assert (path["held_out_error"][:chosen] > limit).all()
    assert circuit.edges["stability"].between(0, 1).all() and circuit.edges["stability"][0] == 1
    assert path["r2"].is_monotonic_increasing


def test_neurons_are_nodes_of_their_own_with_signed_edges(gpt2) -> None:
    circuit = CircuitLasso(nodes=Components(mlp="neurons"), penalty=Share(0.3), **SMALL).fit(
        gpt2, random_tokens(gpt2, batch=30, pos=5)
    )
    nodes = circuit.nodes.set_index("node")
    assert (nodes["kind"] == "neuron").sum() == 2 * gpt2.cfg.d_mlp
    single = circuit.edges[circuit.edges["source"].str.contains("/N") & circuit.edges["target"].str.contains("/N")]
    assert (single["weight"] < 0).any() and (single["weight"] > 0).any()
    assert np.allclose(single["weight"].abs(), single["norm"])


def test_a_basis_gives_its_nodes_and_pairs_regress_site_by_site(gpt2) -> None:
    tokens = random_tokens(gpt2, batch=40, pos=5)
    settings = {**SMALL, "nodes": Neurons(), "regressors": "same", "penalty": Share(0.4)}
    joint, adjacent, every = (
        CircuitLasso(joint=j, **settings).fit(gpt2, tokens) for j in ("joint", "adjacent", "pairs")
    )
    assert len(joint.nodes) == 2 * gpt2.cfg.d_mlp
    for other in (adjacent, every):  # two sites: all three are the same regression
        pd.testing.assert_frame_equal(joint.edges, other.edges, atol=1e-4)
    with pytest.raises(SettingsError, match="gives its nodes no scores"):
        joint.to_scores()


def test_groups_come_and_go_as_wholes(gpt2) -> None:
    lasso = CircuitLasso(
        groups=True, penalty=Share(0.3), regressors="same", nodes=Components(attention="layers"), **SMALL
    )
    circuit = lasso.fit(gpt2, random_tokens(gpt2, batch=40, pos=5))
    widths = {"embedding": 16, "L0/attention": 16, "L0/MLP": 16, "L1/attention": 16, "L1/MLP": 16}
    assert 0 < len(circuit.edges) < 10
    for row in circuit.edges.itertuples():
        assert row.n_weights == widths[row.source] * widths[row.target]


def test_finished_blocks_are_taken_from_the_directory(gpt2, tmp_path: Path, monkeypatch) -> None:
    tokens = random_tokens(gpt2, batch=20, pos=4)
    lasso = CircuitLasso(penalty=Share(0.3), **SMALL)
    whole = lasso.fit(gpt2, tokens)
    first = lasso.observe(gpt2, tokens, resume=tmp_path / "kept")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["block0", "block1"]
    monkeypatch.setattr("tl_neuron_circuits.lasso._circuit_lasso.observe_block", None)  # nothing is observed again
    again = lasso.observe(gpt2, tokens, resume=tmp_path / "kept")
    assert torch.equal(first.total()[0].products, again.total()[0].products)
    pd.testing.assert_frame_equal(lasso.solve(again).edges, whole.edges)
    with pytest.raises(FileFormatError, match="another run"):
        lasso.observe(gpt2, tokens[:10], resume=tmp_path / "kept")


_KILLED = """
import os, signal, sys
from tests.families import model_cases, random_tokens
from tl_neuron_circuits.lasso import CircuitLasso, Share, _circuit_lasso
original = _circuit_lasso.write_block
def dying(path, block, parts, settings):
    original(path, block, parts, settings)
    os.kill(os.getpid(), signal.SIGKILL)
_circuit_lasso.write_block = dying
model = model_cases("gpt2")[0].build()
CircuitLasso(penalty=Share(0.3), noise=0.2, readout="none", blocks=3, skip_positions=0).observe(
    model, random_tokens(model, batch=20, pos=4), resume=sys.argv[1])
"""


def test_a_killed_process_goes_on_where_it_was_with_the_same_result(gpt2, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["block0"]
    tokens = random_tokens(gpt2, batch=20, pos=4)
    lasso = CircuitLasso(penalty=Share(0.3), noise=0.2, **{**SMALL, "blocks": 3})
    whole, resumed = lasso.observe(gpt2, tokens), lasso.observe(gpt2, tokens, resume=tmp_path)
    assert torch.equal(whole.total()[0].products, resumed.total()[0].products)
    pd.testing.assert_frame_equal(lasso.solve(whole).edges, lasso.solve(resumed).edges)


def test_noise_is_that_of_its_generator_and_later_components_see_it(gpt2) -> None:
    tokens = random_tokens(gpt2, batch=6, pos=4)
    data = TokenizedPairs.from_tokens(tokens, torch.zeros(6, dtype=torch.long))
    watch = build_observer(gpt2, data, Components(), "none", logit_difference)
    batch = next(data.batches(6))
    plain, _ = watch.values(batch)
    deviations = watch.deviations(batch)
    noisy, _ = watch.values(batch, Noise(0.5, deviations, torch.Generator().manual_seed(3)))
    drawn = torch.randn(plain[0].shape, generator=torch.Generator().manual_seed(3))
    expected = plain[0] + 0.5 * plain[0].flatten(0, 1).std(0, correction=0) * drawn
    assert torch.allclose(noisy[0], expected, atol=1e-6)
    later = (noisy[-1] - plain[-1]).flatten(0, 1).std(0) / plain[-1].flatten(0, 1).std(0)
    assert float(later.mean()) > 0.55  # its own noise, and what earlier noise did to it
    with pytest.raises(SettingsError, match="none with a basis"):
        CircuitLasso(nodes=Neurons(), noise=0.1)


def test_noise_tells_apart_what_observation_cannot() -> None:
    """A chain whose middle is a copy of its start: only noise says which of the two the next one reads."""
    precision = []
    planted = load_planted(9)
    data = planted.pairs(384, seed=1)
    for noise in (0.0, 0.3):
        lasso = CircuitLasso(
            penalty=Share(0.03), shares=(0.3,), blocks=1, noise=noise, skip_positions=0, tolerance=1e-4
        )
        edges = lasso.fit(planted.model, data, metric=planted.metric(data), batch_size=256).edges
        reach = edges[["source", "target", "reach"]].rename(columns={"reach": "score"})
        precision.append(planted.truth.average_precision(reach))
    assert precision[1] > precision[0] + 0.1


def test_what_two_processes_saw_adds_up(gpt2) -> None:
    tokens = random_tokens(gpt2, batch=24, pos=4)
    lasso = CircuitLasso(penalty=Share(0.3), **SMALL)
    parts = [lasso.observe(gpt2, part) for part in (tokens[:10], tokens[10:])]
    both, whole = (parts[0] + parts[1]).total()[0], lasso.observe(gpt2, tokens).total()[0]
    assert both.n == whole.n
    assert torch.allclose(both.products, whole.products)
    with pytest.raises(SettingsError, match="regressors"):
        parts[0] + replace(lasso, regressors="same").observe(gpt2, tokens)


def test_what_cannot_be_done_is_refused(gpt2) -> None:
    tokens = random_tokens(gpt2, batch=8, pos=4)
    for penalty in (0.0, Share(-1.0), float("inf")):
        with pytest.raises(SettingsError, match="positive, finite penalty"):
            CircuitLasso(penalty=penalty)
    with pytest.raises(SettingsError, match="held-out error"):
        CircuitLasso(penalty=HeldOut(0))
    with pytest.raises(SettingsError, match="one prompt per block.*or blocks="):
        CircuitLasso(penalty=Share(0.5)).fit(gpt2, tokens[:1])
    with pytest.raises(SettingsError, match="needs pairs"):
        CircuitLasso(readout="metric", penalty=Share(0.5)).fit(gpt2, tokens)
    with pytest.raises(SettingsError, match="one length"):
        lengths = TokenizedPairs.from_tokens([tokens[0], tokens[1, :3]], torch.zeros(2, dtype=torch.long))
        CircuitLasso(regressors="earlier", penalty=Share(0.5), **SMALL).fit(gpt2, lengths)
    with pytest.raises(SettingsError, match="skip_positions=4 leaves nothing"):
        CircuitLasso(penalty=Share(0.5), **{**SMALL, "skip_positions": 4}).fit(gpt2, tokens)
    with pytest.raises(SettingsError, match="nothing varies together"):
        CircuitLasso(penalty=Share(0.5), regressors="earlier", **SMALL).fit(gpt2, tokens[:1].expand(8, -1))


def test_activations_that_are_not_finite_are_refused() -> None:
    model = model_cases("gpt2")[0].build()
    with torch.no_grad():
        biases = [
            p
            for n, p in torch.nn.Module.named_parameters(model)
            if n.endswith(("mlp.b_out", "c_proj._original_component.bias"))
        ]
        biases[0].fill_(torch.nan)
    with pytest.raises(NumericalError, match="finite sources"):
        CircuitLasso(penalty=Share(0.5), **SMALL).fit(model, random_tokens(model, batch=8, pos=4))


def test_reach_is_the_weight_times_the_best_path_to_the_readout(gpt2) -> None:
    lasso = CircuitLasso(
        readout="logits",
        nodes=Components(attention="layers"),
        penalty=Share(0.1),
        shares=(0.3,),
        blocks=1,
        regressors="same",
    )
    edges = lasso.fit(gpt2, random_tokens(gpt2, batch=30, pos=5)).edges

    def best(node: str) -> float:  # every path, one by one
        if node == "logits":
            return 1.0
        onward = edges[edges["source"] == node]
        return max((min(1.0, abs(row.weight)) * best(row.target) for row in onward.itertuples()), default=0.0)

    for row in edges.itertuples():
        assert row.reach == pytest.approx(abs(row.weight) * best(row.target))
    assert (edges.loc[edges["target"] == "logits", "reach"] == edges.loc[edges["target"] == "logits", "weight"]).all()
    silent = CircuitLasso(penalty=Share(0.3), **SMALL).fit(gpt2, random_tokens(gpt2, batch=10, pos=5))
    assert silent.edges["reach"].isna().all()


def test_as_a_circuit_it_is_saved_and_is_a_graph(gpt2, tmp_path: Path) -> None:
    lasso = CircuitLasso(
        readout="logits",
        nodes=Components(mlp="neurons"),
        penalty=Share(0.2),
        shares=(0.4,),
        blocks=1,
        regressors="same",
    )
    found = lasso.fit(gpt2, random_tokens(gpt2, batch=20, pos=5))
    circuit = found.to_circuit()
    assert isinstance(found, Circuit) and type(circuit) is Circuit
    found.save(tmp_path / "lasso")
    loaded = LassoCircuit.load(tmp_path / "lasso")
    for name in ("nodes", "edges", "path"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(found, name))
    assert loaded.settings == found.settings and repr(loaded) == repr(found)
    found.to_html(tmp_path / "page.html")
    assert "L1/H3" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(found.plot().data) > 2
    assert len(circuit) == len(found) == 2 * gpt2.cfg.d_mlp + 8  # neurons and heads
    circuit.save(tmp_path / "circuit")
    again = Circuit.load(tmp_path / "circuit")
    assert np.allclose(again.edges["weight"], found.edges["weight"])
    assert again.graph().number_of_edges() == len(found.edges)
    assert circuit.nodes.set_index("node").loc["logits", "score"] == 1
    assert circuit.nodes["score"].between(0, 1).all()
    assert np.isnan(circuit.unexplained) and circuit.notes == [] and "explained" not in repr(circuit)
    circuit.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"\d% is explained|nan%", page)


def test_a_regression_says_what_it_predicts_of_the_readout(gpt2) -> None:
    tokens = random_tokens(gpt2, batch=20, pos=5)
    good, poor = (
        CircuitLasso(readout="logits", penalty=Share(share), regressors="same").fit(gpt2, tokens)
        for share in (0.1, 0.999)
    )
    r2 = good.nodes.set_index("node").loc["logits", "r2"]
    assert f"R2 of the readout {r2:.2f}" in repr(good) and r2 > 0.1 and good.notes == []
    assert len(poor.notes) == 1 and "Share(0.2)" in poor.notes[0] and "Share(0.2)" in poor._repr_html_()


def test_pruning_keeps_weights_and_the_way_to_the_readout(gpt2) -> None:
    lasso = CircuitLasso(readout="logits", penalty=Share(0.05), shares=(0.4,), blocks=1, regressors="same")
    whole = lasso.fit(gpt2, random_tokens(gpt2, batch=20, pos=5))
    few = whole.prune(edges=12)
    assert 0 < len(few.edges) <= 12 and isinstance(few, LassoCircuit)
    weights = whole.edges.set_index(["source", "target"])["weight"]
    assert all(row.weight == weights[row.source, row.target] for row in few.edges.itertuples())
    assert set(few.members) <= set(few.edges["source"])  # something follows from each
    assert len(whole.prune(count=3)) <= 3 and len(whole - whole.prune(count=3)) <= len(whole) - 3
    grouped = whole.group({"first": ["L0/H0", "L0/H1"]}).collapse()
    assert "first" in set(grouped.nodes["node"]) and len(grouped) == len(whole)
    with pytest.raises(SettingsError, match="nothing is conserved"):
        whole.prune(node_influence=0.8)
    with pytest.raises(SettingsError, match="join what they were fitted to"):
        whole | few
    with pytest.raises(SettingsError, match="metric_of_edges"):
        whole.to_scores()


def test_compiled_models_have_no_edges_of_unused_parts(tracr) -> None:
    model, _ = tracr
    tokens = torch.randint(1, model.cfg.d_vocab, (60, model.cfg.n_ctx), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    circuit = CircuitLasso(penalty=Share(0.05), shares=(0.3,), blocks=1).fit(model, tokens)
    silent = circuit.nodes.loc[circuit.nodes["r2"].isna() & (circuit.nodes["node"] != "embedding"), "node"]
    ends = set(circuit.edges["source"]) | set(circuit.edges["target"])
    assert not ends & set(silent)
    assert circuit.nodes.set_index("node").loc["logits", "r2"] > 0.8
