"""Edges between components: what is exact is exact on both model classes, and gradients are its derivative."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models, model_cases, random_tokens, typical_models
from tests.loops import for_each
from tests.propagation.readings import settled
from tl_neuron_circuits._errors import PairsError, SettingsError, UnsupportedModelError
from tl_neuron_circuits.components import (
    ACDC,
    EAP,
    EAPIGInputs,
    EdgeScores,
    Random,
    RelP,
    component_edges,
    component_graph,
    metric_of_edges,
)
from tl_neuron_circuits.components._eap import read_gradients
from tl_neuron_circuits.components._streams import paired_streams, run_with_edges
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.tasks import TokenizedPairs, logit_difference

POST_NORM = ("gemma2", "gemma3")


def some_pairs(model: Any, n: int = 4, pos: int = 5, seed: int = 0) -> TokenizedPairs:
    tokens = random_tokens(model, batch=2 * n, pos=pos, seed=seed)
    answers = torch.arange(2 * n) + 3
    return TokenizedPairs.from_tokens(tokens[:n], answers[:n], tokens[n:], answers[n:])


def attention_of(case: ModelCase) -> str:
    return "layers" if case.family in POST_NORM else "heads"


def masks(model: Any, attention: str) -> tuple[Tensor, Tensor]:
    edges = component_graph(model, attention).edges
    return edges, torch.zeros_like(edges)


@for_each("case", typical_models())
def test_all_edges_are_the_model_and_none_are_the_corrupt_run(case: ModelCase) -> None:
    model, attention = case.build(), attention_of(case)
    pairs = some_pairs(model)
    found = metric_of_edges(model, pairs, torch.stack(masks(model, attention)), attention=attention, batch_size=4)
    batch = next(pairs.batches(4))
    with torch.no_grad():
        clean = logit_difference(model(batch.clean), batch)
        corrupt = logit_difference(model(batch.corrupt), batch.on_corrupt())
    tolerance = 1e-9 if case.backend == "HookedTransformer" else 1e-4  # Hugging Face computes parts in float32
    assert torch.allclose(found[0], clean.double(), atol=tolerance)
    assert torch.allclose(found[1], corrupt.double(), atol=tolerance)
    assert not torch.allclose(clean, corrupt, atol=0.01)


def by_split_inputs(model: Any, pairs: TokenizedPairs, source: str, target: str) -> float:
    """m(clean) - m(with one edge patched) on HookedTransformer's own split inputs: another way to the same number."""
    batch = next(pairs.batches(len(pairs)))
    _, clean = model.run_with_cache(batch.clean)
    _, corrupt = model.run_with_cache(batch.corrupt)

    def written(cache: Any) -> Tensor:
        if source == "embedding":
            return cache["blocks.0.hook_resid_pre"]
        layer = int(source[1])
        if source.endswith("MLP"):
            return cache[f"blocks.{layer}.hook_mlp_out"]
        head = int(source[-1])
        return cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ model.W_O[layer, head]

    change = (written(corrupt) - written(clean)).detach()

    def all_of_it(value: Tensor, hook: Any) -> Tensor:
        return value + change

    def one_head(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, int(target[-1])] += change
        return value

    if target == "logits":
        hooks = [(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", all_of_it)]
    elif target.endswith("MLP"):
        hooks = [(f"blocks.{target[1]}.hook_mlp_in", all_of_it)]
    else:
        hooks = [(f"blocks.{target[1]}.hook_{kind}_input", one_head) for kind in "qkv"]
    with torch.no_grad():
        before = logit_difference(model(batch.clean), batch)
        after = logit_difference(model.run_with_hooks(batch.clean, fwd_hooks=hooks), batch)
    return float((before - after).mean())


EDGES = [
    ("embedding", "L0/H1"),
    ("embedding", "logits"),
    ("L0/H1", "L0/MLP"),
    ("L0/H3", "L1/H2"),
    ("L0/MLP", "L1/H0"),
    ("L0/H0", "L1/MLP"),
    ("L1/H2", "L1/MLP"),
    ("L1/H2", "logits"),
    ("L1/MLP", "logits"),
]


@pytest.mark.parametrize("case", [c for c in all_models("gpt2", "solu", "no_norm") if "Hooked" in c.id])
def test_patching_equals_patching_of_split_inputs(case: ModelCase) -> None:
    model = case.build()
    pairs = some_pairs(model)
    scores = component_edges(model, pairs, method="patching").to_dataframe().set_index(["source", "target"])["score"]
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    for source, target in EDGES:
        assert scores[source, target] == pytest.approx(by_split_inputs(model, pairs, source, target), abs=1e-9)


@pytest.mark.parametrize("case", typical_models("gpt2", "llama", "pythia", "gemma2"))
def test_eap_is_the_derivative_of_patching(case: ModelCase) -> None:
    model, attention = case.build(), attention_of(case)
    pairs = some_pairs(model, n=2)
    batch = next(pairs.batches(2))
    graph = component_graph(model, attention)
    clean, corrupt = paired_streams(model, graph, batch)
    share = 1e-4 if case.tolerance < 1e-6 else 2e-3
    near = replace(corrupt, writes=torch.lerp(clean.writes, corrupt.writes, share))
    scores = component_edges(model, pairs, method="eap", attention=attention).scores
    edges = graph.edges.nonzero()[::7]
    kept = torch.ones(len(edges), len(graph), len(graph), dtype=torch.bool)
    kept[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = False
    with torch.no_grad():
        start = logit_difference(model(batch.clean), batch)
    for mask, (source, target) in zip(kept, edges.tolist(), strict=True):
        logits = run_with_edges(model, graph, batch, mask[None], clean, near)[0]
        slope = float((start - logit_difference(logits, batch)).mean()) / share
        assert slope == pytest.approx(float(scores[source, target]), rel=0.03, abs=5e-3)


@pytest.mark.parametrize("case", all_models("no_norm"))
def test_edges_into_a_linear_readout_sum_to_the_effect(case: ModelCase) -> None:
    model = case.build()
    pairs = some_pairs(model)
    whole = float(
        (metric_of_edges(model, pairs, torch.stack(masks(model, "heads"))) * torch.tensor([[1.0], [-1]])).sum(0).mean()
    )
    for method in ("eap", "eap_ig_inputs", "relp", "patching"):
        scores = component_edges(model, pairs, method=method).scores
        assert float(scores[:-1, -1].sum()) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("case", all_models("llama"))
def test_relp_without_rules_and_ig_of_one_step_are_eap(case: ModelCase) -> None:
    model = case.build()
    pairs = some_pairs(model)
    eap = component_edges(model, pairs, method="eap").scores
    ig = component_edges(model, pairs, method="eap_ig_inputs(steps=1, start=clean)").scores
    plain = component_edges(model, pairs, method=RelP(rules=())).scores
    ruled = component_edges(model, pairs, method="relp").scores
    assert torch.equal(eap.nan_to_num(), ig.nan_to_num()) and torch.equal(eap.nan_to_num(), plain.nan_to_num())
    assert not torch.allclose(eap.nan_to_num(), ruled.nan_to_num(), atol=1e-3)


def test_eap_under_relps_rules_is_relp() -> None:
    model = model_cases("gpt2")[0].build()
    pairs = some_pairs(model)
    for rules in ("relp", ("ln", "half")):
        ruled, relp_scores = (component_edges(model, pairs, method=m(rules=rules)).scores for m in (EAP, RelP))
        assert torch.equal(ruled.nan_to_num(), relp_scores.nan_to_num())


@for_each("method", [EAP(("ln", "half")), EAPIGInputs(3, "relp"), ACDC(0.5, "metric"), Random(2)])
def test_a_method_is_its_label(method: Any) -> None:
    model = model_cases("gpt2")[0].build()
    pairs = some_pairs(model, n=1)
    by_object, by_label = (component_edges(model, pairs, method=m) for m in (method, method.label))
    assert torch.equal(by_object.scores.nan_to_num(), by_label.scores.nan_to_num())
    assert by_label.settings["method"] == method.label and by_label.settings["method_options"] == method.to_json()


@for_each(
    ("method", "message"),
    [
        ("eap_ig", "expected a method out of"),
        ("eap(steps=2)", "expected options of eap"),
        ("eap_ig_inputs(steps=0)", "at least 1"),
        ("eap_ig_inputs(start=middle)", "start='corrupt' or 'clean'"),
    ],
)
def test_what_a_method_does_not_have_is_refused(method: Any, message: str) -> None:
    model = model_cases("gpt2")[0].build()
    with pytest.raises(SettingsError, match=message):
        component_edges(model, some_pairs(model, n=1), method=method)


@pytest.mark.parametrize("case", all_models("gpt2"))
@pytest.mark.parametrize("start", ["corrupt", "clean"])
def test_ig_is_the_mean_of_gradients_along_the_path(case: ModelCase, start: str) -> None:
    model = case.build()
    pairs = some_pairs(model)
    batch, graph = next(pairs.batches(4)), component_graph(model)
    with torch.no_grad():
        ends = [model.run_with_cache(tokens)[1]["hook_embed"] for tokens in (batch.clean, batch.corrupt)]
        ends = ends if start == "clean" else ends[::-1]
    total = 0
    for k in range(3):
        point = ends[0] + k / 3 * (ends[1] - ends[0])
        with relp(model, ()):
            hook = ("hook_embed", lambda value, hook, point=point: point.clone().requires_grad_(True))
            total = total + read_gradients(model, graph, batch, logit_difference, [hook])[0] / 3
    clean, corrupt = paired_streams(model, graph, batch)
    change = clean.writes - corrupt.writes
    expected = torch.einsum("sbtd,rbtd->sr", change, total.to(change)) / 4
    found = component_edges(model, pairs, method=f"eap_ig_inputs(steps=3, start={start})").scores
    assert torch.allclose(found[:-1][graph.edges[:-1]], expected[graph.edges[:-1]], atol=1e-9)


@pytest.mark.parametrize("method", ["eap", "eap_ig_inputs", "relp", "patching"])
def test_the_scores_of_a_batch_are_the_mean_of_its_members(method: str, untouched) -> None:
    model = settled(model_cases("gpt2")[0].build())
    pairs = some_pairs(model)
    with untouched(model):
        together = component_edges(model, pairs, method=method, batch_size=4).scores
    apart = component_edges(model, pairs, method=method, batch_size=1).scores
    assert torch.allclose(together, apart, atol=1e-10, equal_nan=True)


def test_acdc_keeps_what_moves_the_output_by_more_than_its_threshold() -> None:
    model = model_cases("gpt2")[0].build()
    pairs = some_pairs(model)
    graph = component_graph(model)
    kept = {}
    for threshold in (-1e9, 0.01, 0.1, 1e9):
        found = component_edges(model, pairs, method=ACDC(threshold))
        assert found.kept is not None
        kept[threshold] = int(found.kept.sum())
        assert torch.equal(found.kept[graph.edges], (found.scores >= threshold)[graph.edges])
    assert kept[-1e9] == int(graph.edges.sum()) > kept[0.01] > kept[0.1] > kept[1e9] == 0


def test_acdcs_first_cut_is_exact_patching() -> None:
    model = model_cases("gpt2")[0].build()
    pairs = some_pairs(model, n=1)
    graph = component_graph(model)
    acdc = component_edges(model, pairs, method=ACDC(-1e9, "metric")).scores
    exact = component_edges(model, pairs, method="patching").scores
    assert torch.allclose(acdc[graph.edges].double(), exact[graph.edges].abs(), atol=1e-5)


def test_the_order_of_components_and_the_edges_that_it_allows() -> None:
    graph = component_graph(model_cases("gpt2")[0].build())
    heads = [[f"L{layer}/H{head}" for head in range(4)] for layer in range(2)]
    assert graph.names == ["embedding", *heads[0], "L0/MLP", *heads[1], "L1/MLP", "logits"]
    edges = {(graph.names[i], graph.names[j]) for i, j in graph.edges.nonzero().tolist()}
    assert ("L0/H1", "L0/MLP") in edges and ("embedding", "logits") in edges
    assert ("L0/H1", "L0/H2") not in edges and ("L0/MLP", "L0/H0") not in edges
    parallel = component_graph(model_cases("gptj")[0].build())
    edges = {(parallel.names[i], parallel.names[j]) for i, j in parallel.edges.nonzero().tolist()}
    assert ("L0/H1", "L0/MLP") not in edges and ("L0/MLP", "L1/H0") in edges


def test_scores_are_saved_named_and_ranked(tmp_path: Path) -> None:
    model = model_cases("gpt2")[0].build()
    found = component_edges(model, some_pairs(model), method=ACDC(0.01))
    table = found.to_dataframe()
    assert list(table.columns) == ["source", "target", "score", "kept"] and len(table) == len(found)
    assert table["score"].abs().is_monotonic_decreasing and not table["score"].isna().any()
    found.save(tmp_path / "edges")
    again = EdgeScores.load(tmp_path / "edges")
    assert again.to_dataframe().equals(table) and again.settings["method_options"]["name"] == "acdc"


def test_random_scores_follow_their_seed() -> None:
    model = model_cases("gpt2")[0].build()
    one, two, other = (component_edges(model, some_pairs(model), method=Random(s)).scores for s in (0, 0, 1))
    assert torch.equal(one.nan_to_num(), two.nan_to_num()) and not torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("case", all_models("gemma2"))
def test_heads_behind_a_norm_are_refused(case: ModelCase) -> None:
    model = case.build()
    with pytest.raises(UnsupportedModelError, match="attention='layers'"):
        component_edges(model, some_pairs(model), method="eap")


def test_pairs_without_aligned_corrupt_prompts_are_refused() -> None:
    model = model_cases("gpt2")[0].build()
    tokens = random_tokens(model, batch=2)
    with pytest.raises(PairsError, match="have none"):
        component_edges(model, TokenizedPairs.from_tokens(tokens, torch.tensor([1, 2])))
    short = [row[:3] for row in tokens]
    with pytest.raises(PairsError, match="equal token length"):
        component_edges(model, TokenizedPairs.from_tokens(tokens, torch.tensor([1, 2]), short, torch.tensor([3, 4])))
