"""The study: numbers are those of the package, advice follows from the table, and stability is checked on the truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tl_neuron_circuits as tnc
from tests.study.cases import TASKS
from tests.study.cells import Cell
from tests.study.known_stability import chain_pairs, compiled_row, planted_rows
from tests.study.page import page
from tests.study.summary import compactness_of_pairs, summarize


def as_cell(curve: tnc.SparsityCurve) -> dict[str, Any]:
    rows = {name: getattr(curve, name).tolist() for name in ("kept", "removed", "full", "empty")}
    return {"sizes": list(curve.sizes), "total": curve.total, **rows}


def test_the_endpoint_is_the_curves_compactness_pair_by_pair() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("nounpp", n=16)
    curve = tnc.evaluate(model, pairs, tnc.attribute(model, pairs), sizes=[3, 40, 900], ablation="corrupt")
    assert compactness_of_pairs(as_cell(curve)).mean() == pytest.approx(curve.compactness)


def write_cells(folder: Path, smallest: dict[tuple[str, str], int]) -> None:
    """Cells in which each method's circuits answer right from some size on."""
    sizes = [1, 10, 100, 1000]
    for (method, ranking), first in smallest.items():
        for task in TASKS:
            right = [[1.0 if size >= first + (pair == 0) else -1.0 for pair in range(12)] for size in sizes]
            found = {
                "sizes": sizes, "total": 10_000, "kept": right, "removed": (-np.array(right)).tolist(),
                "full": [2.0] * 12,
                "empty": [-1.0] * 12, "words": [[str(pair // 2)] for pair in range(12)], "seconds_judging": 1.0,
                "cost": {"RelP": 3.0, "AtP": 3.0}.get(method, 12.0),
            }  # fmt: skip
            path = folder / Cell("smollm2", task, method, "corrupt", ranking, "corrupt").path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))


def test_the_advice_changes_with_the_table(tmp_path: Path) -> None:
    def advice(name: str, **smallest: int) -> tuple[list[list[str]], str]:
        methods = {
            "relp": ("RelP", "abs"),
            "sign": ("RelP", "signed"),
            "atp": ("AtP", "abs"),
            "ig": ("IG over inputs", "abs"),
        }
        write_cells(tmp_path / name, {methods[key]: size for key, size in smallest.items()})
        machine = dict.fromkeys(("cpu", "torch", "transformer-lens", "date"), "x")
        found = json.loads(json.dumps({"machine": machine} | summarize(tmp_path / name)))
        return [step["method"] for step in found["recommended"]], page(found)

    same, text = advice("same", relp=100, sign=100, atp=100, ig=100)
    assert same == [] and "stays the default: nothing at its price is better" in text
    signed, text = advice("sign", relp=100, sign=10, atp=100, ig=10)
    assert signed == [["RelP", "signed"]] and "rank its scores by sign" in text  # the dear one is no better than that
    dear, text = advice("dear", relp=100, sign=100, atp=1000, ig=10)
    assert dear == [["IG over inputs", "abs"]] and "Where 4 times the price does not matter" in text
    cheap, text = advice("cheap", relp=100, sign=100, atp=10, ig=1)
    assert cheap == [["AtP", "abs"], ["IG over inputs", "abs"]] and "AtP ranked by absolute score is better" in text


def test_null_pairs_of_a_chain_keep_its_answer_and_pairs_change_nothing_else() -> None:
    from tests.planted.load import load_planted

    planted = load_planted(3)
    pairs, null = chain_pairs(planted, 2)
    place = planted.case.chains[2].position
    for clean, corrupt, other in zip(pairs.clean, pairs.corrupt or (), null.corrupt or (), strict=True):
        assert [i for i in range(6) if clean[i] != corrupt[i]] == [place] and clean[place] == other[place]
    right = tnc.tasks.logit_difference(planted.model(next(pairs.batches(64)).clean), next(pairs.batches(64)))
    assert float((right > 0).float().mean()) > 0.95


def test_true_nodes_of_a_planted_chain_are_selected_and_false_discoveries_are_told() -> None:
    (row,) = planted_rows(3, chains=[2])
    assert row["true_share_of_draws"] > 0.95 and row["core_true"] == row["core"] >= 5
    for null in ("signs", "pairs"):
        strict, loose = (row["rates"][null][rate] for rate in ("0.05", "0.2"))
        assert 20 < strict["named"] <= loose["named"]
        assert loose["outside"] > 0.05 > loose["outside_mass"]  # outside the chain, with little of the scores
        assert strict["without_effect"]["0.0"] == loose["without_effect"]["0.0"] == 0


def test_neurons_of_a_compiled_program_without_effect_are_never_selected() -> None:
    from tests.study.cases import SHARED

    if not SHARED.is_dir():
        pytest.skip("../shared/models is not there")
    row = compiled_row("reverse")
    assert row is not None and row["true_share_of_draws"] == 1 and row["mean_false"] == 0
    for null in ("signs", "pairs"):
        assert row["rates"][null]["0.05"]["without_effect"]["0.0"] == 0
