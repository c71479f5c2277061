"""Statistics of batches are the statistics of the whole, and say so where they cannot be taken."""

import pytest
import torch

from tests.lasso.problems import regression, standardized_columns
from tl_neuron_circuits._errors import NumericalError, SettingsError
from tl_neuron_circuits.lasso._statistics import Accumulator, Statistics, combine, standardize

FIELDS = ("mean", "products", "target_mean", "target_products", "target_squares")


def assert_same(a: Statistics, b: Statistics, tolerance: float = 1e-11) -> None:
    assert a.n == b.n
    assert a.square == b.square
    for name in FIELDS:
        one, other = getattr(a, name), getattr(b, name)
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max())), name


@pytest.mark.parametrize("with_targets", [True, False], ids=["targets", "square"])
def test_batches_add_up_to_the_whole(with_targets: bool) -> None:
    x, y = regression(200, 7, 3)
    y = y if with_targets else None
    accumulator = Accumulator()
    parts = []
    for rows in torch.arange(200).split(37):
        batch = (x[rows], None if y is None else y[rows])
        accumulator.add(*batch)
        parts.append(Statistics.from_rows(*batch))
    whole = Statistics.from_rows(x, y)
    assert_same(accumulator.total(), whole)
    assert_same(combine(parts, [1] * len(parts)), whole)
    assert accumulator.n == 200


def test_products_by_strips_are_the_whole_product() -> None:
    x, _ = regression(30, 600, 1)
    centered = x - x.mean(0)
    products = Statistics.from_rows(x).products
    assert torch.allclose(products, centered.T @ centered, atol=1e-9)
    assert torch.equal(products, products.T)


def test_a_part_counted_twice_is_its_observations_twice() -> None:
    x, y = regression(90, 5, 2)
    parts = [Statistics.from_rows(x[rows], y[rows]) for rows in (slice(0, 30), slice(30, 60), slice(60, 90))]
    rows = torch.tensor([*range(30), *range(30), *range(60, 90)])
    assert_same(combine(parts, [2, 0, 1]), Statistics.from_rows(x[rows], y[rows]))


def test_large_means_cost_no_digits() -> None:
    x, _ = regression(300, 4, 1)
    shifted = Accumulator()
    for batch in (x + 1e6).split(50):
        shifted.add(batch)
    assert torch.allclose(shifted.total().products, Statistics.from_rows(x).products, rtol=1e-8)


def test_float32_activations_are_summed_in_float64() -> None:
    x = torch.ones(100, 1)
    x[::2] = 1 + 2**-20
    accumulator = Accumulator()
    for batch in x.repeat(50, 1).split(64):
        accumulator.add(batch)
    assert float(accumulator.total().products) == pytest.approx(5000 * 2.0**-42, rel=1e-6)


def test_standardizing_gives_correlations() -> None:
    x, y = regression(150, 6, 2)
    problem = standardize(Statistics.from_rows(x, y))
    zx, zy = standardized_columns(x), standardized_columns(y)
    assert torch.allclose(problem.gram, zx.T @ zx / 150)
    assert torch.allclose(problem.cross, zx.T @ zy / 150)
    assert torch.allclose(problem.squares, torch.ones(2, dtype=torch.float64))


def test_constant_columns_are_zero_and_named() -> None:
    x, y = regression(50, 4, 2)
    x[:, 2] = 7.0
    y[:, 0] = 0.0
    problem = standardize(Statistics.from_rows(x, y))
    assert problem.constant.tolist() == [False, False, True, False]
    assert problem.target_constant.tolist() == [True, False]
    assert not problem.gram[2].any() and not problem.cross[2].any() and not problem.cross[:, 0].any()
    assert torch.isfinite(problem.gram).all()


def test_float32_noise_on_a_constant_is_not_a_signal() -> None:
    x = torch.full((64, 2), 3.0)
    x[:, 0] += torch.linspace(0, 2e-6, 64)
    x[:, 1] = torch.linspace(0, 1, 64)
    assert standardize(Statistics.from_rows(x)).constant.tolist() == [True, False]


def test_small_variances_are_divided_by_the_floor() -> None:
    x, _ = regression(80, 3, 1)
    x = standardized_columns(x)
    x[:, 1] *= 1e-6
    problem = standardize(Statistics.from_rows(x), floor=1e-4)
    assert float(problem.scale[1]) == pytest.approx(1e-4)
    assert float(problem.gram[1, 1]) == pytest.approx(1e-4, rel=1e-6)  # (1e-6 / 1e-4)^2


@pytest.mark.parametrize("square", [True, False], ids=["square", "targets"])
def test_statistics_come_back_from_their_tensors(square: bool) -> None:
    x, y = regression(40, 5, 2)
    statistics = Statistics.from_rows(x, None if square else y)
    assert_same(Statistics.from_tensors(statistics.n, statistics.tensors()), statistics, tolerance=0)


def test_what_is_not_finite_is_refused_with_its_columns() -> None:
    x, y = regression(20, 5, 2)
    x[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"1 of 5 columns, first \[4\]"):
        Statistics.from_rows(x, y)
    y[0, 1] = torch.inf
    with pytest.raises(NumericalError, match="finite targets"):
        Statistics.from_rows(x[4:], y[[0, *range(5, 20)]])


def test_nothing_one_observation_and_other_columns_are_refused() -> None:
    x, y = regression(20, 5, 2)
    with pytest.raises(SettingsError, match="empty batch"):
        Statistics.from_rows(x[:0])
    with pytest.raises(SettingsError, match="got none"):
        Accumulator().total()
    with pytest.raises(SettingsError, match="at least 2 observations"):
        standardize(Statistics.from_rows(x[:1]))
    with pytest.raises(SettingsError, match="same columns"):
        combine([Statistics.from_rows(x, y), Statistics.from_rows(x[:, 1:], y)], [1, 1])
