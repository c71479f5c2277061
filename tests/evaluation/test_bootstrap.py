"""Bands over lexical items: whole groups are drawn, ratios are of means, and draws are the same for every curve."""

import numpy as np
import torch

from tests.evaluation.curves import curve
from tl_neuron_circuits.evaluation._bootstrap import band, draw_weights, gap_band, ratios

GROUPS = ("dog", "dog", "cat", "cat", "cow", "cow")


def test_pairs_of_one_label_are_drawn_together() -> None:
    weights = draw_weights(GROUPS, 6, 500, seed=0)
    assert weights.shape == (500, 6)
    assert (weights[:, ::2] == weights[:, 1::2]).all()
    assert (weights[:, ::2].sum(1) == 3).all()
    assert abs(weights.mean() - 1) < 0.05 and (weights == 0).any() and (weights == 3).any()


def test_without_labels_each_pair_is_drawn_alone() -> None:
    weights = draw_weights(None, 6, 500, seed=0)
    assert (weights.sum(1) == 6).all() and (weights[:, 0] != weights[:, 1]).any()


def test_draws_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    assert np.array_equal(draw_weights(GROUPS, 6, 50, 3), draw_weights(GROUPS, 6, 50, 3))
    assert not np.array_equal(draw_weights(GROUPS, 6, 50, 3), draw_weights(GROUPS, 6, 50, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_ratios_are_those_of_means_over_the_drawn_pairs() -> None:
    values = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    made = curve([1, 5, 9], values, groups=GROUPS)
    made.full[:] = torch.tensor([3.0, 2.0, 5.0, 4.0, 3.0, 2.5])
    weights = draw_weights(GROUPS, 6, 20, seed=1)
    faithfulness, completeness = ratios(made, weights)
    for draw in range(20):
        rows = [row for row in range(6) for _ in range(int(weights[draw, row]))]
        low, high = made.empty[rows].mean(), made.full[rows].mean()
        for size in range(3):
            kept, removed = made.kept[size, rows].mean(), made.removed[size, rows].mean()
            np.testing.assert_allclose(faithfulness[draw, size], float((kept - low) / (high - low)), rtol=1e-5)
            np.testing.assert_allclose(completeness[draw, size], float((removed - low) / (high - low)), rtol=1e-5)


def test_a_draw_that_cannot_be_normalized_is_left_out_silently() -> None:
    made = curve([1], [0.5], n_pairs=6, groups=GROUPS)
    made.full[:4] = 1.0  # cats and dogs alone: full = empty
    weights = draw_weights(GROUPS, 6, 300, seed=0)
    faithfulness, _ = ratios(made, weights)
    undefined = weights[:, 4] == 0
    assert undefined.any() and np.isnan(faithfulness[undefined]).all() and np.isfinite(faithfulness[~undefined]).all()
    low, high = band(faithfulness)
    assert np.isfinite(low).all() and np.isfinite(high).all()


def test_the_band_of_the_gap_is_that_of_the_drawn_pairs() -> None:
    made = curve([1], [0.5], n_pairs=6, groups=GROUPS)
    made.full[:] = torch.tensor([3.0, 2.0, 5.0, -4.0, 3.0, 2.5])
    weights = draw_weights(GROUPS, 6, 50, seed=1)
    rows = [[row for row in range(6) for _ in range(int(times[row]))] for times in weights]
    gaps = [float((made.full[drawn] - made.empty[drawn]).mean()) for drawn in rows]
    np.testing.assert_allclose(gap_band(made, weights), np.percentile(gaps, [2.5, 97.5]), rtol=1e-6)


def test_the_band_covers_the_truth_about_as_often_as_it_says() -> None:
    """40 items of mean faithfulness .5: 95% bands hold it in most of 200 repetitions."""
    hits = 0
    for seed in range(200):
        values = 0.5 + 0.3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
        low, high = band(ratios(curve([1], values), draw_weights(None, 40, 300, seed))[0])
        hits += bool(low[0] <= 0.5 <= high[0])
    assert 0.88 <= hits / 200 <= 0.99
