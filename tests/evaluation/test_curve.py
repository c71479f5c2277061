"""`SparsityCurve`: areas by hand, files, tables."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.attribution.plain import random_pairs
from tests.families import ModelCase, all_models
from tests.propagation.readings import model_of
from tl_neuron_circuits._errors import FileFormatError
from tl_neuron_circuits.attribution import attribute
from tl_neuron_circuits.evaluation import MIB_FRACTIONS, SparsityCurve, evaluate

models = pytest.mark.parametrize("case", all_models("gpt2"))


def curve_of(faithfulness: list[float], sizes: list[int], n_nodes: int) -> SparsityCurve:
    """A curve whose normalised numbers are the ones given: F(0) = 2 and F(M) = 6 on average."""
    full, empty = torch.tensor([5.0, 7.0]), torch.tensor([1.0, 3.0])
    kept = torch.tensor([[2 + 4 * f - 1, 2 + 4 * f + 1] for f in faithfulness])
    return SparsityCurve(tuple(sizes), kept, 8 - kept, full, empty, torch.zeros(len(sizes)), n_nodes, {})


def test_a_constant_one_has_cmd_0_and_cpr_0_999() -> None:
    """Also where the sizes are few, since faithfulness is read at MIB's fractions."""
    curve = curve_of([1.0, 1.0, 1.0], [1, 100, 1000], 1000)
    assert curve.cmd == pytest.approx(0, abs=1e-6)
    assert curve.cpr == pytest.approx(0.999, abs=1e-6)
    assert curve.faithfulness.tolist() == [1, 1, 1] and curve.completeness.tolist() == [0, 0, 0]


def test_a_straight_line_has_the_area_of_a_triangle() -> None:
    """The integral of x and of 1 - x from 0.001 to 1; beyond one, CMD counts the distance and CPR the surplus."""
    sizes = [1, 10, 500, 2000]
    line = curve_of([size / 2000 for size in sizes], sizes, 2000)
    assert line.cpr == pytest.approx((1 - 1e-6) / 2, abs=1e-5)
    assert line.cmd == pytest.approx(0.999**2 / 2, abs=1e-5)
    above = curve_of([1.5, 1.5, 1.5, 1.0], [1, 2, 1999, 2000], 2000)
    grid = [1.5] * 9 + [1.0]
    expected = sum(
        (b - a) * (f + g) / 2 for a, b, f, g in zip(MIB_FRACTIONS, MIB_FRACTIONS[1:], grid, grid[1:], strict=False)
    )
    assert above.cpr == pytest.approx(expected, abs=1e-3) and above.cmd == pytest.approx(expected - 0.999, abs=1e-3)


def test_normalisation_is_of_means_not_a_mean_of_ratios() -> None:
    curve = curve_of([0.25], [3], 10)
    assert curve.metric_full == 6 and curve.metric_empty == 2
    assert curve.to_dataframe().to_dict("records") == [
        {"size": 3, "fraction": 0.3, "faithfulness": 0.25, "completeness": 0.75}
    ]


@models
def test_what_is_saved_is_loaded(case: ModelCase, tmp_path: Path) -> None:
    model, pairs = model_of(case), random_pairs(4, 4)
    curve = evaluate(model, pairs, attribute(model, pairs), sizes=[3, 30])
    curve.save(tmp_path / "curve")
    loaded = SparsityCurve.load(tmp_path / "curve")
    assert loaded.sizes == curve.sizes and loaded.n_nodes == curve.n_nodes and loaded.groups == curve.groups
    for name in ("kept", "removed", "full", "empty", "predicted"):
        assert torch.equal(getattr(loaded, name), getattr(curve, name))
    assert np.array_equal(loaded.faithfulness, curve.faithfulness) and loaded.settings["ablation"] == "mean"
    assert "\n" not in repr(loaded) and "<table" in loaded._repr_html_()
    (tmp_path / "curve" / "curve.safetensors").write_bytes(b"short")
    with pytest.raises(FileFormatError, match="truncated or foreign"):
        SparsityCurve.load(tmp_path / "curve")
    (tmp_path / "curve" / "curve.json").write_text("[]")
    with pytest.raises(FileFormatError, match="something else"):
        SparsityCurve.load(tmp_path / "curve")
