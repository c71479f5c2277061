"""Sizes, areas, CPR and CMD of curves whose numbers are known."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.curves import comparison, curve
from tests.loops import for_each
from tests.saved_files import edit
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.evaluation import EdgeCurve, SparsityCurve
from tl_neuron_circuits.evaluation._curve import area
from tl_neuron_circuits.tasks import PromptPairs


def test_faithfulness_and_completeness_are_the_definitions_ratios() -> None:
    one = curve([1, 10], [0.25, 0.5])
    assert one.metric_full == 3 and one.metric_empty == 1
    np.testing.assert_allclose(one.faithfulness, [0.25, 0.5])
    np.testing.assert_allclose(one.completeness, [0.75, 0.5])
    table = one.to_dataframe()
    assert list(table["fraction"]) == [0.01, 0.1] and list(table["size"]) == [1, 10]


def test_a_gap_that_the_pairs_do_not_settle_is_said_and_none_that_they_do() -> None:
    """Faithfulness divides by F(M) - F(0): where draws of pairs give it either sign, its bands have no bounds."""
    sure = curve([1, 10], [0.25, 0.5])
    assert sure.notes == [] and "notes" not in repr(sure)
    unsure = dataclasses.replace(sure, full=torch.tensor([3.0, -0.9, 2.0, 0.4]))
    (note,) = unsure.notes
    assert note.startswith("F(M) - F(0) is 0.125 [-1.") and "bands without bounds" in note
    assert "pairs.where_model_is_right(model)" in note and hasattr(PromptPairs, "where_model_is_right")
    assert "see its notes" in repr(unsure) and note.split(":")[0] in unsure._repr_html_()
    worse = dataclasses.replace(sure, full=torch.full((4,), -1.0))
    assert worse.notes[0].startswith("F(M) - F(0) is -2 [-2, -2]: without its nodes the model does better")
    two = comparison(
        {("t", "neurons", method): unsure for method in ("relp", "gradient")} | {("t", "sae", "relp"): sure}
    )
    assert two.notes == [f"neurons: {note}"] and note.split(":")[0] in two._repr_html_()
    tasks = comparison({(task, "neurons", "relp"): one for task, one in (("a", sure), ("b", unsure))})
    assert tasks.notes == [f"b, neurons: {note}"]


@for_each(
    ("faithfulness", "expected"),
    [
        ([0.2, 0.6, 1.0], 10**1.5),  # .8 half-way between 10 and 100
        ([0.2, 0.9, 1.1], 10 ** (0.6 / 0.7)),
        ([0.2, 1.4, 1.0], 10**1.5),  # overshoot is no success: 1.2 half-way
        ([0.9, 1.0, 1.0], 1),
        ([1.0, 1.0, 1.4], math.inf),
    ],
)
def test_the_size_from_which_faithfulness_stays_near_1(faithfulness: list[float], expected: float) -> None:
    assert curve([1, 10, 100], faithfulness).size_within() == pytest.approx(expected)


def test_areas_of_error_and_overshoot_are_over_log_size() -> None:
    one = curve([1, 10, 100], [0.0, 1.5, 1.0])  # |1 - f| = 1, .5, 0;  above 1: 0, .5, 0;  f - 1: -1, .5, 0
    assert one.error_area() == pytest.approx((0.75 + 0.25) / 2)
    assert one.overshoot_area() == pytest.approx((0.25 + 0.25) / 2)
    assert one.overshoot_area(signed=True) == pytest.approx((-0.25 + 0.25) / 2)
    assert one.error_area(10) == pytest.approx(0.75)
    assert curve([1], [3.0], n_nodes=1).error_area() == pytest.approx(1)  # overshoot costs no more than nothing does


def test_a_contrast_is_paired_over_clusters() -> None:
    """What the pairs of a cluster have in common cancels; what differs between clusters is the interval."""
    shift = torch.tensor([0.0, 0.0, 0.4, 0.4])
    groups = ("a", "a", "b", "b")
    sizes, low = [1, 10, 100], torch.tensor([[0.1], [0.2], [0.3]])
    one = curve(sizes, low + shift, groups=groups)
    other = curve(sizes, low + shift + torch.tensor([0.1, 0.1, 0.3, 0.3]), groups=groups)
    found = other.contrast(one, draws=200)
    assert found["difference"] == pytest.approx(-0.2) and found["clusters"] == 2
    assert (found["low"], found["high"]) == pytest.approx((-0.3, -0.1))
    assert set(np.round(found.attrs["draws"], 6)) == {-0.3, -0.2, -0.1}
    assert one.contrast(other, measure="log_area", draws=2)["difference"] == pytest.approx(-0.2)
    same = other.contrast(one, draws=200, among=["a", "b", "c"]).attrs["draws"]
    again = curve(sizes, low + shift[:2], groups=("c", "a"))
    assert (
        np.isnan(again.contrast(again, draws=200, among=["a", "b", "c"]).attrs["draws"]).sum() > 0 and len(same) == 200
    )
    with pytest.raises(SettingsError, match=r"\['b'\] are not"):
        other.contrast(one, among=["a"])
    with pytest.raises(SettingsError, match="one cluster per pair, 4 in all; got 1"):
        other.contrast(one, clusters=["a"])
    with pytest.raises(SettingsError, match="pairs_hash"):
        other.contrast(curve(sizes, [0, 0, 0], pairs_hash="x"))


def test_means_are_taken_before_the_ratio() -> None:
    """A pair that the ablation hardly changes does not blow up the number."""
    kept, full, empty = torch.tensor([[2.0, 1.1]]), torch.tensor([3.0, 1.2]), torch.tensor([1.0, 1.0])
    made = SparsityCurve((1,), kept, kept, full, empty, torch.zeros(1), 5, {})
    np.testing.assert_allclose(made.faithfulness, [(1.55 - 1) / (2.1 - 1)], rtol=1e-6)


@for_each(
    ("faithfulness", "level", "expected"),
    [
        ([0.2, 0.6, 1.0], 0.8, 10**1.5),  # half-way between 10 and 100, on the log axis
        ([0.2, 0.6, 1.0], 0.6, 10),
        ([0.2, 0.6, 1.0], 0.1, 1),
        ([0.9, 0.4, 0.9], 0.8, 10**1.8),  # it does not stay above before
        ([0.9, 0.9, 0.7], 0.8, np.inf),
        ([0.2, np.nan, 1.0], 0.8, 100),
    ],
)
def test_size_at_is_where_faithfulness_starts_to_stay_above(
    faithfulness: list[float], level: float, expected: float
) -> None:
    assert curve([1, 10, 100], faithfulness).size_at(level) == pytest.approx(expected, rel=1e-5)


def test_log_area_is_the_mean_over_the_log_axis_of_absolute_counts() -> None:
    assert curve([1, 10, 100], [1.0, 1.0, 1.0]).log_area() == pytest.approx(1)
    assert curve([1, 10, 100], [0.0, 0.5, 1.0]).log_area() == pytest.approx(0.5)
    assert curve([10], [1.0]).log_area() == pytest.approx(0.75)  # from 0 at one node, to 1 at all
    rises = curve([1, 10, 100], [0.0, 0.5, 1.0])
    assert rises.log_area(10_000) == pytest.approx(0.75)  # beyond all nodes it stays 1
    assert rises.log_area(10) == pytest.approx(0.25)
    assert curve([1, 10], [0.0, 0.5]).log_area(10_000) == pytest.approx(0.75)  # all nodes, unmeasured, give 1
    assert curve([1, 10], [0.5, 0.5], error_nodes="ablate").log_area(10_000) == pytest.approx(0.5)


def test_cpr_and_cmd_of_curves_that_are_known() -> None:
    """MIB's grid runs from .001 to 1: constant 1 has .999; what needs everything .25 and .75, as MIB's random has."""
    sizes = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    perfect = curve(sizes, [1.0] * 10, 1000)
    assert perfect.cpr == pytest.approx(0.999) and perfect.cmd == pytest.approx(0)
    shares = [size / 1000 for size in sizes]
    linear = curve(sizes, shares, 1000)  # a random ranking where the metric is linear in the nodes
    assert linear.cpr == pytest.approx(0.5, abs=1e-3) and linear.cmd == pytest.approx(0.5, abs=1e-3)
    needs_all = curve(sizes, [share**8 for share in shares], 1000)  # a random ranking where nodes depend on each other
    assert needs_all.cpr == pytest.approx(0.25, abs=3e-3) and needs_all.cmd == pytest.approx(0.75, abs=3e-3)
    above = curve(sizes, [1.5] * 9 + [1.0], 1000)
    assert above.cmd == pytest.approx(0.374, abs=1e-3) and above.cpr > 1
    ablated = curve([500, 1000], [0.5, 0.5], 1000, error_nodes="ablate")
    assert ablated.cmd == pytest.approx(0.624, abs=1e-3)  # 1 to .5 until the middle, .5 from there
    assert curve([0, 1000], [0.0, 1.0], 1000).cpr == pytest.approx(0.5, abs=1e-3)


def test_area_is_the_trapezoids() -> None:
    assert area(np.array([0.0, 1.0, 1.0]), [0.0, 1.0, 3.0]) == 2.5


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    first = curve([1, 10], [0.25, 0.5], groups=("a", "a", "b", "b"))
    first.save(tmp_path / "curve")
    again = SparsityCurve.load(tmp_path / "curve")
    assert again.sizes == first.sizes and again.groups == first.groups and again.settings == first.settings
    assert all(
        torch.equal(getattr(again, n), getattr(first, n)) for n in ("kept", "removed", "full", "empty", "predicted")
    )
    assert repr(again) == repr(first) and "<table" in again._repr_html_()
    for name in ("kept", "full", "predicted"):  # one row, pair or size short
        first.save(tmp_path / "curve")
        edit(tmp_path / "curve" / "curve.safetensors", lambda _, found, n=name: found.update({n: found[n][:-1]}))
        with pytest.raises(FileFormatError, match="has the shape"):
            SparsityCurve.load(tmp_path / "curve")
    with pytest.raises(FileFormatError, match=r"edge_curve\.safetensors is missing\. A saved curve is there"):
        EdgeCurve.load(tmp_path / "curve")


def test_compactness_counts_pairs_and_leaves_overshoot_to_its_own_number() -> None:
    # Faithfulness of five pairs at 1, 10 and 100 nodes: the fifth pair is wrong in the model itself and counts nowhere.
    wanted = torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0], [1.0, 9.0, 1.0, 0.4, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    made = curve([1, 10, 100], wanted)
    full = torch.tensor([3.0, 3.0, 3.0, 3.0, -1.0])
    swapped = dataclasses.replace(
        made, kept=-3 + 6 * wanted, removed=3 - 6 * wanted, full=full, empty=torch.full((5,), -3.0)
    )
    assert swapped.accuracy.tolist() == swapped.flips.tolist() == [0.0, 0.75, 1.0]
    assert swapped.compactness == pytest.approx((0.375 + 0.875) / 2)  # trapezoids over log 1, log 10, log 100
    assert swapped.overshoot == pytest.approx(float(swapped.faithfulness.max()) - 1) and swapped.overshoot > 0.5
    assert "faithfulness up to" in repr(swapped) and curve([1, 100], [0.0, 1.0]).overshoot == 0
    summary = comparison({("t", "neurons", "relp"): swapped}).summary()
    assert summary["compactness"][0] == swapped.compactness and summary["overshoot"][0] == swapped.overshoot
    untied = dataclasses.replace(swapped, settings=dict(swapped.settings) | {"metric": "answer_log_probability"})
    assert math.isnan(untied.compactness) and math.isnan(untied.accuracy[0])
    unmeasured = dataclasses.replace(swapped, removed=torch.full_like(swapped.removed, torch.nan))
    assert math.isnan(unmeasured.compactness) and unmeasured.accuracy.tolist() == [0.0, 0.75, 1.0]


def test_the_normalizations_of_mib_differ_where_sizes_do_not_reach_all_nodes() -> None:
    made = curve([0, 10, 20], [0.0, 1.0, 1.0], 1000)
    assert (made.cpr, made.cmd) == made.mib("percentages") != made.mib("counts")
    assert made.mib("counts") == (pytest.approx(0.75), pytest.approx(0.25))
