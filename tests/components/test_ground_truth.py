"""Measures against known circuits, and what compiled models say about their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.benchmarks.ground_truth import PAGE, RESULTS, marked, written
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.components import (
    GroundTruth,
    component_edges,
    judge_edges,
)
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.tasks._tokenized import Batch

POSSIBLE = frozenset((f"n{i}", f"n{j}") for i in range(8) for j in range(i + 1, 8))


def random_case(seed: int, signal: float = 1.0) -> tuple[GroundTruth, dict]:
    rng = np.random.default_rng(seed)
    order = sorted(POSSIBLE)
    true = rng.random(len(order)) < 0.3
    scores = np.round(rng.normal(size=len(order)) + signal * true, 1)  # rounded: ties
    truth = GroundTruth(f"case{seed}", frozenset(e for e, t in zip(order, true, strict=True) if t), POSSIBLE)
    return truth, dict(zip(order, scores, strict=True))


def columns(truth: GroundTruth, scores: dict) -> tuple[list[bool], list[float]]:
    return [e in truth.edges for e in sorted(POSSIBLE)], [abs(scores.get(e, 0.0)) for e in sorted(POSSIBLE)]


@pytest.mark.parametrize("seed", range(3))
def test_areas_equal_scikit_learns(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, scores = random_case(seed)
    assert truth.auroc(scores) == pytest.approx(metrics.roc_auc_score(*columns(truth, scores)))
    expected = metrics.average_precision_score(*columns(truth, scores))
    assert truth.average_precision(scores) == pytest.approx(expected)


def test_edges_without_a_score_count_zero_and_signs_do_not_matter() -> None:
    truth, scores = random_case(0)
    some = {edge: -value for edge, value in scores.items() if abs(value) > 0.5}
    filled = {edge: some.get(edge, 0.0) for edge in POSSIBLE}
    assert truth.auroc(some) == truth.auroc(filled)
    frame = pd.DataFrame([(*edge, value) for edge, value in some.items()], columns=["source", "target", "weight"])
    assert truth.auroc(frame) == truth.auroc(some)


def test_the_distance_counts_both_kinds_of_errors() -> None:
    truth, _ = random_case(0)
    assert truth.shd(truth.edges) == 0
    assert truth.shd([]) == truth.empty_shd == len(truth.edges)
    assert truth.shd(POSSIBLE) == len(POSSIBLE) - len(truth.edges)
    one_wrong = set(truth.edges) ^ {sorted(POSSIBLE)[0], sorted(POSSIBLE)[-1]}
    assert truth.shd(frozenset(one_wrong)) == 2


def test_precision_and_recall_at_every_threshold() -> None:
    truth = GroundTruth("t", frozenset({("n0", "n1"), ("n1", "n2")}), POSSIBLE)
    table = truth.precision_recall({("n0", "n1"): 3.0, ("n0", "n2"): -2.0, ("n1", "n2"): 1.0})
    assert table["threshold"].tolist() == [3.0, 2.0, 1.0, 0.0]
    assert table["precision"].tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 28])
    assert table["recall"].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert table["shd"].tolist() == [1, 2, 1, 26]


def test_the_threshold_comes_from_the_other_cases() -> None:
    cases = [random_case(seed, signal=2.0) for seed in range(5)]
    table = judge_edges(cases).set_index("case")
    truth, scores = cases[0]
    changed = GroundTruth("case0", POSSIBLE - truth.edges, POSSIBLE)  # its own truth must not move its threshold
    again = judge_edges([(changed, scores), *cases[1:]]).set_index("case")
    assert table.loc["case0", "threshold"] == again.loc["case0", "threshold"]
    assert (table["shd"] >= table["shd_best"]).all() and (table["shd_best"] <= table["shd_empty"]).all()
    for truth, scores in cases:
        row = table.loc[truth.name]
        limit = row["threshold"] * max(abs(v) for v in scores.values())
        kept = frozenset(edge for edge, value in scores.items() if abs(value) > limit)
        assert truth.shd(kept) == row["shd"] and len(kept) == row["n_edges"]


def test_perfect_scores_are_judged_perfect_and_their_scale_does_not_matter() -> None:
    truths = [random_case(seed)[0] for seed in range(3)]
    table = judge_edges([(t, {e: 10.0**k for e in t.edges}) for k, t in enumerate(truths)])
    assert (table["auroc"] == 1).all() and (table["shd"] == 0).all() and (table["average_precision"] == 1).all()


def test_scores_of_other_components_are_refused() -> None:
    truth, scores = random_case(0)
    with pytest.raises(SettingsError, match="Score the same components"):
        truth.auroc({("n1", "n0"): 1.0})
    with pytest.raises(SettingsError, match="have none"):
        truth.auroc({("n0", "n1"): float("nan")})
    with pytest.raises(SettingsError, match="source, target and score"):
        truth.auroc(pd.DataFrame({"a": [1]}))
    with pytest.raises(SettingsError, match="at least two"):
        judge_edges([(truth, scores)])
    with pytest.raises(SettingsError, match="among the possible ones"):
        GroundTruth("t", frozenset({("a", "b")}), POSSIBLE)


def compiled_pairs(model: Any, n: int = 12) -> TokenizedPairs:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.cfg.d_vocab, (2 * n, model.cfg.n_ctx), generator=generator)
    tokens[:, 0] = 0
    return TokenizedPairs.from_tokens(tokens[:n], torch.zeros(n, dtype=torch.long), tokens[n:])


def every_output(logits: Tensor, batch: Batch) -> Tensor:
    """A number that depends on all outputs, each with a weight of its own."""
    weights = torch.linspace(0.5, 2, logits.shape[1] * logits.shape[2]).reshape(logits.shape[1:])
    return (logits.square() * weights).sum((1, 2))


def test_patching_finds_no_effect_where_a_compiled_model_has_no_edge(tracr: tuple[Any, Path]) -> None:
    model, path = tracr
    truth = GroundTruth.from_tracr(path)
    scores = component_edges(model, compiled_pairs(model), method="patching", metric=every_output).to_dataframe()
    effect = {(row.source, row.target): abs(row.score) for row in scores.itertuples()}
    assert set(effect) == truth.possible
    largest = max(effect.values())
    assert max(effect[edge] for edge in truth.possible - truth.edges) < 1e-4 * largest
    assert sum(effect[edge] > 1e-4 * largest for edge in truth.edges) >= 0.7 * len(truth.edges)


def test_neurons_of_a_compiled_model(shared_models: Path) -> None:
    truth = GroundTruth.from_tracr(shared_models / "tracr_hist", granularity="neurons")
    assert ("embedding", "L0/N0") in truth.edges and ("L0/N1", "logits") in truth.edges
    assert ("L0/H0", "L0/N1") in truth.edges and ("L0/H0", "L0/N0") not in truth.edges
    assert not any("L0/N11" in edge for edge in truth.edges)  # reads a constant alone
    whole = GroundTruth.from_tracr(shared_models / "tracr_hist")
    assert ("L0/H0", "L0/MLP") in whole.edges and ("L0/H0", "logits") not in whole.edges


def test_the_tables_in_the_results_are_made_from_the_measurements() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert marked(page, written(results)) == page
    assert results["settings"]["cases"] == {"compiled": 10, "planted": 12} and results["settings"]["draws"] == 3


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not readable JSON"):
        GroundTruth.from_tracr(tmp_path)
    (tmp_path / "ground_truth.json").write_text(json.dumps([1]))
    with pytest.raises(FileFormatError, match="Expected `object`"):
        GroundTruth.from_tracr(tmp_path)


def test_edges_of_interpbench_are_read_from_their_nodes_texts() -> None:
    edges = [
        ("hook_embed", "blocks.0.attn.hook_q[1]"),
        ("blocks.0.attn.hook_q[1]", "blocks.0.attn.hook_result[1]"),
        ("blocks.0.attn.hook_result[1]", "blocks.0.hook_mlp_in"),
        ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"),
        ("blocks.0.mlp.hook_post", "blocks.1.hook_v_input[0]"),
        ("blocks.1.attn.hook_result[0]", "blocks.1.hook_resid_post"),
    ]
    truth = GroundTruth.from_interpbench("3", edges, n_layers=2, n_heads=4)
    assert truth.edges == {
        ("embedding", "L0/H1"),
        ("L0/H1", "L0/MLP"),
        ("L0/MLP", "L1/H0"),
        ("L1/H0", "logits"),
    }
    assert len(truth.possible) == 4 + 4 + 1 + 1 + 1 + 4 * (1 + 1 + 4 + 1) + 1 * (4 + 1 + 1) + 4 * (1 + 1) + 1
    with pytest.raises(SettingsError, match="expected a node such as"):
        GroundTruth.from_interpbench("3", [("x", "hook_embed")], 2, 4)
    with pytest.raises(SettingsError, match="points back"):
        GroundTruth.from_interpbench("3", [edges[5][::-1]], 2, 4)
