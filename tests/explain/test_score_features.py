"""Hypothesis scores: the AUROC itself, and that what was chosen is judged on other prompts."""

import pandas as pd
import pytest
import torch

from tl_neuron_circuits._auroc import auroc
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.explain import score_features
from tl_neuron_circuits.explain._prompt_scores import PromptScores


def made(values: torch.Tensor, keys: list[str] | None = None) -> PromptScores:
    n = values.shape[1]
    nodes = pd.DataFrame({"label": [f"L0/N{i}" for i in range(n)], "hook": "h", "unit": range(n), "position": -1})
    names = tuple(keys or [str(row) for row in range(len(values))])
    return PromptScores(values.float(), nodes.assign(polarity=0), names, None, "logit_difference")


def test_auroc_counts_pairs_and_ties_as_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (23, 6), generator=generator).float()  # many ties
    members = torch.stack([torch.rand(23, generator=generator) < p for p in (0.2, 0.5)], dim=1)
    found = auroc(scores, members)
    for label in range(2):
        inside, outside = scores[members[:, label]], scores[~members[:, label]]
        wins = (inside[:, None] > outside[None]).double() + 0.5 * (inside[:, None] == outside[None]).double()
        torch.testing.assert_close(found[label], wins.mean((0, 1)))
    metrics = pytest.importorskip("sklearn.metrics")
    assert float(found[0, 0]) == pytest.approx(metrics.roc_auc_score(members[:, 0].numpy(), scores[:, 0].numpy()))
    assert auroc(torch.zeros(4, 1), torch.tensor([[1], [1], [0], [0]]).bool()).item() == 0.5
    assert auroc(torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool)).isnan().all()


def test_a_planted_feature_is_found_and_holds_on_other_prompts() -> None:
    labels = ["a", "b", "c"] * 12
    values = torch.randn(36, 50, generator=torch.Generator().manual_seed(1))
    values[:, 7] += torch.tensor([10.0 * (label == "b") for label in labels])
    values[:, 9] -= torch.tensor([10.0 * (label == "c") for label in labels])
    found = score_features(made(values), labels, high=0.95, low=0.05)
    best = found.selected.set_index(["label", "value"])
    assert best.loc[("L0/N7", "b"), "auroc_heldout"] == 1.0 and best.loc[("L0/N9", "c"), "auroc_heldout"] == 0.0
    assert "L0/N7" in found.groups()["label=b"]
    assert len(found.to_dataframe()) == 150 and "<table" in found._repr_html_()


def test_noise_that_was_chosen_does_not_hold_on_other_prompts() -> None:
    labels = [0, 1] * 20
    values = torch.randn(40, 3000, generator=torch.Generator().manual_seed(2))
    chosen = score_features(made(values), labels).selected
    high = chosen[(chosen["value"] == 1) & (chosen["auroc_selection"] >= 0.8)]
    assert len(high) > 10 and high["auroc_selection"].mean() > 0.8
    assert abs(high["auroc_heldout"].mean() - 0.5) < 0.1


def test_equal_prompts_stand_on_one_side() -> None:
    """A column that is 1 on a few prompts' copies: were copies on both sides, the held-out part would know it."""
    keys = [str(row // 4) for row in range(40)]  # ten prompts, four times each
    labels = [int(key) % 2 for key in keys]
    values = torch.zeros(40, 10)
    for row, key in enumerate(keys):
        values[row, int(key)] = 1.0  # one column for each prompt
    table = score_features(made(values, keys), labels).table
    seen = (table["auroc_selection"] != 0.5) & (table["auroc_heldout"] != 0.5)
    assert not seen.any() and (table["auroc_selection"] != 0.5).any()


def test_tables_of_circuits_with_absent_nodes_as_zero() -> None:
    tables, labels = [], []
    for row in range(12):
        rows = {
            "node": ["L0/N1@3", "L0/N1@4", "logit"],
            "kind": ["neuron", "neuron", "logit"],
            "score": [1.0, 2.0, 9.0],
        }
        table = pd.DataFrame(rows)
        tables.append(table if row % 2 else table[table["kind"] == "logit"])
        labels.append(bool(row % 2))
    found = score_features(tables, {"odd": labels, "even": [not label for label in labels]}).table
    assert set(found["label"]) == {"L0/N1"}
    row = found[(found["hypothesis"] == "odd") & (found["value"] == True)].iloc[0]  # noqa: E712
    assert row["auroc_heldout"] == 1.0 and row["mean_inside"] == 3.0 and row["selected"]


def test_the_split_depends_on_the_seed_alone() -> None:
    values, labels = torch.randn(30, 5, generator=torch.Generator().manual_seed(3)), [0, 1, 2] * 10
    first, same, other = (score_features(made(values), labels, seed=seed).table for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, same)
    assert not first["auroc_heldout"].equals(other["auroc_heldout"])


def test_errors() -> None:
    scores = made(torch.randn(6, 2, generator=torch.Generator().manual_seed(4)))
    with pytest.raises(SettingsError, match="have none of their own"):
        score_features(scores)
    with pytest.raises(SettingsError, match="expected 6 labels"):
        score_features(scores, [0, 1])
    with pytest.raises(SettingsError, match="two different labels"):
        score_features(scores, [1] * 6)
    with pytest.raises(SettingsError, match="two different prompts of every label"):
        score_features(scores, [0, 0, 0, 0, 0, 1])
    with pytest.raises(SettingsError, match="equal labels"):
        score_features(made(torch.zeros(4, 1), ["a", "a", "b", "c"]), [0, 1, 0, 1])
    with pytest.raises(SettingsError, match="low < high"):
        score_features(scores, [0, 1] * 3, high=0.1)
    with pytest.raises(SettingsError, match="columns label"):
        score_features([pd.DataFrame({"x": [1]})] * 4, [0, 1, 0, 1])
